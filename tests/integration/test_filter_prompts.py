"""The offline pass with real members over Ray, and its pool as training reads it. The engine is the plain one: the pass
knows the sampler only, and how it samples with vLLM is what other tests are for."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from skyrl.data.datasets import build_datasets
from skyrl.data.pool import METADATA, pool_rows
from skyrl.filter_prompts import filter_prompts
from skyrl.records import DataError
from skyrl.settings import Config

pytestmark = pytest.mark.integration


def test_the_pass_writes_a_pool_that_training_can_read(make_config: Callable[..., Config], tmp_path: Path) -> None:
    cfg = make_config("filter")
    cfg.rollout.engine = "tests.plain_engine:PlainEngine"
    cfg.filter.rows, cfg.filter.output = 14, str(tmp_path / "made" / "pool.parquet")
    console = Console(file=io.StringIO(), width=200)
    path = filter_prompts(cfg, console)
    assert path == Path(cfg.filter.output) and [file.name for file in path.parent.iterdir()] == ["pool.parquet"]

    table, train = pq.read_table(path).to_pylist(), build_datasets(cfg)["train"]
    assert [row["row"] for row in table] == list(range(14))  # chunks of 6, 6 and 2
    for row in table:
        prompt = train[row["row"]]
        assert (row["id"], row["kind"]) == (prompt.id, prompt.kind)
        assert (row["samples"], row["errors"]) == (4, 0)
        assert row["pass_rate"] in (0.0, 0.25, 0.5, 0.75, 1.0)
        assert row["mean_reward"] > 0  # the squashed reward model alone is above 0
        assert (row["hallucination_rate"] is None) == (not prompt.images)
    assert {row["hallucination_rate"] is None for row in table} == {True, False}
    metadata = json.loads(pq.read_schema(path).metadata[METADATA])
    assert metadata["rows"] == cfg.digits.train_size and metadata["samples_per_prompt"] == 4
    assert metadata["temperature"] == 1.0 and Path(metadata["policy"]).is_dir() and metadata["seed"] == 0

    between = [row["row"] for row in table if 0 < row["pass_rate"] < 1]
    if between:
        assert pool_rows(path, cfg.data, train).tolist() == between
    else:
        with pytest.raises(DataError, match="of 14 prompts"):
            pool_rows(path, cfg.data, train)
    shown = console.file.getvalue()
    assert f"data.pool_path={path}" in shown and "only the first 14 of 20000 training rows" in shown
