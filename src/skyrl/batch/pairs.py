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
    scores: np.ndarray, valid: np.ndarray, choosable: np.ndarray, threshold: float, most: int
) -> list[Pair]:
    """Preference pairs of one group, chosen by the reward model and gated by a margin.

    The best answer is paired with the worst, the second best with the second worst, and so on. Equal scores are
    ordered by index. Answers of equal score make no pair, whatever the threshold.

    Args:
        scores: float64 [G], raw reward-model scores r_θ; finite where ``valid``.
        valid: bool [G]; answers that take no part are False.
        choosable: bool [G]; answers that are False can only be rejected.
        threshold: smallest margin; -inf lets every pair of unequal scores pass.
        most: most pairs returned.
    """
    members = np.flatnonzero(valid)
    best_first = members[np.argsort(-scores[members], kind="stable")]
    pairs = _matched(best_first[choosable[best_first]], best_first[::-1], scores, threshold, most)
    return [(chosen, rejected, margin) for chosen, rejected, margin in pairs if margin and margin > 0]


def rule_pairs(
    right: np.ndarray, scores: np.ndarray | None, valid: np.ndarray, choosable: np.ndarray, threshold: float, most: int
) -> list[Pair]:
    """Preference pairs of one group: a right (bool [G]) against a wrong answer by the rule.

    The reward model chooses which: the right answer of the highest r_θ with the wrong one of the lowest, the second
    highest with the second lowest, and so on. Equal scores are ordered by index, and so are all answers without a
    reward model (``scores`` is ``None``); their margins are ``None``, which passes only if there is no threshold.
    Without one pairs of a negative margin pass too. The other arguments are those of :func:`reward_margin_pairs`.
    """
    keys = np.zeros(len(right)) if scores is None else scores
    good, wrong = np.flatnonzero(valid & right & choosable), np.flatnonzero(valid & ~right)
    good = good[np.argsort(-keys[good], kind="stable")]
    wrong = wrong[np.argsort(keys[wrong], kind="stable")]
    return _matched(good, wrong, scores, threshold, most)


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
