"""One flat buffer of all parameters: nothing lost, nothing moved, nothing silently short."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from skyrl.records import SyncError, WeightSnapshot
from skyrl.sync.snapshot import ALIGNMENT, layout_of, parameters_of, take_snapshot


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


def test_starts_are_aligned_and_parts_do_not_overlap() -> None:
    snapshot = snapshot_of(tensors(), 0)
    assert all(offset % ALIGNMENT == 0 for offset in snapshot.offsets)
    ends = [o + t.nbytes for o, (_, t) in zip(snapshot.offsets, tensors(), strict=True)]
    assert all(end <= start for end, start in zip(ends, snapshot.offsets[1:], strict=False))


def test_it_is_a_copy_of_the_parameters_but_views_on_the_buffer() -> None:
    weight = nn.Parameter(torch.ones(4))
    snapshot = snapshot_of([("w", weight)], 0)
    with torch.no_grad():
        weight.zero_()
    ((_, got),) = parameters_of(snapshot)
    assert got.tolist() == [1, 1, 1, 1]
    assert not got.requires_grad
    assert got.data_ptr() == snapshot.buffer.ctypes.data


@pytest.mark.filterwarnings("error")
def test_a_read_only_buffer_is_read_without_a_warning() -> None:
    snapshot = snapshot_of([("w", torch.arange(3.0))], 0)
    snapshot.buffer.flags.writeable = False  # as Ray maps it
    ((_, got),) = parameters_of(snapshot)
    assert got.tolist() == [0, 1, 2]


def test_a_partial_buffer_is_an_error_that_names_the_parameter() -> None:
    whole = snapshot_of([("first", torch.ones(16)), ("second", torch.ones(16))], version=3)
    cut = WeightSnapshot(whole.version, whole.names, whole.shapes, whole.dtypes, whole.buffer[:100], whole.offsets)
    with pytest.raises(SyncError, match=r"snapshot 3 ends at byte 100, but 'second' needs bytes 64 to 128"):
        list(parameters_of(cut))


def test_an_empty_buffer_is_partial_too() -> None:
    whole = snapshot_of([("w", torch.ones(2))], version=3)
    none = WeightSnapshot(3, whole.names, whole.shapes, whole.dtypes, whole.buffer[:0], whole.offsets)
    with pytest.raises(SyncError, match="partial"):
        list(parameters_of(none))


def test_no_parameters() -> None:
    snapshot = snapshot_of([], 0)
    assert snapshot.buffer.dtype == np.uint8
    assert list(parameters_of(snapshot)) == []


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
