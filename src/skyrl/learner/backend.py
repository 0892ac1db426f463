"""What a learner step asks of a training library. A second backend writes these calls: ``tests/plain_backend.py`` is
one, for plain torch on a single rank."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from skyrl.policy.encode import EncodedBatch
from skyrl.policy.module import PolicyModule
from skyrl.settings import Config

NamedTensors = Iterable[tuple[str, torch.Tensor]]


class Backend(Protocol):
    """One rank's model and optimizer (AdamW), without dropout, which would make the ratio differ from 1 on the first
    step. Losses come normalised over the whole step: what counts is the **sum** of gradients over micro-batches and
    ranks.

    Args:
        cfg: The whole configuration.
        load: Makes the starting policy on the CPU; what is not trained has ``requires_grad`` False.
        rank: This rank of ``learner.num_workers``.
        host, port: Where the ranks meet.
        reference: Keep a frozen twin of the starting policy beside it.
    """

    device: torch.device
    model: Any
    """The Hugging Face model: its configuration, buffers and parameters, which may be cut over the ranks."""
    collective: bool
    """Every rank must take part in each forward pass and in :meth:`parameters`."""

    def __init__(
        self, cfg: Config, load: Callable[[], PolicyModule], rank: int, host: str, port: int, reference: bool
    ) -> None: ...

    def forward(self, rows: EncodedBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 [N] log π_θ of the rows' answer tokens, with gradient, and [N] entropy, without."""
        ...

    def score(self, rows: EncodedBatch, reference: bool = False) -> torch.Tensor:
        """float32 [N] log π_θ, or log π_0 of the twin, without gradient."""
        ...

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Add the gradient of one micro-batch's share of the loss; ``last``: the step has no further one."""
        ...

    def update(self, lr: float) -> float:
        """One optimizer step with the gradient clipped to ``learner.max_grad_norm``. Returns the norm of the whole
        gradient before clipping; if it is not finite, nothing was updated."""
        ...

    def parameters(self, names: Collection[str] | None = None, reference: bool = False) -> Iterator[tuple[str, Any]]:
        """Names and whole tensors of the parameters of the policy (or its twin), one after the other, in the model's
        order; only those in ``names`` if given."""
        ...

    def set_reference(self, parameters: NamedTensors) -> None:
        """Overwrite parameters of the twin; the same ones in the same order on every rank."""
        ...

    def reduce(self, values: torch.Tensor, operation: Literal["sum", "max"]) -> torch.Tensor:
        """The values [n] over all ranks."""
        ...

    def save(self, folder: Path) -> None:
        """Write policy and optimizer; every rank calls it."""
        ...

    def load(self, folder: Path) -> None:
        """Continue from what :meth:`save` wrote, with this run's own optimizer settings."""
        ...
