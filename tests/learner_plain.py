"""Learner steps in this process, over the plain backend."""

from __future__ import annotations

from typing import Any

import numpy as np
from learner_cases import settings

from skyrl.learner.step import LearnerStep
from skyrl.settings import Config
from skyrl.sync.snapshot import parameters_of

PLAIN = "plain_backend:PlainBackend"


def plain_settings(**learner: Any) -> Config:
    cfg = settings(0)
    cfg.learner = cfg.learner.model_copy(update={"backend": PLAIN} | learner)
    return cfg


def joined(cfg: Config, policy: str) -> LearnerStep:
    learner = LearnerStep(cfg, policy, 0, threads=1)
    learner.join("127.0.0.1", learner.free_port())
    return learner


def weights_of(learner: LearnerStep) -> dict[str, np.ndarray]:
    snapshot = learner.snapshot(1)
    assert snapshot is not None
    return {name: p.numpy().copy() for name, p in parameters_of(snapshot)}


def recorded_gradients(learner: LearnerStep) -> list[dict[str, np.ndarray]]:
    """Whole gradients (before clipping) of every optimizer step from now on."""
    steps: list[dict[str, np.ndarray]] = []
    update = learner.backend.update

    def watched(lr: float) -> float:
        named = learner.backend.model.named_parameters()
        steps.append({name: p.grad.numpy().copy() for name, p in named if p.grad is not None})
        return update(lr)

    learner.backend.update = watched  # type: ignore[method-assign]
    return steps
