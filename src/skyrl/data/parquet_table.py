"""One Parquet file with texts and pictures: what prompts and preference pairs have in common."""

from __future__ import annotations

import itertools
import os
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from skyrl.data.parquet_schema import WRITTEN, check_schema, is_empty, is_text, plain, short, where
from skyrl.data.pictures import decode_picture
from skyrl.records import DataError

ROWS_PER_GROUP = 64
"""Rows that :func:`write_rows` puts into one row group, the smallest part that can be read."""
CACHED_BYTES = 256 * 2**20
"""Row groups with pictures that one table keeps in memory, at least one."""
Names = Sequence[str]
Rows = Iterable[dict[str, Any]]


class ParquetTable:
    """Random access to the cells of one file. Texts and numbers are read when it is opened, pictures when asked for.

    Args:
        path: The file.
        columns: Name of each known column → ``TEXT``, ``WHOLE``, ``NUMBER`` or ``PICTURES`` (that one is called
            ``images``). Other columns are ignored.
        required: Columns that must be there.
        may_be_null: Columns that may be empty in a row.
        limit: Use the first ``limit`` rows only.

    Raises:
        DataError: naming file, row and column, for a missing or unreadable file, missing columns, wrong types, no rows,
            nulls or empty texts, an id that comes twice, or a picture path without a file.
    """

    def __init__(
        self, path: Path, columns: Mapping[str, str], required: Names, may_be_null: Names, limit: int | None = None
    ) -> None:
        self.path = path
        try:
            self._file = pq.ParquetFile(self.path, memory_map=True)
            schema = self._file.schema_arrow
            self.metadata: dict[bytes, bytes] = schema.metadata or {}
            check_schema(self.path, schema, columns, required, may_be_null)
            names = [name for name in columns if name in schema.names and not is_empty(schema.field(name).type)]
            self._has_pictures = "images" in names
            self._paths = self._has_pictures and is_text(schema.field("images").type.value_type)
            # Picture bytes stay in the file; paths are short.
            loaded = names if self._paths else [name for name in names if name != "images"]
            table = self._file.read(columns=loaded).slice(0, limit)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{self.path}: not a readable Parquet file: {error}") from error
        self._table = pa.table({name: plain(columns[name], table.column(name)) for name in loaded})
        counts = [self._file.metadata.row_group(g).num_rows for g in range(self._file.num_row_groups)]
        self._group_ends = np.cumsum(counts)
        self.groups: OrderedDict[int, pa.ChunkedArray] = OrderedDict()
        """Row groups of pictures in memory, the last used one at the end."""
        self._check_rows([name for name in loaded if name not in may_be_null])

    def __len__(self) -> int:
        return self._table.num_rows

    def require(self, row: int) -> None:
        """Raise :class:`DataError` if there is no such row."""
        if not 0 <= row < len(self):
            raise DataError(f"{self.path}: row {row} does not exist; it has {len(self)} rows")

    def ids(self) -> list[str]:
        """The ids of all rows, in order."""
        return self.column("id") if "id" in self._table.column_names else [self.id(row) for row in range(len(self))]

    def id(self, row: int) -> str:
        """The row's own id, or ``<file name without ending>/<row>``."""
        return self.value("id", row) if "id" in self._table.column_names else f"{self.path.stem}/{row}"

    def value(self, column: str, row: int) -> Any:
        """A cell that isn't a picture; ``None`` if it is null or the column isn't there."""
        return self._table.column(column)[row].as_py() if column in self._table.column_names else None

    def column(self, name: str) -> list[Any]:
        """All cells of a column that is there."""
        return self._table.column(name).to_pylist()

    # ------------------------------------------------------------ pictures

    def pictures(self, row: int) -> Iterator[np.ndarray]:
        """The pictures of a row, uint8 [height, width, 3] each.

        Raises:
            DataError: if one can't be decoded.
        """
        if not self._has_pictures:
            return
        stored = self.value("images", row) if self._paths else self._stored_pictures(row)
        for place, one in enumerate(stored or []):
            at = f"{where(self.path, row, 'images')}, picture {place}"
            if one is None:
                raise DataError(f"{at}: got null; allowed: a picture, or a null instead of the whole list")
            try:
                content = (self.path.parent / one).read_bytes() if self._paths else one
            except OSError as error:
                raise DataError(f"{at}: {error}") from error
            yield decode_picture(content, f"{at} ({one})" if self._paths else at)

    def _stored_pictures(self, row: int) -> list[bytes] | None:
        group = int(np.searchsorted(self._group_ends, row, side="right"))
        if group in self.groups:
            self.groups.move_to_end(group)
        else:
            try:
                self.groups[group] = self._file.read_row_group(group, columns=["images"]).column("images")
            except (OSError, pa.ArrowException) as error:
                raise DataError(f"{where(self.path, row, 'images')}: can't be read: {error}") from error
            while len(self.groups) > 1 and sum(part.nbytes for part in self.groups.values()) > CACHED_BYTES:
                self.groups.popitem(last=False)
        start = int(self._group_ends[group - 1]) if group else 0
        return self.groups[group][row - start].as_py()

    # ------------------------------------------------------------ checks

    def each(self, column: str, check: Callable[[int, Any], object]) -> None:
        """Call ``check(row, value)`` for each value that isn't null, and name the row if it raises."""
        for row, value in enumerate(self.column(column) if column in self._table.column_names else ()):
            try:
                if value is not None:
                    check(row, value)
            except DataError as error:
                raise DataError(f"{where(self.path, row, column)}: {error}") from error

    def _check_rows(self, needed: list[str]) -> None:
        if not len(self):
            raise DataError(f"{self.path}: got 0 rows; allowed: 1 or more")
        for name in needed:
            column = self._table.column(name)
            text = pa.types.is_large_string(column.type)
            self._refuse(name, pc.is_null(column), "a text" if text else "a number")
            if text:
                self._refuse(name, pc.equal(pc.utf8_trim_whitespace(column), ""), "a text that isn't empty")
        if "id" in self._table.column_names:
            first: dict[str, int] = {}
            for row, name in enumerate(self.ids()):
                if first.setdefault(name, row) != row:
                    at = where(self.path, row, "id")
                    also = f"which is also that of row {first[name]}"
                    raise DataError(f"{at}: got {short(name)}, {also}; allowed: unique ids")
        if self._paths:
            self.each("images", self._check_paths)

    def _refuse(self, column: str, mask: pa.ChunkedArray, allowed: str) -> None:
        rows = np.flatnonzero(mask.to_numpy())
        if len(rows):
            got = self.value(column, int(rows[0]))
            more = f" ({len(rows)} such rows)" if len(rows) > 1 else ""
            raise DataError(f"{where(self.path, int(rows[0]), column)}: got {short(got)}; allowed: {allowed}{more}")

    def _check_paths(self, row: int, paths: list[str | None]) -> None:
        for place, path in enumerate(paths):
            if path is None:
                raise DataError(f"picture {place}: got null; allowed: a path, or a null instead of the whole list")
            if not (self.path.parent / path).is_file():
                raise DataError(f"picture {place}: got {path!r}, and {self.path.parent} has no such file")


def write_rows(
    path: str | Path,
    columns: Mapping[str, str],
    rows: Rows,
    repeated: Names,
    metadata: Mapping[bytes, str] | None = None,
) -> None:
    """Write rows (column → cell; pictures are PNG or JPEG files as bytes) as :class:`ParquetTable` reads them, with
    ``metadata``. The file appears when it is complete; only 64 rows are held in memory at a time. Cells of the text
    columns ``repeated`` are often the same.
    """
    path = Path(path)
    schema = pa.schema([(name, WRITTEN[kind]) for name, kind in columns.items()], metadata)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        # Pictures are compressed already, and plain columns can be read straight from the memory map.
        with pq.ParquetWriter(part, schema, compression="none", use_dictionary=list(repeated)) as writer:
            rest = iter(rows)
            while some := list(itertools.islice(rest, ROWS_PER_GROUP)):
                writer.write_table(pa.Table.from_pylist(some, schema))
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def check_files(files: list[str], module: str, check: Callable[[str], str]) -> int:
    """Print what ``check(file)`` says of each file; the exit status is 1 if one is broken, 2 without files."""
    if not files:
        print(f"usage: python -m {module} FILE…", file=sys.stderr)
        return 2
    status = 0
    for file in files:
        try:
            print(f"{file}: {check(file)}, no errors")
        except DataError as error:
            print(f"error: {error}", file=sys.stderr)
            status = 1
    return status
