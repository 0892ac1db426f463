"""``data.source=files``: the files of a run, one or several for each split."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np

from skyrl.data.datasets import PromptDataset
from skyrl.data.files import FilePrompts
from skyrl.data.reading import Reading
from skyrl.data.rows import open_rows
from skyrl.data.stream import shares
from skyrl.records import DataError, Prompt
from skyrl.settings import Config, paths_of


class Mixture:
    """Several files as one data set, one behind the other; in which order training asks them is the stream's matter."""

    def __init__(self, files: Sequence[FilePrompts]) -> None:
        self.files = list(files)
        self.sizes = [len(file) for file in files]
        self._starts = [0, *accumulate(self.sizes)]
        self.contents = np.concatenate([file.contents for file in files])

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, row: int) -> Prompt:
        """As that of the row's file."""
        file, place = self._at(row)
        return file[place]

    def outline(self, row: int) -> Prompt:
        """As that of the row's file."""
        file, place = self._at(row)
        return file.outline(place)

    def ids(self) -> list[str]:
        """The ids of all rows, in order."""
        return [name for file in self.files for name in file.ids()]

    def verifiers(self) -> list[str]:
        """The different verifiers that the rows name."""
        return sorted({name for file in self.files for name in file.verifiers()})

    def _at(self, row: int) -> tuple[FilePrompts, int]:
        if not 0 <= row < len(self):
            raise DataError(f"row {row} does not exist; the files have {len(self)} rows together")
        place = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self.files[place], row - self._starts[place]


def datasets(cfg: Config) -> dict[str, PromptDataset]:
    """All rows of ``data.train_path``, and ``data.eval_size`` rows of ``data.eval_path``: the first of each of its
    files, by their sizes. A missing path, a broken file and an id that stands in two files are a :class:`DataError`."""
    reading, made = Reading.of(cfg), dict[str, list[FilePrompts]]()
    for split, limit in (("train", None), ("eval", cfg.data.eval_size)):
        paths = paths_of(getattr(cfg.data, f"{split}_path"))
        if not paths:
            raise DataError(f"data.source=files needs data.{split}_path: a file or folder; got null")
        limits: list[int | None] = [limit] * len(paths)
        if limit is not None and len(paths) > 1:
            sizes = [len(open_rows(Path(path))) for path in paths]
            limits = [max(1, share) for share in shares(sizes, min(limit, sum(sizes)))]
        made[split] = [FilePrompts(path, reading, most) for path, most in zip(paths, limits, strict=True)]
    check_ids([*made["train"], *made["eval"]], len(made["train"]))
    return {split: files[0] if len(files) == 1 else Mixture(files) for split, files in made.items()}


def check_ids(files: list[FilePrompts], train: int) -> None:
    """Caches and seeds go by id, so one id may not mean two prompts. The same file to train and to evaluate on is
    allowed: it is how one checks that a model can learn its data by heart."""
    for second in range(1, len(files)):
        for first in range(second):
            one, other = files[first], files[second]
            if first < train <= second and one.path.resolve() == other.path.resolve():
                continue
            both = np.intersect1d(one.hashes, other.hashes)
            if len(both):
                name = one.id(int(np.flatnonzero(np.isin(one.hashes, both))[0]))
                raise DataError(
                    f"{len(both)} id(s) stand both in {one.path} and in {other.path}, first {name!r}; allowed: ids "
                    "that are unique over all (without an id column the file's name is part of it: rename one file)"
                )
