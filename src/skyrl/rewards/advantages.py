"""Group advantages: how much better is an answer than the others to the same prompt?"""

from __future__ import annotations

import numpy as np

from skyrl.settings import Std

_UNDERFLOW = 1e-150


def group_advantages(rewards: np.ndarray, std: Std, eps: float = 1e-6) -> np.ndarray:
    """Advantages of one group (Skywork R1V2, Eq. 6): A_i = (r_i - mean(r)) / std(r).

    Nothing is added to the divisor, so A doesn't change when every reward is multiplied by a positive number or
    shifted. A group whose rewards tie gets exact zeros instead.

    Args:
        rewards: [G], the rewards of the answers to one prompt. Read only; may be an integer array.
        std: Divisor: the population's (divides by G) or the sample's (by G - 1) standard deviation, or none.
        eps: What counts as a tie, see :func:`tied`.

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
    if tied(values, eps):
        return np.zeros_like(values)
    centred = values - values.mean()
    if std is Std.none:
        return centred
    return centred / centred.std(ddof=1 if std is Std.sample else 0)


def tied(values: np.ndarray, eps: float = 1e-6) -> bool:
    """Whether the spread (largest minus smallest) of [G] values is at most ``eps`` times the largest absolute value.

    Reward models compute in float32, so equal answers differ in about the seventh digit. Dividing by such a spread
    would blow rounding noise up to advantages of size 1. A spread below 1e-150 ties as well: its square is 0.
    """
    return bool(np.ptp(values) <= max(eps * np.abs(values).max(), _UNDERFLOW))


def effective_share(rule_advantages: np.ndarray) -> float:
    """Share of samples whose rule advantage is not 0, i.e. that carry a signal of the rule reward.

    Args:
        rule_advantages: Any shape, for example [samples] or [groups, G].

    Returns:
        A share in [0, 1]; ``nan`` for an empty array.
    """
    values = np.asarray(rule_advantages)
    return float(np.count_nonzero(values) / values.size) if values.size else float("nan")


def expected_effective_share(p: float, G: int) -> float:
    """Effective share to expect if each of G answers is right with probability p, on its own.

    A group has no signal only if all answers are right or all are wrong: 1 - p^G - (1 - p)^G. It shows how the
    signal vanishes as the policy gets better (G = 8: 0.57 at p = 0.9, 0.34 at p = 0.95).

    Args:
        p: Probability in [0, 1].
        G: Group size, at least 1.

    Raises:
        ValueError: if ``p`` or ``G`` is outside its range.
    """
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"p is {p}; a probability lies in [0, 1]")
    if G < 1:
        raise ValueError(f"G is {G}; a group has at least 1 sample")
    # max: rounding can leave -1e-17 where the share is exactly 0, for example at G = 1.
    return max(0.0, 1.0 - p**G - (1.0 - p) ** G)
