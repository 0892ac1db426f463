"""The rows of a benchmark's files, from a folder or the Hugging Face hub: Parquet, JSON lines, JSON lists, each also
with ``.gz``."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from skyrl.records import DataError


@dataclass(slots=True, frozen=True)
class Row:
    """One row of one file."""

    where: str
    """``FILE, row 3``: how errors name it."""
    cells: dict[str, Any]
    """Column → value, without pictures."""
    file: str
    """The file's name without its endings."""

    def get(self, *names: str) -> Any:
        """The first of these columns that is there and not null; None without one."""
        return next((self.cells[name] for name in names if self.cells.get(name) is not None), None)

    def text(self, *names: str) -> str:
        """The first of these columns as a text that isn't empty; :class:`DataError` without one. Numbers are texts."""
        value = self.get(*names)
        if isinstance(value, str | int | float) and not isinstance(value, bool) and str(value).strip():
            return str(value)
        there = (
            f"got {value!r}" if any(name in self.cells for name in names) else f"columns are {', '.join(self.cells)}"
        )
        raise DataError(f"{self.where}: no text in column {' or '.join(map(repr, names))}; {there}")

    def literal(self, name: str, kind: type) -> Any:
        """A column that holds a value of ``kind`` or its JSON text; :class:`DataError` for another one."""
        value = self.get(name)
        if isinstance(value, str) and kind is not str:
            try:
                value = json.loads(value)
            except ValueError as error:
                raise DataError(
                    f"{self.where}, column {name!r}: got {value[:80]!r}; allowed: JSON ({error})"
                ) from error
        if not isinstance(value, kind):
            raise DataError(f"{self.where}, column {name!r}: got {str(value)[:80]!r}; allowed: a {kind.__name__}")
        return value


class TaskFile:
    """Random access to the rows of one file. Pictures of a Parquet file stay in it until they are asked for.

    Raises:
        DataError: for a file that can't be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.rows = self._parquet() if path.suffix == ".parquet" else list(_json_rows(path))
        except (OSError, ValueError, pa.ArrowException) as error:
            raise DataError(f"{path}: can't be read: {error}") from error

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, place: int) -> Row:
        """Row ``place``, without pictures."""
        return Row(f"{self.path}, row {place}", self.rows[place], self.path.name.split(".")[0])

    def picture(self, place: int, column: str) -> bytes | None:
        """The picture file in a cell; None if the cell is null or there is no such column."""
        if column not in self._pictures:
            return None
        group = next(number for number, end in enumerate(self._ends) if place < end)
        if self._held[:2] != (group, column):
            self._held = group, column, self._file.read_row_group(group, columns=[column]).column(column)
        cell = self._held[2][place - (self._ends[group - 1] if group else 0)].as_py()
        return cell["bytes"] if cell is not None else None

    @cached_property
    def digest(self) -> str:
        """Of the file's bytes."""
        with self.path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    _pictures: frozenset[str] = frozenset()
    _held: tuple[int, str, Any] = (-1, "", None)

    @cached_property
    def _file(self) -> pq.ParquetFile:
        return pq.ParquetFile(self.path, memory_map=True)

    @cached_property
    def _ends(self) -> list[int]:
        """Rows up to the end of each row group."""
        ends: list[int] = []
        sizes = [self._file.metadata.row_group(i).num_rows for i in range(self._file.num_row_groups)]
        for size in sizes:
            ends.append(size + (ends[-1] if ends else 0))
        return ends

    def _parquet(self) -> list[dict[str, Any]]:
        schema = self._file.schema_arrow
        self._pictures = frozenset(
            field.name
            for field in schema
            if pa.types.is_struct(field.type) and {"bytes", "path"} == {part.name for part in field.type}
        )
        loaded = [name for name in schema.names if name not in self._pictures]
        rows: list[dict[str, Any]] = self._file.read(columns=loaded).to_pylist()
        return rows

    def __reduce__(self) -> tuple[type[TaskFile], tuple[Path]]:
        return TaskFile, (self.path,)


def _json_rows(path: Path) -> Iterator[dict[str, Any]]:
    name = path.name.removesuffix(".gz")
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as stream:
        rows = json.load(stream) if name.endswith(".json") and stream.read(1) == "[" and not stream.seek(0) else None
        if rows is None:
            stream.seek(0)
            rows = (json.loads(line) for line in stream if line.strip())
        for place, row in enumerate(rows):
            if not isinstance(row, dict):
                raise ValueError(f"row {place} is a {type(row).__name__}; allowed: an object")
            yield row


def files_in(where: Path, patterns: Sequence[str]) -> list[Path]:
    """The files of a task: ``where`` itself if it is one, else those below it that match the first of the patterns that
    any match, sorted; :class:`DataError` without one."""
    if where.is_file():
        return [where]
    for pattern in patterns:
        if found := sorted(path for path in where.rglob(pattern) if path.is_file()):
            return found
    state = "holds none" if where.is_dir() else "does not exist"
    raise DataError(f"{where}: {state}; looked for {' or '.join(patterns)} in it and below")


def from_hub(repository: str, patterns: Sequence[str]) -> Path:
    """Folder of a data set's files, downloaded unless they are in the hub's cache; :class:`DataError` if that fails."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wanted = [form for pattern in patterns for form in (pattern, f"*/{pattern}")]
    try:
        return Path(snapshot_download(repository, repo_type="dataset", allow_patterns=wanted))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"the data set {repository} could not be had from the Hugging Face hub: {reason}; without a network, "
            "download it elsewhere and give its folder: evaluate.data_dir=… or tasks=[name:/folder]"
        ) from error
