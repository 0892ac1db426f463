"""Multiple choice, A to J."""

from __future__ import annotations

import re

from skyrl.records import DataError

_ALONE = re.compile(r"\(?([A-Ja-j])\)?[.:]?")
"""The whole answer is a letter: ``B``, ``b``, ``(B)``, ``B.``"""
_LEADING = re.compile(r"(?:\(([A-J])\)|([A-J])[).:])(?=\s)")
"""A letter, a mark, and the text of the choice: ``B) text``, ``(B) text``, ``B. text``."""
_SENTENCE = re.compile(r"[Aa]nswer(?: is|:) \(?([A-J])\)?(?=[.,;:!]|$)")
"""``The answer is B``. The letter must end the clause: "the answer is A dog" names no choice."""


def parse_choice(text: str) -> str | None:
    """The letter A-J that an answer names, or ``None`` if it names none in a clear form.

    Several sentences "answer is …" count as their last one; a list such as ``A or B`` names none.
    """
    text = " ".join(text.split())
    if match := _ALONE.fullmatch(text):
        return match.group(1).upper()
    if match := _LEADING.match(text):
        return match.group(1) or match.group(2)
    named = _SENTENCE.findall(text)
    return named[-1] if named else None


def choice_verifier(answer: str, truth: str) -> float:
    """1.0 if the answer names the same letter as the truth, else 0.0. A truth without one is a :class:`DataError`."""
    expected = parse_choice(truth)
    if expected is None:
        raise DataError(f"the truth {truth[:100]!r} of a 'choice' prompt names no letter A-J")
    return float(parse_choice(answer) == expected)
