"""Policy parameters as bytes, without a copy of them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Iterable, Iterator

import numpy as np
import torch

from skyrl.records import SyncError, WeightSnapshot

Layout = list[tuple[str, torch.dtype, tuple[int, ...]]]
"""Name, type and whole shape of each parameter, in order."""


def byte_size(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """Bytes of a whole parameter."""
    return dtype.itemsize * math.prod(shape)


def layout_of(parameters: Iterable[tuple[str, torch.Tensor]]) -> Layout:
    """The layout of parameters, also of those that ZeRO-3 has cut in parts, without gathering them."""
    return [(name, p.dtype, tuple(getattr(p, "ds_shape", p.shape))) for name, p in parameters]


def take_snapshot(
    parameters: Iterable[tuple[str, torch.Tensor]], layout: Layout, version: int, base: int | None = None
) -> WeightSnapshot:
    """Named parameters, whole (gathered) and on any device, as a snapshot of the policy after ``version`` weight
    updates. Those that are on the CPU and in one piece are not copied: it must be read, or handed to another process,
    before they change.

    Raises:
        SyncError: if the parameters are not those of the layout.
    """
    parts: list[np.ndarray] = []
    for name, tensor in parameters:
        found = (name, tensor.dtype, tuple(tensor.shape))
        expected = layout[len(parts)] if len(parts) < len(layout) else None
        if found != expected:
            raise SyncError(f"parameter {len(parts)} of the policy is {found}; its layout says {expected}")
        parts.append(tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy())
    if len(parts) < len(layout):
        raise SyncError(f"the policy gave {len(parts)} parameters; its layout has {len(layout)}")
    names, shapes = [name for name, _, _ in layout], [shape for _, _, shape in layout]
    dtypes = [str(dtype).removeprefix("torch.") for _, dtype, _ in layout]
    return WeightSnapshot(version, names, shapes, dtypes, parts, base)


def parameters_of(snapshot: WeightSnapshot) -> Iterator[tuple[str, torch.Tensor]]:
    """Views of the snapshot's parameters; nothing is copied, and nothing may be written to them.

    Raises:
        SyncError: if a parameter has other bytes than its shape says (a partial transfer).
    """
    for name, shape, dtype_name, part in zip(
        snapshot.names, snapshot.shapes, snapshot.dtypes, snapshot.parts, strict=True
    ):
        dtype = getattr(torch, dtype_name)
        if part.nbytes != byte_size(dtype, shape):
            raise SyncError(
                f"weight snapshot {snapshot.version} has {part.nbytes} bytes of {name!r}, which needs "
                f"{byte_size(dtype, shape)}: the transfer is partial"
            )
        with warnings.catch_warnings():  # Ray maps its objects read-only
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            flat = torch.from_numpy(part) if part.size else torch.empty(0, dtype=torch.uint8)
        yield name, flat.view(dtype).view(shape)


def with_neighbours(names: Collection[str], chosen: Collection[str]) -> set[str]:
    """``chosen`` and those of ``names`` whose modules have a parent in common with one of theirs: engines join them to
    one layer (``q_proj``, ``k_proj`` and ``v_proj``), which takes all of its parts or none.

    Experts count as one: ``experts.0`` and ``experts.1`` are one parent.
    """
    parents = {_parent(name) for name in chosen}
    return {name for name in names if _parent(name) in parents}


def _parent(name: str) -> str:
    path = name.split(".")[:-2]
    while path and path[-1].isdigit() and "experts" in path:
        path.pop()
    return ".".join(path)
