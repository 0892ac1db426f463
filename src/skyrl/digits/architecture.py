"""The embedded policy's architecture: an Idefics3 model of about a million parameters, its tokenizer and processor.

Idefics3 because transformers and vLLM both define it and neither needs torchvision for it. A 32×32 scene
becomes 16 patches of 8×8, and pixel shuffle joins 2×2 of them: one picture is four placeholder tokens, one per digit.
"""

from __future__ import annotations

from typing import Any

from skyrl.digits.scenes import FORM, SCENE_PIXELS, DigitScenes
from skyrl.digits.settings import MAX_POSITIONS
from skyrl.policy.encode import TAGS

PATCH = 8
SCALE = 2
IMAGE_TOKENS = (SCENE_PIXELS // PATCH // SCALE) ** 2

SPECIAL = ["<pad>", "<end_of_utterance>", "<fake_token_around_image>", "<image>", "<global-img>"]

CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{% if message['role'] == 'assistant' %}<end_of_utterance>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def build_tokenizer() -> Any:
    """A byte-level BPE tokenizer that knows the scenes' words and splits every number into single digits."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    # A word or sign takes the blank behind it, so that a digit is always one and the same token.
    split = pre_tokenizers.Split(Regex(r"[A-Za-z]+ ?|[0-9]|[^A-Za-z0-9\s]+ ?|\s"), "isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    scenes = DigitScenes("train", 400, 0.15, seed=0)
    pairs = [scenes.with_reasoning(row) for row in range(len(scenes))]
    corpus = [p.question for p, _ in pairs] + [FORM, *(text for _, text in pairs)]
    for tag in TAGS:  # tags become tokens of their own below
        corpus = [text.replace(tag, "") for text in corpus]
    trainer = trainers.BpeTrainer(
        vocab_size=1024, min_frequency=20, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    core.train_from_iterator(corpus, trainer)
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    ordinary = ["<user>", "<assistant>", *TAGS]  # special tags would be stripped when decoded, and no answer be right
    core.add_tokens([AddedToken(token, special=False, normalized=False) for token in ordinary])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<end_of_utterance>",
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def build_processor() -> Any:
    """Tokenizer, picture processor (PIL, no torchvision) and chat template in one."""
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
    from transformers.models.idefics3.processing_idefics3 import Idefics3Processor

    size = {"longest_edge": SCENE_PIXELS}
    pictures = Idefics3ImageProcessorPil(do_image_splitting=False, size=size, max_image_size=size)
    return Idefics3Processor(pictures, build_tokenizer(), image_seq_len=IMAGE_TOKENS, chat_template=CHAT_TEMPLATE)


def build_config(tokenizer: Any) -> Any:
    """Configuration of the embedded policy for this tokenizer."""
    from transformers import Idefics3Config, Idefics3VisionConfig, LlamaConfig

    pad, end, image = tokenizer.convert_tokens_to_ids(["<pad>", "<end_of_utterance>", "<image>"])
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=MAX_POSITIONS,
        pad_token_id=pad,
        bos_token_id=None,
        eos_token_id=end,
        tie_word_embeddings=True,
    )
    vision = Idefics3VisionConfig(
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=SCENE_PIXELS,
        patch_size=PATCH,
    )
    config = Idefics3Config(
        text_config=text.to_dict(),
        vision_config=vision.to_dict(),
        scale_factor=SCALE,
        image_token_id=image,
        pad_token_id=pad,
        tie_word_embeddings=True,
    )
    config.eos_token_id = end
    config.architectures = ["Idefics3ForConditionalGeneration"]
    return config
