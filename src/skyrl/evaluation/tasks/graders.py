"""Verifiers of the tasks' own: what the built-in ones can't say in one truth. Each takes the answer and its truth as a
JSON object, returns 1.0 or 0.0, and raises :class:`DataError` for a broken truth. :data:`GRADERS` gives them names."""

from __future__ import annotations

import json
import re
from fractions import Fraction
from typing import Any

from skyrl.records import DataError
from skyrl.rewards.verifiers.choice import choice_verifier
from skyrl.rewards.verifiers.exact import exact_verifier
from skyrl.rewards.verifiers.math import math_verifier
from skyrl.rewards.verifiers.numeric import parse_number

LETTERS = "ABCDEFGHIJ"


def option_verifier(answer: str, truth: str) -> float:
    """``{"letter": "B", "options": ["a cat", "a dog"]}``: right if the answer names the letter, or if it names none
    and is the option's text, which no other option has too."""
    wanted = _object(truth, "letter", "options")
    letter, options = str(wanted["letter"]), [str(option) for option in wanted["options"]]
    if letter not in LETTERS[: len(options)]:
        raise DataError(f"letter {letter!r} with {len(options)} options; allowed: one of {LETTERS[: len(options)]}")
    if any(choice_verifier(answer, name) for name in LETTERS[: len(options)]):
        return choice_verifier(answer, letter)
    named = {
        LETTERS[place] for place, option in enumerate(options) if option.strip() and exact_verifier(answer, option)
    }
    return float(named == {letter})


def any_of_verifier(answer: str, truth: str) -> float:
    """``{"truths": ["24/7", "3.429"]}``: right if the answer equals one of them: as a number (off by 0.005
    at most, and by half a per cent), as mathematics where the truth has digits, or else as a text."""
    truths = [str(one) for one in _object(truth, "truths")["truths"]]
    if not truths:
        raise DataError("'truths' is empty; allowed: one or more")
    return float(any(_same(answer, one) for one in truths))


def rounded_verifier(answer: str, truth: str) -> float:
    """``{"number": "1.45", "digits": 2}``: right if the answer is the number once it is rounded to so many digits after
    the point; ``null`` instead of digits asks for the exact number."""
    wanted = _object(truth, "number", "digits")
    expected, given = parse_number(str(wanted["number"])), parse_number(answer)
    if expected is None:
        raise DataError(f"{wanted['number']!r} is not a number")
    if given is None or wanted["digits"] is None:
        return float(given == expected)
    half = Fraction(1, 2 * 10 ** int(wanted["digits"]))
    return float(abs(given - expected) <= half)


def numbers_verifier(answer: str, truth: str) -> float:
    """``{"numbers": "[1, 2.5]", "error": "1e-2", "ordered": true}``: right if the answer has as many numbers,
    and each is off by no more than the error (null: none). Without order both are sorted before."""
    wanted = _object(truth, "numbers", "error", "ordered")
    expected, given = _numbers(str(wanted["numbers"])), _numbers(answer)
    if not expected:
        raise DataError(f"{wanted['numbers']!r} is no list of numbers such as [1, 2.5]")
    if given is None or len(given) != len(expected):
        return 0.0
    if not wanted["ordered"]:
        given, expected = sorted(given), sorted(expected)
    error = Fraction(str(wanted["error"] or 0))
    return float(all(abs(one - two) <= error for one, two in zip(given, expected, strict=True)))


def yes_no_verifier(answer: str, truth: str) -> float:
    """Truth ``yes`` or ``no`` (no JSON): right if the answer begins with that word and does not also say the other."""
    wanted = truth.strip().casefold()
    if wanted not in ("yes", "no"):
        raise DataError(f"got {truth!r}; allowed: yes or no")
    words = re.findall(r"[a-z]+", answer.casefold())
    return float(words[:1] == [wanted] and {"yes": "no", "no": "yes"}[wanted] not in words)


GRADERS = {
    f"task_{name}": f"{__name__}:{name}_verifier" for name in ("option", "any_of", "rounded", "numbers", "yes_no")
}
"""As ``reward.verifiers``: name → ``package.module:function``."""


def _same(answer: str, truth: str) -> bool:
    expected = parse_number(truth)
    if expected is not None:  # often given with two digits; half a per cent keeps tiny numbers apart
        given = parse_number(answer)
        return given is not None and abs(given - expected) <= min(Fraction(1, 200), abs(expected) / 200)
    if exact_verifier(answer, truth):
        return True
    return any(letter.isdigit() for letter in truth) and bool(math_verifier(answer, truth))


def _numbers(text: str) -> list[Fraction] | None:
    """The numbers of ``[1, 2]``, ``(1, 2)`` or ``1, 2``; None if one of the parts is none."""
    parts = text.strip().strip("$").strip().removeprefix("[").removesuffix("]").strip("()").split(",")
    found = [parse_number(part) for part in parts]
    return None if None in found else [one for one in found if one is not None]


def _object(truth: str, *names: str) -> dict[str, Any]:
    try:
        found = json.loads(truth)
    except ValueError as error:
        raise DataError(f"the truth {truth[:100]!r} is no JSON object: {error}") from error
    if not isinstance(found, dict) or set(found) != set(names):
        raise DataError(f"the truth {truth[:100]!r}; allowed: a JSON object with {', '.join(names)}")
    return found
