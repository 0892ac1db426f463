"""What the small checkpoints of :mod:`zoo` are made of: a tokenizer, a chat template, and how they are written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from skyrl.policy.encode import TAGS
from skyrl.policy.torchvision_stand_in import stand_in_for_torchvision

stand_in_for_torchvision()  # before transformers is imported

HIDDEN, HEADS, LAYERS, WIDTH = 64, 2, 2, 128
"""Head size 32: vLLM's attention on a CPU has no kernel for 16."""
SIDE, PATCH = 32, 8
POSITIONS = 256
WORDS = "What is the sum of the digits? <user> <assistant> Reason, then answer: 0 1 2 3 4 5 6 7 8 9. It is wrong right"

TEXT = dict(
    hidden_size=HIDDEN,
    intermediate_size=WIDTH,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    num_key_value_heads=1,
    head_dim=HIDDEN // HEADS,
    max_position_embeddings=POSITIONS,
)
VISION = dict(
    hidden_size=HIDDEN, intermediate_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
    image_size=SIDE, patch_size=PATCH,
)  # fmt: skip


def tokenizer(*special: str, **roles: str) -> Any:
    """A byte-level tokenizer; ``special`` tokens beside padding and the end, ``roles`` as attributes of it."""
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        [WORDS] * 20, trainers.BpeTrainer(vocab_size=320, show_progress=False, initial_alphabet=alphabet)
    )
    core.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in ("<pad>", "<end>", *special)]
    )
    core.add_tokens([AddedToken(token, special=False, normalized=False) for token in TAGS])
    # As Gemma's tokenizers have them, which vLLM looks for.
    core.add_tokens([AddedToken("\n" * count, special=False, normalized=False) for count in (1, 2, 3, 4)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<end>",
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
        extra_special_tokens=roles,
    )


def template(picture: str) -> str:
    """A chat template that writes ``picture`` for each picture."""
    return (
        "{% for message in messages %}<{{ message['role'] }}>"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}" + picture + "{% else %}{{ part['text'] }}{% endif %}"
        "{% endfor %}{% endif %}{% if message['role'] == 'assistant' %}<end>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )


@dataclass(frozen=True)
class Architecture:
    """One row of the table."""

    name: str
    make: Callable[[], tuple[Any, Any, Any]]
    """Model class, configuration, processor."""
    pictures: bool = True

    def build(self, folder: Path, seed: int = 0, scale: float = 3.0) -> Path:
        """Write the checkpoint; matrices are ``scale`` times as large as freshly drawn, so that differences show."""
        torch.manual_seed(seed)
        kind, config, processor = self.make()
        model = kind(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0.0, 0.02 * scale)
                elif not parameter.any():
                    parameter.normal_(0.0, 0.02)  # biases of zero would hide one that is lost
        _name_as_published(model)
        model.generation_config.eos_token_id = processor_tokenizer(processor).eos_token_id
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        return folder


def _name_as_published(model: Any) -> None:
    """Let the model be saved under the names of published checkpoints: transformers leaves out prefixes of a vision
    tower where it did not load the model."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange

    conversions = get_model_conversion_mapping(model, add_legacy=False)
    model._weight_conversions = [c for c in conversions if not isinstance(c, PrefixChange) or c.scope_prefix] or None


def processor_tokenizer(processor: Any) -> Any:
    return getattr(processor, "tokenizer", processor)


def ids_of(tok: Any) -> dict[str, Any]:
    return dict(
        vocab_size=len(tok), pad_token_id=tok.pad_token_id, bos_token_id=None, eos_token_id=tok.eos_token_id,
    )  # fmt: skip
