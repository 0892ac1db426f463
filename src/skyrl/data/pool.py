"""The prompt pool of ``python -m skyrl.filter_prompts``: how often the starting policy is right on each prompt.

A prompt that is always right or always wrong teaches GRPO nothing; ``pool_rows`` leaves those out.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from skyrl.interfaces import PromptDataset
from skyrl.records import DataError, SampleGroup
from skyrl.settings import DataConfig

SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("id", pa.string()),
        ("kind", pa.string()),
        ("samples", pa.int64()),
        ("errors", pa.int64()),
        ("pass_rate", pa.float64()),
        ("mean_reward", pa.float64()),
        ("hallucination_rate", pa.float64()),
    ]
)
METADATA = b"skyrl"
"""Key of the file's metadata, a JSON object."""
COMPARED_IDS = 256
"""Rows whose ids are compared where the data set can't name all its ids cheaply."""
NEEDED = {"row": pa.types.is_integer, "id": pa.types.is_string, "pass_rate": pa.types.is_floating}


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
            pass_rate=sum(reward.rule >= 1.0 for reward in rewards) / len(rewards) if rewards else None,
            mean_reward=sum(reward.total for reward in rewards) / len(rewards) if rewards else None,
            hallucination_rate=sum(sample.false_claims > 0 for sample in samples) / len(samples) if known else None,
        )


def write_pool(path: str | Path, rows: Sequence[PoolRow], data: DataConfig, size: int, **origin: Any) -> None:
    """Write the pool; the file appears when it is complete, and an older one stays until then.

    Args:
        path: the Parquet file. Its folder is made if there is none.
        rows: in any order.
        data: of the data set that was rolled out.
        size: number of its rows.
        **origin: how the pool was made (policy folder, G, temperature, seed), kept in the file's metadata as JSON.

    Raises:
        OSError: if it can't be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {METADATA: json.dumps({"rows": size, "data": _identity(data), **origin})}
    table = pa.Table.from_pylist([dataclasses.asdict(row) for row in rows], SCHEMA.with_metadata(metadata))
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            pq.write_table(table, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def pool_metadata(path: str | Path) -> dict[str, Any]:
    """How a pool was made: ``rows`` and ``data`` of its data set, and what else :func:`write_pool` was given.

    Raises:
        DataError: if the file can't be read or is no pool.
    """
    try:
        schema = pq.read_schema(path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: not a readable Parquet file: {error}") from error
    if METADATA not in (schema.metadata or {}):
        raise DataError(f"{path}: not a prompt pool; python -m skyrl.filter_prompts writes one")
    metadata: dict[str, Any] = json.loads(schema.metadata[METADATA])
    return metadata


def pool_rows(path: str | Path, data: DataConfig, dataset: PromptDataset) -> np.ndarray:
    """Rows of the training data to train on: pass rate strictly between ``data.pool_min`` and ``data.pool_max``.

    Prompts of which no answer could be scored are left out, and so are rows that were not rolled out.

    Args:
        path: the file that :func:`write_pool` wrote.
        data: the limits, and what the data set is made from.
        dataset: the training data.

    Returns:
        int64 [n], n ≥ 1, ascending.

    Raises:
        DataError: if the file is no pool or was made from other data (number of rows, source, seed or an id differs),
            if a column is missing or of the wrong type, a row comes twice, or if no prompt is within the limits.
    """
    metadata = pool_metadata(path)
    _check_data(path, metadata, data, len(dataset))
    table = _read(path)
    rows = table.column("row").to_numpy()
    if len(np.unique(rows)) < len(rows) or (len(rows) and not 0 <= rows.min() <= rows.max() < len(dataset)):
        raise DataError(
            f"{path}: column 'row' has repeats or is out of range; allowed: each of 0 … {len(dataset) - 1} once"
        )
    _check_ids(path, rows, table.column("id").to_pylist(), dataset)
    rates = table.column("pass_rate").to_numpy()  # null becomes nan, which is in no interval
    chosen = (rates > data.pool_min) & (rates < data.pool_max)
    if not chosen.any():
        raise DataError(
            f"{path}: no prompt has a pass rate above {data.pool_min} and below {data.pool_max}: {spread(rates)}"
        )
    return np.sort(rows[chosen]).astype(np.int64)


def spread(rates: np.ndarray) -> str:
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


def _identity(data: DataConfig) -> dict[str, Any]:
    """What decides which prompt a row is, besides the number of rows and the ids."""
    if data.source == "digits":
        kinds = list(data.kinds)
        return {"source": data.source, "seed": data.seed, "text_share": data.text_share, "kinds": kinds}
    return {"source": data.source}


def _check_data(path: str | Path, metadata: dict[str, Any], data: DataConfig, size: int) -> None:
    if metadata.get("rows") != size:
        raise DataError(
            f"{path}: made from a data set of {metadata.get('rows')} rows, this one has {size}; a pool goes with the "
            "data that it was made from: run python -m skyrl.filter_prompts with this run's settings"
        )
    made, now = metadata.get("data"), _identity(data)
    if made != now:
        raise DataError(
            f"{path}: made from other data ({made}, this run: {now}); run python -m skyrl.filter_prompts anew"
        )


def _read(path: str | Path) -> pa.Table:
    schema = pq.read_schema(path)
    for name, fits in NEEDED.items():
        if name not in schema.names:
            raise DataError(f"{path}: column {name!r} is missing; got {', '.join(schema.names)}")
        if not fits(kind := schema.field(name).type):
            raise DataError(f"{path}: column {name!r}: got type {kind}; allowed: {SCHEMA.field(name).type}")
    try:
        table = pq.read_table(path, columns=list(NEEDED))
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: not a readable Parquet file: {error}") from error
    if nulls := table.column("row").null_count:
        raise DataError(f"{path}: column 'row' has {nulls} nulls; allowed: none")
    return table


def _check_ids(path: str | Path, rows: np.ndarray, ids: list[str], dataset: PromptDataset) -> None:
    """All ids of a data set that can list them; else those of some rows, because making a prompt may cost a picture."""
    listed = getattr(dataset, "ids", None)
    names = listed() if listed is not None else None
    places = (
        range(len(rows)) if names is not None else np.unique(np.linspace(0, len(rows) - 1, COMPARED_IDS).astype(int))
    )
    for place in places if len(rows) else ():
        row = int(rows[place])
        own = names[row] if names is not None else dataset[row].id
        if ids[place] != own:
            raise DataError(
                f"{path}: row {row} is {ids[place]!r}, in the training data it is {own!r}: made from other data"
            )
