"""What changes from step to step by plan: the learning rate, how far a stage of the run is, the reference."""

from __future__ import annotations

import math

from skyrl.settings import Config, LearnerConfig, MpoConfig, Schedule, Stage


def learning_rate(cfg: LearnerConfig, step: int, total_steps: int) -> float:
    """Learning rate of step 1, 2, … ``total_steps``: linear warm-up, then constant or a cosine.

    Example: lr 1.0 and two warm-up steps give 0.5 at step 1 and 1.0 at step 2.
    """
    if step <= cfg.warmup_steps:
        return cfg.lr * step / cfg.warmup_steps
    if cfg.schedule is Schedule.constant:
        return cfg.lr
    done = (step - cfg.warmup_steps) / max(1, total_steps - cfg.warmup_steps)
    return cfg.lr * (cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def stage_progress(cfg: Config, step: int) -> float:
    """0 at the first step of the stage that ``step`` is in, 1 at its last: ``mpo_then_grpo`` has two stages, all else
    one."""
    first, last = 1, cfg.controller.steps
    if cfg.algorithm.stage is Stage.mpo_then_grpo:
        border = cfg.algorithm.mpo_steps
        first, last = (1, border) if step <= border else (border + 1, last)
    return min(1.0, (step - first) / max(1, last - first))


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
