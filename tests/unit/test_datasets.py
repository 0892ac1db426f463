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


def test_files(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [text(f"a{i}") for i in range(9)])
    write_parquet(tmp_path / "b.parquet", [text(f"b{i}", "exact") for i in range(9)])
    paths = {"train_path": str(tmp_path / "a.parquet"), "eval_path": str(tmp_path / "b.parquet")}
    datasets = build_datasets(config(source="files", eval_size=4, **paths))
    assert [len(part) for part in datasets.values()] == [9, 4]
    assert (datasets["train"][8].id, datasets["eval"][3].id) == ("a8", "b3")
    assert verifier_names(datasets.values()) == ["exact", "numeric"]


def test_names_of_verifiers_come_from_the_settings(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [text("a", "close")])
    cfg = config(source="files", train_path=str(tmp_path / "a.parquet"), eval_path=str(tmp_path / "a.parquet"))
    with pytest.raises(DataError, match="row 0, column 'verifier': unknown verifier 'close'"):
        build_datasets(cfg)
    cfg.reward.verifiers = {"close": "my_verifiers:close_enough"}
    assert verifier_names(build_datasets(cfg).values()) == ["close"]


def test_an_id_may_not_mean_two_prompts(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [text("x"), text("y")])
    write_parquet(tmp_path / "b.parquet", [text("z"), text("y")])
    one, other = str(tmp_path / "a.parquet"), str(tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"1 id\(s\) stand both in .*a.parquet and in .*b.parquet, first 'y'"):
        build_datasets(config(source="files", train_path=one, eval_path=other))
    build_datasets(config(source="files", train_path=one, eval_path=other, eval_size=1))
    build_datasets(config(source="files", train_path=one, eval_path=one))  # learning by heart, on purpose


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
        ({"source": "files"}, "data.source=files needs data.train_path"),
    ],
)
def test_what_is_refused(data: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        build_datasets(config(**data))


def test_a_name_that_is_no_source_is_never_taken_for_a_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.SOURCES, "digits", "csv")
    with pytest.raises(DataError, match="no source has the name 'csv'; allowed: digits, files, or package"):
        build_datasets(Config())


def test_a_missing_evaluation_file(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [text("a")])
    with pytest.raises(DataError, match=r"needs data\.eval_path: a file or folder; got null"):
        build_datasets(config(source="files", train_path=str(tmp_path / "a.parquet")))


# ---------------------------------------------------------------- several files


def test_several_files_are_one_data_set(tmp_path: Path) -> None:
    for name, size in (("a", 5), ("b", 3), ("c", 30), ("d", 10)):
        write_parquet(
            tmp_path / f"{name}.parquet",
            [text(f"{name}{i}", "exact" if name == "b" else "numeric") for i in range(size)],
        )
    (tmp_path / "e.jsonl").write_text('{"prompt": "1+1?", "answer": 2, "verifier": "numeric"}\n')
    paths = [str(tmp_path / f"{name}.parquet") for name in "abcd"]
    train, held_out = [paths[0], str(tmp_path / "e.jsonl"), paths[1]], paths[2:]
    made = build_datasets(config(source="files", train_path=train, eval_path=held_out, eval_size=8))
    mixed: Any = made["train"]
    assert mixed.sizes == [5, 1, 3] and len(mixed) == 9
    assert [mixed[row].id for row in (0, 4, 5, 6, 8)] == ["a0", "a4", "e/0", "b0", "b2"]
    assert mixed.ids() == [mixed[row].id for row in range(9)] and mixed.outline(8).id == "b2"
    assert verifier_names([mixed]) == ["exact", "numeric"]
    # eval_size rows, shared by the sizes of the files.
    assert [made["eval"][row].id for row in range(8)] == [*(f"c{i}" for i in range(6)), "d0", "d1"]
    for row in (-1, 9):
        with pytest.raises(DataError, match=f"row {row} does not exist; the files have 9 rows"):
            mixed[row]
    with pytest.raises(DataError, match=r"5 id\(s\) stand both in .*a.parquet and in .*a.parquet"):
        build_datasets(config(source="files", train_path=[paths[0], paths[0]], eval_path=held_out))
    build_datasets(config(source="files", train_path=[paths[0], paths[1]], eval_path=paths[0]))  # by heart
