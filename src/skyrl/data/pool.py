"""The prompt pool of ``python -m skyrl.filter_prompts``: how often the starting policy is right on each prompt.

A prompt that is always right or always wrong teaches GRPO nothing; ``pool_rows`` leaves those out.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from skyrl.data.datasets import PromptDataset
from skyrl.data.parquet_table import NUMBER, WHOLE, Column, ParquetTable, write_rows
from skyrl.records import DataError, SampleGroup
from skyrl.settings import DataConfig

COLUMNS = {
    "row": Column(WHOLE, required=True),
    "id": Column(required=True),
    "kind": Column(),
    "samples": Column(WHOLE),
    "errors": Column(WHOLE),
    "pass_rate": Column(NUMBER, required=True, may_be_null=True),
    "mean_reward": Column(NUMBER, may_be_null=True),
    "hallucination_rate": Column(NUMBER, may_be_null=True),
}
METADATA = b"skyrl"
"""Key of the file's metadata, a JSON object."""
COMPARED_IDS = 256
"""Rows whose ids are compared where the data set can't name all its ids cheaply."""


@dataclass(slots=True, frozen=True)
class PoolRow:
    """One prompt of the pool; the fields are the columns of the file."""

    row: int
    """Row of the training data."""
    id: str
    kind: str
    samples: int
    """Answers drawn."""
    errors: int
    """Those that could not be scored; they count in none of the following."""
    pass_rate: float | None
    """Share of the scored answers with the full rule score; None without any."""
    mean_reward: float | None
    """Mean total reward of the scored answers; None without any."""
    hallucination_rate: float | None
    """Share of all answers with a false claim about the picture; None if its claims can't be checked."""

    @classmethod
    def of(cls, row: int, group: SampleGroup) -> PoolRow:
        """What a scored group says about its prompt."""
        prompt, samples = group.prompt, group.samples
        rewards = [sample.reward for sample in samples if sample.reward is not None]
        known = group.checkable and bool(samples)
        return cls(
            row=row,
            id=prompt.id,
            kind=prompt.kind,
            samples=len(samples),
            errors=len(samples) - len(rewards),
            pass_rate=sum(reward.right for reward in rewards) / len(rewards) if rewards else None,
            mean_reward=sum(reward.total for reward in rewards) / len(rewards) if rewards else None,
            hallucination_rate=sum(sample.false_claims > 0 for sample in samples) / len(samples) if known else None,
        )


def write_pool(
    path: str | Path, rows: Sequence[PoolRow], data: DataConfig, dataset: PromptDataset, **origin: Any
) -> None:
    """Write the pool; the file appears when it is complete, and an older one stays until then.

    Args:
        path: the Parquet file. Its folder is made if there is none.
        rows: in any order.
        data, dataset: the training data, of which the rows were rolled out.
        **origin: how the pool was made (policy folder, G, temperature, seed), kept in the file's metadata as JSON.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    metadata = {METADATA: json.dumps(_identity(data, dataset) | origin)}
    write_rows(path, COLUMNS, map(dataclasses.asdict, rows), metadata)


def pool_rows(path: str | Path, data: DataConfig, dataset: PromptDataset) -> np.ndarray:
    """Rows of the training data to train on: pass rate strictly between ``data.pool_min`` and ``data.pool_max``.

    Prompts of which no answer could be scored are left out, and so are rows that were not rolled out.

    Args:
        path: the file that :func:`write_pool` wrote.
        data, dataset: the limits, and the training data.

    Returns:
        int64 [n], n ≥ 1, ascending.

    Raises:
        DataError: if the file is no pool, or is broken; if it was made from other data (number of rows, source,
            identity or an id differs); or if no prompt is within the limits.
    """
    table = ParquetTable(Path(path), COLUMNS)
    if METADATA not in table.metadata:
        raise DataError(f"{path}: not a prompt pool; python -m skyrl.filter_prompts writes one")
    made, now = json.loads(table.metadata[METADATA]), _identity(data, dataset)
    if {key: made.get(key) for key in now} != now:
        raise DataError(
            f"{path}: made from other data ({made.get('rows')} rows of {made.get('data')}; this run: "
            f"{now['rows']} rows of {now['data']}); run python -m skyrl.filter_prompts with this run's settings"
        )
    rows = np.array(table.column("row"))
    if len(np.unique(rows)) < len(rows) or not 0 <= rows.min() <= rows.max() < len(dataset):
        allowed = f"each of 0 … {len(dataset) - 1} once"
        raise DataError(f"{path}: column 'row' has repeats or is out of range; allowed: {allowed}")
    _check_ids(table, rows, dataset)
    rates = np.array(table.column("pass_rate"), dtype=float)  # null becomes nan, which is in no interval
    chosen = (rates > data.pool_min) & (rates < data.pool_max)
    if not chosen.any():
        limits = f"above {data.pool_min} and below {data.pool_max}"
        raise DataError(f"{path}: no prompt has a pass rate {limits}: {_spread(rates)}")
    return np.sort(rows[chosen]).astype(np.int64)


def _identity(data: DataConfig, dataset: PromptDataset) -> dict[str, Any]:
    """What decides which prompt a row is, besides the ids."""
    return {"rows": len(dataset), "data": {"source": data.source, **getattr(dataset, "identity", dict)()}}


def _check_ids(table: ParquetTable, rows: np.ndarray, dataset: PromptDataset) -> None:
    """All ids of a data set that can list them; else those of some rows, because making a prompt may cost a picture."""
    own = dataset.ids() if hasattr(dataset, "ids") else None
    some = np.linspace(0, len(rows) - 1, len(rows) if own is not None else min(len(rows), COMPARED_IDS)).astype(int)
    for place in some.tolist():
        row = int(rows[place])
        pooled, real = table.value("id", place), own[row] if own is not None else dataset[row].id
        if pooled != real:
            other = f"row {row} is {pooled!r}, in the training data it is {real!r}"
            raise DataError(f"{table.path}: {other}: made from other data")


def _spread(rates: np.ndarray) -> str:
    """The distribution of pass rates float [n] (``nan``: not scored) in a sentence."""
    known = rates[~np.isnan(rates)]
    text = (
        f"of {len(rates)} prompts {int((known == 0).sum())} are always wrong, {int((known == 1).sum())} always right, "
        f"{int(((known > 0) & (known < 1)).sum())} in between, {len(rates) - len(known)} were not scored"
    )
    if len(known):
        low, middle, high = np.quantile(known, [0.25, 0.5, 0.75])
        text += f"; quartiles of the pass rate {low:.2f}, {middle:.2f}, {high:.2f}"
    return text
