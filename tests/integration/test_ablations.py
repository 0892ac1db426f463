"""The grid of the paper's tables, small: a few methods and the settings that no table uses, two steps, tiny models; and
that it goes on where it stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.ablations.grid import VARIANTS, Job

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]


def grid(out: Path, cache: Path) -> str:
    command = [sys.executable, "-m", "benchmarks.ablations", "--quick", "--out", str(out)]
    env = os.environ | {"SKYRL_CACHE": str(cache)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def finished(job: Job) -> dict[str, Any]:
    """A row as a grid before this one left it."""
    point = {"eval/accuracy": 0.25, "eval/hallucination": 0.5}
    return {
        **{"key": job.key, "method": job.method, "seed": job.seed, "overrides": job.overrides(), "commit": "before"},
        **{"seconds": 1.0, "evaluations": [{"step": step, **point} for step in (0, 1, 2)]},
        "steps": [{"step": step} for step in (1, 2)],
    }


def test_quick_grid_goes_on_where_it_stopped_and_reports(tmp_path: Path, model_cache: Path) -> None:
    store, before = tmp_path / "ablations.jsonl", json.dumps(finished(Job("default", 0, quick=True)))
    store.write_text(before + "\n")
    printed = grid(tmp_path, model_cache)
    assert "4 runs to do" in printed and "[4/4" in printed
    lines = store.read_text().splitlines()
    assert lines[0] == before
    rows = [json.loads(line) for line in lines[1:]]
    assert sorted(row["method"] for row in rows) == sorted(["mpo", *VARIANTS])
    for row in rows:
        assert [point["step"] for point in row["evaluations"]] == [0, 1, 2]
        assert [point["step"] for point in row["steps"]] == [1, 2]
        assert all(0 <= point["eval/accuracy"] <= 1 for point in row["evaluations"])
    # All start from the same policy on the same held-out scenes, in whatever process they ran.
    starts = [{k: v for k, v in row["evaluations"][0].items() if "seconds" not in k} for row in rows]
    assert all(start == starts[0] for start in starts)
    document = (tmp_path / "ablations.md").read_text()
    assert "## The claims" in document and "| default | 25.0" in document
    assert (tmp_path / "table_3.png").stat().st_size > 10_000
