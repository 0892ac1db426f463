"""The grid of the paper's tables, small: a few methods and the settings that no table uses, two steps, tiny models; and
that it goes on where it stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.ablations.grid import VARIANTS

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]


def grid(out: Path, cache: Path) -> str:
    command = [sys.executable, "-m", "benchmarks.ablations", "--quick", "--out", str(out)]
    env = os.environ | {"SKYRL_CACHE": str(cache)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_quick_grid_runs_reports_and_resumes(tmp_path: Path, model_cache: Path) -> None:
    printed = grid(tmp_path, model_cache)
    assert "5 runs to do" in printed and "[5/5" in printed
    store = tmp_path / "ablations.jsonl"
    rows = [json.loads(line) for line in store.read_text().splitlines()]
    assert {row["method"] for row in rows} == {"default", "mpo", *VARIANTS}
    for row in rows:
        assert [point["step"] for point in row["evaluations"]] == [0, 1, 2]
        assert [point["step"] for point in row["steps"]] == [1, 2]
        assert all(0 <= point["eval/accuracy"] <= 1 for point in row["evaluations"])
    # Both start from the same policy on the same held-out scenes, in whatever process they ran.
    starts = [{k: v for k, v in row["evaluations"][0].items() if "seconds" not in k} for row in rows]
    assert all(start == starts[0] for start in starts)
    document = (tmp_path / "ablations.md").read_text()
    assert "## The claims" in document and "| default |" in document
    assert (tmp_path / "table_3.png").stat().st_size > 10_000

    store.write_text("\n".join(store.read_text().splitlines()[:4]) + "\n")
    assert "1 runs to do" in grid(tmp_path, model_cache)
    assert len(store.read_text().splitlines()) == 5
