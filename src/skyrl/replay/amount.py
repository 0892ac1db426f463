"""How much is replayed in a step, and what each replayed sample weighs. Pure functions."""

from __future__ import annotations

import math

import numpy as np

from skyrl.replay.ssb import Drawn
from skyrl.settings import BufferConfig


def replay_places(fresh: int, effective: int, cfg: BufferConfig) -> int:
    """How many samples to draw from the buffer.

    Replay takes places that ineffective fresh samples leave free, so it never outgrows the rollout batch::

        n = min(round(mix · fresh), fresh − effective)

    and with ``fill_target`` no more than the smallest n with (effective + n) / fresh ≥ fill_target.

    Args:
        fresh: samples of the rollout batch, failed ones too.
        effective: those of them that train, because they carry a signal (with ``grpo.filter=all`` nearly all).
        cfg: ``enabled``, ``mix`` and ``fill_target`` count.

    Raises:
        ValueError: unless 0 ≤ effective ≤ fresh.
    """
    if not 0 <= effective <= fresh:
        raise ValueError(f"{effective} effective of {fresh} fresh samples; allowed: 0 … fresh")
    if not cfg.enabled:
        return 0
    places = min(round(cfg.mix * fresh), fresh - effective)
    if cfg.fill_target is not None and fresh:
        needed = math.ceil(cfg.fill_target * fresh)
        if (needed - 1) / fresh >= cfg.fill_target:  # 0.07 · 100 is a little more than 7 in floats
            needed -= 1
        places = min(places, max(0, needed - effective))
    return places


def importance_weights(drawn: list[Drawn], size: int) -> np.ndarray:
    """float64 [n]: 1/(N·P) of each drawn sample, for N = ``size`` units in the buffer at the time of the draw.

    With one draw, weight · x has the expectation mean(x) over the buffer, whatever P is. For x = A and P ∝ |A| the
    weighted advantage of every sample is sign(A) · mean|A| over the buffer.

    Raises:
        ValueError: for a size below 1 with drawn samples.
    """
    if drawn and size < 1:
        raise ValueError(f"{len(drawn)} samples drawn from a buffer of size {size}; allowed: 1 or more")
    weights: np.ndarray = 1.0 / (size * np.array([one.probability for one in drawn], dtype=np.float64))
    return weights


def replay_weights(drawn: list[Drawn], size: int, cfg: BufferConfig) -> np.ndarray:
    """float64 [n]: the GRPO weight of each drawn sample.

    Ones, or with ``importance_correction`` 1/(N·P) divided by its mean, so that replay as a whole weighs as much as
    without the correction. N drops out then. The division costs exactness: a single drawn sample weighs 1, whatever its
    P; a few are corrected in part; and where much of the buffer is drawn the weights are too uneven, because drawing
    is without replacement (docs/selective_sample_buffer.md has figures).

    Raises:
        ValueError: as :func:`importance_weights`.
    """
    if not cfg.importance_correction or not drawn:
        return np.ones(len(drawn))
    weights = importance_weights(drawn, size)
    weights /= weights.mean()
    return weights
