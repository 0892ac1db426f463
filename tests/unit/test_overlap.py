"""Evaluation prompts that are also trained on are told of, by content, whatever file, layout or id they have."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from skyrl.checks import data
from skyrl.checks.subject import Subject
from skyrl.data import overlap as module
from skyrl.data.datasets import build_datasets
from skyrl.data.overlap import overlap
from skyrl.data.parquet import write_parquet
from skyrl.data.pictures import encode_png
from skyrl.records import Prompt
from skyrl.settings import Config


def picture(shade: int) -> np.ndarray:
    return np.full((8, 8, 3), shade, dtype=np.uint8)


def rows(path: Path, *lines: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def found(train: Path | list[str], held_out: Path, **data: Any) -> tuple[str, tuple[str, str]] | None:
    paths = {"train_path": train if isinstance(train, list) else str(train), "eval_path": str(held_out)}
    cfg = Config(data={"source": "files", **paths, **data}, reward={"verifier": "exact"})
    sets = build_datasets(cfg)
    return overlap(sets["eval"], sets["train"])


def sums(*numbers: int) -> list[dict[str, Any]]:
    return [{"prompt": f"What is {n}+{n}?", "solution": str(2 * n)} for n in numbers]


def test_rows_of_both_files_are_counted(tmp_path: Path) -> None:
    train = rows(tmp_path / "train.jsonl", *sums(*range(20)))
    other = rows(tmp_path / "other.jsonl", *sums(*range(100, 103)))
    held_out = rows(tmp_path / "eval.jsonl", *sums(30, 7, 101, 31))
    assert found(train, held_out) == ("1", ("eval/1", "train/7"))
    assert found([str(train), str(other)], held_out) == ("2", ("eval/1", "train/7"))
    assert found(train, rows(tmp_path / "fine.jsonl", *sums(40, 41))) is None
    assert found(train, train, eval_size=5) == ("5", ("train/0", "train/0"))
    # Another layout, and another truth to the same question.
    said = {"question": " What is 3+3? ", "answer": "6", "verifier": "exact"}
    assert found(train, rows(tmp_path / "own.jsonl", said)) == ("1", ("own/0", "train/3"))
    assert found(train, rows(tmp_path / "wrong.jsonl", said | {"answer": "7"})) is None


def test_the_same_question_about_another_picture_is_another_prompt(tmp_path: Path) -> None:
    def asked(name: str, *shades: int) -> Path:
        prompts = [Prompt(f"{name}-{n}", "How dark?", (picture(n),), "7", "exact") for n in shades]
        write_parquet(tmp_path / f"{name}.parquet", prompts)
        return tmp_path / f"{name}.parquet"

    train = asked("train", *range(100))
    assert found(train, asked("other", *range(100, 140))) is None
    # Row by row where the text is always the same: of a copy of the first rows all are seen.
    copy = asked("copy", *range(30))
    assert found(train, copy) == ("30", ("copy-0", "train-0"))
    whole = asked("whole", *range(100))
    assert found(train, whole) == (f"at least {module.LOOKED_AT}", ("whole-0", "train-0"))
    # The same pictures as files beside JSON lines.
    for shade in range(3):
        (tmp_path / f"{shade}.png").write_bytes(encode_png(picture(shade), ""))
    lines = [{"prompt": "<image>How dark?", "image": f"{shade}.png", "solution": "7"} for shade in range(3)]
    assert found(train, rows(tmp_path / "lines.jsonl", *lines)) == ("3", ("lines/0", "train-0"))


def test_lists_are_compared_and_what_can_not_be_gone_through_is_not() -> None:
    prompts = [Prompt(f"t/{n}", f"{n}?", (), str(n), "exact") for n in range(5)]
    again = [replace(prompts[3], id="e/0"), replace(prompts[4], id="e/1", answer="5")]
    assert overlap(again, prompts) == ("1", ("e/0", "t/3"))
    assert overlap(tuple(again), prompts) is None


def test_the_note_names_both_settings_and_the_default_is_quiet(tmp_path: Path) -> None:
    train = rows(tmp_path / "train.jsonl", *sums(*range(20)))
    held_out = rows(tmp_path / "eval.jsonl", *sums(7, 30))
    paths = {"train_path": str(train), "eval_path": str(held_out)}
    cfg = Config(data={"source": "files", **paths}, reward={"verifier": "exact"}, rollout={"prompts_per_step": 4})
    (note,) = data.repeated(Subject(cfg, ""))
    assert note == (
        "note: 1 of 2 evaluation prompts are also trained on ('eval/0' of data.eval_path is 'train/7' of "
        "data.train_path); accuracy on them says what is known by heart"
    )
    assert data.rows(Subject(cfg, "")) == f"20 train prompts, 2 eval prompts; {note}"
    assert data.repeated(Subject(Config(), "")) == []
    cfg.data.pairs_path = "pairs.parquet"  # trains on those instead
    assert data.repeated(Subject(cfg, "")) == []


@pytest.mark.parametrize("broken", ["train", "eval"])
def test_a_broken_picture_is_not_this_checks_matter(tmp_path: Path, broken: str) -> None:
    (tmp_path / "good.png").write_bytes(encode_png(picture(0), ""))
    (tmp_path / "bad.png").write_bytes(b"no picture")
    files = {
        name: rows(
            tmp_path / f"{name}.jsonl",
            {"prompt": "Dark?", "solution": "7", "image": "bad.png" if name == broken else "good.png"},
        )
        for name in ("train", "eval")
    }
    assert found(files["train"], files["eval"]) is None
