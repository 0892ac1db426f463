"""The data sets of a run, by split."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pkgutil import resolve_name
from typing import Any, Protocol

from skyrl.records import DataError, Prompt
from skyrl.settings import Config

SOURCES = {"digits": "skyrl.digits.scenes:datasets", "files": "skyrl.data.mixture:datasets"}
"""``data.source`` → the function that makes its data sets. Imported when it is asked for."""


class PromptDataset(Protocol):
    """Random access to prompts; a list of them is one. Every rollout worker holds one, so that requests are row
    numbers. Used where a data set has them: ``ids()``, the ids of all rows in order; ``verifiers()``, the different
    verifiers that its rows name; ``identity()``, what else decides which prompt a row is, as a JSON object;
    ``outline(row)``, the prompt with black pictures of the right sizes, by which all rows are measured before a run;
    ``sizes``, the rows of each of the parts that it mixes, one behind the other.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> Prompt: ...


class Chosen:
    """Some rows of a data set."""

    def __init__(self, dataset: PromptDataset, rows: Sequence[int]) -> None:
        self.dataset, self.rows = dataset, list(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Prompt:
        """The prompt of that place."""
        return self.dataset[self.rows[row]]


def build_datasets(cfg: Config) -> dict[str, PromptDataset]:
    """Training and evaluation prompts, ``{"train": …, "eval": …}``, by the function of ``data.source``: one of
    :data:`SOURCES`, or ``package.module:function`` of your own that takes the :class:`Config` and returns such a
    dictionary. Ids must differ over both. Cheap enough for every worker to call: no picture is decoded here. A source
    that can't be imported or returns anything else is a :class:`DataError`; it may raise its own."""
    source = SOURCES.get(cfg.data.source, cfg.data.source)
    try:
        if ":" not in source:
            raise ValueError(f"no source has the name {source!r}")
        make = resolve_name(source)
    except (ImportError, AttributeError, ValueError) as error:
        allowed = f"{', '.join(SOURCES)}, or package.module:function"
        raise DataError(f"data.source={cfg.data.source}: {error}; allowed: {allowed}") from error
    datasets: Any = make(cfg)
    made = {k: len(v) for k, v in datasets.items()} if isinstance(datasets, dict) else type(datasets).__name__
    if not isinstance(made, dict) or made.keys() != {"train", "eval"} or not all(made.values()):
        raise DataError(f"data.source={cfg.data.source} made {made}; allowed: prompts for train and for eval")
    return datasets


def verifier_names(datasets: Iterable[PromptDataset]) -> list[str]:
    """The different verifiers that data sets name, where they can say so without making each prompt."""
    return sorted({name for dataset in datasets for name in getattr(dataset, "verifiers", list)()})


def check_size(size: int, cfg: Config) -> None:
    """A prompt that comes twice in a step would get the same answers twice: sampling is seeded by prompt and step.

    Raises:
        DataError: if there are fewer training prompts than a step asks.
    """
    wanted = cfg.rollout.in_flight * cfg.rollout.num_workers
    if size < wanted and cfg.data.pairs_path is None:
        mend = ", or widen data.pool_min … data.pool_max" if cfg.data.pool_path else ""
        more = f" and oversample={cfg.rollout.oversample:g} ask {wanted}" if cfg.rollout.oversample else ""
        raise DataError(
            f"there are {size} training prompts, but rollout.prompts_per_step={cfg.rollout.prompts_per_step}{more}: a "
            f"step would ask some of them twice; lower it to {size} or less{mend}"
        )
