"""Choosing preference pairs among the answers of one group. Numpy only: the buffer needs no torch."""

from __future__ import annotations

import math

import numpy as np


def select_pairs(
    scores: np.ndarray, valid: np.ndarray, threshold: float, pairs_per_prompt: int
) -> list[tuple[int, int, float]]:
    """Preference pairs of one group, chosen by the reward model and gated by a margin.

    The best answer is paired with the worst, the second best with the second worst, and so on, so each answer
    is used once at most and the margins fall; the first pair below the threshold ends the list. Equal scores are
    ordered by index. Answers of equal score make no pair, even at threshold 0.

    Args:
        scores: float [G], raw reward-model scores r_θ.
        valid: bool [G]; answers that could not be scored are False and their score is ignored.
        threshold: smallest r_θ(chosen) − r_θ(rejected), in raw units.
        pairs_per_prompt: most pairs returned; 0 or more.

    Returns:
        ``(chosen, rejected, margin)`` with indices into ``scores``, the largest margin first.

    Raises:
        ValueError: for shapes that do not fit, a valid score that is not finite, a threshold that is nan, or a
            negative ``pairs_per_prompt``.
    """
    scores, valid = np.asarray(scores, dtype=np.float64), np.asarray(valid, dtype=bool)
    if scores.ndim != 1 or scores.shape != valid.shape:
        raise ValueError(f"scores have shape {scores.shape}, valid {valid.shape}; allowed: [G] and [G]")
    if math.isnan(threshold) or pairs_per_prompt < 0:
        raise ValueError(
            f"threshold is {threshold}, pairs_per_prompt {pairs_per_prompt}; allowed: a number and 0 or more"
        )
    members = np.flatnonzero(valid)
    broken = members[~np.isfinite(scores[members])]
    if broken.size:
        raise ValueError(
            f"reward-model scores of samples {broken.tolist()} are {scores[broken].tolist()}; allowed: finite"
        )
    order = members[np.argsort(-scores[members], kind="stable")]
    pairs: list[tuple[int, int, float]] = []
    for place in range(min(pairs_per_prompt, len(order) // 2)):
        chosen, rejected = int(order[place]), int(order[-1 - place])
        margin = float(scores[chosen] - scores[rejected])
        if margin < threshold or margin <= 0:
            break
        pairs.append((chosen, rejected, margin))
    return pairs
