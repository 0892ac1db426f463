"""Equality of numbers within a tolerance. Nothing is evaluated: a text either has the form of a number or isn't one."""

from __future__ import annotations

import re
from fractions import Fraction

from skyrl.records import DataError
from skyrl.rewards.verifiers.normalise import bare, canonical, fold
from skyrl.rewards.verifiers.quantity import MAX_CHARACTERS, Quantity, close, in_common_unit, read_quantity, scaled

_ASSIGNED = re.compile(r"[A-Za-z](?:_\{?[A-Za-z0-9]{1,10}\}?)?\s*=\s*")


def _read(text: str) -> Quantity | None:
    text = text.strip()
    if len(text) > MAX_CHARACTERS:
        return None
    text = canonical(bare(fold(text)))
    assigned = _ASSIGNED.match(text)
    return read_quantity(text[assigned.end() :] if assigned else text)


def parse_number(text: str) -> Fraction | None:
    """The exact value of a decimal (``-1,234.5``, ``2e3``, ``1.6\\times 10^{-19}``), a fraction or mixed number
    (``3/4``, ``2 1/2``) or a percentage (``12%``, which is 0.12), perhaps with a unit or currency; ``None`` if the text
    isn't one number (``nan``, ``inf``, ``1/0``, ``1+1``, ``2 or 3`` and words aren't). Decoration counts for nothing
    (:func:`skyrl.rewards.verifiers.normalise.bare`)."""
    quantity = _read(text)
    return None if quantity is None else _plain(quantity)


def _plain(quantity: Quantity) -> Fraction:
    return quantity.value / 100 if quantity.percent else quantity.value


def numeric_verifier(answer: str, truth: str, tolerance: float = 1e-6) -> float:
    """1.0 if |answer − truth| ≤ tolerance · |truth|, or if one is the other rounded to six digits or more (0.166667 and
    1/6; not with a tolerance of 0), else 0.0. So nothing but 0 is 0.

    A unit on one side only counts for nothing; two units must measure the same (5 cm is 0.05 m, but not 5 m). An answer
    that :func:`parse_number` can't read is wrong, such a truth a :class:`DataError`.
    """
    expected, given = _read(truth), _read(answer)
    if expected is None:
        raise DataError(f"the truth {truth[:100]!r} of a 'numeric' prompt is not a number such as -1,234.5")
    values = None if given is None else in_common_unit(given, expected)
    if given is None or values is None:
        return 0.0
    one, other = (scaled(part, Fraction(1, 100)) if part.percent else part for part in values)
    if abs(one.value - other.value) <= Fraction(str(tolerance)) * abs(other.value):
        return 1.0
    return float(tolerance > 0 and close(one, other))
