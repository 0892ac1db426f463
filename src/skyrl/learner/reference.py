"""The reference policy π_0, and its refreshes by the current policy (iterated MPO)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from skyrl.learner.passes import pair_members
from skyrl.objective.mpo import compares_with_reference
from skyrl.policy.encode import EncodedBatch
from skyrl.policy.module import PolicyModule
from skyrl.records import SkyrlError, TrainBatch
from skyrl.settings import AlgorithmConfig, MpoConfig

FILE = "reference.safetensors"
NamedTensors = Iterable[tuple[str, torch.Tensor]]


def needs_reference(cfg: AlgorithmConfig) -> bool:
    """True if any step uses π_0: for the preference or quality term of MPO, or for a KL penalty."""
    return (cfg.uses_mpo and compares_with_reference(cfg.mpo)) or (cfg.uses_grpo and cfg.grpo.kl_weight > 0)


def compared_items(batch: TrainBatch, cfg: AlgorithmConfig) -> set[int]:
    """Items of this step whose log π_0 is needed."""
    if cfg.grpo.kl_weight > 0 and cfg.weights(batch.step)[0] > 0:
        return set(range(len(batch.items)))
    return pair_members(batch, cfg) if compares_with_reference(cfg.mpo) else set()


def refresh_due(cfg: MpoConfig, age: int, kl: float | None) -> bool:
    """Whether the reference becomes the current policy after this step.

    Args:
        cfg: ``reference_every`` and ``reference_kl``.
        age: Steps since the last refresh (since the start if there was none), this one included.
        kl: The step's estimate of KL(policy ‖ reference), nats a token; None if the step has no pairs.
    """
    old = cfg.reference_every > 0 and age >= cfg.reference_every
    far = cfg.reference_kl is not None and kl is not None and kl > cfg.reference_kl
    return old or far


def whole_parameters(
    model: Any, sharded: bool, names: Collection[str] | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and whole parameters of a model, one after the other; only those in ``names`` if given.

    ``sharded`` is ZeRO-3; then this is collective, every rank must run through all of them, and each is a copy.
    """
    for name, parameter in model.named_parameters():
        if names is not None and name not in names:
            continue
        if not sharded:
            yield name, parameter.detach()
        else:
            with deepspeed.zero.GatheredParameters([parameter]):
                whole = parameter.detach().clone()
            yield name, whole


class Reference:
    """A frozen policy on every rank, sharded like the learner's under ZeRO-3.

    Args:
        module: The starting policy. It is frozen and then belongs to this object.
        settings: The learner's DeepSpeed configuration.
        zero_stage: ``learner.zero_stage``.
        trained: Names of the parameters that the learner trains: only these ever change.
    """

    def __init__(
        self, module: PolicyModule, settings: dict[str, Any], zero_stage: int, trained: Collection[str]
    ) -> None:
        self.module = module.requires_grad_(False).eval()
        self.sharded, self.trained = zero_stage == 3, frozenset(trained)
        self.step = 0
        """The step after which it was refreshed last; 0 while it is the starting policy."""
        self._forward: Any = self.module
        if self.sharded:  # without an optimizer
            config = {key: value for key, value in settings.items() if key != "optimizer"}
            self._forward = deepspeed.initialize(model=self.module, config=config)[0]
            self._forward.eval()

    @torch.no_grad()
    def __call__(self, rows: EncodedBatch) -> torch.Tensor:
        """log π_0 float32 [N] of the rows' answer tokens. Collective under ZeRO-3."""
        return self._forward(rows)[0]

    @torch.no_grad()
    def replace(self, parameters: NamedTensors, step: int) -> None:
        """Become the policy with these trained parameters, after ``step``. Collective under ZeRO-3.

        Args:
            parameters: Names and whole tensors, in the same order on every rank.

        Raises:
            SkyrlError: if they are not exactly the trained ones.
        """
        own = dict(self.module.model.named_parameters())
        left = set(self.trained)
        for name, whole in parameters:
            if name not in left:
                raise SkyrlError(f"reference policy: parameter {name!r} came twice or is not a trained one")
            left.remove(name)
            with deepspeed.zero.GatheredParameters([own[name]], modifier_rank=0, enabled=self.sharded):
                own[name].copy_(whole)
        if left:
            raise SkyrlError(f"reference policy: {len(left)} parameters are missing, for example {min(left)!r}")
        self.step = step

    def save(self, folder: Path, rank: int) -> None:
        """Write what a refresh has changed; nothing if there was none. Collective under ZeRO-3."""
        if self.step == 0:
            return
        found = whole_parameters(self.module.model, self.sharded, self.trained)
        kept = {name: whole.cpu().contiguous() for name, whole in found if rank == 0}
        if rank == 0:
            save_file(kept, Path(folder) / FILE, metadata={"step": str(self.step)})

    def load(self, folder: Path, step: int, start: Callable[[], NamedTensors]) -> None:
        """Continue from what :meth:`save` wrote. Collective under ZeRO-3.

        Args:
            step: The step of its last refresh; 0 if there was none.
            start: Gives the starting policy's parameters; called if this reference has left them.

        Raises:
            SkyrlError: if the file is missing or is of another step.
        """
        if step == 0:
            if self.step != 0:
                self.replace(((name, p) for name, p in start() if name in self.trained), 0)
            return
        file = Path(folder) / FILE
        if not file.is_file():
            raise SkyrlError(f"the reference policy was refreshed after step {step}, but {folder} has no {FILE}")
        with safe_open(file, "pt") as saved:
            if saved.metadata()["step"] != str(step):
                raise SkyrlError(f"{file} was written after step {saved.metadata()['step']}; expected: {step}")
            self.replace(((name, saved.get_tensor(name)) for name in saved.keys()), step)  # noqa: SIM118
