"""Which parameters are trained (the paper's Table 4)."""

from __future__ import annotations

import pytest
import torch
from learner_cases import tiny_model
from torch import nn

from skyrl.policy.freezing import freeze, module_of
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
