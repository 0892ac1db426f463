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
    """The exact value of a decimal (``-1,234.5``, ``2e3``), a fraction (``3/4``) or a percentage (``12%``, which is
    0.12); ``None`` if the text isn't one number (``nan``, ``inf``, ``1/0`` and words aren't). Whitespace and ``$``
    around it are ignored, as is a final full stop; ``−`` counts as a minus sign."""
    text = text.strip().strip("$").strip()
    if len(text) > MAX_CHARACTERS:
        return None
    match = _NUMBER.fullmatch(text.replace("−", "-").removesuffix("."))
    if match is None:
        return None
    top, bottom, percent = (part and part.replace(",", "") for part in match.groups())
    try:
        return Fraction(top) / Fraction(1 if bottom is None else bottom) / (100 if percent else 1)
    except (ValueError, ZeroDivisionError):  # the pattern lets through what has no digit, such as "-" or ".", and 1/0
        return None


def numeric_verifier(answer: str, truth: str, tolerance: float = 1e-6) -> float:
    """1.0 if |answer − truth| ≤ tolerance · max(1, |truth|), else 0.0. An answer that :func:`parse_number` can't read
    is wrong, such a truth a :class:`DataError`."""
    expected = parse_number(truth)
    if expected is None:
        raise DataError(f"the truth {truth[:MAX_CHARACTERS]!r} of a 'numeric' prompt is not a number such as -1,234.5")
    value = parse_number(answer)
    within = Fraction(tolerance) * max(Fraction(1), abs(expected))
    return float(value is not None and abs(value - expected) <= within)
