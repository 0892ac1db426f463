"""Your own preference pairs for offline MPO, from a Parquet file; ``docs/data.md`` has the columns and an example. Text
is checked completely when the file is opened, pictures are decoded when their row is asked for. To check those too,
before a long run::

    python -m skyrl.data.preference_pairs FILE…
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from skyrl.data.parquet_table import NUMBER, PICTURES, Column, ParquetTable, check_files, short, where, write_rows
from skyrl.data.pictures import encode_png
from skyrl.records import DataError, Prompt

if TYPE_CHECKING:
    from skyrl.policy.encode import PromptEncoder

PAIR_COLUMNS = {
    "id": Column(),
    "question": Column(required=True),
    "chosen": Column(required=True),
    "rejected": Column(required=True),
    "kind": Column(may_be_null=True),
    "margin": Column(NUMBER, may_be_null=True),
    "images": Column(PICTURES, may_be_null=True),
}
ENCODED_TOGETHER = 1024


@dataclass(slots=True, frozen=True)
class TextPair:
    """A better and a worse answer to one prompt, as text."""

    prompt: Prompt
    """Its truth and facts are not in a file of pairs: ``answer`` is empty, ``verifier`` ``exact``, both unused."""
    chosen: str
    """The whole answer, tags included, without the token that ends it."""
    rejected: str
    margin: float | None = None
    """r_θ(chosen) − r_θ(rejected) in a reward model's raw units; ``None`` if unknown."""


class ParquetPairs:
    """Random access to the pairs of one Parquet file. It reads :data:`PAIR_COLUMNS` and ignores others.

    Raises:
        DataError: naming file, row and column, as :class:`ParquetTable`, and for two equal answers and an infinite
            margin.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.table = ParquetTable(self.path, PAIR_COLUMNS)
        self.table.each("rejected", self._check_difference)
        self.table.each("margin", _check_margin)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, row: int) -> TextPair:
        """Row ``row`` with decoded pictures; :class:`DataError` if it isn't there, or one can't be decoded."""
        cells = self.table[row]
        kind, margin = cells["kind"] or "default", cells["margin"]
        # Its variant keeps it apart from a data set's prompt of the same id, which may have other pictures.
        prompt = Prompt(cells["id"], cells["question"], cells["images"], "", "exact", kind, variant="pair")
        unknown = margin is None or math.isnan(margin)
        return TextPair(prompt, cells["chosen"], cells["rejected"], None if unknown else margin)

    def check_tokens(
        self, encoder: PromptEncoder, max_prompt_tokens: int | None = None, max_answer_tokens: int | None = None
    ) -> None:
        """Encode every text once, to find what the learner could not take. Pictures' placeholders are not counted.

        Args:
            encoder: The policy's.
            max_prompt_tokens: Longest question, chat template included; ``None`` for any.
            max_answer_tokens: Longest answer, its end included; ``None`` for any.

        Raises:
            DataError: naming file, row and column, for a text that is too long or has a special token.
        """
        # The policy can't say these, so their log-probability is -inf; and an end in the middle is no end.
        special = np.array([*encoder.forbidden_token_ids(), *encoder.stop_token_ids])
        for column in ("chosen", "rejected"):
            texts = self.table.column(column)
            for start in range(0, len(texts), ENCODED_TOGETHER):
                for place, ids in enumerate(encoder.answer_ids(texts[start : start + ENCODED_TOGETHER])):
                    at = where(self.path, start + place, column)
                    found = ids[:-1][np.isin(ids[:-1], special)]
                    if found.size:
                        token = encoder.tokenizer.convert_ids_to_tokens(int(found[0]))
                        raise DataError(f"{at}: got the special token {token!r}; allowed: plain text, the end is added")
                    _check_length(len(ids), max_answer_tokens, at)
        for row, question in enumerate(self.table.column("question")):
            prompt = Prompt(self.table.value("id", row), question, (), "", "exact")
            _check_length(len(encoder.text_ids(prompt)), max_prompt_tokens, where(self.path, row, "question"))

    def _check_difference(self, row: int, rejected: str) -> None:
        if rejected == self.table.value("chosen", row):
            raise DataError(f"got {short(rejected)}, which is also the chosen answer; allowed: two different answers")


def write_pairs(path: str | Path, pairs: Iterable[TextPair]) -> None:
    """Write pairs as :class:`ParquetPairs` reads them, pictures as PNG files inside. The file appears when it is
    complete. Only 64 pairs are held in memory at a time.

    Raises:
        DataError: for a picture that isn't uint8 [height, width, 3].
    """
    write_rows(path, PAIR_COLUMNS, map(_as_row, pairs))


def _as_row(pair: TextPair) -> dict[str, Any]:
    prompt = pair.prompt
    texts = {"id": prompt.id, "question": prompt.question, "chosen": pair.chosen, "rejected": pair.rejected}
    images = [encode_png(picture, f"pair {prompt.id!r}") for picture in prompt.images]
    return texts | {"kind": prompt.kind, "margin": pair.margin, "images": images}


def _check_margin(row: int, margin: float) -> None:
    if math.isinf(margin):
        raise DataError(f"got {margin}; allowed: a finite number, or null or nan if it is unknown")


def _check_length(length: int, limit: int | None, at: str) -> None:
    if limit is not None and length > limit:
        raise DataError(f"{at}: got {length} tokens; allowed: up to {limit}")


def main(files: list[str]) -> int:
    """Check whole files; the exit status is 1 if one is broken, 2 without files."""
    return check_files(files, "skyrl.data.preference_pairs", "pairs", lambda file: ParquetPairs(file).table)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
