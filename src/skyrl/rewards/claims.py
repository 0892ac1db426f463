"""Hallucination monitor: exact checks of what an answer claims to see, against what the picture is known to show.

No judge model is involved: a claim is checked only if a fact about it is known. The rates follow CHAIR
(Rohrbach et al. 2018): CHAIR_i counts false claims, CHAIR_s counts answers with a false claim.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from skyrl.records import DataError


@dataclass(frozen=True, slots=True)
class Claim:
    """One checkable statement about the picture."""

    start: int
    """First character of the claim in the answer text."""
    end: int
    """One past its last character."""
    text: str
    """``answer[start:end]``."""
    true: bool
    """Whether the known facts agree with it."""


Checker = Callable[[str, Any], list[Claim]]
"""Takes an answer text and the value of one fact, and returns the claims about that fact."""

# One character class without nested repetition, so that matching is linear in the text.
_SEEN = re.compile(r"\bI see ([0-9][0-9/]*)")


def check_grid(text: str, grid: Any) -> list[Claim]:
    """Check every digit named in an ``I see ROW/ROW`` statement of a digit scene.

    Each digit claims "this digit stands in this row and column". It is false if another digit stands there, and
    also if the picture has no such place. Digits that a statement leaves out claim nothing.

    Args:
        text: The whole answer. All of its statements are checked.
        grid: The digits of the picture, row by row, for example ``[[3, 1], [4, 1]]``; rows may differ in length.

    Raises:
        DataError: if ``grid`` isn't rows of digits 0-9.
    """
    rows = _digit_rows(grid)
    claims = []
    for seen in _SEEN.finditer(text):
        row = column = 0
        for place in range(seen.start(1), seen.end(1)):
            if text[place] == "/":
                row, column = row + 1, 0
                continue
            exists = row < len(rows) and column < len(rows[row])
            true = exists and rows[row][column] == int(text[place])
            claims.append(Claim(place, place + 1, text[place], true))
            column += 1
    return claims


def _digit_rows(grid: Any) -> list[list[int]]:
    try:
        rows = [[int(digit) for digit in row] for row in grid]
    except (TypeError, ValueError):
        raise DataError(f"fact 'grid' is {grid!r}; allowed: rows of digits such as [[3, 1], [4, 1]]") from None
    if any(not 0 <= digit <= 9 for row in rows for digit in row):
        raise DataError(f"fact 'grid' is {grid!r}; every digit must be 0-9")
    return rows


CHECKERS: dict[str, Checker] = {"grid": check_grid}
"""Name of a fact (a key of ``Prompt.facts``) → its checker."""


def register_checker(name: str, fn: Checker) -> None:
    """Check claims about the fact ``name`` with ``fn``. Replaces an earlier checker of that name.

    The registry is that of this process: register wherever answers are scored.
    """
    CHECKERS[name] = fn


def check_claims(text: str, facts: Mapping[str, Any]) -> list[Claim]:
    """All checkable claims of an answer, sorted by their place in it.

    Args:
        text: The answer, tags included.
        facts: ``Prompt.facts``. ``{}`` gives ``[]``; a fact without a checker is ignored.

    Raises:
        DataError: if a fact is malformed.
    """
    claims = [claim for name, fact in facts.items() if name in CHECKERS for claim in CHECKERS[name](text, fact)]
    return sorted(claims, key=lambda claim: (claim.start, claim.end))


@dataclass(frozen=True, slots=True)
class HallucinationRates:
    """Rates in [0, 1] over a set of picture answers; ``nan`` where the denominator is 0."""

    chair_i: float
    """False claims / claims."""
    chair_s: float
    """Picture answers with at least one false claim / picture answers."""
    coverage: float
    """Picture answers with at least one claim / picture answers. A low CHAIR_s means little if this is low too:
    an answer that claims nothing can't be false."""


def hallucination_rates(counts: Sequence[tuple[int, int]]) -> HallucinationRates:
    """CHAIR_i, CHAIR_s and coverage of a set of answers.

    Args:
        counts: (claims, false claims) of each picture answer with known facts. An empty sequence gives ``nan``
            for all three rates; if nobody claimed anything, only CHAIR_i is ``nan``.

    Raises:
        ValueError: if an answer has more false claims than claims.
    """
    for place, (claims, false) in enumerate(counts):
        if not 0 <= false <= claims:
            raise ValueError(f"counts[{place}] is {(claims, false)}; false claims must lie in 0 … claims")
    answers, total = len(counts), sum(claims for claims, _ in counts)
    nan = float("nan")
    return HallucinationRates(
        chair_i=sum(false for _, false in counts) / total if total else nan,
        chair_s=sum(false > 0 for _, false in counts) / answers if answers else nan,
        coverage=sum(claims > 0 for claims, _ in counts) / answers if answers else nan,
    )
