"""All policy parameters in one flat buffer."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterable, Iterator

import numpy as np
import torch

from skyrl.records import SyncError, WeightSnapshot

ALIGNMENT = 64
Layout = list[tuple[str, torch.dtype, tuple[int, ...]]]
"""Name, type and whole shape of each parameter, in order."""


def byte_size(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """Bytes of a whole parameter."""
    return dtype.itemsize * math.prod(shape)


def layout_of(parameters: Iterable[tuple[str, torch.Tensor]]) -> Layout:
    """The layout of parameters, also of those that ZeRO-3 has cut in parts, without gathering them."""
    return [(name, p.dtype, tuple(getattr(p, "ds_shape", p.shape))) for name, p in parameters]


def take_snapshot(parameters: Iterable[tuple[str, torch.Tensor]], layout: Layout, version: int) -> WeightSnapshot:
    """Copy named parameters, whole (gathered) and on any device, into a snapshot of the policy after ``version`` weight
    updates, one after the other: the host never holds a large policy twice.

    Raises:
        SyncError: if the parameters are not those of the layout.
    """
    sizes = [byte_size(dtype, shape) for _, dtype, shape in layout]
    offsets = [0, *itertools.accumulate(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)]
    buffer = np.empty(offsets.pop(), dtype=np.uint8)
    flat = torch.from_numpy(buffer)
    copied = 0
    for name, tensor in parameters:
        found, expected = (name, tensor.dtype, tuple(tensor.shape)), layout[copied] if copied < len(layout) else None
        if found != expected:
            raise SyncError(f"parameter {copied} of the policy is {found}; its layout says {expected}")
        start, bytes_of = offsets[copied], tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
        flat[start : start + sizes[copied]] = bytes_of
        copied += 1
    if copied < len(layout):
        raise SyncError(f"the policy gave {copied} parameters; its layout has {len(layout)}")
    names, shapes = [name for name, _, _ in layout], [shape for _, _, shape in layout]
    dtypes = [str(dtype).removeprefix("torch.") for _, dtype, _ in layout]
    return WeightSnapshot(version, names, shapes, dtypes, buffer, offsets)


def parameters_of(snapshot: WeightSnapshot) -> Iterator[tuple[str, torch.Tensor]]:
    """Views of the snapshot's parameters; nothing is copied.

    Raises:
        SyncError: if the buffer is shorter than its index says (a partial transfer).
    """
    with warnings.catch_warnings():
        # Ray maps its objects read-only; nothing here writes to them.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        flat = torch.from_numpy(snapshot.buffer)
    for name, shape, dtype_name, offset in zip(
        snapshot.names, snapshot.shapes, snapshot.dtypes, snapshot.offsets, strict=True
    ):
        dtype = getattr(torch, dtype_name)
        size = byte_size(dtype, shape)
        if offset + size > snapshot.buffer.nbytes:
            raise SyncError(
                f"weight snapshot {snapshot.version} ends at byte {snapshot.buffer.nbytes}, "
                f"but {name!r} needs bytes {offset} to {offset + size}: the transfer is partial"
            )
        yield name, flat[offset : offset + size].view(dtype).view(shape)
