"""The tokens of a formula in canonical notation (normalise.py). arithmetic.py and latex.py read them."""

from __future__ import annotations

import re
from itertools import pairwise

from skyrl.rewards.verifiers.quantity import NUMBER

MAX_DEPTH = 40
"""Of brackets and fractions inside each other."""
CLOSES = {"(": ")", "{": "}", "[": "]"}
FUNCTIONS = {
    *(
        "arcsin",
        "arccos",
        "arctan",
        "arccot",
        "asin",
        "acos",
        "atan",
        "sinh",
        "cosh",
        "tanh",
        "coth",
        "sin",
        "cos",
        "tan",
    ),
    *("cot", "sec", "csc", "log", "lg", "ln", "exp", "sqrt", "cbrt", "abs", "gcd", "lcm", "max", "min", "det"),
}
GREEK = {
    *("alpha", "beta", "gamma", "delta", "epsilon", "theta", "lambda", "mu", "rho", "sigma", "tau", "phi", "varphi"),
    *("psi", "omega", "pi", "Delta", "Gamma", "Omega", "Sigma", "Phi", "Pi"),
}
_SPELLED = {"asin": "arcsin", "acos": "arccos", "atan": "arctan", "lg": "log"}
_SPELLED |= {"infinity": "infty", "inf": "infty", "oo": "infty"}
KNOWN = {name: f"\\{_SPELLED.get(name, name)}" for name in (*FUNCTIONS, *GREEK, *_SPELLED, "mod")}
"""Name → command."""
_NAMES = "|".join(sorted(KNOWN, key=len, reverse=True))
_TOKEN = re.compile(
    rf"\s*(?:(?P<number>(?:{NUMBER})(?:[eE][+-]?[0-9]{{1,3}}(?![0-9A-Za-z.]))?)"
    r"|(?P<command>\\(?:begin|end)\{[a-zA-Z*]+\}|\\(?:[A-Za-z]+|.))"
    rf"|(?P<word>(?:{_NAMES})(?![A-Za-z]{{2}})|[A-Za-z]+)|(?P<sign>\S))"
)
_MAX_WORD = 3
"""Longer runs of letters are words, shorter ones products of variables."""


class NotMathematics(ValueError):
    """The text holds words, or breaks off."""


def tokens(text: str) -> list[str]:
    """The tokens of a formula: numbers, commands, letters and signs. Names such as ``sqrt`` and ``pi`` become commands.

    Raises:
        NotMathematics: if it has a run of more than three letters that names nothing, or signs that mean two things.
    """
    found: list[str] = []
    for match in _TOKEN.finditer(text.strip()):
        if word := match["word"]:
            if word in KNOWN:
                found.append(KNOWN[word])
            elif len(word) > _MAX_WORD:
                raise NotMathematics(f"{word!r} is a word")
            else:
                found += word
        else:
            found.append(match[match.lastgroup or 0])
    if ("!", "!") in pairwise(found):
        raise NotMathematics("5!! is a double factorial, and not (5!)!")
    if "--" in text or any(token.isdigit() and not token.isascii() for token in found):
        raise NotMathematics("-- may be a dash or two signs; digits are those of ASCII")
    for before, first, second in zip(["", *found], found, found[1:], strict=False):
        if is_number(first) and is_number(second) and before not in ("\\frac", "\\binom", "_"):
            raise NotMathematics("two numbers side by side")
        if is_number(first) and second in ("_", "'"):
            raise NotMathematics("a number with an index")
    return found


def is_number(token: str) -> bool:
    """Whether a token is a number."""
    return token[0] in "0123456789." and token != "."
