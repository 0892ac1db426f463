"""Your own prompts, from a Parquet file; ``docs/data.md`` has an example.

Text is checked completely when the file is opened, pictures are decoded when their row is asked for. Check those too,
before a long run, with::

    python -m skyrl.data.parquet FILE…
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from skyrl.data.parquet_schema import COLUMNS, MAY_BE_NULL, REQUIRED, SELF_CHECKED, json_object
from skyrl.data.parquet_table import ParquetTable, check_files, write_rows
from skyrl.data.pictures import encode_png
from skyrl.records import DataError, Prompt
from skyrl.rewards.claims import check_claims
from skyrl.rewards.verifiers import get_verifier, verifier_reference


class ParquetPrompts:
    """Implements :class:`skyrl.interfaces.PromptDataset` for one Parquet file. Other columns are ignored.

    ======== ======================================== ==========================================================
    column   type                                     meaning
    ======== ======================================== ==========================================================
    id       string, optional                         unique; default ``<file name without ending>/<row>``
    question string                                   the user's message without picture placeholders
    answer   string                                   the truth that the verifier compares with
    verifier string                                   ``exact``, ``numeric``, ``math``, ``choice``, or
                                                      ``package.module:function``
    images   list of binary or of string, optional    PNG or JPEG files, or paths relative to the Parquet file
    kind     string, optional                         family of the question, default ``default``
    facts    string, optional                         JSON object of what is true of the pictures, default ``{}``
    ======== ======================================== ==========================================================

    Args:
        path: The file.
        limit: Use the first ``limit`` rows only.

    Raises:
        DataError: naming file, row and column, for a missing or unreadable file, missing columns, wrong types, nulls
            or empty texts, an id that comes twice, an unknown verifier, a truth that ``exact``, ``numeric`` or
            ``choice`` can't read, a kind with a slash, facts that are no JSON object or that
            their checker refuses, or a picture path without a file.
    """

    def __init__(self, path: str | Path, limit: int | None = None) -> None:
        self.path, self.limit = Path(path), limit
        self.table = ParquetTable(self.path, COLUMNS, REQUIRED, MAY_BE_NULL, limit)
        self.table.each("verifier", lambda row, name: verifier_reference(name), unique=True)
        self.table.each("kind", _check_kind, unique=True)
        self.table.each("facts", lambda row, text: check_claims("", json_object(text)))
        self.table.each("answer", self._check_truth)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, row: int) -> Prompt:
        """Row ``row`` with decoded pictures.

        Raises:
            DataError: if there is no such row, or if a picture can't be decoded.
        """
        table = self.table
        table.require(row)
        facts = table.value("facts", row)
        return Prompt(
            id=table.id(row),
            question=table.value("question", row),
            images=tuple(table.pictures(row)),
            answer=table.value("answer", row),
            verifier=table.value("verifier", row),
            kind=table.value("kind", row) or "default",
            facts=json.loads(facts) if facts else {},
        )

    def __reduce__(self) -> tuple[type[ParquetPrompts], tuple[Path, int | None]]:
        # A memory map can't travel to another process; the path can.
        return ParquetPrompts, (self.path, self.limit)

    def ids(self) -> list[str]:
        """The ids of all rows, in order."""
        return self.table.ids()

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


def write_parquet(path: str | Path, prompts: Iterable[Prompt]) -> None:
    """Write prompts as :class:`ParquetPrompts` reads them, pictures as PNG files inside; nothing is lost.

    The file appears when it is complete. Only 64 prompts are held in memory at a time.

    Raises:
        DataError: for a picture that isn't uint8 [height, width, 3], or facts that JSON can't hold.
    """
    write_rows(path, COLUMNS, map(_as_row, prompts), repeated=("verifier", "kind"))


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


def _describe(file: str) -> str:
    prompts = ParquetPrompts(file)
    pictures = sum(len(prompts[row].images) for row in range(len(prompts)))
    return f"{len(prompts)} prompts with {pictures} pictures"


def main(files: list[str]) -> int:
    """Check whole files, pictures too; the exit status is 1 if one is broken."""
    return check_files(files, "skyrl.data.parquet", _describe)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
