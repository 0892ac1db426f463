"""Weighted draws without replacement, as a race."""

from __future__ import annotations

import numpy as np


def race(weights: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """Draw up to ``n`` distinct places one after the other, each with chance ∝ weight among those not drawn yet.

    Every place waits for a time from Exp(1) / weight, and the first ``n`` to come are drawn. The place i comes first
    with chance w_i / Σ w, and since waiting has no memory the same holds for the rest from then on: this is exactly
    successive sampling (Efraimidis and Spirakis, 2006).

    Args:
        weights: float64 [N], finite, 0 or more. A weight of 0 is never drawn.
        n: places wanted, 0 or more.
        rng: gives one number for each weight above 0.

    Returns:
        int64 [k] in the order drawn; k < n only if fewer weights are above 0.
    """
    live = np.flatnonzero(weights)
    times = rng.standard_exponential(live.size) / weights[live]
    first = np.argpartition(times, n)[:n] if n < live.size else np.arange(live.size)
    return live[first[np.argsort(times[first], kind="stable")]]
