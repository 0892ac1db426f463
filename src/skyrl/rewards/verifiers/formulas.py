"""Whether two formulas are equal: exact arithmetic where that is enough, math-verify where it isn't.

Imported only in the verifier process: math-verify loads sympy, which some formulas (``9^{9^{9}}``) keep busy for ever,
so that the process has to be killed.
"""

from __future__ import annotations

import logging
import re
from contextlib import suppress
from fractions import Fraction
from functools import lru_cache
from typing import Any

import sympy
from latex2sympy2_extended import NormalizationConfig, latex2sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig
from math_verify.grader import should_treat_as_complex

from skyrl.rewards.verifiers.arithmetic import exact
from skyrl.rewards.verifiers.expressions import NotMathematics
from skyrl.rewards.verifiers.latex import to_latex
from skyrl.rewards.verifiers.magnitude import TooLarge, digits
from skyrl.rewards.verifiers.quantity import (
    Quantity,
    close,
    decimal_value,
    in_common_unit,
    last_place,
    read_quantity,
    scaled,
    stands_for,
)
from skyrl.rewards.verifiers.units import Unit, foreign, read_unit, same_kind

# It would warn on every start that its time limits are off; they are, on purpose (see parsed).
logging.getLogger("math_verify").setLevel(logging.ERROR)

_NORMAL = NormalizationConfig(basic_latex=True, units=False, malformed_operators=False, nits=False, boxed="none")
"""Its own removal of units takes away variables too ("5 t"); the rest is done before."""
_CONVERSION = ConversionConfig(interpret_as_mixed_fractions=False, lowercase_symbols=False)
_UNIT_TEXT = re.compile(
    r"\s*\\(?:text|mathrm|mbox|textbf|textit|textrm|operatorname)\s*\{|\s+(?=[A-Za-z°$€£]{2})|\s*(?=°)"
)
_OF_ANGLE = re.compile(r"sin|cos|tan|cot|sec|csc")
_DECIMAL = re.compile(r"[+-]?[0-9]*\.[0-9]+")
_ALL, _NONE = -1, 0
_POINTS = tuple(
    (sympy.Rational(top, bottom), negative)
    for top, bottom, negative in ((7, 5, _NONE), (91, 6, _NONE), (3, 11, _NONE), (17, 11, _ALL), (9, 7, 1), (13, 9, 2))
)
"""What is put in for the variables, each with something of its own added; and which of them are negative there: those
whose place, in binary, has a digit in common with this. So any two of four variables have different signs somewhere."""
_WHOLE = (sympy.Integer(3), _NONE)
"""Where rounded numbers (⌊x⌋) are looked at, too."""
_ROUNDED = (sympy.floor, sympy.ceiling, sympy.Mod)
_LARGEST = sympy.Float(10) ** 6000
"""Of larger numbers sympy does not know the difference."""
_NO_VALUE = (ArithmeticError, ValueError, TypeError, RecursionError, NotImplementedError)
"""What sympy raises for a sum that diverges, the factorial of -3, a logarithm to base 0."""
_DIGITS = 40
"""Digits of a number that is looked at."""
_EQUAL_DIGITS = 200
"""Numbers that agree in so many digits behind the point are equal; in so many leading ones, if they are below 1."""


def split_unit(text: str) -> tuple[str, Unit | None]:
    r"""A formula and the unit behind it: ``36\pi \text{ cm}^3``, ``2\sqrt{3} cm``."""
    if _OF_ANGLE.search(text):
        return text, None  # the sine of 60 is not that of 60°
    for match in _UNIT_TEXT.finditer(text[:300]):
        head, tail = text[: match.start()], text[match.start() :]
        if head.strip() and head.rstrip()[-1] not in "+-*/^=(,{_" and (unit := read_unit(" " + tail)) is not None:
            return head, unit
    return text, None


@lru_cache(maxsize=64)
def parsed(text: str) -> Any:
    """The sympy expression of a formula in canonical notation; ``None`` if it can't be read.

    math-verify's LaTeX grammar reads it; that evaluates no Python, as sympy's own parser does. Its time limits are off:
    they use SIGALRM, which works in a main thread only and can't end a loop in C. The runner kills this process.
    """
    try:
        latex = to_latex(text)
        real = not should_treat_as_complex(latex)
        expression = latex2sympy(latex, is_real=real, normalization_config=_NORMAL, conversion_config=_CONVERSION)
        digits(expression)
        return expression
    except (NotMathematics, TooLarge):
        return None
    except Exception:  # noqa: BLE001 - the grammar raises what it likes on a text that isn't in it
        return None


def readable(text: str) -> bool:
    """Whether a formula can be read at all."""
    bare_text, _ = split_unit(text)
    if read_quantity(text) is not None or exact(bare_text, point=0) is not None:
        return True
    return parsed(bare_text) is not None or parsed(text) is not None


def same_formula(answer: str, truth: str) -> bool:
    """Whether two formulas in canonical notation are equal."""
    given, expected = read_quantity(answer), read_quantity(truth)
    loose = expected is not None and expected.unit is not None and expected.unit.loose
    if given is not None and expected is not None and not (loose and given.unit is None):
        agree = _same_quantity(given, expected)
        if agree or not loose:
            return agree
    answer_text, answer_unit = _without_unit(answer, given)
    truth_text, truth_unit = (truth, None) if loose else _without_unit(truth, expected)
    if foreign(answer_unit, truth_unit):
        return False
    if answer_unit and truth_unit and answer_unit.powers and truth_unit.powers:
        same_unit = same_kind(answer_unit, truth_unit) and answer_unit.size == truth_unit.size
        if not same_unit:
            return False
    whole = answer_text != answer or truth.endswith("°")  # the grammar knows 180° as π
    return _same_value(answer_text, truth_text) or (whole and _same_value(answer, truth))


def _without_unit(text: str, quantity: Quantity | None) -> tuple[str, Unit | None]:
    if quantity is None or quantity.percent:
        head, unit = split_unit(text.rstrip().removesuffix("%"))
        return head.lstrip("$€£¥₹ "), unit
    return (
        f"({quantity.value.numerator})/({quantity.value.denominator})" if not quantity.plain else text,
        quantity.unit,
    )


def _same_quantity(given: Quantity, expected: Quantity) -> bool:
    if (given.percent and expected.unit) or (expected.percent and given.unit):
        return False
    values = in_common_unit(given, expected)
    if values is None:
        return False
    if close(*values):
        return True
    if given.percent == expected.percent:
        return False
    # 30 % is 0.3, and 30 where the question asks for per cent.
    return close(*(scaled(part, Fraction(1, 100)) if part.percent else part for part in values))


def _same_value(answer: str, truth: str) -> bool:
    if "".join(answer.split()) == "".join(truth.split()):
        return bool(answer.strip())
    if not answer.strip() or {"∅", "∞", "-∞"} & {answer.strip(), truth.strip()}:
        return False
    given, expected = exact(answer), exact(truth)
    if given is not None and expected is not None:
        return given == expected
    with suppress(NotMathematics):
        if to_latex(answer) == to_latex(truth):
            return True
    agree = same_rational_function(answer, truth)
    if agree is not None:
        return agree
    left, right = parsed(answer), parsed(truth)
    if left is None or right is None:
        return False
    for decimal, other in ((answer, right), (truth, left)):
        if _DECIMAL.fullmatch(decimal.strip()) and not other.free_symbols:
            return _approximates(decimal.strip(), other)
    return same_expressions(left, right)


def same_rational_function(answer: str, truth: str) -> bool | None:
    """Whether two formulas made of variables, numbers and ``+ - * / ^`` agree; ``None`` if they hold anything else, or
    one of them is a decimal that may stand for the other."""
    if _DECIMAL.fullmatch(answer.strip()) or _DECIMAL.fullmatch(truth.strip()):
        return None
    for point in range(4):
        given, expected = exact(answer, point), exact(truth, point)
        if given is None or expected is None:
            return None
        if given != expected:
            return False
    return True


def _approximates(decimal: str, number: Any) -> bool:
    try:
        value = sympy.N(number, _DIGITS)
    except _NO_VALUE:
        return False
    if not value.is_Float or not abs(value) < _LARGEST:
        return False
    rounded = (-1 if decimal.startswith("-") else 1) * decimal_value(decimal.lstrip("+-"))
    return stands_for(rounded, last_place(decimal), Fraction(str(value)))


def same_expressions(left: Any, right: Any) -> bool:
    """Whether two expressions are equal: by their values where they have some, else as they are written.

    math-verify's own comparison takes for 0 whatever is below 1e-15, and all infinite values for equal.
    """
    if not isinstance(left, sympy.Expr) or not isinstance(right, sympy.Expr):
        return bool(left == right)
    right = right.doit()
    if not right.free_symbols:
        sympy.N(right, _DIGITS)  # a truth without a value is an error, such an answer is wrong
    try:
        left = left.doit()
    except _NO_VALUE:
        return False
    agree = same_values(left, right)
    return agree if agree is not None else bool(left - right == 0)


def same_values(left: Any, right: Any) -> bool | None:
    """Whether the expressions agree in :data:`_EQUAL_DIGITS` places at every point of :data:`_POINTS`; ``None`` if they
    have no values at two of them. A point with negative values counts only where all roots and logarithms are real:
    ``sqrt(1/n)`` is meant for n > 0. But ``|x|`` is not x, nor ``ln|x|`` ln x."""
    symbols = sorted(left.free_symbols | right.free_symbols, key=str)
    points = (*_POINTS, _WHOLE) if left.has(*_ROUNDED) or right.has(*_ROUNDED) else _POINTS
    agreed = 0
    for point, negative in points if symbols else _POINTS[:1]:
        signs = [-1 if negative == _ALL or place & negative else 1 for place in range(len(symbols))]
        step = 1 if point.is_integer else sympy.Rational(1, 7)
        values = {symbol: signs[place] * (point + place * step) for place, symbol in enumerate(symbols)}
        if -1 in signs:
            real = [_is_real(part, values) for part in (left, right)]
            if real[0] != real[1] and left.has(sympy.Abs) != right.has(sympy.Abs):
                return False
            if not all(real):
                continue
        one, two = _value(left, values), _value(right, values)
        if one is None or two is None:
            continue
        size = max(one, two)
        places = _EQUAL_DIGITS + max(0, int(sympy.log(size, 10))) if size > 1 else _EQUAL_DIGITS
        gap = abs(sympy.N(left.subs(values) - right.subs(values), _DIGITS, maxn=2 * places))
        if not isinstance(gap, sympy.Number) or not gap.is_finite:
            continue
        if gap > size * sympy.Float(10) ** -places:
            return False
        agreed += 1
    return True if agreed >= 2 - (not symbols) else None


def _value(expression: Any, values: dict[Any, Any]) -> Any | None:
    """The size of an expression's value; ``None`` if it has none, or one that is too large to be compared."""
    try:
        with sympy.evaluate(False):
            replaced = expression.xreplace(values)
        digits(replaced)
        size = abs(sympy.N(expression.subs(values), _DIGITS))
    except _NO_VALUE:
        return None
    return size if isinstance(size, sympy.Number) and size.is_finite and size < _LARGEST else None


def _is_real(expression: Any, values: dict[Any, Any]) -> bool:
    """Whether no root or logarithm in an expression has a negative argument there."""
    for part in sympy.preorder_traversal(expression):
        rooted = part.is_Pow and not part.exp.is_integer
        if (rooted or isinstance(part, sympy.log)) and not part.args[0].subs(values).is_nonnegative:
            return False
    return True


def proportion(answer: str, truth: str) -> Fraction | Any | None:
    """The constant c ≠ 0 with answer = c · truth for all values of the variables; ``None`` if there is none."""
    points = [(exact(answer, point), exact(truth, point)) for point in range(4)]
    ratios = {one / other for one, other in points if one and other}
    if len(ratios) == 1 and all(one and other for one, other in points):
        return ratios.pop()
    if all(None not in pair for pair in points) and not re.search(r"/|\\frac|\^\s*\{?\s*-", answer + truth):
        return None  # polynomials
    left, right = parsed(answer), parsed(truth)
    if not isinstance(left, sympy.Expr) or not isinstance(right, sympy.Expr):
        return None
    if left.free_symbols != right.free_symbols or not left.free_symbols:
        return None
    left, right = (sympy.fraction(sympy.together(part))[0] for part in (left, right))  # y = 1/x is xy = 1
    if left.free_symbols != right.free_symbols or not left.free_symbols:
        return None
    values = {s: sympy.Rational(7 + 4 * k, 5 + 2 * k) for k, s in enumerate(sorted(left.free_symbols, key=str))}
    top, bottom = left.subs(values), right.subs(values)
    if bottom.is_zero or top.is_zero or not (bottom.is_finite and top.is_finite):
        return None
    return top / bottom if same_values(left, top / bottom * right) else None
