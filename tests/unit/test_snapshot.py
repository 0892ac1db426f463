"""Parameters as bytes: nothing lost, nothing copied, nothing silently short."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from skyrl.records import SyncError, WeightSnapshot
from skyrl.sync.snapshot import layout_of, parameters_of, take_snapshot, with_neighbours


def tensors() -> list[tuple[str, torch.Tensor]]:
    torch.manual_seed(0)
    return [
        ("a.weight", torch.randn(3, 5)),
        ("scalar", torch.tensor(2.5)),
        ("half", torch.randn(7).bfloat16()),
        ("transposed", torch.randn(4, 6).T),
        ("empty", torch.empty(0, 3)),
        ("double", torch.randn(2, dtype=torch.float64)),
    ]


def snapshot_of(parameters: list[tuple[str, torch.Tensor]], version: int) -> WeightSnapshot:
    return take_snapshot(iter(parameters), layout_of(parameters), version)


def test_roundtrip_keeps_values_shapes_types_and_order() -> None:
    snapshot = snapshot_of(tensors(), version=7)
    assert snapshot.version == 7
    assert snapshot.names == [name for name, _ in tensors()]
    back = list(parameters_of(snapshot))
    for (name, want), (got_name, got) in zip(tensors(), back, strict=True):
        assert got_name == name
        assert got.dtype == want.dtype
        assert got.shape == want.shape
        assert torch.equal(got, want)


def test_bfloat16_is_bit_identical() -> None:
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)  # every bfloat16 there is, nan included
    ((_, got),) = parameters_of(snapshot_of([("w", bits.view(torch.bfloat16))], 0))
    assert torch.equal(got.view(torch.int16), bits)


def test_it_is_the_parameters_own_memory_and_a_copy_of_what_is_not_in_one_piece() -> None:
    weight = nn.Parameter(torch.ones(4))
    snapshot = snapshot_of([("w", weight), ("t", torch.ones(2, 3).T)], 0)
    with torch.no_grad():
        weight.zero_()
    (_, got), (_, turned) = parameters_of(snapshot)
    assert got.tolist() == [0, 0, 0, 0]
    assert not got.requires_grad
    assert got.data_ptr() == snapshot.parts[0].ctypes.data == weight.data_ptr()
    assert turned.is_contiguous()


@pytest.mark.filterwarnings("error")
def test_a_read_only_buffer_is_read_without_a_warning() -> None:
    snapshot = snapshot_of([("w", torch.arange(3.0))], 0)
    snapshot.parts[0].flags.writeable = False  # as Ray maps it
    ((_, got),) = parameters_of(snapshot)
    assert got.tolist() == [0, 1, 2]


@pytest.mark.parametrize("kept", [0, 36, 68])
def test_a_parameter_of_another_size_is_an_error_that_names_it(kept: int) -> None:
    whole = snapshot_of([("first", torch.ones(16)), ("second", torch.ones(16))], version=3)
    whole.parts[1] = np.resize(whole.parts[1], kept)
    with pytest.raises(SyncError, match=rf"snapshot 3 has {kept} bytes of 'second', which needs 64: .* partial"):
        list(parameters_of(whole))


def test_no_parameters() -> None:
    snapshot = snapshot_of([], 0)
    assert snapshot.megabytes == 0 and list(parameters_of(snapshot)) == []


def test_parameters_that_are_not_those_of_the_layout_are_refused() -> None:
    layout = layout_of([("a", torch.ones(2)), ("b", torch.ones(3))])
    for wrong in (
        [("a", torch.ones(2))],
        [("a", torch.ones(2)), ("c", torch.ones(3))],
        [("a", torch.ones(2)), ("b", torch.ones(4))],
        [("a", torch.ones(2)), ("b", torch.ones(3).double())],
        [("a", torch.ones(2)), ("b", torch.ones(3)), ("c", torch.ones(1))],
    ):
        with pytest.raises(SyncError, match="layout"):
            take_snapshot(wrong, layout, 0)


def test_the_layout_of_a_sharded_parameter_is_its_whole_shape() -> None:
    shard = nn.Parameter(torch.empty(0))
    shard.ds_shape = torch.Size([4, 6])  # as DeepSpeed's ZeRO-3 leaves it
    assert layout_of([("w", shard)]) == [("w", torch.float32, (4, 6))]


def test_what_engines_join_goes_together() -> None:
    """By hand: the names of a layer of Qwen2, of one of Qwen3-MoE, and of a projector."""
    attention = {f"layers.0.self_attn.{part}" for part in ("q_proj.weight", "k_proj.weight", "k_proj.bias")}
    experts = {f"layers.0.mlp.experts.{i}.{part}_proj.weight" for i in range(3) for part in ("gate", "up", "down")}
    rest = {"layers.0.mlp.gate.weight", "layers.1.self_attn.q_proj.weight", "norm.weight", "lm_head.weight"}
    names = attention | experts | rest
    assert with_neighbours(names, {"layers.0.self_attn.k_proj.bias"}) == attention
    assert with_neighbours(names, {"layers.0.mlp.experts.2.up_proj.weight"}) == experts
    assert with_neighbours(names, {"lm_head.weight"}) == {"lm_head.weight", "norm.weight"}  # both at the top
    assert with_neighbours(names, set()) == set()
