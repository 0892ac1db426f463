"""The Python of docs/data.md runs, and its table of columns is complete."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from skyrl.data.parquet import ParquetPrompts, main
from skyrl.data.parquet_schema import COLUMNS, REQUIRED

TEXT = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 3
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "docs/data.md", "exec"), names)
    assert main(["train.parquet", "eval.parquet", "mine.parquet"]) == 0
    mine = ParquetPrompts("mine.parquet")[0]
    assert (mine.id, mine.images[0].tolist(), mine.facts) == ("mine/0", names["red"].tolist(), {"colour": "red"})
    assert [names["close_enough"](answer, "red") for answer in ("Red ", "rose", "blue")] == [1.0, 0.5, 0.0]


def test_every_column_is_in_the_table() -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \| (yes|no) \|", TEXT, re.MULTILINE)
    assert {name for name, _, _ in rows} == set(COLUMNS)
    assert {name for name, _, needed in rows if needed == "yes"} == set(REQUIRED)
