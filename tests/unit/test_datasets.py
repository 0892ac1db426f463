"""Which data sets a configuration means."""

from __future__ import annotations

from pathlib import Path

import pytest

from skyrl.data.datasets import build_datasets
from skyrl.data.parquet import write_parquet
from skyrl.digits.scenes import DigitScenes
from skyrl.records import DataError, Prompt
from skyrl.settings import DataConfig


def text(name: str) -> Prompt:
    return Prompt(name, "1+1?", (), "2", "numeric")


def test_digits() -> None:
    datasets = build_datasets(DataConfig(train_size=30, eval_size=7, text_share=0.0, seed=4))
    assert list(datasets) == ["train", "eval"]
    assert [len(part) for part in datasets.values()] == [30, 7]
    assert datasets["train"][3].question == DigitScenes("train", 30, 0.0, 4)[3].question
    assert datasets["eval"][3].facts == DigitScenes("eval", 7, 0.0, 4)[3].facts


def test_parquet(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [text(f"a{i}") for i in range(9)])
    write_parquet(tmp_path / "b.parquet", [text(f"b{i}") for i in range(9)])
    cfg = DataConfig("parquet", str(tmp_path / "a.parquet"), str(tmp_path / "b.parquet"), train_size=2, eval_size=4)
    datasets = build_datasets(cfg)
    assert [len(part) for part in datasets.values()] == [9, 4]
    assert (datasets["train"][8].id, datasets["eval"][3].id) == ("a8", "b3")


def test_an_id_may_not_mean_two_prompts(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [text("x"), text("y")])
    write_parquet(tmp_path / "b.parquet", [text("z"), text("y")])
    paths = str(tmp_path / "a.parquet"), str(tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"1 id\(s\) stand both in .*a.parquet and in .*b.parquet, first 'y'"):
        build_datasets(DataConfig("parquet", *paths))
    build_datasets(DataConfig("parquet", *paths, eval_size=1))
    build_datasets(DataConfig("parquet", paths[0], paths[0]))  # learning by heart, on purpose


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (DataConfig("csv"), "data.source=csv: allowed are digits and parquet"),
        (DataConfig("parquet"), "data.source=parquet needs data.train_path"),
        (DataConfig("parquet", "a.parquet"), "data.source=parquet needs data.eval_path"),
    ],
)
def test_what_is_refused(cfg: DataConfig, message: str) -> None:
    with pytest.raises(DataError, match=message):
        build_datasets(cfg)
