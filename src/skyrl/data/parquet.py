"""Your own prompts, from a Parquet file; ``docs/data.md`` has the columns and an example. Text is checked completely
when the file is opened, pictures are decoded when their row is asked for. To check those too, before a long run::

    python -m skyrl.data.parquet FILE…
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from skyrl.data.datasets import PromptDataset
from skyrl.data.parquet_table import PICTURES, Column, ParquetTable, check_files, short, write_rows
from skyrl.data.pictures import encode_png
from skyrl.records import DataError, Prompt
from skyrl.rewards.claims import check_claims
from skyrl.rewards.verifiers import get_verifier, verifier_reference
from skyrl.settings import Config

COLUMNS = {
    "id": Column(),
    "question": Column(required=True),
    "answer": Column(required=True),
    "verifier": Column(required=True),
    "kind": Column(may_be_null=True),
    "facts": Column(may_be_null=True),
    "images": Column(PICTURES, may_be_null=True),
}
"""The fields of a :class:`Prompt` of the same names."""
SELF_CHECKED = ("exact", "numeric", "choice")
"""Verifiers whose truths are checked when a file is opened; they take microseconds and can't hang."""


def datasets(cfg: Config) -> dict[str, PromptDataset]:
    """``data.source=parquet``: all of ``data.train_path``, the first ``data.eval_size`` rows of ``data.eval_path``. A
    missing path, a broken file and an id that is in both are a :class:`DataError`."""
    files: list[ParquetPrompts] = []
    for key, limit in (("train_path", None), ("eval_path", cfg.data.eval_size)):
        if (path := getattr(cfg.data, key)) is None:
            raise DataError(f"data.source=parquet needs data.{key}: a parquet file; got null")
        files.append(ParquetPrompts(path, limit, cfg.reward.verifiers))
    train, held_out = files
    shared = sorted(set(train.ids()) & set(held_out.ids()))
    # Caches and seeds go by id, so one id may not mean two prompts. The same file twice is allowed: it is how one
    # checks that a model can learn its data by heart.
    if shared and train.path.resolve() != held_out.path.resolve():
        raise DataError(
            f"{len(shared)} id(s) stand both in {train.path} and in {held_out.path}, first {shared[0]!r}; allowed: ids "
            "that are unique over both (without an id column the file's name is part of it: rename one file)"
        )
    return {"train": train, "eval": held_out}


class ParquetPrompts:
    """Random access to the prompts of one Parquet file. It reads :data:`COLUMNS` and ignores others.

    Args:
        path: The file.
        limit: Use the first ``limit`` rows only.
        verifiers: ``reward.verifiers`` of the settings: names that rows may give besides the built-in ones.

    Raises:
        DataError: naming file, row and column, as :class:`ParquetTable`, and for an unknown verifier, a truth that
            ``exact``, ``numeric`` or ``choice`` can't read, a kind with a slash, and facts that are no JSON object or
            that their checker refuses.
    """

    def __init__(self, path: str | Path, limit: int | None = None, verifiers: Mapping[str, str] | None = None) -> None:
        self.path, self._arguments = Path(path), (path, limit, verifiers)
        self.table = ParquetTable(self.path, COLUMNS, limit)
        self.table.each("verifier", lambda _, name: verifier_reference(name, verifiers))
        self.table.each("kind", _check_kind)
        self.table.each("facts", lambda _, text: check_claims("", _json_object(text)))
        self.table.each("answer", self._check_truth)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, row: int) -> Prompt:
        """Row ``row`` with decoded pictures; :class:`DataError` if it isn't there, or one can't be decoded."""
        cells = self.table[row]
        cells |= {"kind": cells["kind"] or "default", "facts": json.loads(cells["facts"] or "{}")}
        return Prompt(**cells)

    def __reduce__(self) -> tuple[type[ParquetPrompts], tuple[Any, ...]]:
        # A memory map can't travel to another process; the path can.
        return ParquetPrompts, self._arguments

    def ids(self) -> list[str]:
        """The ids of all rows, in order."""
        return self.table.column("id")

    def verifiers(self) -> list[str]:
        """The different verifiers that the rows name."""
        return sorted(set(self.table.column("verifier")))

    def _check_truth(self, row: int, answer: str) -> None:
        name = self.table.value("verifier", row)
        if name in SELF_CHECKED:
            get_verifier(name)(answer, answer)  # raises if it can't read the truth


def _check_kind(row: int, kind: str) -> None:
    if "/" in kind:
        raise DataError(f"got {kind!r}; allowed: no slash, because the kind becomes part of a metric's name")


def _json_object(text: str) -> Mapping[str, Any]:
    try:
        if isinstance(value := json.loads(text), dict):
            return value
        raise ValueError("such as {}")
    except ValueError as error:
        raise DataError(f"got {short(text)}; allowed: a JSON object ({error})") from error


def write_parquet(path: str | Path, prompts: Iterable[Prompt]) -> None:
    """Write prompts as :class:`ParquetPrompts` reads them, pictures as PNG files inside; nothing is lost. The file
    appears when it is complete. Only 64 prompts are held in memory at a time.

    Raises:
        DataError: for a picture that isn't uint8 [height, width, 3], or facts that JSON can't hold.
    """
    write_rows(path, COLUMNS, map(_as_row, prompts))


def _as_row(prompt: Prompt) -> dict[str, Any]:
    try:
        facts = json.dumps(dict(prompt.facts), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise DataError(f"prompt {prompt.id!r}: facts can't be written as JSON: {error}") from error
    images = [encode_png(picture, f"prompt {prompt.id!r}") for picture in prompt.images]
    return {name: getattr(prompt, name) for name in COLUMNS} | {"facts": facts, "images": images}


def main(files: list[str]) -> int:
    """Check whole files; the exit status is 1 if one is broken, 2 without files."""
    return check_files(files, "skyrl.data.parquet", "prompts", lambda file: ParquetPrompts(file).table)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
