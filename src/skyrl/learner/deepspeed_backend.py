"""DeepSpeed as the learner's backend: ZeRO 0 to 3, gloo on CPU, nccl on CUDA."""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Callable, Collection, Iterator
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import deepspeed
import psutil
import torch
import torch.distributed as dist
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.utils.tensor_fragment import fragment_address

from skyrl.learner.backend import NamedTensors
from skyrl.learner.deepspeed_config import deepspeed_config
from skyrl.learner.sharded_loading import sharded_loading
from skyrl.learner.tensor_files import read_tree, write_tree
from skyrl.policy.encode import EncodedBatch
from skyrl.policy.module import PolicyModule
from skyrl.records import SkyrlError
from skyrl.settings import Config

TAG = "deepspeed"
SHM_OP = "deepspeed_shm_comm"
OBJECTS = (LossScaler, DynamicLossScaler, fragment_address)
"""Classes of DeepSpeed that stand in its states."""


class PlainFiles(CheckpointEngine):
    """DeepSpeed's files, without pickle: named .pt by DeepSpeed, which looks for such names, they are safetensors."""

    def create(self, info: CheckpointCommitInfo) -> None:
        pass

    def save(self, state_dict: Any, path: str) -> None:
        write_tree(Path(path), state_dict, OBJECTS)

    def load(self, path: str, map_location: Any = None) -> Any:
        # Where a function says it, and on "cpu": DeepSpeed copies them into tensors of its own.
        return read_tree(Path(path), OBJECTS)

    def commit(self, info: CheckpointCommitInfo) -> bool:
        return True

    def preserves_storage_sharing(self) -> bool:
        return False


class DeepSpeedBackend:
    """A :class:`skyrl.learner.backend.Backend`, which says what the arguments and calls mean.

    Raises:
        SkyrlError: if ``learner.device=cuda`` and this process sees no such device.
    """

    def __init__(
        self, cfg: Config, load: Callable[[], PolicyModule], rank: int, host: str, port: int, reference: bool
    ) -> None:
        self.cfg = cfg
        on_gpu = cfg.learner.device == "cuda"
        if on_gpu and not torch.cuda.is_available():
            raise SkyrlError("learner.device=cuda, but this process sees no CUDA device; use learner.device=cpu")
        self.device = torch.device("cuda" if on_gpu else "cpu")
        self.collective = cfg.learner.zero_stage == 3
        join_ranks(cfg, rank, host, port)
        settings = deepspeed_config(cfg.learner, cfg.model.dtype)
        module = self._loaded(load, settings)
        self.model = module.model
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.engine, *_ = deepspeed.initialize(model=module, model_parameters=self.trained, config=settings)
        self.engine.checkpoint_engine = PlainFiles()
        self.engine.eval()
        for part in module.modules():
            if getattr(part, "gradient_checkpointing", False):
                part.training = True  # transformers checkpoints layers in training mode only
        self._twin: Any = None
        if reference:
            self._twin = self._loaded(load, settings).requires_grad_(False).eval()
            self._twin_model = self._twin.model
            if self.collective:  # sharded like the policy, without an optimizer
                config = {key: value for key, value in settings.items() if key != "optimizer"}
                self._twin = deepspeed.initialize(model=self._twin, config=config)[0]
                self._twin.eval()

    def _loaded(self, load: Callable[[], PolicyModule], settings: dict[str, Any]) -> PolicyModule:
        with sharded_loading(settings) if self.collective else nullcontext():
            module = load()
        return module.to(self.device)

    # ------------------------------------------------------------ passes

    def forward(self, rows: EncodedBatch) -> tuple[torch.Tensor, torch.Tensor]:
        return self.engine(rows, with_entropy=True)

    @torch.no_grad()
    def score(self, rows: EncodedBatch, reference: bool = False) -> torch.Tensor:
        return (self._twin if reference else self.engine.module)(rows)[0]

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)
        # DeepSpeed averages gradients over ranks.
        self.engine.backward(loss * self.cfg.learner.num_workers)

    def update(self, lr: float) -> float:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        if self.cfg.learner.zero_stage == 0 and self.cfg.model.dtype == "float32":
            # Here DeepSpeed neither reports the norm nor refuses a gradient that is not finite.
            norm = float(torch.nn.utils.get_total_norm([p.grad for p in self.trained if p.grad is not None]))
            if math.isfinite(norm):
                self.engine.step()
            return norm
        self.engine.step()
        return float(self.engine.get_global_grad_norm() or 0.0) if self.engine.was_step_applied() else math.inf

    # ------------------------------------------------------------ parameters

    def parameters(self, names: Collection[str] | None = None, reference: bool = False) -> Iterator[tuple[str, Any]]:
        for name, parameter in (self._twin_model if reference else self.model).named_parameters():
            if names is not None and name not in names:
                continue
            if not self.collective:
                yield name, parameter.detach()
            else:
                with deepspeed.zero.GatheredParameters([parameter]):
                    whole = parameter.detach().clone()
                yield name, whole

    @torch.no_grad()
    def set_reference(self, parameters: NamedTensors) -> None:
        own = dict(self._twin_model.named_parameters())
        for name, whole in parameters:
            with deepspeed.zero.GatheredParameters([own[name]], modifier_rank=0, enabled=self.collective):
                own[name].copy_(whole)

    # ------------------------------------------------------------ ranks and files

    def reduce(self, values: torch.Tensor, operation: Literal["sum", "max"]) -> torch.Tensor:
        if self.cfg.learner.num_workers > 1:
            dist.all_reduce(values, op=dist.ReduceOp.SUM if operation == "sum" else dist.ReduceOp.MAX)
        return values

    def save(self, folder: Path) -> None:
        self.engine.save_checkpoint(str(folder), tag=TAG)
        if dist.get_rank() == 0:  # scripts that DeepSpeed adds, for its pickled files
            for script in Path(folder).glob("zero_to_*.py"):
                script.unlink()

    def load(self, folder: Path) -> None:
        # Without an optimizer's file DeepSpeed would begin with a fresh one, and not say so.
        own = f"{TAG}/*zero_pp_rank_{dist.get_rank()}_mp_rank_*_optim_states.pt"
        if self.cfg.learner.zero_stage > 0 and not list(Path(folder).glob(own)):
            raise SkyrlError(f"{folder} has no optimizer state of learner rank {dist.get_rank()}: no file {own}")
        if self.engine.load_checkpoint(str(folder), tag=TAG)[0] is None:
            raise SkyrlError(f"{folder} has no checkpoint of DeepSpeed: no folder {TAG}, or none that is whole")
        for group in self.engine.optimizer.param_groups:
            group["betas"], group["weight_decay"] = tuple(self.cfg.learner.betas), self.cfg.learner.weight_decay


def join_ranks(cfg: Config, rank: int, host: str, port: int) -> None:
    """Start DeepSpeed's process group; does nothing if this process has one. A peer that does not answer a collective
    call within ``controller.timeout`` is an error."""
    world_size = cfg.learner.num_workers
    os.environ.update(MASTER_ADDR=host, MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world_size))
    # Every rank is a process of its own that sees one device, which is therefore the first.
    os.environ["LOCAL_RANK"] = "0"
    if name := interface_towards(host):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    # Otherwise DeepSpeed compiles this C++ op at the first start on a CPU: a minute and a compiler, for an all-reduce
    # that only its inference engine calls.
    deepspeed.ops.__compatible_ops__[SHM_OP] = False
    library = "gloo" if cfg.learner.device == "cpu" else "nccl"
    timeout = timedelta(seconds=cfg.controller.timeout)
    if world_size == 1 and not dist.is_initialized():  # meets nobody: else it would listen on all interfaces
        dist.init_process_group(library, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    deepspeed.init_distributed(
        library, auto_mpi_discovery=False, verbose=False, timeout=timeout, rank=rank, world_size=world_size
    )


def interface_towards(host: str) -> str | None:
    """Name of the network interface by which ``host``, an address, is reached; None if none has its address. gloo would
    ask for the address of this host's own name, which on many systems is 127.0.1.1 and nothing that others reach."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # sends nothing
        own = probe.getsockname()[0]
    found = psutil.net_if_addrs().items()
    return next((name for name, addresses in found if any(one.address == own for one in addresses)), None)
