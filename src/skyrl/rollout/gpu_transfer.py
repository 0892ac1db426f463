"""The trainer side of vLLM's ``nccl`` and ``ipc`` weight transfer. Not run on a GPU yet: see docs/architecture.md."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

from skyrl.config import Config, WeightSync
from skyrl.types import SkyrlError

NamedParameters = Callable[[], Iterator[tuple[str, torch.Tensor]]]


class LearnerSource(WeightSource):
    """The learner's parameters as vLLM wants to read them.

    Args:
        named_parameters: Called once a sync; yields Hugging Face names and whole tensors. Under ZeRO-3 it gathers
            them one by one, on all ranks in the same order.
    """

    def __init__(self, named_parameters: NamedParameters) -> None:
        self.named_parameters = named_parameters
        self._metadata: list[ParamMeta] | None = None

    def metadata(self) -> list[ParamMeta]:
        if self._metadata is None:
            self._metadata = [ParamMeta(name, p.dtype, tuple(p.shape)) for name, p in self.named_parameters()]
        return self._metadata

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self.named_parameters()


class VllmSender:
    """Sends the learner's weights with the backend that ``rollout.weight_sync`` names.

    Args:
        cfg: The whole configuration.
        control: The four control-plane calls, reaching every rollout engine.
        named_parameters: See :class:`LearnerSource`.
        rank: Learner rank; rank 0 sends.

    Raises:
        SkyrlError: without CUDA, or for the ``shm`` backend, which needs no sender.
    """

    def __init__(self, cfg: Config, control: Any, named_parameters: NamedParameters, rank: int) -> None:
        if not torch.cuda.is_available():
            raise SkyrlError(f"rollout.weight_sync={cfg.rollout.weight_sync.value} needs CUDA in the learner")
        self._engine = WeightTransferTrainerFactory.trainer_init(
            _init_info(cfg, rank), client=control, source=LearnerSource(named_parameters)
        )

    def send(self) -> None:
        """One full round: start, transfer, finish on every rollout engine. Called on every learner rank."""
        self._engine.send_weights()


def _init_info(cfg: Config, rank: int) -> Any:
    if cfg.rollout.weight_sync is WeightSync.nccl:
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        return NCCLTrainerInitInfo(
            master_address=socket.gethostbyname(socket.gethostname()),
            master_port=port,
            world_size=1 + cfg.rollout.num_workers * cfg.rollout.tensor_parallel_size,
            rank=rank,
        )
    if cfg.rollout.weight_sync is WeightSync.ipc:
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

        return IPCTrainerInitInfo(rank=rank)
    raise SkyrlError("rollout.weight_sync=shm needs no sender: the snapshot travels through Ray's object store")
