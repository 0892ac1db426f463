"""Small checkpoints with random weights of many architectures, as ``save_pretrained`` writes them. To make one:

``python tests/models/zoo.py "Qwen2.5-VL" FOLDER``
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from making import HEADS, HIDDEN, PATCH, SIDE, TEXT, VISION, WIDTH, Architecture, ids_of, template, tokenizer


def _text(kind: str, config: str, **more: Any) -> Architecture:
    def make() -> tuple[Any, Any, Any]:
        import transformers

        tok = tokenizer()
        tok.chat_template = template("")
        cfg = getattr(transformers, config)(**TEXT, **ids_of(tok), tie_word_embeddings=False, **more)
        return getattr(transformers, kind), cfg, tok

    return Architecture(kind, make, pictures=False)


def _qwen_vl(family: str, processor: str, vision: dict[str, Any]) -> Architecture:
    def make() -> tuple[Any, Any, Any]:
        import transformers
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        roles = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>",
                 "vision_bos_token": "<|vision_start|>", "vision_eos_token": "<|vision_end|>"}  # fmt: skip
        tok = tokenizer(*roles.values())
        start, end, image, video = tok.convert_tokens_to_ids(
            ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
        )
        sections: dict[str, Any] = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0}
        if "3" in family:
            sections["mrope_interleaved"] = True  # as published; vLLM believes it, transformers always does so
        text = TEXT | ids_of(tok) | {"rope_parameters": sections, "tie_word_embeddings": False}
        config_class = getattr(transformers, f"{family}Config")
        cfg = config_class(
            text_config=text, vision_config=vision, image_token_id=image, video_token_id=video,
            vision_start_token_id=start, vision_end_token_id=end, tie_word_embeddings=False,
        )  # fmt: skip
        size = {"shortest_edge": SIDE * SIDE, "longest_edge": SIDE * SIDE * 4}
        pictures = Qwen2VLImageProcessorPil(patch_size=PATCH, merge_size=2, temporal_patch_size=2, size=size)
        videos = getattr(transformers, "Qwen3VLVideoProcessor" if "3" in family else "Qwen2VLVideoProcessor")
        made = getattr(transformers, processor)(
            pictures, tok, videos(patch_size=PATCH, merge_size=2, temporal_patch_size=2),
            chat_template=template("<|vision_start|><|image_pad|><|vision_end|>"),
        )  # fmt: skip
        return getattr(transformers, f"{family}ForConditionalGeneration"), cfg, made

    return Architecture(f"{family}ForConditionalGeneration", make)


QWEN2_VISION = dict(
    depth=2, embed_dim=HIDDEN, hidden_size=HIDDEN, num_heads=HEADS, mlp_ratio=2, patch_size=PATCH,
    spatial_merge_size=2, temporal_patch_size=2, in_channels=3,
)  # fmt: skip
QWEN25_VISION = dict(
    depth=2, hidden_size=HIDDEN, out_hidden_size=HIDDEN, num_heads=HEADS, intermediate_size=WIDTH, patch_size=PATCH,
    spatial_merge_size=2, temporal_patch_size=2, in_channels=3, window_size=32, fullatt_block_indexes=[1],
)  # fmt: skip
QWEN3_VISION = dict(
    depth=2, hidden_size=HIDDEN, out_hidden_size=HIDDEN, num_heads=HEADS, intermediate_size=WIDTH, patch_size=PATCH,
    spatial_merge_size=2, temporal_patch_size=2, in_channels=3, num_position_embeddings=64,
    deepstack_visual_indexes=[0],
)  # fmt: skip


def _llava() -> tuple[Any, Any, Any]:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tok = tokenizer("<image>")
    cfg = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION, projection_dim=HIDDEN),
        text_config=LlamaConfig(**TEXT, **ids_of(tok)),
        image_token_id=tok.convert_tokens_to_ids("<image>"),
        image_seq_length=(SIDE // PATCH) ** 2,
        vision_feature_layer=-1,
    )
    pictures = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    made = LlavaProcessor(
        pictures, tok, patch_size=PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=template("<image>"),
    )  # fmt: skip
    return LlavaForConditionalGeneration, cfg, made


def _llava_onevision() -> tuple[Any, Any, Any]:
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
        Qwen2Config,
        SiglipVisionConfig,
    )
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

    tok = tokenizer("<image>", "<video>")
    image, video = tok.convert_tokens_to_ids(["<image>", "<video>"])
    grid = [[SIDE, SIDE], [SIDE, 2 * SIDE], [2 * SIDE, SIDE]]
    cfg = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=Qwen2Config(**TEXT, **ids_of(tok)),
        image_token_id=image,
        video_token_id=video,
        image_grid_pinpoints=grid,
        vision_feature_layer=-1,
    )
    size = {"height": SIDE, "width": SIDE}
    pictures = LlavaOnevisionImageProcessorPil(size=size, image_grid_pinpoints=grid)
    made = LlavaOnevisionProcessor(
        pictures, tok, LlavaOnevisionVideoProcessor(size=size), num_image_tokens=(SIDE // PATCH) ** 2,
        vision_feature_select_strategy="full", chat_template=template("<image>"),
    )  # fmt: skip
    return LlavaOnevisionForConditionalGeneration, cfg, made


def _paligemma() -> tuple[Any, Any, Any]:
    from transformers import (
        GemmaConfig,
        PaliGemmaConfig,
        PaliGemmaForConditionalGeneration,
        PaliGemmaProcessor,
        SiglipVisionConfig,
    )
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    tok = tokenizer("<image>", "<bos>", image_token="<image>")
    tok.bos_token = "<bos>"
    pictures = SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE}, image_seq_length=(SIDE // PATCH) ** 2)
    made = PaliGemmaProcessor(pictures, tok, chat_template=template("<image>"))
    cfg = PaliGemmaConfig(
        vision_config=SiglipVisionConfig(**VISION, vision_use_head=False, projection_dim=HIDDEN).to_dict(),
        text_config=GemmaConfig(**TEXT, **ids_of(tok)).to_dict(),
        image_token_index=tok.convert_tokens_to_ids("<image>"),
        projection_dim=HIDDEN,
    )
    return PaliGemmaForConditionalGeneration, cfg, made


def _gemma3() -> tuple[Any, Any, Any]:
    from transformers import (
        Gemma3Config,
        Gemma3ForConditionalGeneration,
        Gemma3Processor,
        Gemma3TextConfig,
        SiglipVisionConfig,
    )
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    roles = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    tok = tokenizer(*roles.values(), **roles)
    start, end, image = tok.convert_tokens_to_ids(list(roles.values()))
    count = (SIDE // PATCH // 2) ** 2
    cfg = Gemma3Config(
        vision_config=SiglipVisionConfig(**VISION, vision_use_head=False).to_dict(),
        text_config=Gemma3TextConfig(**TEXT, **ids_of(tok), sliding_window=64, query_pre_attn_scalar=32).to_dict(),
        mm_tokens_per_image=count,
        boi_token_index=start,
        eoi_token_index=end,
        image_token_index=image,
    )
    pictures = Gemma3ImageProcessorPil(size={"height": SIDE, "width": SIDE}, do_pan_and_scan=False)
    made = Gemma3Processor(pictures, tok, image_seq_length=count, chat_template=template("<start_of_image>"))
    return Gemma3ForConditionalGeneration, cfg, made


def _idefics(family: str) -> Architecture:
    def make() -> tuple[Any, Any, Any]:
        import transformers
        from transformers import LlamaConfig
        from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
        from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

        tok = tokenizer("<fake_token_around_image>", "<image>", "<global-img>", "<end_of_utterance>", "<video>")
        cfg = getattr(transformers, f"{family}Config")(
            vision_config=getattr(transformers, f"{family}VisionConfig")(**VISION).to_dict(),
            text_config=LlamaConfig(**TEXT, **ids_of(tok)).to_dict(),
            scale_factor=2,
            image_token_id=tok.convert_tokens_to_ids("<image>"),
            pad_token_id=tok.pad_token_id,
            tie_word_embeddings=False,
        )
        size = {"longest_edge": SIDE}
        count = (SIDE // PATCH // 2) ** 2
        chat = template("<image>")
        if family == "SmolVLM":
            pictures: Any = SmolVLMImageProcessorPil(do_image_splitting=False, size=size, max_image_size=size)
            videos = transformers.SmolVLMVideoProcessor(size=size, max_image_size=size)
            made: Any = transformers.SmolVLMProcessor(pictures, tok, videos, image_seq_len=count, chat_template=chat)
        else:
            pictures = Idefics3ImageProcessorPil(do_image_splitting=False, size=size, max_image_size=size)
            made = transformers.Idefics3Processor(pictures, tok, image_seq_len=count, chat_template=chat)
        return getattr(transformers, f"{family}ForConditionalGeneration"), cfg, made

    return Architecture(f"{family}ForConditionalGeneration", make)


def _internvl() -> tuple[Any, Any, Any]:
    from transformers import (
        InternVLConfig,
        InternVLForConditionalGeneration,
        InternVLProcessor,
        InternVLVideoProcessor,
        InternVLVisionConfig,
        Qwen2Config,
    )
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    roles = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
             "video_token": "<video>"}  # fmt: skip
    tok = tokenizer(*roles.values(), **roles)
    size = {"height": SIDE, "width": SIDE}
    vision = VISION | {"image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH]}
    cfg = InternVLConfig(
        vision_config=InternVLVisionConfig(**vision).to_dict(),
        text_config=Qwen2Config(**TEXT, **ids_of(tok)).to_dict(),
        image_token_id=tok.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=(SIDE // PATCH // 2) ** 2,
        downsample_ratio=0.5,
    )
    made = InternVLProcessor(
        GotOcr2ImageProcessorPil(size=size, crop_to_patches=False), tok, InternVLVideoProcessor(size=size),
        image_seq_length=(SIDE // PATCH // 2) ** 2, chat_template=template("<IMG_CONTEXT>"),
    )  # fmt: skip
    return InternVLForConditionalGeneration, cfg, made


def _mistral3() -> tuple[Any, Any, Any]:
    from transformers import (
        Mistral3Config,
        Mistral3ForConditionalGeneration,
        MistralConfig,
        PixtralProcessor,
        PixtralVisionConfig,
    )
    from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

    tok = tokenizer("[IMG]", "[IMG_BREAK]", "[IMG_END]")
    cfg = Mistral3Config(
        vision_config=PixtralVisionConfig(**VISION, head_dim=HIDDEN // HEADS).to_dict(),
        text_config=MistralConfig(**TEXT, **ids_of(tok)).to_dict(),
        image_token_index=tok.convert_tokens_to_ids("[IMG]"),
        spatial_merge_size=2,
        vision_feature_layer=-1,
    )
    pictures = PixtralImageProcessorPil(size={"longest_edge": SIDE}, patch_size={"height": PATCH, "width": PATCH})
    made = PixtralProcessor(pictures, tok, patch_size=PATCH, spatial_merge_size=2, chat_template=template("[IMG]"))
    return Mistral3ForConditionalGeneration, cfg, made


def _glm4v() -> tuple[Any, Any, Any]:
    from transformers import Glm4vConfig, Glm4vForConditionalGeneration, Glm4vProcessor, Glm4vVideoProcessor
    from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil

    marks = [
        "<|begin_of_image|>",
        "<|end_of_image|>",
        "<|begin_of_video|>",
        "<|end_of_video|>",
        "<|image|>",
        "<|video|>",
    ]
    tok = tokenizer(*marks)
    names = ("image_start", "image_end", "video_start", "video_end", "image", "video")
    ids = {f"{name}_token_id": i for name, i in zip(names, tok.convert_tokens_to_ids(marks), strict=True)}
    rope = {"rope_type": "default", "mrope_section": [4, 2, 2], "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    cfg = Glm4vConfig(
        # transformers always has these biases; vLLM asks the configuration, and published ones say so.
        text_config=TEXT
        | ids_of(tok)
        | {"rope_parameters": rope, "tie_word_embeddings": False, "attention_bias": True},
        vision_config=dict(
            depth=2, hidden_size=HIDDEN, out_hidden_size=HIDDEN, num_heads=HEADS, intermediate_size=WIDTH,
            image_size=SIDE, patch_size=PATCH, spatial_merge_size=2, temporal_patch_size=2,
        ),
        tie_word_embeddings=False,
        **ids,
    )  # fmt: skip
    size = {"shortest_edge": SIDE * SIDE * 2, "longest_edge": SIDE * SIDE * 8}
    pictures = Glm4vImageProcessorPil(patch_size=PATCH, merge_size=2, temporal_patch_size=2, size=size)
    videos = Glm4vVideoProcessor(patch_size=PATCH, merge_size=2, temporal_patch_size=2)
    made = Glm4vProcessor(pictures, tok, videos, chat_template=template("<|begin_of_image|><|image|><|end_of_image|>"))
    return Glm4vForConditionalGeneration, cfg, made


ARCHITECTURES = {
    "Qwen2-VL": _qwen_vl("Qwen2VL", "Qwen2VLProcessor", QWEN2_VISION),
    "Qwen2.5-VL": _qwen_vl("Qwen2_5_VL", "Qwen2_5_VLProcessor", QWEN25_VISION),
    "Qwen3-VL": _qwen_vl("Qwen3VL", "Qwen3VLProcessor", QWEN3_VISION),
    "InternVL": Architecture("InternVLForConditionalGeneration", _internvl),
    "LLaVA": Architecture("LlavaForConditionalGeneration", _llava),
    "LLaVA-OneVision": Architecture("LlavaOnevisionForConditionalGeneration", _llava_onevision),
    "PaliGemma": Architecture("PaliGemmaForConditionalGeneration", _paligemma),
    "Gemma 3": Architecture("Gemma3ForConditionalGeneration", _gemma3),
    "Idefics3": _idefics("Idefics3"),
    "SmolVLM": _idefics("SmolVLM"),
    "Mistral 3": Architecture("Mistral3ForConditionalGeneration", _mistral3),
    "GLM-4V": Architecture("Glm4vForConditionalGeneration", _glm4v),
    "Qwen2": _text("Qwen2ForCausalLM", "Qwen2Config"),
    "Qwen3": _text("Qwen3ForCausalLM", "Qwen3Config"),
    "Qwen3-MoE": _text(
        "Qwen3MoeForCausalLM", "Qwen3MoeConfig", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64
    ),
    "Llama": _text("LlamaForCausalLM", "LlamaConfig"),
    "Gemma": _text("GemmaForCausalLM", "GemmaConfig"),
    "Phi 3": _text("Phi3ForCausalLM", "Phi3Config"),
}


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ARCHITECTURES:
        sys.exit(f"usage: zoo.py ARCHITECTURE FOLDER; architectures: {', '.join(ARCHITECTURES)}")
    print(ARCHITECTURES[sys.argv[1]].build(Path(sys.argv[2])))
