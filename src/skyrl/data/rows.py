"""The rows of one file as plain Python values: random access, and all of them in order, in bounded memory."""

from __future__ import annotations

import json
import shutil
import tempfile
from array import array
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from skyrl.records import DataError

BATCH_ROWS = 1024
"""Rows that are read together when all are gone through."""
LARGE_ROWS = 64
"""The same where they hold pictures."""
GROUP_BYTES = 64 * 2**20
"""A Parquet row group above this is too large to be read for one row: the file's rows are then copied to a temporary
file with small ones."""
CACHED_BYTES = 16 * 2**20
"""Row groups that one file keeps in memory, at least one. Where rows are read in no order, hardly one is met again."""
NAMED_ROWS = 1000
"""JSON lines whose keys count as the file's columns."""
BROKEN = (OSError, pa.ArrowException, ValueError, LookupError, OverflowError, RecursionError)
"""What readers raise for broken files, between them."""
Row = dict[str, Any]


class Rows(Protocol):
    """The rows of a file. Reading raises :class:`DataError`, which names the file."""

    names: list[str]
    """Columns."""
    inline: set[str]
    """Those with binary data inside, which are large."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> Row: ...

    def batches(self, without: Collection[str] = ()) -> Iterator[Sequence[Row | DataError]]:
        """All rows in order, some at a time, without some columns; an error where one row can't be read."""
        ...


def open_rows(path: Path) -> Rows:
    """The rows of a Parquet, JSONL or JSON file, or of a folder that ``datasets`` wrote with ``save_to_disk``.

    Raises:
        DataError: if there is no such file, or it is none of these.
    """
    if path.is_dir():
        return ArrowRows(path, _arrow_files(path))
    if not path.is_file():
        raise DataError(f"{path}: no such file or folder")
    with reading(path), path.open("rb") as file:
        start = file.read(4)
    if start == b"PAR1":
        return ParquetRows(path)
    if path.suffix.lower() in (".json", ".jsonl", ".ndjson"):
        whole = path.suffix.lower() == ".json" and start.lstrip()[:1] == b"["
        return JsonRows(path) if whole else JsonLines(path)
    allowed = "a Parquet, .jsonl or .json file, or a folder written by datasets.save_to_disk"
    raise DataError(f"{path}: got {start!r} as its first bytes; allowed: {allowed}")


@contextmanager
def reading(path: Path, row: int | None = None) -> Iterator[None]:
    """Names file and row where something can't be read."""
    try:
        yield
    except BROKEN as error:
        at = "" if row is None else f", row {row}"
        raise DataError(f"{path}{at}: can't be read: {type(error).__name__}: {error}") from error


class RowGroups:
    """Random access to the rows of an open Parquet file. Row groups that were read last stay in memory.

    Args:
        columns: Those that are read; None for all.
    """

    def __init__(self, file: pq.ParquetFile, columns: list[str] | None = None) -> None:
        self._file, self._columns = file, columns
        groups = [file.metadata.row_group(group) for group in range(file.num_row_groups)]
        self._ends = np.cumsum([group.num_rows for group in groups], dtype=np.int64)
        self.largest: int = max((group.total_byte_size for group in groups), default=0)
        """Bytes of the largest row group, all columns, not compressed."""
        self.kept: OrderedDict[int, tuple[pa.Table, int]] = OrderedDict()
        """Row groups in memory and their bytes, the last used one at the end."""
        self._bytes = 0

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, row: int) -> Row:
        """Column → cell. Raises one of :data:`BROKEN` if it can't be read."""
        group = int(np.searchsorted(self._ends, row, side="right"))
        if group not in self.kept:
            table = self._file.read_row_group(group, self._columns, use_threads=False)
            table.validate(full=True)
            self.kept[group] = table, table.nbytes
            self._bytes += table.nbytes
        self.kept.move_to_end(group)
        while len(self.kept) > 1 and self._bytes > CACHED_BYTES:
            self._bytes -= self.kept.popitem(last=False)[1][1]
        start = int(self._ends[group - 1]) if group else 0
        found: Row = self.kept[group][0].slice(row - start, 1).to_pylist()[0]
        return found


class ParquetRows:
    """A Parquet file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._copy: ParquetRows | None = None
        with reading(path):
            # No memory map, whose pages would count as this process's memory; buffered, or a column is read as a whole.
            self._file = pq.ParquetFile(path, buffer_size=2**20)
            self.names: list[str] = self._file.schema_arrow.names
            self.inline = _inline(self._file.schema_arrow)
            self.groups = RowGroups(self._file)
            self._large = self.groups.largest > GROUP_BYTES

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, row: int, /) -> Row:
        if self._large:
            self._copy = self._copy or self._copied()
            return self._copy[row]
        with reading(self.path, row):
            return self.groups[row]

    def batches(self, without: Collection[str] = ()) -> Iterator[list[Row]]:
        names = [name for name in self.names if name not in without]
        for batch in self._record_batches(names, BATCH_ROWS if self.inline <= set(without) else LARGE_ROWS):
            with reading(self.path):
                rows = batch.to_pylist() if names else [{} for _ in range(len(batch))]
            yield rows

    def _record_batches(self, names: list[str], size: int) -> Iterator[pa.RecordBatch]:
        for group in range(self._file.num_row_groups):  # asked for all groups, pyarrow keeps what it has read
            with reading(self.path):
                found = self._file.iter_batches(size, [group], names, use_threads=False)
            while True:
                with reading(self.path):
                    if (batch := next(found, None)) is None:
                        break
                    batch.validate(full=True)
                yield batch

    def _copied(self) -> ParquetRows:
        folder = Path(tempfile.mkdtemp(prefix="skyrl-rows-"))
        try:
            path, size = folder / "rows.parquet", LARGE_ROWS if self.inline else BATCH_ROWS
            with reading(path), pq.ParquetWriter(path, self._file.schema_arrow, compression="none") as writer:
                for batch in self._record_batches(self.names, size):
                    writer.write_batch(batch, size)
            copy = ParquetRows(path)
            copy.path, copy._large = self.path, False
            return copy
        finally:  # what is open stays readable
            shutil.rmtree(folder, ignore_errors=True)


class ArrowRows:
    """Arrow files, as ``datasets`` caches and saves them, mapped into memory: the system may drop their pages again."""

    def __init__(self, path: Path, files: list[Path]) -> None:
        self.path, self._files = path, files
        with reading(path):
            self._batches = self._mapped()
            schemas = [batch.schema for batch in self._batches[:1]]
            self.names: list[str] = schemas[0].names if schemas else []
            self.inline = _inline(schemas[0]) if schemas else set()
            self._ends = np.cumsum([len(batch) for batch in self._batches], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, row: int, /) -> Row:
        place = int(np.searchsorted(self._ends, row, side="right"))
        start = int(self._ends[place - 1]) if place else 0
        with reading(self.path, row):
            found: Row = self._batches[place].slice(row - start, 1).to_pylist()[0]
            return found

    def batches(self, without: Collection[str] = ()) -> Iterator[list[Row]]:
        names = [name for name in self.names if name not in without]
        size = BATCH_ROWS if self.inline <= set(without) else LARGE_ROWS
        for batch in self._mapped():  # anew: what is looked at once need not stay mapped
            for start in range(0, len(batch), size):
                with reading(self.path):
                    part = batch.select(names).slice(start, size)
                    part.validate(full=True)
                    rows = part.to_pylist() if names else [{} for _ in range(len(part))]
                yield rows

    def _mapped(self) -> list[pa.RecordBatch]:
        found: list[pa.RecordBatch] = []
        for file in self._files:
            with reading(file):
                source = pa.memory_map(str(file))
                if source.read(6) == b"ARROW1":
                    reader = pa.ipc.open_file(source)
                    found += [reader.get_batch(place) for place in range(reader.num_record_batches)]
                else:
                    source.seek(0)
                    found += pa.ipc.open_stream(source).read_all().to_batches()
        return found


class JsonLines:
    """One JSON object a line. Only where each line begins is kept in memory."""

    def __init__(self, path: Path) -> None:
        self.path, self.inline = path, set[str]()
        starts, at, names = array("q"), 0, dict[str, None]()
        with reading(path):
            self._file = path.open("rb")
            for line in self._file:
                if line.strip():
                    starts.append(at)
                at += len(line)
        self._starts = np.frombuffer(starts, dtype=np.int64) if starts else np.zeros(0, np.int64)
        for row in map(self._try, range(min(NAMED_ROWS, len(self)))):
            names |= dict.fromkeys(row) if isinstance(row, dict) else {}
        self.names = list(names)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, row: int, /) -> Row:
        with reading(self.path, row):
            self._file.seek(int(self._starts[row]))
            return _object(self.path, row, json.loads(self._file.readline()))

    def batches(self, without: Collection[str] = ()) -> Iterator[Sequence[Row | DataError]]:
        for start in range(0, len(self), BATCH_ROWS):
            yield [_left(self._try(row), without) for row in range(start, min(len(self), start + BATCH_ROWS))]

    def _try(self, row: int) -> Row | DataError:
        try:
            return self[row]
        except DataError as error:
            return error


class JsonRows:
    """A JSON file that is one list of objects. It is held in memory: JSON lines are not."""

    def __init__(self, path: Path) -> None:
        self.path, self.inline = path, set[str]()
        with reading(path):
            rows = json.loads(path.read_bytes())
        self._rows = [_object(path, row, one) for row, one in enumerate(rows)]
        self.names = list(dict.fromkeys(name for row in self._rows[:NAMED_ROWS] for name in row))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int, /) -> Row:
        return self._rows[row]

    def batches(self, without: Collection[str] = ()) -> Iterator[Sequence[Row | DataError]]:
        yield [_left(row, without) for row in self._rows]


def _inline(schema: pa.Schema) -> set[str]:
    return {field.name for field in schema if "binary" in str(field.type)}


def _object(path: Path, row: int, value: Any) -> Row:
    if isinstance(value, dict):
        return value
    raise DataError(f"{path}, row {row}: got a {type(value).__name__}; allowed: a JSON object")


def _left(row: Row | DataError, without: Collection[str]) -> Row | DataError:
    if not without or isinstance(row, DataError):
        return row
    return {name: value for name, value in row.items() if name not in without}


def _arrow_files(folder: Path) -> list[Path]:
    """The files of a saved data set, in order."""
    if (folder / "dataset_dict.json").is_file():
        parts = ", ".join(sorted(str(path.parent) for path in folder.glob("*/dataset_info.json")))
        raise DataError(f"{folder}: holds several splits; allowed: the folder of one, {parts}")
    state = folder / "state.json"
    with reading(state):
        listed = json.loads(state.read_bytes())["_data_files"] if state.is_file() else []
        files = [folder / Path(one["filename"]).name for one in listed] or sorted(folder.glob("*.arrow"))
    if not files:
        raise DataError(f"{folder}: holds no .arrow file; allowed: a file, or a folder by datasets.save_to_disk")
    return files
