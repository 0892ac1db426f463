"""The Python of docs/data.md runs, and its tables of columns are complete."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from skyrl.data.columns import COLUMNS
from skyrl.data.files import FilePrompts
from skyrl.data.layouts import detected
from skyrl.data.parquet import COLUMNS as WRITTEN
from skyrl.data.preference_pairs import PAIR_COLUMNS, main
from skyrl.settings import Layout

TEXT = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 6
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "docs/data.md", "exec"), names)
    assert [
        list(FilePrompts(f"{name}.parquet").problems(lambda prompt: None)) for name in ("train", "eval", "mine")
    ] == [[], [], []]
    assert main(["pairs.parquet"]) == 0
    mine = FilePrompts("mine.parquet")[0]
    assert (mine.id, mine.images[0].tolist(), mine.facts) == ("mine/0", names["red"].tolist(), {"colour": "red"})
    own = names["prompts"](names["cfg"])
    assert (len(own["train"]), len(own["eval"]), own["eval"][0].answer) == (49, 512, "100")
    assert [names["close_enough"](answer, "red") for answer in ("Red ", "rose", "blue")] == [1.0, 0.5, 0.0]


def rows(section: str) -> dict[str, list[str]]:
    """First cell → the others, of a section's table."""
    (text,) = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", TEXT, re.DOTALL | re.MULTILINE)
    cells = [
        [one.strip() for one in line.strip("|").split(" | ")] for line in text.splitlines() if line.startswith("| `")
    ]
    assert len({row[0] for row in cells}) == len(cells)
    return {row[0].strip("| `"): row[1:] for row in cells}


def test_every_column_is_in_the_tables() -> None:
    assert set(rows("Columns")) == set(COLUMNS) == set(WRITTEN)
    pairs = rows("Preference pairs")
    assert set(pairs) == set(PAIR_COLUMNS)
    assert {name for name, cells in pairs.items() if cells[1] == "yes"} == {
        name for name, column in PAIR_COLUMNS.items() if column.required
    }


def test_every_layout_is_in_the_table_and_found_by_what_it_says() -> None:
    assert set(rows("Layouts")) == {layout.value for layout in Layout} - {"auto"}
    for columns, layout in (
        ("question", Layout.skyrl),
        ("messages answer", Layout.skyrl),
        ("prompt data_source", Layout.verl),
        ("problem answer", Layout.verl),
        ("prompt", Layout.trl),
        ("messages", Layout.swift),
    ):
        assert detected(columns.split()) is layout
