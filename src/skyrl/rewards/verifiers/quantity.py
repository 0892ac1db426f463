"""One number with its unit, exact. Nothing is evaluated: a text either has the form of a number or isn't one."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fractions import Fraction

from skyrl.rewards.verifiers.units import Unit, foreign, read_unit, same_kind

MAX_CHARACTERS = 200
"""Longer texts are no single number: bounds the work that a hostile answer can cause."""

MIN_DIGITS = 6
"""Significant digits that a decimal needs to stand for a number that it can't write in full, such as 1/3 or π."""

_FLOAT = 10**14
"""Decimals of 15 digits or more may be off by one in the last, as floats are."""

# ASCII digits only (\d would take those of every script), and at most three digits of exponent, so that the exact
# fraction stays small.
GROUPED = r"(?<!_)[1-9][0-9]{0,2}(?:(?:,[0-9]{3})+|(?: [0-9]{3})+)(?![0-9]|,[0-9])"
"""``1,234,567`` or ``1 234 567``; not the 2 128 of ``\\log_2 128``."""
_OVERLINE = r"\\(?:overline|bar|dot)\s*(?:\{[0-9]+\}|[0-9])"


def _number(recurring: str) -> str:
    return rf"(?:(?:(?:{GROUPED})|[0-9]+)(?:\.[0-9]*(?:{recurring})?)?|\.[0-9]+(?:{recurring})?|\.(?:{recurring}))"


NUMBER = _number(_OVERLINE)
"""A number without a sign: ``12``, ``1,234.5``, ``.5``, ``0.1\\overline{6}``."""
_BRACKETED = _number(r"\([0-9]+\)")
"""``0.1(6)``; only where it is the whole text, else it is a product."""
_SCIENTIFIC = rf"(?:{NUMBER})(?:[eE][+-]?[0-9]{{1,3}}(?![0-9]))?"
_BRACED = rf"\{{\s*([+-]?\s*{_SCIENTIFIC})\s*\}}"
_MAGNITUDE = re.compile(
    rf"(?P<whole>[0-9]+)\s*\\frac\s*(?:\{{\s*(?P<t1>[0-9]+)\s*\}}\s*\{{\s*(?P<b1>[0-9]+)\s*\}}|(?P<t2>[0-9])\s*(?P<b2>[0-9]))"
    r"|(?P<whole3>[0-9]+) (?P<t3>[0-9]+)\s*/\s*(?P<b3>[0-9]+)"
    rf"|\\frac\s*(?:{_BRACED.replace('(', '(?P<t4>', 1)}\s*{_BRACED.replace('(', '(?P<b4>', 1)}"
    r"|(?P<t5>[0-9])\s*(?P<b5>[0-9]))"
    rf"|(?:(?P<times>{NUMBER})\s*[*x]\s*)?10\s*\^\s*(?:\{{\s*(?P<e1>[+-]?[0-9]{{1,3}})\s*\}}"
    r"|\((?P<e2>[+-]?[0-9]{1,3})\)|(?P<e3>[+-]?[0-9]{1,3})(?![0-9.]))"
    rf"|(?P<t6>{_SCIENTIFIC})\s*/\s*(?P<b6>[+-]?{_SCIENTIFIC})"
    rf"|(?P<plain>{_BRACKETED}(?=\s*$)|{_SCIENTIFIC})"
)
_MONEY = r"(?:US|CA|AU|NZ|HK|SG)?\$|[€£¥₹]|(?:USD|EUR|GBP|JPY|INR|CNY|RMB|Rs\.?)(?= ?[0-9])"
_HEAD = re.compile(rf"([+-])?\s*({_MONEY})?\s*([+-])?\s*")
_SCALE = re.compile(r"\s*(?:\\text\{)?\s*(hundred|thousand|million|billion|trillion|dozen)s?\b\}?", re.IGNORECASE)
_SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
_PERCENT = re.compile(r"\s*(?:\\text\{)?\s*(?:%|per ?cent\b|percentage\b|pct\b)(?: points?)?\}?", re.IGNORECASE)
_GOES_ON = re.compile(r"([0-9]*\.[0-9]*?)([0-9]{1,6}?)\2{2,}\.\.\.$")
_ORDINAL = re.compile(r"(?:\^\s*\{?)?(?:\\text\{)?(?:st|nd|rd|th)\}*$")


@dataclass(frozen=True)
class Quantity:
    """A number as it was written.

    Attributes:
        value: The number; of ``12%`` it is 12.
        percent: Whether a sign of per cent follows.
        unit: Unit or noun behind it, or the currency; ``None`` if there is none.
        last: One unit of the last place that a decimal of :data:`MIN_DIGITS` digits or more was written with (1/10^7
            for ``1.0000000``), 0 for other forms.
        plain: Whether it is a decimal with a point, as it was written.
        money: The currency whose sign is in front; ``None`` if there is none.
    """

    value: Fraction
    percent: bool = False
    unit: Unit | None = None
    last: Fraction = Fraction(0)
    plain: bool = False
    money: Unit | None = None


def decimal_value(text: str) -> Fraction:
    """The exact value of a text of the form :data:`NUMBER`, perhaps with an exponent."""
    text, _, exponent = (
        text.replace(",", "").replace(" ", "").lower().partition("e") if "\\" not in text else (text, "", "")
    )
    text = text.replace(",", "").replace(" ", "")
    match = re.fullmatch(r"([0-9]*)(?:\.([0-9]*))?(?:\\[a-z]+\{?([0-9]+)\}?|\(([0-9]+)\))?", text)
    if match is None:
        raise ValueError(f"{text!r} is no decimal")
    whole, places, recurring = match[1], match[2] or "", match[3] or match[4]
    value = Fraction(int(whole + places or "0"), 10 ** len(places))
    if recurring:
        value += Fraction(int(recurring), (10 ** len(recurring) - 1) * 10 ** len(places))
    return value * Fraction(10) ** int(exponent or 0)


def _magnitude(match: re.Match[str]) -> Fraction:
    for whole, top, bottom in (("whole", "t1", "b1"), ("whole", "t2", "b2"), ("whole3", "t3", "b3")):
        if match[top] is not None:
            part = Fraction(int(match[top]), int(match[bottom]))
            if part >= 1:  # 2 3/2 and 2\frac{3}{2} are no mixed numbers
                raise ValueError("no proper fraction")
            return int(match[whole]) + part
    for top, bottom in (("t4", "b4"), ("t5", "b5"), ("t6", "b6")):
        if match[top] is not None:
            return _signed(match[top]) / _signed(match[bottom])
    exponent = match["e1"] or match["e2"] or match["e3"]
    if exponent is not None:
        return decimal_value(match["times"] or "1") * Fraction(10) ** int(exponent)
    return decimal_value(match["plain"])


def _signed(text: str) -> Fraction:
    sign = -1 if text.lstrip().startswith("-") else 1
    return sign * decimal_value(text.lstrip("+- "))


def last_place(text: str) -> Fraction:
    """One unit of the last place of a decimal of :data:`MIN_DIGITS` significant digits or more; 0 for other texts."""
    mantissa, _, exponent = text.lower().partition("e")
    digits = re.sub(r"[^0-9]", "", mantissa).lstrip("0")
    if "." not in text or re.search(r"[\\(]", text) or len(digits) < MIN_DIGITS:
        return Fraction(0)
    return Fraction(10) ** (int(exponent or 0) - len(mantissa.partition(".")[2]))


def _unit_of(rest: str, money: str | None) -> tuple[Unit | None, Unit | None]:
    """Unit of a number, from what follows it and the sign of money in front, and that sign's; ``ValueError`` if it has
    none."""
    rest = "" if _ORDINAL.fullmatch(rest) else rest
    behind = read_unit(rest) if rest.strip() else None
    if rest.strip() and behind is None:
        raise ValueError(f"{rest!r} is no unit")
    before = read_unit(" " + money) if money else None
    if before is None or behind is None or not behind.powers or behind.powers == before.powers:
        return (behind if before is None else before), before
    if any(power > 0 for _, power in behind.powers):
        raise ValueError(f"{money} {rest}: two units")
    return read_unit(f" {money} {rest}"), before  # $5 per hour


def read_quantity(text: str) -> Quantity | None:
    """The number that a canonical text (:func:`skyrl.rewards.verifiers.normalise.canonical`) consists of, with sign,
    currency, per cent and unit; ``None`` if it isn't one number: ``nan``, ``1/0``, ``1+1``, ``2 or 3``, words."""
    if len(text) > MAX_CHARACTERS:
        return None
    text = text.strip()
    while text.startswith("(") and text.endswith(")") and text.count("(") == 1:
        text = text[1:-1].strip()
    if text.endswith("..."):
        text = _GOES_ON.sub(r"\1\\overline{\2}", text)
    head = _HEAD.match(text)
    assert head is not None  # all of it is optional
    match = _MAGNITUDE.match(text, head.end())
    if match is None or (head[1] and head[3]):
        return None
    try:
        value = _magnitude(match) * (-1 if "-" in (head[1], head[3]) else 1)
        rest = text[match.end() :]
        if scale := _SCALE.match(rest):
            value, rest = value * _SCALES[scale[1].lower()], rest[scale.end() :]
        percent = _PERCENT.match(rest)
        unit, money = _unit_of(rest[percent.end() :] if percent else rest, head[2])
    except (ValueError, ZeroDivisionError):
        return None
    plain = "" if scale else match["plain"] or ""
    return Quantity(value, percent is not None, unit, last_place(plain), "." in plain, money)


def in_common_unit(answer: Quantity, truth: Quantity) -> tuple[Quantity, Quantity] | None:
    """Both in one unit, per cent left aside; ``None`` if their units differ in kind, or the answer's may change the
    number. A number without a unit is taken to be in the other's."""
    if foreign(answer.unit, truth.unit):
        return None
    if answer.unit is None or truth.unit is None or not answer.unit.powers or not truth.unit.powers:
        return answer, truth
    if not same_kind(answer.unit, truth.unit):
        left_out = (
            answer.money is not None and answer.money == truth.money and answer.money in (answer.unit, truth.unit)
        )
        return (answer, truth) if left_out else None  # $5 and $5 per hour
    return scaled(answer, answer.unit.size), scaled(truth, truth.unit.size)


def scaled(quantity: Quantity, factor: Fraction) -> Quantity:
    """The quantity with its value in a unit that is ``factor`` times smaller."""
    return replace(quantity, value=quantity.value * factor, last=quantity.last * factor)


def close(answer: Quantity, truth: Quantity) -> bool:
    """Equal; or one is a decimal of at least :data:`MIN_DIGITS` digits, rounded or cut, of the other, which no decimal
    writes in full (1/3 and 0.333333). Units count for nothing here."""
    if answer.value == truth.value:
        return True
    for one, other in ((answer, truth), (truth, answer)):
        if not _terminates(other.value) and stands_for(one.value, one.last, other.value):
            return True
    return False


def _terminates(value: Fraction) -> bool:
    return pow(10, value.denominator.bit_length(), value.denominator) == 0


def stands_for(decimal: Fraction, last: Fraction, full: Fraction) -> bool:
    """Whether a decimal whose last place is worth ``last`` is ``full``, rounded or cut there; not if it is 0."""
    if not last or decimal * full < 0:
        return False
    written, whole = abs(decimal / last), abs(full / last)
    exact_enough = abs(written - whole) * (1 if written >= _FLOAT else 2) <= 1
    return exact_enough or written == int(whole)
