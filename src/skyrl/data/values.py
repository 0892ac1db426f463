"""Single cells of a row: truths, JSON, and how errors name them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from decimal import Decimal
from typing import Any


class CellError(Exception):
    """What is wrong with a column of a row."""

    def __init__(self, column: str, problem: str) -> None:
        super().__init__(column, problem)
        self.column, self.problem = column, problem


def truth_text(value: Any, column: str) -> str:
    """A truth as text: numbers as one writes them, lists and structs as JSON."""
    if isinstance(value, str):
        if not value.strip():
            raise CellError(column, f"got {short(value)}; allowed: a text that isn't empty, or a number")
        check_unicode(value, column)
        return value
    if isinstance(value, (int, float, Decimal)) and not isinstance(value, bool) and math.isfinite(value):
        whole = int(value)
        return str(whole) if value == whole and abs(whole) < 10**15 else str(value)
    if isinstance(value, (list, Mapping)) and value:
        return json.dumps(json_like(value), ensure_ascii=False)
    raise CellError(column, f"got {short(value)}; allowed: a text that isn't empty, or a number")


def check_unicode(text: str, column: str) -> None:
    """Half of a surrogate pair, which JSON can spell, is no letter: no tokenizer takes it."""
    try:
        text.isascii() or text.encode()
    except UnicodeEncodeError as error:
        raise CellError(column, f"got {text[error.start : error.end]!r} in it; allowed: Unicode text") from error


def tagged(text: str) -> str:
    """What stands between the last ``<answer>`` tags of a text; the whole text where there are none."""
    _, opened, rest = text.rpartition("<answer>")
    inside, closed, _ = rest.partition("</answer>")
    return inside.strip() if opened and closed else text


def json_like(value: Any) -> Any:
    """A cell as JSON would hold it; other types (dates, decimals) as their texts, binary ones left out (None)."""
    if isinstance(value, Mapping):
        return {str(name): json_like(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_like(one) for one in value]
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    return None if isinstance(value, (bytes, bytearray)) else str(value)


def short(value: Any) -> str:
    """A cell as errors show it."""
    if value is None:
        return "null"
    text = value if isinstance(value, str) else repr(value)
    text = text if len(text) <= 80 else text[:80] + "…"
    return repr(text) if isinstance(value, str) else text


def parsed(text: str, other: Any) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return other
