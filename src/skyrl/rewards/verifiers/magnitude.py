"""How large the value of an expression may be, estimated without computing it."""

from __future__ import annotations

import math
from typing import Any

import sympy

MAX_DIGITS = 200_000.0
"""Digits of a whole number on the way to a value. ``9^{9^9}`` has 370 million."""
_MAX_EXPONENT = 4e6
"""Digits before the point of a power of a number that isn't rational, such as ``e^{e^{9}}``."""
_TERMS = 4.0
"""Digits of the bounds of a sum or product."""
_MAX_DEPTH = 60
_SHORT = 100.0
"""Digits of what may be computed to see how large it is."""


class TooLarge(ValueError):
    """Computing it might take for ever."""


def digits(expression: Any, depth: int = 0) -> float:
    """An upper bound for the digits of an expression's value, of its parts, and of their inverses; what holds variables
    counts as 1, so it must be looked at again when there are numbers in their place.

    Raises:
        TooLarge: if a part has more than can be computed in a moment.
    """
    if depth > _MAX_DEPTH:
        raise TooLarge("nested too deeply")
    if isinstance(expression, sympy.Rational):
        return max(abs(expression.p).bit_length(), expression.q.bit_length()) * math.log10(2)
    if not getattr(expression, "args", ()):
        return 1.0
    parts = [digits(part, depth + 1) for part in expression.args]
    if isinstance(expression, sympy.Sum | sympy.Product):
        _check_terms(expression)
    return 1.0 if expression.free_symbols else _of_constant(expression, parts)


def _of_constant(expression: Any, parts: list[float]) -> float:
    if isinstance(expression, sympy.factorial | sympy.gamma | sympy.binomial):
        return _limited(_number(expression.args[-1], parts[-1]) * max(parts), MAX_DIGITS)
    if isinstance(expression, sympy.exp | sympy.sinh | sympy.cosh):
        return _limited(_number(expression.args[0], parts[0]), _MAX_EXPONENT)
    if isinstance(expression, sympy.Pow):
        size = _number(expression.args[1], parts[1])
        return _limited(size * max(parts[0], 1.0), MAX_DIGITS if expression.args[0].is_Rational else _MAX_EXPONENT)
    return sum(parts) if isinstance(expression, sympy.Add | sympy.Mul) else max(parts)


def _number(expression: Any, size: float) -> float:
    """The absolute value of an expression with so many digits, or a bound for it."""
    return abs(complex(sympy.N(expression, 5))) if size <= _SHORT else 10.0 ** min(size, 300)


def _limited(size: float, limit: float) -> float:
    if size > limit:
        raise TooLarge(f"{size:.2g} digits")
    return size


def _check_terms(expression: Any) -> None:
    for end in (end for _, *both in expression.limits for end in both):
        if not (end.free_symbols or end.is_infinite or (end.is_integer and digits(end) <= _TERMS)):
            raise TooLarge("terms")
