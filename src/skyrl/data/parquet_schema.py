"""The columns of Parquet files of prompts and of pairs, and what is allowed in them."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from skyrl.records import DataError

TEXT = "string"
WHOLE = "integer"
NUMBER = "float or integer"
PICTURES = "list of binary (PNG or JPEG files) or list of string (paths of such files)"
REQUIRED = ("question", "answer", "verifier")
COLUMNS = dict.fromkeys(("id", "question", "answer", "verifier", "kind", "facts"), TEXT) | {"images": PICTURES}
MAY_BE_NULL = ("kind", "facts", "images")
PICTURE_NAME = re.compile(r"image|img|picture|photo", re.IGNORECASE)
"""What an unknown column is called that probably holds pictures."""
SELF_CHECKED = ("exact", "numeric", "choice")
"""Verifiers whose truths are checked when a file is opened; they take microseconds and can't hang."""


def check_schema(
    path: Path, schema: pa.Schema, columns: Mapping[str, str], required: Sequence[str], may_be_null: Sequence[str]
) -> None:
    """Check that the required columns are there and that all known ones (``columns``: name → kind of cells) have a type
    that can be read; those of ``may_be_null`` may have none, because every cell is null.

    Raises:
        DataError: naming the file and the column; also for a name that looks like a misspelt known one, or like that of
            pictures where there is no column ``images``.
    """
    for name in required:
        if name not in schema.names:
            raise DataError(
                f"{path}: column {name!r} is missing; got {', '.join(schema.names)}; needed: {', '.join(required)}"
            )
    for name in schema.names:
        if schema.names.count(name) > 1:
            raise DataError(f"{path}: column {name!r} comes twice")
        kind = schema.field(name).type
        if name in columns:
            if not FITS[columns[name]](kind) and not (name in may_be_null and is_empty(kind)):
                raise DataError(f"{path}: column {name!r}: got type {kind}; allowed: {columns[name]}")
        elif close := difflib.get_close_matches(name, set(columns) - set(schema.names), n=1, cutoff=0.8):
            raise DataError(f"{path}: column {name!r} is unknown; did you mean {close[0]!r}? Rename or remove it")
        elif "images" not in schema.names and PICTURE_NAME.search(name) and not pa.types.is_primitive(kind):
            # Ignoring it would make a picture data set a text data set without a word.
            raise DataError(
                f"{path}: column {name!r} looks like pictures, which are read from a column 'images' only: {PICTURES}. "
                "Write it so, or remove it"
            )


def is_text(kind: pa.DataType) -> bool:
    """True for strings of any layout, also dictionary-encoded (pandas' categories)."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


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


FITS: dict[str, Callable[[pa.DataType], bool]]
FITS = {TEXT: is_text, WHOLE: pa.types.is_integer, NUMBER: is_number, PICTURES: is_pictures}
"""Kind of cells → whether a column's type can be read as such."""
WRITTEN = {TEXT: pa.string(), WHOLE: pa.int64(), NUMBER: pa.float64(), PICTURES: pa.list_(pa.binary())}
"""Kind of cells → the type in files that are written here."""


def plain(kind: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Text and numbers of any layout as the one layout that every pyarrow function takes; others as they are."""
    return column if kind == PICTURES else column.cast(pa.large_string() if kind == TEXT else WRITTEN[kind])


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
        if isinstance(value := json.loads(text), dict):
            return value
        raise ValueError("such as {}")
    except ValueError as error:
        raise DataError(f"got {short(text)}; allowed: a JSON object ({error})") from error
