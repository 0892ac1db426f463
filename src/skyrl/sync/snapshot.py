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


def layout_of(parameters: Iterable[tuple[str, torch.Tensor]]) -> Layout:
    """The layout of parameters, also of those that ZeRO-3 has cut in parts, without gathering them."""
    return [(name, p.dtype, tuple(getattr(p, "ds_shape", p.shape))) for name, p in parameters]


def take_snapshot(parameters: Iterable[tuple[str, torch.Tensor]], layout: Layout, version: int) -> WeightSnapshot:
    """Copy named parameters, which must be whole (gathered), into a :class:`WeightSnapshot`, one after the other: the
    host never holds a large policy twice.

    Args:
        parameters: Name and tensor, of any type and on any device.
        layout: Theirs, in the same order.
        version: Weight updates that the policy has received.

    Raises:
        SyncError: if the parameters are not those of the layout.
    """
    sizes = [dtype.itemsize * math.prod(shape) for _, dtype, shape in layout]
    offsets = [0, *itertools.accumulate(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)]
    buffer = np.empty(offsets.pop(), dtype=np.uint8)
    flat = torch.from_numpy(buffer)
    copied = 0
    for name, tensor in parameters:
        found, expected = (name, tensor.dtype, tuple(tensor.shape)), layout[copied] if copied < len(layout) else None
        if found != expected:
            raise SyncError(f"parameter {copied} of the policy is {found}; its layout says {expected}")
        flat[offsets[copied] : offsets[copied] + sizes[copied]] = (
            tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
        )
        copied += 1
    if copied < len(layout):
        raise SyncError(f"the policy gave {copied} parameters; its layout has {len(layout)}")
    return WeightSnapshot(
        version=version,
        names=[name for name, _, _ in layout],
        shapes=[shape for _, _, shape in layout],
        dtypes=[str(dtype).removeprefix("torch.") for _, dtype, _ in layout],
        buffer=buffer,
        offsets=offsets,
    )


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
        size = dtype.itemsize
        for length in shape:
            size *= length
        if offset + size > snapshot.buffer.nbytes:
            raise SyncError(
                f"weight snapshot {snapshot.version} ends at byte {snapshot.buffer.nbytes}, "
                f"but {name!r} needs bytes {offset} to {offset + size}: the transfer is partial"
            )
        yield name, flat[offset : offset + size].view(dtype).view(shape)
