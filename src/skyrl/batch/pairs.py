"""Choosing preference pairs among the answers of one group. Numpy only.

Every builder returns ``(chosen, rejected, margin)`` with indices into the group. An answer is in one pair at most, and
the margins r_θ(chosen) − r_θ(rejected), in raw reward-model units, never rise along the list: the first pair that the
threshold stops ends it.
"""

from __future__ import annotations

import math

import numpy as np

Pair = tuple[int, int, float | None]
"""Chosen index, rejected index, margin (``None`` without a reward model)."""
NO_THRESHOLD = -math.inf


def reward_margin_pairs(
    scores: np.ndarray, valid: np.ndarray, threshold: float, most: int, choosable: np.ndarray | None = None
) -> list[Pair]:
    """Preference pairs of one group, chosen by the reward model and gated by a margin.

    The best answer is paired with the worst, the second best with the second worst, and so on. Equal scores are
    ordered by index. Answers of equal score make no pair, whatever the threshold.

    Args:
        scores: float [G], raw reward-model scores r_θ.
        valid: bool [G]; answers that take no part are False and their score is ignored.
        threshold: smallest margin; -inf lets every pair of unequal scores pass.
        most: most pairs returned; 0 or more.
        choosable: bool [G]; answers that are False can only be rejected. ``None``: all may be chosen.

    Raises:
        ValueError: for shapes that do not fit, a valid score that is not finite, a threshold that is nan, or a
            negative ``most``.
    """
    scores, members, choosable = _checked(scores, valid, choosable, threshold, most)
    best_first = members[np.argsort(-scores[members], kind="stable")]
    pairs = _matched(best_first[choosable[best_first]], best_first[::-1], scores, threshold, most)
    return [(chosen, rejected, margin) for chosen, rejected, margin in pairs if margin and margin > 0]


def rule_pairs(
    right: np.ndarray,
    scores: np.ndarray | None,
    valid: np.ndarray,
    threshold: float,
    most: int,
    choosable: np.ndarray | None = None,
) -> list[Pair]:
    """Preference pairs of one group: a right against a wrong answer by the rule.

    The reward model chooses which: the right answer of the highest r_θ with the wrong one of the lowest, the second
    highest with the second lowest, and so on. Equal scores are ordered by index, and so are all answers without a
    reward model; their margins are ``None``, which passes only if there is no threshold.

    Args:
        right: bool [G]: right by the rule.
        scores: float [G], raw reward-model scores r_θ; ``None`` without a reward model.
        threshold: smallest margin; -inf lets every pair pass, also of a negative margin.

    The other arguments and the errors are those of :func:`reward_margin_pairs`.
    """
    right = np.asarray(right, dtype=bool)
    keys = np.zeros(right.shape) if scores is None else scores
    keys, members, choosable = _checked(keys, valid, choosable, threshold, most)
    if right.shape != keys.shape:
        raise ValueError(f"right has shape {right.shape}, scores {keys.shape}; allowed: [G] and [G]")
    good, wrong = members[right[members] & choosable[members]], members[~right[members]]
    good = good[np.argsort(-keys[good], kind="stable")]
    wrong = wrong[np.argsort(keys[wrong], kind="stable")]
    return _matched(good, wrong, None if scores is None else keys, threshold, most)


def _checked(
    scores: np.ndarray, valid: np.ndarray, choosable: np.ndarray | None, threshold: float, most: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores as float64 [G], the places of the valid ones, and what may be chosen as bool [G]."""
    scores, valid = np.asarray(scores, dtype=np.float64), np.asarray(valid, dtype=bool)
    choosable = np.ones_like(valid) if choosable is None else np.asarray(choosable, dtype=bool)
    if scores.ndim != 1 or not scores.shape == valid.shape == choosable.shape:
        raise ValueError(
            f"scores have shape {scores.shape}, valid {valid.shape}, choosable {choosable.shape}; allowed: [G] each"
        )
    if math.isnan(threshold) or most < 0:
        raise ValueError(f"threshold is {threshold}, most pairs {most}; allowed: a number and 0 or more")
    broken = np.flatnonzero(valid & ~np.isfinite(scores))
    if broken.size:
        raise ValueError(
            f"reward-model scores of samples {broken.tolist()} are {scores[broken].tolist()}; allowed: finite"
        )
    return scores, np.flatnonzero(valid), choosable


def _matched(
    chosen: np.ndarray, rejected: np.ndarray, scores: np.ndarray | None, threshold: float, most: int
) -> list[Pair]:
    """Pair the first of ``chosen`` with the first of ``rejected`` and so on, each index once, while they pass."""
    pairs: list[Pair] = []
    used: set[int] = set()
    waiting = iter(rejected.tolist())
    for one in chosen.tolist():
        if len(pairs) == most:
            break
        if one in used:
            continue
        other = next((place for place in waiting if place != one and place not in used), None)
        if other is None:
            break
        margin = None if scores is None else float(scores[one] - scores[other])
        if threshold != NO_THRESHOLD and (margin is None or margin < threshold):
            break
        pairs.append((one, other, margin))
        used |= {one, other}
    return pairs
