"""The exact value of plain arithmetic, and of formulas with numbers put in for their variables."""

from __future__ import annotations

from fractions import Fraction
from math import factorial
from zlib import crc32

from skyrl.rewards.verifiers.expressions import CLOSES, GREEK, MAX_DEPTH, NotMathematics, is_number, tokens
from skyrl.rewards.verifiers.quantity import decimal_value

MAX_BITS = 40_000
"""Of a numerator or denominator: 2006! has 19,000. Larger numbers are left to sympy."""
_NO_VARIABLE = {"i", "d"}
"""Letters with a meaning: the imaginary unit, a differential."""
_CALLED = set("fghFGPp")
"""Letters before a bracket that are functions."""


class _NotPlain(ValueError):
    """Not plain arithmetic, or numbers that are too large."""


class _Arithmetic:
    """Recursive descent over tokens. Each number stays below :data:`MAX_BITS`, each nesting below :data:`MAX_DEPTH`."""

    def __init__(self, found: list[str], point: int | None) -> None:
        self.tokens, self.place, self.depth, self.point = found, 0, 0, point

    def peek(self) -> str:
        return self.tokens[self.place] if self.place < len(self.tokens) else ""

    def take(self, *allowed: str) -> str:
        token = self.peek()
        if not token or (allowed and token not in allowed):
            raise _NotPlain(token)
        self.place += 1
        return token

    def sum(self) -> Fraction:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _NotPlain("nested too deeply")
        value = self.product()
        while self.peek() in ("+", "-"):
            value = value + self.product() if self.take() == "+" else value - self.product()
        self.depth -= 1
        return _bounded(value)

    def product(self) -> Fraction:
        value = self.signed()
        while (token := self.peek()) and token not in ("+", "-", ")", "}", "]"):
            if token == "/":
                self.take()
                value /= self.signed()
            elif token == "*":
                self.take()
                value *= self.signed()
            elif is_number(token):  # two numbers side by side
                raise _NotPlain(token)
            else:
                value *= self.power()
            value = _bounded(value)
        return value

    def signed(self) -> Fraction:
        negative = False
        if self.peek() in ("+", "-"):
            negative = self.take() == "-"
        value = self.power()
        return -value if negative else value

    def power(self) -> Fraction:
        value = self.atom()
        while self.peek() == "!":
            self.take()
            if value.denominator != 1 or not 0 <= value <= 3000:
                raise _NotPlain("!")
            value = Fraction(factorial(int(value)))
        if self.peek() != "^":
            return value
        self.take()
        exponent = self.signed()
        bits = max(value.numerator.bit_length(), value.denominator.bit_length())
        if exponent.denominator != 1 or bits * abs(exponent) > MAX_BITS:
            raise _NotPlain("^")
        return value ** int(exponent)

    def atom(self) -> Fraction:
        token = self.take()
        if token in CLOSES:
            value = self.sum()
            self.take(CLOSES[token])
            return value
        if token == "\\frac":
            top = self.argument()
            return top / self.argument()
        if is_number(token):
            value = decimal_value(token)
            return value + self.proper_fraction() if value.denominator == 1 and token.isdigit() else value
        return self.variable(token)

    def variable(self, token: str) -> Fraction:
        """The value put in for a variable, or for π or e, which no equation with rational numbers binds."""
        greek = token[1:] in GREEK and token[0] == "\\"
        if self.point is None or not (greek or (token.isalpha() and token not in _NO_VARIABLE)):
            raise _NotPlain(token)
        if self.peek() == "_":
            self.take()
            first = self.place
            if self.take() == "{":
                while self.take() != "}":
                    pass
            token += "_" + "".join(self.tokens[first : self.place]).strip("{}")
        if (token in _CALLED and self.peek() == "(") or self.peek() == "'":
            raise _NotPlain(token)
        mixed = crc32(f"{token} {self.point}".encode())
        return Fraction(2 + mixed % 9973, 3 + (mixed >> 16) % 101)

    def proper_fraction(self) -> Fraction:
        """The fraction of a mixed number such as ``3\\frac{1}{7}``, or 0."""
        if self.peek() != "\\frac":
            return Fraction(0)
        before, saved = self.place, list(self.tokens)
        value = self.atom()
        if 0 < value < 1 and not {"-", "+", "/", "."} & set("".join(self.tokens[before : self.place])):
            return value
        self.place, self.tokens = before, saved
        return Fraction(0)

    def argument(self) -> Fraction:
        """One argument of ``\\frac``: a group, or one digit."""
        if self.peek() == "{":
            return self.atom()
        token = self.take()
        if not is_number(token):
            raise _NotPlain(token)
        self.place -= 1
        if len(token) > 1:  # \frac12: the second digit is the other argument
            self.tokens[self.place] = token[1:]
        else:
            self.place += 1
        return Fraction(int(token[0]))


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise _NotPlain("too large")
    return value


def exact(text: str, point: int | None = None) -> Fraction | None:
    """The value of plain arithmetic: numbers, ``+ - * / ^ !``, ``\\frac``, brackets; ``None`` for anything else.

    With a ``point``, variables are allowed: each has its own value there. Formulas that agree at several points are
    equal, but for a chance of about one in 10,000 at each.
    """
    try:
        reader = _Arithmetic(tokens(text), point)
        value = reader.sum()
    except (NotMathematics, _NotPlain, ZeroDivisionError, ValueError, RecursionError):
        return None
    return value if reader.place == len(reader.tokens) else None
