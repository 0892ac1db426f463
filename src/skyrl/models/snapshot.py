"""All policy parameters in one flat buffer."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator

import numpy as np
import torch

from skyrl.types import SyncError, WeightSnapshot

ALIGNMENT = 64


def take_snapshot(parameters: Iterable[tuple[str, torch.Tensor]], version: int) -> WeightSnapshot:
    """Copy named parameters, which must be whole (gathered), into a :class:`WeightSnapshot`.

    Args:
        parameters: Name and tensor, of any type and on any device.
        version: Weight updates that the policy has received.
    """
    tensors = [(name, p.detach().to("cpu").contiguous()) for name, p in parameters]
    offsets, end = [], 0
    for _, tensor in tensors:
        offsets.append(end)
        end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    buffer = np.empty(end, dtype=np.uint8)
    flat = torch.from_numpy(buffer)
    for offset, (_, tensor) in zip(offsets, tensors, strict=True):
        flat[offset : offset + tensor.nbytes] = tensor.reshape(-1).view(torch.uint8)
    return WeightSnapshot(
        version=version,
        names=[name for name, _ in tensors],
        shapes=[tuple(tensor.shape) for _, tensor in tensors],
        dtypes=[str(tensor.dtype).removeprefix("torch.") for _, tensor in tensors],
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
