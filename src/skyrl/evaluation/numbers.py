"""What many answers to many questions come to, each number with a 95 % interval.

A question gives one value in [0, 1]; a number is the mean over the questions. Answers to one question are not
independent of each other, so the questions, and not the answers, are what an interval is taken over:

- where every question's value is 0 or 1 (one answer each, ``pass@n``, a vote without ties) the interval is Wilson's for
  one proportion, which also holds near 0 and 1;
- elsewhere it is mean ± t · s / √Q over the Q questions' values, cut to [0, 1]: the standard error *clustered by
  question* (E. Miller, "Adding error bars to evals", arXiv 2411.00640). It needs two questions that differ.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import comb, sqrt

import numpy as np
from scipy import stats

LEVEL = 0.95


@dataclass(slots=True, frozen=True)
class Estimate:
    """A mean over questions."""

    value: float
    low: float | None
    high: float | None
    """Ends of the interval; None where the values say nothing about it."""
    interval: str
    """``wilson``, ``clustered`` or ``none``."""
    questions: int


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of one value in [0, 1] per question, with its interval; :class:`ValueError` without values or for one
    that lies outside."""
    found = np.asarray(values, dtype=np.float64)
    if found.ndim != 1 or not len(found) or not ((found >= 0) & (found <= 1)).all():
        raise ValueError(f"got {found.tolist()[:5]}…; allowed: one value or more, each in [0, 1]")
    mean, count = float(found.mean()), len(found)
    if bool(((found == 0) | (found == 1)).all()):
        return Estimate(mean, *wilson(int(found.sum()), count), "wilson", count)
    spread = float(found.std(ddof=1)) if count > 1 else 0.0
    if spread == 0.0:
        return Estimate(mean, None, None, "none", count)
    half = float(stats.t.ppf(0.5 + LEVEL / 2, count - 1)) * spread / sqrt(count)
    return Estimate(mean, max(0.0, mean - half), min(1.0, mean + half), "clustered", count)


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """Wilson's interval of a proportion."""
    found = stats.binomtest(successes, trials).proportion_ci(LEVEL, method="wilson")
    return float(found.low), float(found.high)


def pass_at_k(n: int, right: int, k: int) -> float:
    """Chance that at least one of ``k`` answers is right, of which ``n`` were drawn and ``right`` were: without bias,
    1 − C(n − right, k) / C(n, k) (Chen et al., arXiv 2107.03374). :class:`ValueError` unless 1 ≤ k ≤ n and
    0 ≤ right ≤ n."""
    if not 1 <= k <= n or not 0 <= right <= n:
        raise ValueError(f"n is {n}, right {right}, k {k}; allowed: 1 ≤ k ≤ n and 0 ≤ right ≤ n")
    return 1.0 - comb(n - right, k) / comb(n, k)


def majority(votes: Sequence[int | None], right: Sequence[bool]) -> float:
    """Share of the winning vote that is right: 1 or 0 where one answer has the most votes, the mean over the winners
    where several have.

    Args:
        votes: For each answer to one question the number of what it says: equal answers have equal numbers. None does
            not vote: no answer was found.
        right: Whether it is right.
    """
    counts = Counter(vote for vote in votes if vote is not None)
    if not counts:
        return 0.0
    most = max(counts.values())
    winners = [vote for vote, count in counts.items() if count == most]
    shares = [np.mean([good for one, good in zip(votes, right, strict=True) if one == vote]) for vote in winners]
    return float(np.mean(shares))


def pass_sizes(n: int) -> list[int]:
    """The k of which pass@k is told: 1, 2, 4, … below ``n``, and ``n``."""
    return [*(1 << power for power in range(n.bit_length()) if 1 << power < n), n]
