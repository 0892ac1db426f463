"""The columns of Parquet files of prompts and of pairs, and what is allowed in them."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from skyrl.records import DataError

TEXT = "string"
NUMBER = "float or integer"
PICTURES = "list of binary (PNG or JPEG files) or list of string (paths of such files)"
REQUIRED = ("question", "answer", "verifier")
COLUMNS = {
    "id": TEXT,
    "question": TEXT,
    "answer": TEXT,
    "verifier": TEXT,
    "kind": TEXT,
    "facts": TEXT,
    "images": PICTURES,
}
MAY_BE_NULL = ("kind", "facts", "images")
SELF_CHECKED = ("exact", "numeric", "choice")
"""Verifiers whose truths are checked when a file is opened; they take microseconds and can't hang."""


def check_schema(
    path: Path, schema: pa.Schema, columns: Mapping[str, str], required: Sequence[str], may_be_null: Sequence[str]
) -> None:
    """Check that the required columns are there and that all known ones have a type that can be read.

    Args:
        path: The file, named by errors.
        schema: What it has.
        columns: Name of each known column → ``TEXT``, ``NUMBER`` or ``PICTURES``.
        required: The names that must be there.
        may_be_null: Columns that also may have no type, because every cell is null.

    Raises:
        DataError: naming the file and the column; also for a name that looks like a misspelt known one.
    """
    for name in required:
        if name not in schema.names:
            raise DataError(
                f"{path}: column {name!r} is missing; got {', '.join(schema.names)}; needed: {', '.join(required)}"
            )
    for name in schema.names:
        if schema.names.count(name) > 1:
            raise DataError(f"{path}: column {name!r} comes twice")
        if name in columns:
            kind = schema.field(name).type
            if not CHECKS[columns[name]](kind) and not (name in may_be_null and is_empty(kind)):
                raise DataError(f"{path}: column {name!r}: got type {kind}; allowed: {columns[name]}")
        elif close := difflib.get_close_matches(name, set(columns) - set(schema.names), n=1, cutoff=0.8):
            # Silently ignoring "image" would make a picture data set a text data set.
            raise DataError(f"{path}: column {name!r} is unknown; did you mean {close[0]!r}? Rename or remove it")


def is_text(kind: pa.DataType) -> bool:
    """True for strings of any layout, also dictionary-encoded (pandas' categories)."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def plain(kind: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Text and numbers of any layout as the one layout that every pyarrow function takes; others as they are."""
    if kind == PICTURES:
        return column
    return column.cast(pa.large_string() if kind == TEXT else pa.float64())


def is_pictures(kind: pa.DataType) -> bool:
    """True for lists of picture files or of paths."""
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return False
    item = kind.value_type
    return is_text(item) or pa.types.is_binary(item) or pa.types.is_large_binary(item)


def is_empty(kind: pa.DataType) -> bool:
    """True for what pyarrow makes of a column of nulls or of empty lists."""
    return pa.types.is_null(kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else kind)


def is_number(kind: pa.DataType) -> bool:
    """True for floats and integers of any width."""
    return pa.types.is_floating(kind) or pa.types.is_integer(kind)


CHECKS: dict[str, Callable[[pa.DataType], bool]] = {TEXT: is_text, NUMBER: is_number, PICTURES: is_pictures}


def where(path: Path, row: int, column: str) -> str:
    """How errors name a cell."""
    return f"{path}, row {row}, column {column!r}"


def short(value: Any) -> str:
    """A cell's text as errors show it."""
    return "null" if value is None else repr(value if len(value) <= 80 else value[:80] + "…")


def json_object(text: str) -> Mapping[str, Any]:
    """Parse a cell of the column ``facts``.

    Raises:
        DataError: if it is anything but a JSON object.
    """
    try:
        value = json.loads(text)
    except ValueError as error:
        raise DataError(f"got {short(text)}; allowed: a JSON object ({error})") from error
    if not isinstance(value, dict):
        raise DataError(f"got {short(text)}; allowed: a JSON object such as {{}}")
    return value
