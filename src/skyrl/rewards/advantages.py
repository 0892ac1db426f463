"""Group advantages: how much better is an answer than the others to the same prompt?"""

from __future__ import annotations

import numpy as np

from skyrl.settings import Std

FLOAT32_NOISE = 1e-6
"""Reward models compute in float32: scores of equal answers differ by up to about eight units in the last place, this
share of their size."""
_ROUNDING = 4 * float(np.finfo(np.float64).eps)
_UNDERFLOW = 1e-150


def group_advantages(rewards: np.ndarray, std: Std, noise: float = FLOAT32_NOISE) -> np.ndarray:
    """Advantages of one group (Skywork R1V2, Eq. 6): A_i = (r_i - mean(r)) / std(r).

    Nothing is added to the divisor, so A doesn't change when every reward is shifted, or when rewards and ``noise`` are
    multiplied by a positive number. A group whose rewards tie gets exact zeros instead.

    Args:
        rewards: [G], the rewards of the answers to one prompt. Read only; may be an integer array.
        std: Divisor: the population's (divides by G) or the sample's (by G - 1) standard deviation, or none.
        noise: Rewards that differ by no more than this tie, see :func:`tied`. The default is for values in 0 … 1.

    Returns:
        float64 [G]. Sums to 0; its squares sum to G (population) or G - 1 (sample) unless the group ties.

    Raises:
        ValueError: for fewer than 2 rewards, another shape than [G], or a reward that isn't finite.
    """
    values = np.asarray(rewards, dtype=np.float64)
    if values.ndim != 1 or values.size < 2:
        raise ValueError(f"rewards has shape {values.shape}; a group advantage needs one axis of at least 2 values")
    if not np.isfinite(values).all():
        raise ValueError(f"rewards must be finite, got {values.tolist()}")
    if tied(values, noise):
        return np.zeros_like(values)
    centred = values - values.mean()
    if std is Std.none:
        return centred
    return centred / centred.std(ddof=1 if std is Std.sample else 0)


def tied(values: np.ndarray, noise: float) -> bool:
    """Whether the spread (largest minus smallest) of [G] values is at most ``noise``: dividing by such a spread would
    blow rounding up to advantages of size 1. What float64 itself rounds off the values counts as noise too, and a
    spread whose square is 0."""
    return bool(np.ptp(values) <= noise + max(_ROUNDING * np.abs(values).max(), _UNDERFLOW))


def float32_noise(part: np.ndarray) -> float:
    """How much of the spread of one part [G] of the rewards of a group may be rounding: :data:`FLOAT32_NOISE` times
    the largest absolute value, but never more than the spread.

    So a large value that is the same for all answers adds no noise: it must not make a tie of what another part says.
    """
    return float(min(np.ptp(part), FLOAT32_NOISE * np.abs(part).max())) if part.size else 0.0
