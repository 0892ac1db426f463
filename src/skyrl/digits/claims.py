"""Claims about digit scenes, checked against the known digits (the fact ``grid``)."""

from __future__ import annotations

import re
from typing import Any

from skyrl.records import DataError
from skyrl.rewards.claims import Claim

# One character class without nested repetition, so that matching is linear in the text.
_SEEN = re.compile(r"\bI see ([0-9][0-9/]*)")


def check_grid(text: str, grid: Any) -> list[Claim]:
    """Check every digit named in the ``I see ROW/ROW`` statements of an answer.

    Each digit claims "this digit stands in this row and column". It is false if another digit stands there, and also
    if the picture has no such place. Digits that a statement leaves out claim nothing.

    Args:
        text: The whole answer.
        grid: The digits of the picture, row by row, for example ``[[3, 1], [4, 1]]``; rows may differ in length.

    Raises:
        DataError: if ``grid`` isn't rows of digits 0-9.
    """
    try:
        rows = [[int(digit) for digit in row] for row in grid]
        if any(not 0 <= digit <= 9 for row in rows for digit in row):
            raise ValueError
    except (TypeError, ValueError):
        raise DataError(f"fact 'grid' is {grid!r}; allowed: rows of digits 0-9 such as [[3, 1], [4, 1]]") from None
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
