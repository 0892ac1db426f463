"""The Python of docs/data.md runs, and its tables of columns are complete."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from skyrl.data.parquet import COLUMNS, ParquetPrompts, main
from skyrl.data.parquet_table import Column
from skyrl.data.preference_pairs import PAIR_COLUMNS
from skyrl.data.preference_pairs import main as check_pairs

TEXT = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 5
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "docs/data.md", "exec"), names)
    assert main(["train.parquet", "eval.parquet", "mine.parquet"]) == 0
    assert check_pairs(["pairs.parquet"]) == 0
    mine = ParquetPrompts("mine.parquet")[0]
    assert (mine.id, mine.images[0].tolist(), mine.facts) == ("mine/0", names["red"].tolist(), {"colour": "red"})
    own = names["prompts"](names["cfg"])
    assert (len(own["train"]), len(own["eval"]), own["eval"][0].answer) == (49, 512, "100")
    assert [names["close_enough"](answer, "red") for answer in ("Red ", "rose", "blue")] == [1.0, 0.5, 0.0]


@pytest.mark.parametrize(("section", "columns"), [("Columns", COLUMNS), ("Preference pairs", PAIR_COLUMNS)])
def test_every_column_is_in_the_table(section: str, columns: dict[str, Column]) -> None:
    (text,) = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", TEXT, re.DOTALL | re.MULTILINE)
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \| (yes|no) \|", text, re.MULTILINE)
    assert {name for name, _, _ in rows} == set(columns) and len(rows) == len(columns)
    required = {name for name, column in columns.items() if column.required}
    assert {name for name, _, needed in rows if needed == "yes"} == required and len(required) == 3
