"""A learner's backend in plain torch: one rank, AdamW, no DeepSpeed. It is the example of what another one has to write
(:class:`skyrl.learner.backend.Backend` says what each call means), and lets unit tests run whole steps in one process.

``learner.backend=plain_backend:PlainBackend``
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, Literal

import torch

from skyrl.learner.backend import NamedTensors
from skyrl.policy.encode import EncodedBatch
from skyrl.policy.module import PolicyModule
from skyrl.records import ConfigError, SkyrlError
from skyrl.settings import Config


class PlainBackend:
    device = torch.device("cpu")
    collective = False

    def __init__(
        self, cfg: Config, load: Callable[[], PolicyModule], rank: int, host: str, port: int, reference: bool
    ) -> None:
        if cfg.learner.num_workers != 1:
            raise ConfigError(f"learner.num_workers={cfg.learner.num_workers}: PlainBackend runs one rank")
        self.cfg, self.module = cfg, load().eval()
        self.model = self.module.model
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        learner = cfg.learner
        self.optimizer = torch.optim.AdamW(
            self.trained, lr=learner.lr, betas=learner.betas, weight_decay=learner.weight_decay
        )
        self.twin = load().requires_grad_(False).eval() if reference else None

    def forward(self, rows: EncodedBatch) -> tuple[torch.Tensor, torch.Tensor]:
        return self.module(rows, with_entropy=True)

    @torch.no_grad()
    def score(self, rows: EncodedBatch, reference: bool = False) -> torch.Tensor:
        return (self.twin if reference else self.module)(rows)[0]

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        loss.backward()

    def update(self, lr: float) -> float:
        self.optimizer.param_groups[0]["lr"] = lr
        norm = float(torch.nn.utils.clip_grad_norm_(self.trained, self.cfg.learner.max_grad_norm))
        if math.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def parameters(self, names: Collection[str] | None = None, reference: bool = False) -> Iterator[tuple[str, Any]]:
        for name, parameter in (self.twin if reference else self.module).model.named_parameters():
            if names is None or name in names:
                yield name, parameter.detach()

    @torch.no_grad()
    def set_reference(self, parameters: NamedTensors) -> None:
        own = dict(self.twin.model.named_parameters())
        for name, whole in parameters:
            own[name].copy_(whole)

    def reduce(self, values: torch.Tensor, operation: Literal["sum", "max"]) -> torch.Tensor:
        return values

    def save(self, folder: Path) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        try:
            torch.save(state, Path(folder) / "plain.pt")
        except (OSError, RuntimeError) as error:  # torch says RuntimeError of a full disk
            raise SkyrlError(f"{folder}/plain.pt could not be written: {error}") from error

    def load(self, folder: Path) -> None:
        state = torch.load(Path(folder) / "plain.pt", weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        group = self.optimizer.param_groups[0]
        group["betas"], group["weight_decay"] = self.cfg.learner.betas, self.cfg.learner.weight_decay
