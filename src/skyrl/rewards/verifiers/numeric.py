"""Equality of numbers within a tolerance. Nothing is evaluated: a text either has the form of a number or isn't one."""

from __future__ import annotations

import re
from fractions import Fraction

from skyrl.records import DataError

MAX_CHARACTERS = 100
"""Longer texts are no numbers: bounds the work that a hostile answer can cause."""

# ASCII digits only (\d would take those of every script), and at most three digits of exponent, so that the exact
# fraction stays small. Every repetition is followed by something it can't match itself: no backtracking.
_PLAIN = r"[+-]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)?(?:\.[0-9]*)?(?:[eE][+-]?[0-9]{1,3})?"
_NUMBER = re.compile(rf"({_PLAIN})(?:\s*/\s*({_PLAIN}))?\s*(%?)")


def parse_number(text: str) -> Fraction | None:
    """Read a decimal (``-1,234.5``, ``2e3``), a fraction (``3/4``) or a percentage (``12%``, which is 0.12).

    Surrounding whitespace and ``$`` are ignored, as is a final full stop; ``−`` counts as a minus sign.

    Returns:
        The exact value; ``None`` if the text isn't one number (``nan``, ``inf``, ``1/0`` and words aren't).
    """
    text = text.strip().strip("$").strip()
    if len(text) > MAX_CHARACTERS:
        return None
    match = _NUMBER.fullmatch(text.replace("−", "-").removesuffix("."))
    if match is None:
        return None
    numerator, denominator, percent = match.groups()
    top = _plain(numerator)
    bottom = Fraction(1) if denominator is None else _plain(denominator)
    if top is None or not bottom:
        return None
    return top / bottom / (100 if percent else 1)


def _plain(text: str) -> Fraction | None:
    try:
        return Fraction(text.replace(",", ""))
    except ValueError:  # the pattern lets through what has no digit, such as "-" or "."
        return None


def numeric_verifier(answer: str, truth: str, tolerance: float = 1e-6) -> float:
    """1.0 if |answer − truth| ≤ tolerance · max(1, |truth|), else 0.0.

    Args:
        answer: Whatever the policy wrote; anything but one number is wrong.
        truth: A number, in one of the forms of :func:`parse_number`.
        tolerance: Relative, and absolute for a truth below 1.

    Raises:
        DataError: if the truth isn't a number.
    """
    expected = parse_number(truth)
    if expected is None:
        raise DataError(f"the truth {truth[:MAX_CHARACTERS]!r} of a 'numeric' prompt is not a number such as -1,234.5")
    value = parse_number(answer)
    if value is None:
        return 0.0
    return float(abs(value - expected) <= Fraction(tolerance) * max(Fraction(1), abs(expected)))
