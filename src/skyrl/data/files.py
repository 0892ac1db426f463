"""Your own prompts, from a file of any :mod:`layout <skyrl.data.layouts>`; ``docs/data.md`` has columns and examples.
All texts are checked when a file is opened, pictures that stand in it when their row is asked for. Neither keeps the
rows in memory. To check everything, before a long run::

    python -m skyrl.data validate FILE…
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from skyrl.data.columns import check_columns
from skyrl.data.layouts import PICTURE_COLUMNS, TRUTHS, UNSEEN, Cells, detected, read_cells
from skyrl.data.overlap import content
from skyrl.data.pictures import decode_picture, picture_file, picture_outline
from skyrl.data.reading import USUAL, Reading
from skyrl.data.rows import Row, open_rows
from skyrl.data.values import CellError, check_unicode, json_like, short
from skyrl.records import Check, DataError, Prompt, Turn
from skyrl.rewards.claims import check_claims
from skyrl.rewards.verifiers import get_verifier, verifier_reference
from skyrl.settings import Layout

SELF_CHECKED = ("exact", "numeric", "choice")
"""Verifiers whose truths are checked when a file is opened; they take microseconds and can't hang."""
Opened = Callable[[bytes, str, int], np.ndarray]
"""Makes a picture of a file: its bytes, what errors call it, most pixels."""


@dataclass(slots=True, frozen=True)
class Problem:
    """What is wrong with a row."""

    row: int
    column: str
    """"" if it is the prompt as a whole, such as one that is too long."""
    problem: str

    def named(self, path: Path) -> str:
        """As errors say it."""
        return f"{path}, row {self.row}{f', column {self.column!r}' if self.column else ''}: {self.problem}"


class FilePrompts:
    """Random access to the prompts of one file or saved data set.

    Args:
        path: The file or folder.
        reading: How it is read.
        limit: Use the first ``limit`` rows only.
        check: False leaves out the checks of the rows: see :meth:`problems`.

    Raises:
        DataError: naming file, row and column: for a file that can't be read, columns of no layout or that are probably
            misspelt, no rows; and for the first of :meth:`problems`.
    """

    def __init__(
        self, path: str | Path, reading: Reading = USUAL, limit: int | None = None, check: bool = True
    ) -> None:
        self.path, self.reading, self._arguments = Path(path), reading, (path, reading, limit, check)
        self.rows, self._stem = open_rows(self.path), self.path.stem
        self._size = len(self.rows) if limit is None else min(limit, len(self.rows))
        self.hashes = np.empty(self._size, dtype=np.int64)
        """Of the ids, in order; they hold for this process only."""
        self.contents = np.zeros(self._size, dtype=np.int64)
        """Of what the rows ask and of their truths, without pictures (:mod:`skyrl.data.overlap`)."""
        self._verifiers = set[str]()
        if not self._size:
            raise DataError(f"{self.path}: got 0 rows; allowed: 1 or more")
        try:
            self.layout = detected(self.rows.names) if reading.layout is Layout.auto else reading.layout
            check_columns(self.rows.names, self.layout, self._first)
        except DataError as error:
            raise DataError(f"{self.path}: {error}") from error
        self._root = Path(reading.picture_root) if reading.picture_root else self._beside()
        for problem in self.problems() if check else ():
            raise DataError(f"{problem.named(self.path)} (python -m skyrl.data validate names all such rows)")

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, row: int) -> Prompt:
        """Row ``row`` with decoded pictures; :class:`DataError` if it isn't there, or is broken."""
        return self._asked(row, decode_picture)

    def __reduce__(self) -> tuple[type[FilePrompts], tuple[Any, ...]]:
        # An open file can't travel to another process; the path can.
        return FilePrompts, self._arguments

    def outline(self, row: int) -> Prompt:
        """The same with black pictures of the right sizes, of whose files only the beginning is read."""
        return self._asked(row, picture_outline)

    def id(self, row: int) -> str:
        """The id of a row."""
        return self._id(row, self.rows[row])

    def ids(self) -> list[str]:
        """The ids of all rows, in order."""
        if "id" not in self.rows.names:
            return [self._id(row, {}) for row in range(self._size)]
        without, found = set(self.rows.names) - {"id"}, list[str]()
        for batch in self.rows.batches(without):
            found += [self._id(len(found) + place, row) for place, row in enumerate(batch) if isinstance(row, dict)]
        return found[: self._size]

    def verifiers(self) -> list[str]:
        """The different verifiers that the rows name."""
        return sorted(self._verifiers)

    # ------------------------------------------------------------ checks

    def problems(self, look: Callable[[Prompt], object] | None = None) -> Iterator[Problem]:
        """Everything that is wrong with the rows: at most one problem a row, and ids that come twice. Without ``look``
        pictures inside the file are passed over, and those that have a path must be there.

        Args:
            look: Is given each prompt with its decoded pictures; may raise a DataError.
        """
        at, hidden = 0, self.rows.inline & set(PICTURE_COLUMNS) if look is None else set()
        unseen = dict.fromkeys(hidden, UNSEEN)
        for batch in self.rows.batches(hidden):
            for row in batch[: self._size - at]:
                try:
                    self.hashes[at] = hash((at,))
                    if isinstance(row, DataError):
                        raise CellError("", str(row).removeprefix(f"{self.path}, row {at}: "))
                    self.hashes[at] = hash(self._id(at, row))
                    self.contents[at] = self._check(row | unseen)
                    if look is not None:
                        look(self._prompt(at, row, decode_picture))
                except CellError as error:
                    yield Problem(at, error.column, error.problem)
                except DataError as error:
                    yield Problem(at, "", str(error))
                at += 1
            if at == self._size:
                break
        if "id" in self.rows.names:
            yield from self._repeated()

    def _repeated(self) -> Iterator[Problem]:
        order = np.argsort(self.hashes, kind="stable")
        for place in np.flatnonzero(np.diff(self.hashes[order]) == 0).tolist():
            first, row = int(order[place]), int(order[place + 1])
            if self.id(first) == self.id(row):
                also = f"which is also that of row {first}"
                yield Problem(row, "id", f"got {short(self.id(row))}, {also}; allowed: unique ids")

    def _check(self, row: Row) -> int:
        """Of a sound row, the hash of what it asks."""
        cells = read_cells(row, self.layout)
        checks = self._checks(cells)
        for check in checks:
            self._verifiers.add(check.verifier)
            if problem := _truth_problem(check.verifier, check.truth):
                raise CellError("verifier" if cells.checks else self._truth_column(row), problem)
        check_unicode(cells.kind, "kind")
        if "/" in cells.kind:
            raise CellError(
                "kind", f"got {cells.kind!r}; allowed: no slash, because it becomes part of a metric's name"
            )
        try:
            check_claims("", _facts(cells.facts))
        except DataError as error:
            raise CellError("facts", str(error)) from error
        for place, stored in enumerate(cells.pictures if cells.pictures is not UNSEEN else ()):
            self._file(stored, place, read=False)
        return content(cells.turns, checks)

    def _checks(self, cells: Cells) -> tuple[Check, ...]:
        """The comparisons of a row, every name known."""
        name = cells.verifier or self.reading.verifier
        if name is None:
            raise CellError("verifier", "the row names none; allowed: such a column, or a setting reward.verifier=NAME")
        for one in [check.verifier for check in cells.checks] or [name]:
            try:
                verifier_reference(one, self.reading.verifiers)
            except DataError as error:
                raise CellError("verifier", str(error)) from error
        if cells.answer is None and name not in self.reading.verifiers:
            columns = TRUTHS[self.layout]
            raise CellError(
                columns[-1], f"got null; allowed: a truth for {name!r}, in the column {' or '.join(columns)}"
            )
        return cells.checks or (Check(name, cells.answer or ""),)

    def _truth_column(self, row: Row) -> str:
        return next((name for name in TRUTHS[self.layout] if row.get(name) is not None), "messages")

    def _first(self) -> Row:
        return next((row for batch in self.rows.batches() for row in batch if isinstance(row, dict)), {})

    # ------------------------------------------------------------ prompts

    def _asked(self, row: int, opened: Opened) -> Prompt:
        if not 0 <= row < self._size:
            raise DataError(f"{self.path}: row {row} does not exist; it has {self._size} rows")
        try:
            return self._prompt(row, self.rows[row], opened)
        except CellError as error:
            raise DataError(Problem(row, error.column, error.problem).named(self.path)) from error

    def _prompt(self, row: int, values: Row, opened: Opened) -> Prompt:
        cells, images = read_cells(values, self.layout), list[np.ndarray]()
        checks, extra = self._checks(cells), self._extra(values, cells.used)
        for place, stored in enumerate(cells.pictures):
            file = self._file(stored, place)
            try:
                images.append(opened(file, f"picture {place}", self.reading.max_pixels))
            except DataError as error:
                raise CellError("images", str(error)) from error
        turns = self._framed(cells.turns)
        parts = turns[-1].parts
        simple = len(turns) == 1 and None not in parts[len(images) :] and len(parts) == len(images) + 1
        return Prompt(
            id=self._id(row, values),
            question="".join(part for part in parts if part is not None),
            images=tuple(images),
            answer=checks[0].truth if cells.answer is None else cells.answer,
            verifier=checks[0].verifier,
            kind=cells.kind,
            facts=_facts(cells.facts),
            turns=() if simple else turns,
            checks=checks if cells.checks else (),
            extra=extra,
        )

    def _framed(self, turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
        """With the settings' system prompt and suffix."""
        if (suffix := self.reading.suffix) is not None:
            suffix = suffix if suffix[:1].isspace() else f"\n{suffix}"
            parts = turns[-1].parts
            ended = (*parts[:-1], parts[-1] + suffix) if parts[-1] is not None else (*parts, suffix)
            turns = (*turns[:-1], replace(turns[-1], parts=ended))
        if self.reading.system_prompt is not None and turns[0].role != "system":
            turns = (Turn("system", (self.reading.system_prompt,)), *turns)
        return turns

    def _extra(self, row: Row, used: set[str]) -> dict[str, Any]:
        extra = {name: json_like(value) for name, value in row.items() if name not in used}
        if self.layout is Layout.skyrl and row.get("extra") is not None:
            extra |= _mapping(row["extra"], "extra")
        return extra

    def _id(self, row: int, values: Row) -> str:
        if "id" not in self.rows.names:
            return f"{self._stem}/{row}"
        value = values.get("id")
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if not isinstance(value, str) or not value.strip():
            raise CellError("id", f"got {short(value)}; allowed: a text that isn't empty, or a whole number")
        check_unicode(value, "id")
        return value

    def _file(self, stored: Any, place: int, read: bool = True) -> bytes:
        try:
            return picture_file(stored, self._root, read)
        except DataError as error:
            raise CellError("images", f"picture {place}: {error}") from error

    def _beside(self) -> Path:
        return self.path if self.path.is_dir() else self.path.parent


@lru_cache(65536)
def _truth_problem(name: str, truth: str) -> str | None:
    """Why a verifier of :data:`SELF_CHECKED` can't read a truth."""
    try:
        if name in SELF_CHECKED:
            get_verifier(name)(truth, truth)
    except DataError as error:
        return str(error)
    return None


def _facts(value: Any) -> Mapping[str, Any]:
    return {} if value is None or value == "" else _mapping(value, "facts")


def _mapping(value: Any, column: str) -> Mapping[str, Any]:
    """A JSON object, or its text."""
    problem = "such as {}"
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        found, problem = None, str(error)
    if not isinstance(found, Mapping):
        raise CellError(column, f"got {short(value)}; allowed: a JSON object ({problem})")
    return found
