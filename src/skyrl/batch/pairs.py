"""Choosing preference pairs among the answers of one group. Numpy only: the buffer needs no torch.

Every builder returns ``(chosen, rejected, margin)`` with indices into the group. An answer is in one pair at most, and
the margins r_θ(chosen) − r_θ(rejected), in raw reward-model units, never rise along the list: the first pair that the
threshold stops ends it.
"""

from __future__ import annotations

import math

import numpy as np

Pair = tuple[int, int, float]
"""Chosen index, rejected index, margin (``nan`` without a reward model)."""
NO_THRESHOLD = -math.inf
RIGHT = 1.0
"""The rule score of a right answer; anything below is wrong."""


def reward_margin_pairs(
    scores: np.ndarray, valid: np.ndarray, threshold: float, most: int, choosable: np.ndarray | None = None
) -> list[Pair]:
    """Preference pairs of one group, chosen by the reward model and gated by a margin.

    The best answer is paired with the worst, the second best with the second worst, and so on. Equal scores are
    ordered by index. Answers of equal score make no pair, whatever the threshold.

    Args:
        scores: float [G], raw reward-model scores r_θ.
        valid: bool [G]; answers that could not be scored are False and their score is ignored.
        threshold: smallest margin; -inf lets every pair of unequal scores pass.
        most: most pairs returned; 0 or more.
        choosable: bool [G]; answers that are False can only be rejected. ``None``: all may be chosen.

    Raises:
        ValueError: for shapes that do not fit, a valid score that is not finite, a threshold that is nan, or a
            negative ``most``.
    """
    scores = np.asarray(scores, dtype=np.float64)
    valid, choosable = _checked(scores, valid, choosable, threshold, most)
    members = np.flatnonzero(valid)
    _require_finite(scores, members)
    best_first = members[np.argsort(-scores[members], kind="stable")]
    pairs = _matched(best_first[choosable[best_first]], best_first[::-1], scores, threshold, most)
    return [pair for pair in pairs if pair[2] > 0]


def rule_pairs(
    rules: np.ndarray,
    scores: np.ndarray,
    valid: np.ndarray,
    threshold: float,
    most: int,
    choosable: np.ndarray | None = None,
) -> list[Pair]:
    """Preference pairs of one group: a right against a wrong answer by the rule.

    The reward model chooses which: the right answer of the highest r_θ with the wrong one of the lowest, the second
    highest with the second lowest, and so on. Equal scores are ordered by index, and so are all answers without a
    reward model; their margins are ``nan``, which passes only if there is no threshold.

    Args:
        rules: float [G], rule scores; 1 or more is right, anything below wrong.
        scores: float [G], raw reward-model scores r_θ; ``nan`` for all valid answers if there is no reward model.
        valid: bool [G], as in :func:`reward_margin_pairs`.
        threshold: smallest margin; -inf lets every pair pass, also of a negative margin.
        most: most pairs returned; 0 or more.
        choosable: bool [G], as in :func:`reward_margin_pairs`.

    Raises:
        ValueError: for shapes that do not fit, a valid rule score that is nan, valid scores of which only some are
            finite, a threshold that is nan, or a negative ``most``.
    """
    rules, scores = np.asarray(rules, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    valid, choosable = _checked(scores, valid, choosable, threshold, most)
    if rules.shape != scores.shape:
        raise ValueError(f"rule scores have shape {rules.shape}, scores {scores.shape}; allowed: [G] and [G]")
    members = np.flatnonzero(valid)
    broken = members[np.isnan(rules[members])]
    if broken.size:
        raise ValueError(f"rule scores of samples {broken.tolist()} are nan; allowed: a number")
    with_model = not np.isnan(scores[members]).all()
    if with_model:
        _require_finite(scores, members)
    keys = scores if with_model else np.zeros_like(scores)
    is_right = rules >= RIGHT
    right, wrong = members[is_right[members] & choosable[members]], members[~is_right[members]]
    right = right[np.argsort(-keys[right], kind="stable")]
    wrong = wrong[np.argsort(keys[wrong], kind="stable")]
    return _matched(right, wrong, scores, threshold, most)


def _checked(
    scores: np.ndarray, valid: np.ndarray, choosable: np.ndarray | None, threshold: float, most: int
) -> tuple[np.ndarray, np.ndarray]:
    """The two masks as bool [G]."""
    valid = np.asarray(valid, dtype=bool)
    choosable = np.ones_like(valid) if choosable is None else np.asarray(choosable, dtype=bool)
    if scores.ndim != 1 or not scores.shape == valid.shape == choosable.shape:
        raise ValueError(
            f"scores have shape {scores.shape}, valid {valid.shape}, choosable {choosable.shape}; allowed: [G] each"
        )
    if math.isnan(threshold) or most < 0:
        raise ValueError(f"threshold is {threshold}, most pairs {most}; allowed: a number and 0 or more")
    return valid, choosable


def _require_finite(scores: np.ndarray, members: np.ndarray) -> None:
    broken = members[~np.isfinite(scores[members])]
    if broken.size:
        raise ValueError(
            f"reward-model scores of samples {broken.tolist()} are {scores[broken].tolist()}; allowed: finite"
        )


def _matched(chosen: np.ndarray, rejected: np.ndarray, scores: np.ndarray, threshold: float, most: int) -> list[Pair]:
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
        margin = float(scores[one] - scores[other])
        if not (margin >= threshold or threshold == NO_THRESHOLD):
            break
        pairs.append((one, other, margin))
        used |= {one, other}
    return pairs
