"""Whether an optimizer step moved the weights, and as far as a step with its history moves them.

A gradient that is computed and never applied, a module that stays frozen though it shall train, an optimizer that lost
its moments on the way through a checkpoint: none of them raises an error, and the loss looks as always. What they do to
the weights shows in a few of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from skyrl.policy.lora import plain_name
from skyrl.policy.module import TRAINED, module_of
from skyrl.records import Metrics
from skyrl.settings import LearnerConfig

MODULES = ("vision", "adapter", "language")
LOOKED_AT = 32
"""Weights of each trained tensor, spread over it."""
WHOLE = 0.02
"""A weight moved by the learning rate if by that up to this share of it."""
COARSE = 16.0
"""Weights whose last place is coarser than the learning rate divided by this say nothing about how far they moved."""


class Motion:
    """Some weights of every tensor that the settings want to be trained, whether anything trains it or not.

    Args:
        parameters: Names and parameters of the policy; of those that ZeRO-3 cuts, this rank's piece is looked at.
        cfg: ``trainable`` says which modules; with ``lora`` only their factors are trained.
    """

    def __init__(self, parameters: Iterable[tuple[str, torch.nn.Parameter]], cfg: LearnerConfig) -> None:
        self._seen: list[tuple[torch.Tensor, torch.Tensor]] = []
        """Tensors, and the places that are looked at."""
        self._modules: list[str] = []
        """Of the same tensors."""
        for name, parameter in parameters:
            own = getattr(parameter, "ds_tensor", parameter)
            trained = module_of(name) in TRAINED[cfg.trainable] and (not cfg.lora.rank or plain_name(name) is None)
            if trained and own.numel():
                places = torch.linspace(0, own.numel() - 1, min(LOOKED_AT, own.numel()), dtype=torch.float64)
                self._seen.append((own, places.long().to(own.device)))
                self._modules.append(module_of(name))
        self._counts = [len(places) for _, places in self._seen]
        # The other modules take their first step when the first picture comes.
        every_step = {"language"} & {*self._modules} or {*self._modules}
        self._every_step = torch.tensor([module in every_step for module in self._modules], dtype=torch.bool)

    def look(self) -> torch.Tensor:
        """float32 on the CPU: the weights that are looked at, tensor after tensor."""
        parts = [own.detach().reshape(-1)[places] for own, places in self._seen]
        return torch.cat(parts).float().cpu() if parts else torch.zeros(0)

    def since(self, before: torch.Tensor, lr: float, total: Callable[[torch.Tensor], torch.Tensor]) -> Metrics:
        """``learner/moved/<module>`` and ``learner/whole_steps`` of an optimizer step with the learning rate ``lr``,
        since :meth:`look` gave ``before``. A module without such tensors has no entry; ``whole_steps`` has none if
        nothing moved.

        Args:
            total: Adds up a vector over the ranks, which may hold pieces; every rank calls it.
        """
        change = (self.look() - before).abs()
        moved = torch.tensor([bool(part.any()) for part in change.split(self._counts)], dtype=torch.bool)
        told = (change > 0) & self._every_step.repeat_interleave(torch.tensor(self._counts, dtype=torch.int64))
        told &= COARSE * (before.abs().nextafter(torch.tensor(torch.inf)) - before.abs()) < lr
        whole = told & ((change - lr).abs() <= WHOLE * lr)
        own = [torch.tensor([module == one for one in self._modules], dtype=torch.bool) for module in MODULES]
        counts = [(moved & part).sum() for part in own] + [part.sum() for part in own] + [whole.sum(), told.sum()]
        found = total(torch.tensor(counts, dtype=torch.float64)).tolist()
        shares = zip((f"learner/moved/{module}" for module in MODULES), found[:3], found[3:6], strict=True)
        metrics = {name: count / tensors for name, count, tensors in shares if tensors}
        return metrics | ({"learner/whole_steps": found[6] / found[7]} if found[7] else {})
