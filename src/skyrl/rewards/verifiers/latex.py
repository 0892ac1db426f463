"""Formulas as LaTeX that can be read in one way only."""

from __future__ import annotations

import re

from skyrl.rewards.verifiers.expressions import CLOSES, FUNCTIONS, GREEK, MAX_DEPTH, NotMathematics, is_number, tokens
from skyrl.rewards.verifiers.quantity import decimal_value

_NAMES = {
    *FUNCTIONS,
    *GREEK,
    *("frac", "binom", "infty", "sum", "prod", "int", "iint", "oint", "lim", "to", "partial", "mod", "pmod"),
    *("bmod", "lfloor", "rfloor", "lceil", "rceil", "lvert", "rvert", "begin", "end", "mathbb", "overline"),
    *("bar", "vec", "hat", "zeta", "eta", "kappa", "nu", "xi", "chi", "upsilon", "ell", "varepsilon"),
    *("vartheta", "Theta", "Lambda", "Psi", "Xi", "Re", "Im", "arg"),
}
_COMMANDS = {"\\" + name for name in _NAMES} | {"\\\\", "\\{", "\\}", "\\|"}
"""What the grammar knows; it passes over some that it does not."""
_WRAPPED = {"\\cbrt": ("\\sqrt[3]{", "}"), "\\exp": ("e^{", "}"), "\\abs": ("\\left|", "\\right|")}

_COMPUTED = {"\\gcd", "\\lcm", "\\binom"}
"""What the grammar computes while it reads."""
_HUGE = re.compile(r"\^\{[^{}]*(?:[\^!]|[0-9]{5})|\)!|[0-9]{5}!|\\binom\{[^{}]*[0-9]{5}")
"""Powers and factorials that may take too long."""


class _Writer:
    """Writes tokens as LaTeX with every argument in braces, so that there is one way to read it."""

    def __init__(self, found: list[str]) -> None:
        self.tokens, self.place, self.depth = found, 0, 0
        # In the grammar I is the imaginary unit (and loses its exponent); i is a variable, as in the index of a sum.
        text = "".join(found)
        self.imaginary = "(I)" if not re.search(r"_\{?i|i=", text) else "i"

    def peek(self) -> str:
        return self.tokens[self.place] if self.place < len(self.tokens) else ""

    def run(self, close: str = "") -> str:
        """Everything up to the token ``close``, which is taken too."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise NotMathematics("nested too deeply")
        parts: list[str] = []
        while self.place < len(self.tokens) and self.peek() != close:
            parts.append(self.one())
        if close:
            if self.peek() != close:
                raise NotMathematics(f"{close!r} is missing")
            self.place += 1
        self.depth -= 1
        return "".join(parts)

    def one(self) -> str:
        token = self.tokens[self.place]
        self.place += 1
        if token in ("^", "_"):
            written = self.argument()
            while token == self.peek() == "^":  # a^b^c is a^(b^c)
                written += self.one()
            return f"{token}{{{written}}}"
        if token == "\\sqrt":
            return f"\\sqrt{self.option()}{{{self.argument()}}}"
        if token == "I":  # not the imaginary unit
            part = self.one() if self.peek() == "_" else ""
            return f"q_{{I{part.strip('_{}')}}}"
        if token in _WRAPPED:
            before, after = _WRAPPED[token]
            return f"{before}{self.argument()}{after}"
        if token in ("\\frac", "\\binom"):
            return f"{token}{{{self.argument(digits=True)}}}{{{self.argument(digits=True)}}}"
        if token in ("(", "[", "{"):
            return token + self.run(CLOSES[token]) + CLOSES[token]
        if token in (")", "]", "}"):
            raise NotMathematics(f"{token!r} closes nothing")
        if is_number(token):
            return self.number(token)
        return {"i": self.imaginary, "*": "\\cdot ", "'": "_{prime}", "∞": "\\infty "}.get(
            token, f"{token} " if token[0] == "\\" else token
        )

    def number(self, token: str) -> str:
        try:
            value = decimal_value(token)
        except ValueError as error:  # .\bar1e999, or more digits than Python reads
            raise NotMathematics(str(error)) from None
        top, bottom = value.numerator, value.denominator
        if self.peek() == "°":  # the grammar would take 60° for 60 radians
            self.place += 1
            return f"(\\frac{{{top}\\cdot \\pi }}{{{180 * bottom}}})"
        written = str(top) if bottom == 1 else f"\\frac{{{top}}}{{{bottom}}}"
        if not token.isdigit() or self.peek() != "\\frac":
            return written
        part = self.one()
        match = re.fullmatch(r"\\frac\{(\d+)\}\{(\d+)\}", part)
        mixed = match is not None and 0 < int(match[1]) < int(match[2])
        return f"({written}+{part})" if mixed else written + part

    def option(self) -> str:
        if self.peek() != "[":
            return ""
        self.place += 1
        return f"[{self.run(']')}]"

    def argument(self, digits: bool = False) -> str:
        """What a command or ``^`` is applied to: a group, or one token, or one digit of a number."""
        token = self.peek()
        if token in ("(", "{") and not (digits and token == "("):
            self.place += 1
            return self.run(CLOSES[token])
        if not token:
            raise NotMathematics("the formula breaks off")
        if digits and len(token) > 1 and token.isdigit():
            self.tokens[self.place] = token[1:]
            return token[0]
        if token in ("-", "+"):
            self.place += 1
            return token + self.argument()
        return self.one()


def to_latex(text: str) -> str:
    """The formula as LaTeX, decimals as fractions.

    Raises:
        NotMathematics: if the text holds words or unknown commands, or breaks off.
    """
    found = tokens(text)
    if {"∞", "\\infty"} & set(found) and not {"\\sum", "\\prod", "\\int", "\\lim"} & set(found):
        raise NotMathematics("infinity is no number")
    unknown = [token for token in found if token[0] == "\\" and token.partition("{")[0] not in _COMMANDS]
    bars = found.count("|")
    if unknown or bars % 2 or bars > MAX_DEPTH:  # which | opens and which one closes is tried in all ways
        raise NotMathematics(f"unknown commands {unknown}, or a number of | that is odd or above {MAX_DEPTH}")
    try:
        latex = _Writer(found).run()
    except RecursionError:
        raise NotMathematics("nested too deeply") from None
    if _COMPUTED & set(found) and _HUGE.search(latex):
        raise NotMathematics("too large")
    return latex
