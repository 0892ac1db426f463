"""Equality of short texts."""

from __future__ import annotations

from skyrl.records import DataError
from skyrl.rewards.verifiers.normalise import composed, fold

MAX_CHARACTERS = 10_000
"""Answers that are longer by so many, and 20 times as long as the truth, are wrong unread."""


def exact_verifier(answer: str, truth: str) -> float:
    """1.0 if both texts are equal but for case, whitespace and Unicode form, else 0.0.

    Runs of whitespace count as one space, those at the ends for nothing, nor do characters that can't be seen. Accents,
    punctuation and ``x²`` against ``x2`` are differences. An empty truth is a :class:`DataError`.
    """
    expected = _plain(truth)
    if not expected:
        raise DataError("the truth of an 'exact' prompt is empty; it needs some text")
    if len(answer) > MAX_CHARACTERS + 20 * len(truth):
        return 0.0
    return float(_plain(answer) == expected)


def _plain(text: str) -> str:
    return composed(fold(text).casefold())
