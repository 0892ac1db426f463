"""Which parameters are trained (the paper's Table 4)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from learner_cases import tiny_model
from torch import nn

from skyrl.policy.module import freeze, module_of
from skyrl.records import ConfigError
from skyrl.settings import Trainable


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny_model()[0]


@pytest.mark.parametrize(
    ("name", "module"),
    [
        # Idefics3 and SmolVLM
        ("model.vision_model.encoder.layers.0.self_attn.q_proj.weight", "vision"),
        ("model.connector.modality_projection.proj.weight", "adapter"),
        ("model.text_model.layers.0.mlp.up_proj.weight", "language"),
        # Llava
        ("model.vision_tower.vision_model.encoder.layers.0.layer_norm1.bias", "vision"),
        ("model.multi_modal_projector.linear_1.weight", "adapter"),
        ("model.language_model.embed_tokens.weight", "language"),
        # InternVL as published
        ("vision_model.encoder.layers.0.attn.qkv.weight", "vision"),
        ("mlp1.1.weight", "adapter"),
        ("language_model.model.layers.0.self_attn.k_proj.bias", "language"),
        # Qwen-VL keeps its adapter inside the vision module
        ("model.visual.blocks.3.attn.proj.weight", "vision"),
        ("model.visual.patch_embed.proj.weight", "vision"),
        ("model.visual.pos_embed.weight", "vision"),
        ("model.visual.deepstack_merger_list.0.linear_fc1.weight", "adapter"),
        ("model.visual.merger.mlp.0.weight", "adapter"),
        ("lm_head.weight", "language"),
    ],
)
def test_module_of(name: str, module: str) -> None:
    assert module_of(name) == module


TEXT: dict[str, Any] = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0),
)
AXES = TEXT | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
VIT: dict[str, Any] = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
)
BLOCKS: dict[str, Any] = dict(depth=2, hidden_size=32, intermediate_size=64, num_heads=2, patch_size=4)
OUT = {"out_hidden_size": 32}

FAMILIES: dict[str, tuple[Any, Any, set[str], set[str]]] = {
    # class → text configuration, vision configuration, the modules of the tower, the modules of the adapter
    "Qwen2VL": (AXES, dict(depth=1, embed_dim=32, hidden_size=32, num_heads=2), {"visual"}, {"visual.merger"}),
    "Qwen2_5_VL": (AXES, BLOCKS | OUT, {"visual"}, {"visual.merger"}),
    "Qwen3VL": (
        AXES,
        BLOCKS | OUT | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16},
        {"visual"},
        {"visual.merger", "visual.deepstack_merger_list"},
    ),
    "Qwen3_5": (
        AXES | {"layer_types": ["full_attention"]},
        BLOCKS | OUT | {"num_position_embeddings": 16},
        {"visual"},
        {"visual.merger"},
    ),
    "Glm4v": (AXES, BLOCKS | OUT | {"image_size": 16}, {"visual"}, {"visual.merger", "visual.downsample"}),
    "InternVL": (
        ("Qwen2", TEXT),
        VIT | {"image_size": [16, 16], "patch_size": [8, 8]},
        {"vision_tower"},
        {"multi_modal_projector"},
    ),
    "Llava": (("Llama", TEXT), ("CLIPVision", VIT), {"vision_tower"}, {"multi_modal_projector"}),
    "LlavaNext": (("Llama", TEXT), ("CLIPVision", VIT), {"vision_tower"}, {"multi_modal_projector", "image_newline"}),
    "LlavaOnevision": (
        ("Qwen2", TEXT),
        ("SiglipVision", VIT),
        {"vision_tower"},
        {"multi_modal_projector", "image_newline"},
    ),
    "Gemma3": (TEXT, VIT, {"vision_tower"}, {"multi_modal_projector"}),
    "PaliGemma": (("Gemma", TEXT), ("SiglipVision", VIT), {"vision_tower"}, {"multi_modal_projector"}),
    "Mistral3": (("Mistral", TEXT), ("PixtralVision", VIT), {"vision_tower"}, {"multi_modal_projector"}),
    "Idefics3": (("Llama", TEXT), VIT, {"vision_model"}, {"connector"}),
    "SmolVLM": (("Llama", TEXT), VIT, {"vision_model"}, {"connector"}),
    "DeepseekVL": (("Llama", TEXT), ("SiglipVision", VIT), {"vision_model"}, {"aligner"}),
    "VideoLlama3": (("Qwen2", TEXT), VIT, {"vision_model"}, {"projector"}),
}


def small(family: str) -> nn.Module:
    """A model of the family as transformers builds it, without memory for its weights."""

    def config(part: Any) -> Any:
        return getattr(transformers, f"{part[0]}Config")(**part[1]).to_dict() if isinstance(part, tuple) else part

    text, vision, _, _ = FAMILIES[family]
    whole = getattr(transformers, f"{family}Config")(text_config=config(text), vision_config=config(vision))
    with torch.device("meta"):
        return getattr(transformers, f"{family}ForConditionalGeneration")(whole)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_modules_of_every_family_are_found(family: str) -> None:
    """The oracle goes by where a parameter hangs in the model, written down by hand for each family."""
    model = small(family)
    towers, adapters = ({f"model.{name}" for name in names} for names in FAMILIES[family][2:])

    def hangs_in(name: str, modules: set[str]) -> bool:
        return any(name == module or name.startswith(f"{module}.") for module in modules)

    seen = {"vision": 0, "adapter": 0, "language": 0}
    for name, _ in model.named_parameters():
        want = "adapter" if hangs_in(name, adapters) else "vision" if hangs_in(name, towers) else "language"
        assert module_of(name) == want, name
        seen[want] += 1
    assert all(seen.values())
    for module in towers | adapters:
        assert any(hangs_in(name, {module}) for name, _ in model.named_parameters()), module
    inner = {id(p) for p in model.get_input_embeddings().parameters()}
    assert {module_of(name) for name, p in model.named_parameters() if id(p) in inner} == {"language"}


@pytest.mark.parametrize(
    ("trainable", "trained"),
    [
        (Trainable.all, {"vision", "adapter", "language"}),
        (Trainable.adapter, {"adapter"}),
        (Trainable.language_and_adapter, {"language", "adapter"}),
        (Trainable.adapter_and_vision, {"vision", "adapter"}),
    ],
)
def test_freeze_counts_what_it_leaves_trainable(model: nn.Module, trainable: Trainable, trained: set[str]) -> None:
    counts = freeze(model.named_parameters(), trainable)
    assert set(counts) == trained
    flags = {module_of(name): p.requires_grad for name, p in model.named_parameters()}
    assert {module for module, flag in flags.items() if flag} == trained
    assert all(p.requires_grad == (module_of(n) in trained) for n, p in model.named_parameters())
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_freezing_can_be_undone(model: nn.Module) -> None:
    freeze(model.named_parameters(), Trainable.adapter)
    freeze(model.named_parameters(), Trainable.all)
    assert all(p.requires_grad for p in model.parameters())


def test_adapter_step_leaves_tower_language_and_text_logits_bit_identical(model: nn.Module) -> None:
    freeze(model.named_parameters(), Trainable.adapter)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ids = torch.arange(5, 17)[None]
    with torch.no_grad():
        text_logits = model(input_ids=ids).logits
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    image_id = model.config.image_token_id
    seen = torch.tensor([[7, *[image_id] * 4, 8, 9]])
    loss = model(input_ids=seen, pixel_values=torch.randn(1, 1, 3, 32, 32), labels=seen).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert {module_of(name) for name in gradients} == {"adapter"}
    assert max(g.abs().max() for g in gradients.values()) > 1e-4
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (module_of(name) != "adapter"), name
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, text_logits)


@pytest.mark.parametrize("trainable", [Trainable.adapter, Trainable.adapter_and_vision, Trainable.language_and_adapter])
def test_a_text_model_has_no_adapter(trainable: Trainable) -> None:
    text_model = nn.ModuleDict({"layers": nn.Linear(2, 2)})
    with pytest.raises(ConfigError, match=f"learner.trainable={trainable.value}: the policy has no adapter"):
        freeze(text_model.named_parameters(), trainable)
    assert freeze(text_model.named_parameters(), Trainable.all)["language"] == 6


@pytest.mark.parametrize("trainable", [Trainable.adapter, Trainable.language_and_adapter])
def test_a_tower_of_an_unknown_name_is_not_trained_as_a_part_of_the_language_model(trainable: Trainable) -> None:
    parts = nn.ModuleDict({name: nn.Linear(2, 2) for name in ("eye", "connector", "language_model")})
    with pytest.raises(ConfigError, match="the policy has no vision parameters"):
        freeze(parts.named_parameters(), trainable)
