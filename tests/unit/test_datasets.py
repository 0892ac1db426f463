"""Which data sets a configuration means."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from skyrl.data import datasets as module
from skyrl.data.datasets import build_datasets, verifier_names
from skyrl.data.parquet import write_parquet
from skyrl.digits.scenes import DigitScenes
from skyrl.records import DataError, Prompt
from skyrl.settings import Config


def text(name: str, verifier: str = "numeric") -> Prompt:
    return Prompt(name, "1+1?", (), "2", verifier)


def config(**data: Any) -> Config:
    return Config(data=data)


def test_digits() -> None:
    cfg = config(eval_size=7, seed=4)
    cfg.digits.train_size, cfg.digits.text_share, cfg.digits.kinds = 30, 0.0, ["max", "count"]
    datasets = build_datasets(cfg)
    assert list(datasets) == ["train", "eval"]
    assert [len(part) for part in datasets.values()] == [30, 7]
    assert datasets["train"][3].question == DigitScenes("train", 30, 0.0, 4, ("max", "count"))[3].question
    assert datasets["eval"][3].facts == DigitScenes("eval", 7, 0.0, 4, ("max", "count"))[3].facts
    assert {datasets["train"][row].kind for row in range(30)} == {"max", "count"}


def test_parquet(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [text(f"a{i}") for i in range(9)])
    write_parquet(tmp_path / "b.parquet", [text(f"b{i}", "exact") for i in range(9)])
    paths = {"train_path": str(tmp_path / "a.parquet"), "eval_path": str(tmp_path / "b.parquet")}
    datasets = build_datasets(config(source="parquet", eval_size=4, **paths))
    assert [len(part) for part in datasets.values()] == [9, 4]
    assert (datasets["train"][8].id, datasets["eval"][3].id) == ("a8", "b3")
    assert verifier_names(datasets.values()) == ["exact", "numeric"]


def test_names_of_verifiers_come_from_the_settings(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [text("a", "close")])
    cfg = config(source="parquet", train_path=str(tmp_path / "a.parquet"), eval_path=str(tmp_path / "a.parquet"))
    with pytest.raises(DataError, match="row 0, column 'verifier': unknown verifier 'close'"):
        build_datasets(cfg)
    cfg.reward.verifiers = {"close": "my_verifiers:close_enough"}
    assert verifier_names(build_datasets(cfg).values()) == ["close"]


def test_an_id_may_not_mean_two_prompts(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [text("x"), text("y")])
    write_parquet(tmp_path / "b.parquet", [text("z"), text("y")])
    one, other = str(tmp_path / "a.parquet"), str(tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"1 id\(s\) stand both in .*a.parquet and in .*b.parquet, first 'y'"):
        build_datasets(config(source="parquet", train_path=one, eval_path=other))
    build_datasets(config(source="parquet", train_path=one, eval_path=other, eval_size=1))
    build_datasets(config(source="parquet", train_path=one, eval_path=one))  # learning by heart, on purpose


def own_source(monkeypatch: pytest.MonkeyPatch, made: Any) -> None:
    source: Any = ModuleType("own_source")
    source.prompts = lambda cfg: made(cfg)
    monkeypatch.setitem(sys.modules, "own_source", source)


def test_a_source_of_ones_own_gets_the_settings_and_may_return_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    own_source(monkeypatch, lambda cfg: {"train": [text("a"), text("b")], "eval": [text("c")] * cfg.data.eval_size})
    datasets = build_datasets(config(source="own_source:prompts", eval_size=3))
    assert [len(part) for part in datasets.values()] == [2, 3]
    assert datasets["train"][1].id == "b"
    assert verifier_names(datasets.values()) == []  # a list says nothing of its verifiers


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ({"train": [text("a")]}, r"made {'train': 1}; allowed: prompts for train and for eval"),
        ({"train": [text("a")], "eval": []}, r"made {'train': 1, 'eval': 0}"),
        ([text("a")], "made list; allowed"),
    ],
)
def test_a_source_of_ones_own_must_make_both_splits(monkeypatch: pytest.MonkeyPatch, made: Any, message: str) -> None:
    own_source(monkeypatch, lambda cfg: made)
    with pytest.raises(DataError, match="data.source=own_source:prompts " + message):
        build_datasets(config(source="own_source:prompts"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"source": "no_module:prompts"},
            "data.source=no_module:prompts: No module named 'no_module'; allowed: digits",
        ),
        ({"source": "json:prompts"}, "data.source=json:prompts: module 'json' has no attribute 'prompts'; allowed"),
        ({"source": "parquet"}, "data.source=parquet needs data.train_path"),
    ],
)
def test_what_is_refused(data: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        build_datasets(config(**data))


def test_a_name_that_is_no_source_is_never_taken_for_a_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.SOURCES, "digits", "csv")
    with pytest.raises(DataError, match="no source has the name 'csv'; allowed: digits, parquet, or package"):
        build_datasets(Config())


def test_a_missing_evaluation_file(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [text("a")])
    with pytest.raises(DataError, match=r"needs data\.eval_path: a parquet file; got null"):
        build_datasets(config(source="parquet", train_path=str(tmp_path / "a.parquet")))
