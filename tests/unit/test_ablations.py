"""Figures and verdicts of the ablation grid, on rows made by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from benchmarks.ablations.__main__ import missing
from benchmarks.ablations.claims import CLAIMS, Claim
from benchmarks.ablations.figures import (
    at_step,
    best,
    difference,
    drop_from_best,
    final,
    interval,
    of,
    over_steps,
    rollouts_to,
)
from benchmarks.ablations.grid import METHODS, TABLES, VARIANTS, Job, jobs
from benchmarks.ablations.report import shown, write_report
from skyrl.cli import compose_config

ACCURACY = final("eval/accuracy")


def row(method: str, seed: int, *accuracies: float, **step: float):
    points = [
        {"step": 10 * i, "eval/accuracy": value, "eval/hallucination": 1 - value} for i, value in enumerate(accuracies)
    ]
    return {
        **{"key": f"{method}/{seed}", "method": method, "seed": seed, "seconds": 1.0, "commit": "abc"},
        "evaluations": points,
        "steps": [{"step": 1, **step}],
    }


def test_interval_is_student_t() -> None:
    # mean 2, std 1, n 3: 4.302653 / sqrt(3) = 2.484138
    found = interval([1.0, 2.0, 3.0])
    assert found.mean == 2.0 and found.half == pytest.approx(2.484138, abs=1e-6)
    assert found.sign == 0
    assert interval([1.0, 1.1, 0.9]).sign == 1
    assert interval([-1.0, -1.1, -0.9]).sign == -1
    assert interval([5.0]).sign == 0 and math.isnan(interval([5.0]).half)
    assert interval([math.nan, 1.0, 2.0]).count == 2
    assert interval([]).count == 0


def test_differences_are_paired_by_seed() -> None:
    rows = [row("a", 0, 0.5), row("a", 1, 0.9), row("b", 0, 0.4), row("b", 1, 0.8), row("b", 2, 0.0)]
    found = difference(rows, "a", "b", ACCURACY)
    assert found.count == 2 and found.mean == pytest.approx(0.1) and found.half == pytest.approx(0.0, abs=1e-12)
    assert of(rows, "b", ACCURACY).count == 3


def test_figures_of_a_run() -> None:
    one = row("a", 0, 0.5, 0.7, 0.6, share=0.25)
    assert ACCURACY(one) == 0.6 and best("eval/accuracy")(one) == 0.7
    assert at_step("eval/accuracy", 10)(one) == 0.7 and math.isnan(at_step("eval/accuracy", 15)(one))
    assert drop_from_best("eval/accuracy")(one) == pytest.approx(0.1)
    assert over_steps("share")(one) == 0.25 and math.isnan(over_steps("other")(one))
    # Half of the way from 0.5 to 0.7 is reached after 5 of 10 steps.
    assert rollouts_to(0.6, 256)(one) == pytest.approx(5 * 256)
    assert rollouts_to(0.5, 256)(one) == 0.0
    assert math.isnan(rollouts_to(0.8, 256)(one))


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ((0.30, 0.31, 0.29, 0.30, 0.30), "seen"),
        ((-0.30, -0.31, -0.29, -0.30, -0.30), "seen otherwise"),
        ((0.3, -0.3, 0.0, 0.1, -0.1), "not seen"),
        ((0.3, 0.31, 0.29, 0.30), "unfinished"),
        ((), "not measured yet"),
        ((0.3, 0.31, 0.29, 0.30, math.nan), "a seed has no value"),
    ],
)
def test_verdict_is_the_side_of_the_interval(values: tuple[float, ...], verdict: str) -> None:
    claim = Claim("T", "a beats b", "ours", "", "a", "b", ACCURACY, 1)
    rows = [row(m, seed, v) for seed, value in enumerate(values) for m, v in (("a", 0.5 + value), ("b", 0.5))]
    assert claim.verdict(rows) == verdict
    if verdict.startswith("seen"):
        other = Claim("T", "b beats a", "ours", "", "a", "b", ACCURACY, -1)
        assert {claim.verdict(rows), other.verdict(rows)} == {"seen", "seen otherwise"}


def test_every_method_is_a_valid_configuration() -> None:
    for job in [*jobs(list(METHODS), (0,), quick=False), *jobs(list(VARIANTS), (0,), quick=True)]:
        compose_config(job.overrides())


def test_tables_and_claims_name_methods_of_the_grid_and_use_all() -> None:
    assert {name for methods in TABLES.values() for name in methods} == set(METHODS)
    assert {name for claim in CLAIMS for name in (claim.one, claim.other)} <= set(METHODS)


def test_jobs_finish_whole_seeds_first() -> None:
    assert [job.key for job in jobs(["a", "b"], (0, 1), False)] == ["a/0", "b/0", "a/1", "b/1"]
    assert Job("default", 2).overrides()[-1] == "controller.seed=2"


def test_rows_made_with_other_settings_are_refused() -> None:
    wanted = jobs(["grpo", "default"], (0, 1), False)
    rows = [{"key": job.key, "overrides": job.overrides()} for job in wanted[:3]]
    assert missing(wanted, rows) == wanted[3:]
    rows[1]["overrides"] = ["learner.lr=1"]
    with pytest.raises(SystemExit, match="default/0 were made with other settings"):
        missing(wanted, rows)


def test_report_needs_only_the_rows(tmp_path: Path) -> None:
    rows = [row(m, seed, 0.5, 0.6 + seed / 100) for m in ("grpo", "grpo_ssb", "default") for seed in range(3)]
    text = write_report(rows, tmp_path).read_text()
    assert "9 finished runs, seeds 0, 1, 2," in text
    assert f"| grpo | {shown(of(rows, 'grpo', ACCURACY), 100)} |" in text
    assert "61.0 ± 2.5" in text
    assert "| warm start | 50.0 |" in text
    assert "not measured yet" in text
    assert (tmp_path / "table_2.png").is_file()
