"""Your own prompts, from a Parquet file; ``docs/data.md`` has an example.

Text is checked completely when the file is opened, pictures are decoded when their row is asked for. Check those too,
before a long run, with::

    python -m skyrl.data.parquet FILE…
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from skyrl.data.parquet_schema import (
    COLUMNS,
    MAY_BE_NULL,
    SELF_CHECKED,
    TEXT,
    check_schema,
    is_text,
    json_object,
    plain_text,
    short,
    where,
)
from skyrl.data.pictures import decode_picture, encode_png
from skyrl.rewards.verifiers import get_verifier, verifier_reference
from skyrl.types import DataError, Prompt

ROWS_PER_GROUP = 64
"""Rows that :func:`write_parquet` puts into one row group, the smallest part that can be read."""
CACHED_BYTES = 256 * 2**20
"""Row groups with pictures that one data set keeps in memory, at least one."""

SCHEMA = pa.schema([(name, pa.string() if kind == TEXT else pa.list_(pa.binary())) for name, kind in COLUMNS.items()])
"""What :func:`write_parquet` writes."""


class ParquetPrompts:
    """Implements :class:`skyrl.interfaces.PromptDataset` for one Parquet file. Other columns are ignored.

    ======== ======================================== ==========================================================
    column   type                                     meaning
    ======== ======================================== ==========================================================
    id       string, optional                         unique; default ``<file name without ending>/<row>``
    question string                                   the user's message without picture placeholders
    answer   string                                   the truth that the verifier compares with
    verifier string                                   ``exact``, ``numeric``, ``math``, ``choice``, a registered
                                                      name, or ``package.module:function``
    images   list of binary or of string, optional    PNG or JPEG files, or paths relative to the Parquet file
    kind     string, optional                         family of the question, default ``default``
    facts    string, optional                         JSON object of what is true of the pictures, default ``{}``
    ======== ======================================== ==========================================================

    Args:
        path: The file.
        limit: Use the first ``limit`` rows only.

    Raises:
        DataError: naming file, row and column, for a missing or unreadable file, missing columns, wrong types, nulls
            or empty texts, an id that comes twice, an unknown verifier, a truth that its verifier can't read, facts
            that are no JSON object, or a picture path without a file.
    """

    def __init__(self, path: str | Path, limit: int | None = None) -> None:
        self.path, self.limit = Path(path), limit
        try:
            self._file = pq.ParquetFile(self.path, memory_map=True)
            check_schema(self.path, self._file.schema_arrow)
            names = [name for name in COLUMNS if name in self._file.schema_arrow.names]
            self._has_pictures = "images" in names
            self._paths = self._has_pictures and is_text(self._file.schema_arrow.field("images").type.value_type)
            # Picture bytes stay in the file; paths are short.
            loaded = names if self._paths else [name for name in names if name != "images"]
            table = self._file.read(columns=loaded).slice(0, limit)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{self.path}: not a readable Parquet file: {error}") from error
        self._table = pa.table({name: plain_text(name, table.column(name)) for name in loaded})
        counts = [self._file.metadata.row_group(g).num_rows for g in range(self._file.num_row_groups)]
        self._group_ends = np.cumsum(counts)
        self._groups: OrderedDict[int, pa.ChunkedArray] = OrderedDict()
        self._check_rows()

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, row: int) -> Prompt:
        """Row ``row`` with decoded pictures.

        Raises:
            DataError: if there is no such row, or if a picture can't be decoded.
        """
        if not 0 <= row < len(self):
            raise DataError(f"{self.path}: row {row} does not exist; it has {len(self)} rows")
        facts = self._value("facts", row)
        return Prompt(
            id=self._id(row),
            question=self._value("question", row),
            images=tuple(self._pictures(row)),
            answer=self._value("answer", row),
            verifier=self._value("verifier", row),
            kind=self._value("kind", row) or "default",
            facts=json.loads(facts) if facts else {},
        )

    def __reduce__(self) -> tuple[type[ParquetPrompts], tuple[Path, int | None]]:
        # A memory map can't travel to another process; the path can.
        return ParquetPrompts, (self.path, self.limit)

    def ids(self) -> list[str]:
        """The ids of all rows, in order."""
        if "id" in self._table.column_names:
            return self._table.column("id").to_pylist()
        return [self._id(row) for row in range(len(self))]

    def _id(self, row: int) -> str:
        return self._value("id", row) if "id" in self._table.column_names else f"{self.path.stem}/{row}"

    def _value(self, column: str, row: int) -> Any:
        return self._table.column(column)[row].as_py() if column in self._table.column_names else None

    # ------------------------------------------------------------ pictures

    def _pictures(self, row: int) -> Iterator[np.ndarray]:
        """The pictures of a row, uint8 [height, width, 3] each."""
        if not self._has_pictures:
            return
        stored = self._value("images", row) if self._paths else self._stored_pictures(row)
        for place, one in enumerate(stored or []):
            at = f"{where(self.path, row, 'images')}, picture {place}"
            if one is None:
                raise DataError(f"{at}: got null; allowed: a picture, or a null instead of the whole list")
            if not self._paths:
                yield decode_picture(one, at)
                continue
            try:
                content = (self.path.parent / one).read_bytes()
            except OSError as error:
                raise DataError(f"{at}: {error}") from error
            yield decode_picture(content, f"{at} ({one})")

    def _stored_pictures(self, row: int) -> list[bytes] | None:
        group = int(np.searchsorted(self._group_ends, row, side="right"))
        if group in self._groups:
            self._groups.move_to_end(group)
        else:
            try:
                self._groups[group] = self._file.read_row_group(group, columns=["images"]).column("images")
            except (OSError, pa.ArrowException) as error:
                raise DataError(f"{where(self.path, row, 'images')}: can't be read: {error}") from error
            while len(self._groups) > 1 and sum(part.nbytes for part in self._groups.values()) > CACHED_BYTES:
                self._groups.popitem(last=False)
        start = int(self._group_ends[group - 1]) if group else 0
        return self._groups[group][row - start].as_py()

    # ------------------------------------------------------------ checks

    def _check_rows(self) -> None:
        if not len(self):
            raise DataError(f"{self.path}: got 0 rows; allowed: 1 or more")
        for name in self._table.column_names:
            if name not in MAY_BE_NULL:
                column = self._table.column(name)
                self._refuse(name, pc.is_null(column), "a text")
                self._refuse(name, pc.equal(pc.utf8_trim_whitespace(column), ""), "a text that isn't empty")
        if "id" in self._table.column_names:
            self._check_ids()
        self._each("verifier", lambda row, name: verifier_reference(name), unique=True)
        self._each("facts", lambda row, text: json_object(text))
        self._each("answer", self._check_truth)
        if self._paths:
            self._each("images", self._check_paths)

    def _refuse(self, column: str, mask: pa.ChunkedArray, allowed: str) -> None:
        rows = np.flatnonzero(mask.to_numpy())
        if len(rows):
            got = self._value(column, int(rows[0]))
            more = f" ({len(rows)} such rows)" if len(rows) > 1 else ""
            raise DataError(f"{where(self.path, int(rows[0]), column)}: got {short(got)}; allowed: {allowed}{more}")

    def _check_ids(self) -> None:
        first: dict[str, int] = {}
        for row, name in enumerate(self.ids()):
            if first.setdefault(name, row) != row:
                at = where(self.path, row, "id")
                raise DataError(
                    f"{at}: got {short(name)}, which is also that of row {first[name]}; allowed: unique ids"
                )

    def _each(self, column: str, check: Callable[[int, Any], object], unique: bool = False) -> None:
        """Call ``check(row, value)`` for each value, and name the row if it raises."""
        if column not in self._table.column_names:
            return
        seen = set()
        for row, value in enumerate(self._table.column(column).to_pylist()):
            if value is None or (unique and value in seen):
                continue
            if unique:
                seen.add(value)
            try:
                check(row, value)
            except DataError as error:
                raise DataError(f"{where(self.path, row, column)}: {error}") from error

    def _check_truth(self, row: int, answer: str) -> None:
        name = self._value("verifier", row)
        if name in SELF_CHECKED:
            get_verifier(name)(answer, answer)  # raises if it can't read the truth

    def _check_paths(self, row: int, paths: list[str | None]) -> None:
        for place, path in enumerate(paths):
            if path is not None and not (self.path.parent / path).is_file():
                raise DataError(f"picture {place}: got {path!r}, and {self.path.parent} has no such file")


def write_parquet(path: str | Path, prompts: Iterable[Prompt]) -> None:
    """Write prompts as :class:`ParquetPrompts` reads them, pictures as PNG files inside; nothing is lost.

    The file appears when it is complete. Only 64 prompts are held in memory at a time.

    Raises:
        DataError: for a picture that isn't uint8 [height, width, 3], or facts that JSON can't hold.
    """
    path = Path(path)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        # Pictures are compressed already, and plain columns can be read straight from the memory map.
        with pq.ParquetWriter(part, SCHEMA, compression="none", use_dictionary=["verifier", "kind"]) as writer:
            rest = iter(prompts)
            while rows := [_as_row(prompt) for prompt in itertools.islice(rest, ROWS_PER_GROUP)]:
                writer.write_table(pa.Table.from_pylist(rows, SCHEMA))
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _as_row(prompt: Prompt) -> dict[str, Any]:
    try:
        facts = json.dumps(dict(prompt.facts), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise DataError(f"prompt {prompt.id!r}: facts can't be written as JSON: {error}") from error
    return {
        "id": prompt.id,
        "question": prompt.question,
        "answer": prompt.answer,
        "verifier": prompt.verifier,
        "kind": prompt.kind,
        "facts": facts,
        "images": [encode_png(picture, f"prompt {prompt.id!r}") for picture in prompt.images],
    }


def main(files: list[str]) -> int:
    """Check whole files, pictures too; the exit status is 1 if one is broken."""
    if not files:
        print("usage: python -m skyrl.data.parquet FILE…", file=sys.stderr)
        return 2
    status = 0
    for file in files:
        try:
            prompts = ParquetPrompts(file)
            pictures = sum(len(prompts[row].images) for row in range(len(prompts)))
            print(f"{file}: {len(prompts)} prompts with {pictures} pictures, no errors")
        except DataError as error:
            print(f"error: {error}", file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
