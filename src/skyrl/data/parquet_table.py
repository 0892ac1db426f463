"""One Parquet file whose texts are held in memory: what preference pairs and the prompt pool have in common."""

from __future__ import annotations

import difflib
import itertools
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from skyrl.data.pictures import decode_picture, picture_file
from skyrl.data.rows import BROKEN, RowGroups
from skyrl.records import DataError

ROWS_PER_GROUP = 64
"""Rows that :func:`write_rows` puts into one row group, the smallest part that can be read."""
PICTURE_NAME = re.compile(r"image|img|picture|photo", re.IGNORECASE)
"""What an unknown column is called that probably holds pictures."""


class Kind(NamedTuple):
    """What a column's cells are: as errors say it, whether a type can be read so, and the type that is written here."""

    allowed: str
    fits: Callable[[pa.DataType], bool]
    written: pa.DataType


def _is_text(found: pa.DataType) -> bool:
    """True for strings of any layout, also dictionary-encoded (pandas' categories)."""
    item = found.value_type if pa.types.is_dictionary(found) else found
    return item in (pa.string(), pa.large_string(), pa.string_view())


def _is_list(found: pa.DataType) -> bool:
    return pa.types.is_list(found) or pa.types.is_large_list(found)


def _is_pictures(found: pa.DataType) -> bool:
    item = found.value_type if _is_list(found) else None
    struct = item is not None and pa.types.is_struct(item) and {field.name for field in item} == {"bytes", "path"}
    return item is not None and (struct or _is_text(item) or item in (pa.binary(), pa.large_binary()))


def _is_empty(found: pa.DataType) -> bool:
    """True for what pyarrow makes of a column of nulls or of empty lists."""
    return pa.types.is_null(found.value_type if _is_list(found) else found)


TEXT = Kind("string", _is_text, pa.string())
WHOLE = Kind("integer", pa.types.is_integer, pa.int64())
NUMBER = Kind("float or integer", lambda found: pa.types.is_floating(found) or pa.types.is_integer(found), pa.float64())
PICTURES = Kind(
    "list of binary (PNG, JPEG or WebP files), list of string (paths of such files) or list of {bytes, path}",
    *(_is_pictures, pa.list_(pa.binary())),
)


class Column(NamedTuple):
    """What is known of a column: its kind, whether it must be there, and whether its cells may be null."""

    kind: Kind = TEXT
    required: bool = False
    may_be_null: bool = False


Columns = Mapping[str, Column]
"""Name → column, in the order in which they are written. In every file ``id`` is a text, ``images`` has pictures."""


def where(path: Path, row: int, column: str) -> str:
    """How errors name a cell."""
    return f"{path}, row {row}, column {column!r}"


def short(value: Any) -> str:
    """A cell's text as errors show it."""
    return "null" if value is None else repr(value if len(value) <= 80 else value[:80] + "…")


class ParquetTable:
    """Random access to the cells of one file. Texts and numbers are read when it is opened, pictures when asked for.

    Args:
        path: The file.
        columns: Those that are read. One that isn't there reads as nulls, ``id`` as ``<file name, no ending>/<row>``.
        limit: Use the first ``limit`` rows only.

    Raises:
        DataError: naming file, row and column, for a missing or unreadable file, missing columns, wrong types, no rows,
            nulls or empty texts, an id that comes twice, or a picture path without a file.
    """

    def __init__(self, path: Path, columns: Columns, limit: int | None = None) -> None:
        self.path, self.columns = path, columns
        try:
            self._file = pq.ParquetFile(path, memory_map=True)
            schema = self._file.schema_arrow
            self.metadata: dict[bytes, bytes] = schema.metadata or {}
            _check_schema(path, schema, columns)
            present = [name for name in columns if name in schema.names and not _is_empty(schema.field(name).type)]
            # Picture bytes stay in the file; paths are short.
            self._holds_pictures = "images" in present and not _is_text(schema.field("images").type.value_type)
            loaded = [name for name in present if name != "images" or not self._holds_pictures]
            table = self._file.read(columns=loaded).slice(0, limit)
            table.validate(full=True)
        except BROKEN as error:
            raise DataError(f"{path}: not a readable Parquet file: {error}") from error
        cells: dict[str, Any] = {name: pa.nulls(len(table)) for name in (*columns, "images")}
        if "id" not in loaded:
            cells["id"] = [f"{path.stem}/{row}" for row in range(len(table))]
        self._table = pa.table(cells | {name: _plain(columns[name].kind, table.column(name)) for name in loaded})
        self._pictures = RowGroups(self._file, ["images"])
        self._check_rows([name for name in loaded if not columns[name].may_be_null])

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, row: int) -> dict[str, Any]:
        """Column → cell of a row; ``images`` is a tuple of decoded pictures, uint8 [height, width, 3] each. A row that
        isn't there and a picture that can't be decoded are a :class:`DataError`."""
        if not 0 <= row < len(self):
            raise DataError(f"{self.path}: row {row} does not exist; it has {len(self)} rows")
        stored = self._stored_pictures(row) if self._holds_pictures else self.value("images", row)
        images = tuple(self._picture(row, place, one) for place, one in enumerate(stored or []))
        return {name: self.value(name, row) for name in self.columns} | {"images": images}

    def value(self, column: str, row: int) -> Any:
        """A cell that isn't a picture; ``None`` if it is null."""
        return self._table.column(column)[row].as_py()

    def column(self, name: str) -> list[Any]:
        """All cells of a column, in order."""
        return self._table.column(name).to_pylist()

    def each(self, column: str, check: Callable[[int, Any], object]) -> None:
        """Call ``check(row, value)`` for each value that isn't null, and name the row if it raises."""
        for row, value in enumerate(self.column(column)):
            try:
                if value is not None:
                    check(row, value)
            except DataError as error:
                raise DataError(f"{where(self.path, row, column)}: {error}") from error

    def _picture(self, row: int, place: int, stored: Any) -> np.ndarray:
        at = f"{where(self.path, row, 'images')}, picture {place}"
        try:
            file = picture_file(stored, self.path.parent)
        except DataError as error:
            raise DataError(f"{at}: {error}") from error
        return decode_picture(file, at)

    def _stored_pictures(self, row: int) -> list[Any] | None:
        try:
            found: list[Any] | None = self._pictures[row]["images"]
        except BROKEN as error:
            raise DataError(f"{where(self.path, row, 'images')}: can't be read: {error}") from error
        return found

    def _check_rows(self, needed: list[str]) -> None:
        if not len(self):
            raise DataError(f"{self.path}: got 0 rows; allowed: 1 or more")
        for name in needed:
            column, text = self._table.column(name), self.columns[name].kind is TEXT
            self._refuse(name, pc.is_null(column), "a text" if text else "a number")
            if text:
                self._refuse(name, pc.equal(pc.utf8_trim_whitespace(column), ""), "a text that isn't empty")
        first: dict[str, int] = {}
        for row, name in enumerate(self.column("id")):
            if first.setdefault(name, row) != row:
                also = f"which is also that of row {first[name]}"
                raise DataError(f"{where(self.path, row, 'id')}: got {short(name)}, {also}; allowed: unique ids")
        self.each("images", self._check_paths)

    def _refuse(self, column: str, mask: pa.ChunkedArray, allowed: str) -> None:
        rows = np.flatnonzero(mask.to_numpy())
        if len(rows):
            row, more = int(rows[0]), f" ({len(rows)} such rows)" if len(rows) > 1 else ""
            got = short(self.value(column, row))
            raise DataError(f"{where(self.path, row, column)}: got {got}; allowed: {allowed}{more}")

    def _check_paths(self, row: int, paths: list[str | None]) -> None:
        for place, path in enumerate(paths):
            try:
                picture_file(path, self.path.parent, read=False)
            except DataError as error:
                raise DataError(f"picture {place}: {error}") from error


def _plain(kind: Kind, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Text and numbers of any layout as the one layout that every pyarrow function takes; others as they are."""
    return column if kind is PICTURES else column.cast(pa.large_string() if kind is TEXT else kind.written)


def _check_schema(path: Path, schema: pa.Schema, columns: Columns) -> None:
    """Check that the required columns are there, that all known ones have a type that can be read, and that no other's
    name looks like a misspelt known one, or like pictures where there is no column ``images``."""
    required = [name for name, column in columns.items() if column.required]
    for name in required:
        if name not in schema.names:
            needed = f"got {', '.join(schema.names)}; needed: {', '.join(required)}"
            raise DataError(f"{path}: column {name!r} is missing; {needed}")
    for name in schema.names:
        if schema.names.count(name) > 1:
            raise DataError(f"{path}: column {name!r} comes twice")
        found, known = schema.field(name).type, columns.get(name)
        if known is not None:
            if not known.kind.fits(found) and not (known.may_be_null and _is_empty(found)):
                raise DataError(f"{path}: column {name!r}: got type {found}; allowed: {known.kind.allowed}")
        elif close := difflib.get_close_matches(name, set(columns) - set(schema.names), n=1, cutoff=0.8):
            raise DataError(f"{path}: column {name!r} is unknown; did you mean {close[0]!r}? Rename or remove it")
        elif "images" not in schema.names and PICTURE_NAME.search(name) and not pa.types.is_primitive(found):
            # Ignoring it would make a picture data set a text data set without a word.
            raise DataError(
                f"{path}: column {name!r} looks like pictures, which are read from a column 'images' only: "
                f"{PICTURES.allowed}. Write it so, or remove it"
            )


def write_rows(
    path: str | Path, columns: Columns, rows: Iterable[dict[str, Any]], metadata: Mapping[bytes, str] | None = None
) -> None:
    """Write rows (column → cell; pictures are PNG or JPEG files as bytes) as :class:`ParquetTable` reads them, with
    ``metadata``. The file appears when it is complete; only 64 rows are held in memory at a time."""
    path = Path(path)
    schema = pa.schema([(name, column.kind.written) for name, column in columns.items()], metadata)
    repeated = [name for name in ("verifier", "kind") if name in columns]  # the same few texts in most rows
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        # Pictures are compressed already, and plain columns can be read straight from the memory map.
        with pq.ParquetWriter(part, schema, compression="none", use_dictionary=repeated) as writer:
            rest = iter(rows)
            while some := list(itertools.islice(rest, ROWS_PER_GROUP)):
                writer.write_table(pa.Table.from_pylist(some, schema))
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def check_files(files: list[str], module: str, things: str, opened: Callable[[str], ParquetTable]) -> int:
    """Check whole files, pictures too: print how many ``things`` each holds, or what is wrong with it. Returns the exit
    status of ``python -m module FILE…``: 1 if a file is broken, 2 without files."""
    if not files:
        print(f"usage: python -m {module} FILE…", file=sys.stderr)
        return 2
    status = 0
    for file in files:
        try:
            table = opened(file)
            pictures = sum(len(table[row]["images"]) for row in range(len(table)))
            print(f"{file}: {len(table)} {things} with {pictures} pictures, no errors")
        except DataError as error:
            print(f"error: {error}", file=sys.stderr)
            status = 1
    return status
