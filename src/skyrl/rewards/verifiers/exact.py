"""Equality of short texts."""

from __future__ import annotations

from skyrl.records import DataError


def exact_verifier(answer: str, truth: str) -> float:
    """1.0 if both texts are equal but for case and whitespace, else 0.0.

    Runs of whitespace count as one space, and none at the ends.

    Raises:
        DataError: if the truth is empty; an empty answer would be right.
    """
    expected = _normal(truth)
    if not expected:
        raise DataError("the truth of an 'exact' prompt is empty; it needs some text")
    return float(_normal(answer) == expected)


def _normal(text: str) -> str:
    return " ".join(text.split()).casefold()
