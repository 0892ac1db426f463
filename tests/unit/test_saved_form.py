"""What is sent to the engines is what a saved checkpoint holds: the oracle is ``save_pretrained`` itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from skyrl.policy.lora import add_lora
from skyrl.records import SkyrlError
from skyrl.settings.system import LoraConfig, LoraSync
from skyrl.sync import saved_form
from skyrl.sync.incoming import Incoming
from skyrl.sync.outgoing import Outgoing
from skyrl.sync.saved_form import SavedForm
from skyrl.sync.snapshot import layout_of, parameters_of, take_snapshot

SIZES: dict[str, Any] = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)


def moe(folder: Path) -> Any:
    """Its experts are one parameter a layer, and one tensor an expert in a file."""
    cfg = Qwen3MoeConfig(
        **SIZES, vocab_size=40, num_key_value_heads=1, head_dim=8, num_experts=3, num_experts_per_tok=2,
        moe_intermediate_size=12, pad_token_id=0, bos_token_id=None, eos_token_id=1, tie_word_embeddings=True,
    )  # fmt: skip
    Qwen3MoeForCausalLM(cfg).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder)


def llava(folder: Path) -> Any:
    """Its parts have other names, and its vision tower one level less."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    text = LlamaConfig(**SIZES, vocab_size=40, pad_token_id=0, bos_token_id=None, eos_token_id=1)
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=CLIPVisionConfig(**SIZES, image_size=16, patch_size=8), text_config=text)
    )
    model._weight_conversions = get_model_conversion_mapping(model, add_legacy=False)  # as published
    model.save_pretrained(folder)
    return AutoModelForImageTextToText.from_pretrained(folder)


@pytest.mark.parametrize("make", [moe, llava])
def test_it_is_what_save_pretrained_writes(tmp_path: Path, make: Any) -> None:
    model = make(tmp_path / "start")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    form = SavedForm(model, layout_of(model.named_parameters()))
    snapshot = take_snapshot(form.of(model.named_parameters()), form.layout, version=3)
    model.save_pretrained(tmp_path / "end")
    saved = load_file(tmp_path / "end" / "model.safetensors")
    sent = dict(parameters_of(snapshot))
    assert sent.keys() == saved.keys() and sent.keys() != {name for name, _ in model.named_parameters()}
    assert all(torch.equal(sent[name], saved[name]) for name in saved)


def test_published_names_survive(tmp_path: Path) -> None:
    model = llava(tmp_path)
    names = {name for name, _, _ in SavedForm(model, layout_of(model.named_parameters())).layout}
    assert names == load_file(tmp_path / "model.safetensors").keys()
    assert any(name.startswith("vision_tower.vision_model.encoder.") for name in names)
    assert any(name.startswith("language_model.model.layers.") for name in names)


def test_parameters_may_be_cut_over_ranks_when_the_plan_is_made(tmp_path: Path) -> None:
    """Under ZeRO-3 the model's own tensors are empty; whole ones come one after the other."""
    model = moe(tmp_path)
    whole = [(name, p.detach().clone()) for name, p in model.named_parameters()]
    layout = layout_of(whole)
    for parameter in model.parameters():
        parameter.data = torch.empty(0)
    form = SavedForm(model, layout)
    sent = dict(form.of(iter(whole)))
    gate_up = dict(whole)["model.layers.1.mlp.experts.gate_up_proj"]  # [experts, gate and up, hidden]
    assert torch.equal(sent["model.layers.1.mlp.experts.2.gate_proj.weight"], gate_up[2, :12])
    assert torch.equal(sent["model.layers.1.mlp.experts.2.up_proj.weight"], gate_up[2, 12:])
    assert [(n, t.dtype, tuple(t.shape)) for n, t in sent.items()] == form.layout


def test_most_parameters_are_renamed_without_a_copy(tmp_path: Path) -> None:
    model = moe(tmp_path)
    form = SavedForm(model, layout_of(model.named_parameters()))
    own = {p.data_ptr() for p in model.parameters()}
    cut = [name for name, tensor in form.of(model.named_parameters()) if tensor.data_ptr() not in own]
    assert all(".experts." in name for name in cut)


class Joining:
    """Stands for the library: joins ``a.0`` and ``a.1``, renames ``b``."""

    def __call__(self, _model: Any, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        made = {}
        for name, tensor in state.items():
            if name == "b":
                made["c"] = tensor
        parts = [tensor for name, tensor in sorted(state.items()) if name.startswith("a.")]
        return made | ({"a": torch.cat(parts)} if parts else {})


def test_parameters_that_are_joined_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saved_form, "revert_weight_conversion", Joining())
    parameters = [("a.0", torch.ones(2)), ("b", torch.ones(1)), ("a.1", torch.zeros(1))]
    form = SavedForm(None, layout_of(parameters))
    assert form.layout == [("c", torch.float32, (1,)), ("a", torch.float32, (3,))]
    assert [(n, t.tolist()) for n, t in form.of(iter(parameters))] == [("c", [1.0]), ("a", [1.0, 1.0, 0.0])]


def test_what_needs_the_whole_model_at_once_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def strange(_model: Any, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {f"{name}.of{len(state)}": tensor for name, tensor in state.items()}

    monkeypatch.setattr(saved_form, "revert_weight_conversion", strange)
    with pytest.raises(SkyrlError, match="such architectures are not supported"):
        SavedForm(None, layout_of([("a", torch.ones(2)), ("b", torch.ones(1))]))


@pytest.mark.parametrize(("make", "targets"), [(moe, []), (llava, []), (llava, ["q_proj"])])
def test_with_lora_factors_and_merged_layers_have_a_checkpoints_names(
    tmp_path: Path, make: Any, targets: list[str]
) -> None:
    """What a receiver makes of the factors, and what comes merged, are those tensors of the whole that were trained."""
    model, lora = make(tmp_path / "start"), LoraConfig(rank=2, targets=targets, sync=LoraSync.adapter)
    add_lora(model, lora, {"vision", "adapter", "language"})
    named = list(model.named_parameters())
    start, incoming = dict(Outgoing(model, lora).saved([(n, p.clone()) for n, p in named])), Incoming(lora)

    def sent(out: Outgoing, base: int | None) -> Any:
        chosen = [(name, p) for name, p in named if base is None or name in out.changing]
        return take_snapshot(out.sent(chosen), out.sent_layout(base is not None), 2, base)

    assert dict(incoming.tensors(sent(Outgoing(model, lora), None))).keys() == start.keys()
    incoming.version = 1
    with torch.no_grad():
        for _, p in named:
            if p.requires_grad:
                p.normal_()
    wanted = dict(Outgoing(model, lora).saved(named))
    trained = {name for name in wanted if not torch.equal(wanted[name], start[name])}
    merged = sent(Outgoing(model, lora.model_copy(update={"sync": LoraSync.merged})), 1)
    apart = sent(Outgoing(model, lora), 1)
    for received in (dict(parameters_of(merged)), dict(incoming.tensors(apart))):
        assert trained <= received.keys() and (received.keys() < wanted.keys() or not targets)
        for name, tensor in received.items():
            torch.testing.assert_close(tensor, wanted[name])
    assert trained and apart.megabytes < merged.megabytes
