"""The table of metrics and its document."""

from __future__ import annotations

from pathlib import Path

import pytest

from skyrl.monitoring.metrics import METRICS, MetricError, check_names, markdown

DOCUMENT = Path(__file__).parents[2] / "docs" / "metrics.md"


def test_document_agrees_with_the_table() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == markdown(), (
        "run: python -m skyrl.monitoring.metrics > docs/metrics.md"
    )


def test_every_metric_has_a_unit_and_one_sentence() -> None:
    for name, info in METRICS.items():
        assert "/" in name and info.unit, name
        assert info.description.endswith(".") and info.description.count(". ") == 0, name
        assert info.unit != "share" or " of " in f" {info.description}" or "mean over" in info.description, name


def test_names_and_patterns_are_allowed() -> None:
    check_names({"loss/total": 1.0, "eval/accuracy": 0.5, "eval/accuracy/sum": 0.5, "eval/accuracy/two words": 0.1})
    check_names([])


@pytest.mark.parametrize(
    "name", ["loss/totl", "eval/accuracy/", "eval/accuracy/a/b", "xeval/accuracy/a", "eval/accuracy/<kind>/x", ""]
)
def test_undefined_names_are_refused(name: str) -> None:
    with pytest.raises(MetricError, match="undefined metric") as caught:
        check_names(["loss/total", name])
    assert repr(name) in str(caught.value)
