"""Which of a run's samples a page shows: marks of what is worth a look, and a choice that leaves none of them out."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa

MARKS = {
    "disagree": "the rule says wrong and the reward model gives more than to the median right answer of the same step, "
    "or right and less than to the median wrong one",
    "false claim": "at least one statement contradicts what is known of the picture",
    "cut off": "the length limit ended it",
    "longest": "among the longest twentieth of the samples",
    "error": "it could not be scored",
    "replayed": "drawn from the Selective Sample Buffer",
}
PLAIN = "no mark"
NUMBERS = ["step", "split", "origin", "tokens", "truncated", "rule", "model", "false_claims", "error", "kind"]
"""Columns that the marks are made from."""


def marks_of(table: pa.Table) -> dict[str, np.ndarray]:
    """Mark → how strong it is, float64 [N]: above 0 where a sample has it.

    Args:
        table: the columns :data:`NUMBERS` of N samples.
    """

    def numbers(name: str) -> np.ndarray:
        return table[name].cast(pa.float64()).to_numpy(zero_copy_only=False)  # null becomes nan

    tokens = numbers("tokens")
    many = np.quantile(tokens, 0.95) if len(tokens) else 0.0
    return {
        "disagree": _disagreement(table, numbers("rule"), numbers("model")),
        "false claim": np.nan_to_num(numbers("false_claims")),
        "cut off": numbers("truncated"),
        "longest": np.where(tokens >= many, tokens, 0.0)
        if len(tokens) and many > tokens.min()
        else np.zeros(len(tokens)),
        "error": table["error"].is_valid().to_numpy(zero_copy_only=False).astype(float),
        "replayed": np.array([origin == "replayed" for origin in table["origin"].to_pylist()], dtype=float),
    }


def _disagreement(table: pa.Table, rule: np.ndarray, model: np.ndarray) -> np.ndarray:
    """How far, in raw units of the reward model, an answer is on the wrong side of the others of its step."""
    gap = np.zeros(len(rule))
    known = ~np.isnan(rule) & ~np.isnan(model)
    right = rule >= 1
    of_split = np.array([split == "eval" for split in table["split"].to_pylist()], dtype=int)
    steps = table["step"].to_numpy() * 2 + of_split
    order = np.argsort(steps, kind="stable")
    for places in np.split(order, np.flatnonzero(np.diff(steps[order])) + 1):
        good, bad = places[known[places] & right[places]], places[known[places] & ~right[places]]
        if len(good) and len(bad):
            gap[bad], gap[good] = model[bad] - np.median(model[good]), np.median(model[bad]) - model[good]
    return np.maximum(gap, 0.0)


def choose(marks: Mapping[str, np.ndarray], steps: np.ndarray, limit: int) -> np.ndarray:
    """Places of at most ``limit`` samples, ascending. Each mark, and the samples without one, get a place in turn: the
    strongest first, among equals the newest. Those without a mark come in a fixed random order.

    Args:
        marks: as :func:`marks_of` gives them, [N] each.
        steps: int [N].
    """
    if len(steps) <= limit:
        return np.arange(len(steps))
    shuffled = np.random.default_rng(0).permutation(len(steps))
    plain = np.where(np.any([strength > 0 for strength in marks.values()], axis=0), 0.0, 1.0 + shuffled)
    turn = np.full(len(steps), np.inf)
    for strength in (*marks.values(), plain):
        own = np.flatnonzero(strength > 0)
        ranked = own[np.lexsort((-steps[own], -strength[own]))]
        turn[ranked] = np.minimum(turn[ranked], np.arange(len(ranked)))
    return np.sort(np.lexsort((-steps, turn))[:limit])
