"""The trainer side of vLLM's ``nccl`` and ``ipc`` weight transfer. Not run on a GPU yet: see docs/architecture.md."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

from skyrl.records import SkyrlError
from skyrl.settings import Config, WeightSync
from skyrl.sync.snapshot import Layout, byte_size


class LearnerSource(WeightSource):
    """The learner's parameters, of this ``layout``, as vLLM wants to read them. ``named_parameters`` is called once a
    sync; under ZeRO-3 it gathers whole tensors one by one, on all ranks in the same order."""

    def __init__(self, named_parameters: Callable[[], Iterator[tuple[str, torch.Tensor]]], layout: Layout) -> None:
        self.named_parameters, self.layout = named_parameters, layout

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(name, dtype, shape) for name, dtype, shape in self.layout]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self.named_parameters()


def vllm_trainer(cfg: Config, control: Any, source: LearnerSource, rank: int, host: str) -> Any:
    """vLLM's trainer side of the backend of ``rollout.weight_sync``. Each call of its ``send_weights``, on every
    learner rank, is one full round: start, transfer, finish on every rollout engine.

    Args:
        control: The four control-plane calls, reaching every rollout engine.
        rank: Learner rank; rank 0 sends.
        host: Address of this host, where the rollout engines meet rank 0 (nccl).

    Raises:
        SkyrlError: without CUDA.
    """
    if not torch.cuda.is_available():
        raise SkyrlError(f"rollout.weight_sync={cfg.rollout.weight_sync.value} needs CUDA in the learner")
    init_info = _init_info(cfg, rank, host, source.layout)
    return WeightTransferTrainerFactory.trainer_init(init_info, client=control, source=source)


def _init_info(cfg: Config, rank: int, host: str, layout: Layout) -> Any:
    """Of ``nccl`` or ``ipc``: ``shm`` has no sender."""
    if cfg.rollout.weight_sync is WeightSync.nccl:
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        return NCCLTrainerInitInfo(
            master_address=host,
            master_port=port,
            world_size=1 + cfg.rollout.num_workers * cfg.rollout.tensor_parallel_size,
            rank=rank,
        )
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
    from vllm.distributed.weight_transfer.packed_tensor import DEFAULT_PACKED_BUFFER_SIZE_BYTES

    # Packed: copies chunk by chunk. Else every gathered parameter would stay until the last one is sent.
    # A parameter that is larger than the buffer would be refused.
    size = max(DEFAULT_PACKED_BUFFER_SIZE_BYTES, *(byte_size(dtype, shape) for _, dtype, shape in layout))
    return IPCTrainerInitInfo(rank=rank, packed=True, packed_buffer_size_bytes=size)
