"""Equality of short texts."""

from __future__ import annotations

from skyrl.records import DataError


def exact_verifier(answer: str, truth: str) -> float:
    """1.0 if both texts are equal but for case and whitespace, else 0.0. Runs of whitespace count as one space, those
    at the ends for nothing. An empty truth is a :class:`DataError`; an empty answer would be right."""
    given, expected = (" ".join(text.split()).casefold() for text in (answer, truth))
    if not expected:
        raise DataError("the truth of an 'exact' prompt is empty; it needs some text")
    return float(given == expected)
