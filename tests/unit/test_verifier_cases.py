"""The four verifiers on pairs of answer and truth with the right verdict, by kind; and on hostile answers."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from hostile_answers import hostile

from skyrl.rewards.runner import VerifierRunner
from skyrl.rewards.verifiers.choice import choice_verifier
from skyrl.rewards.verifiers.exact import exact_verifier
from skyrl.rewards.verifiers.math import math_verifier
from skyrl.rewards.verifiers.numeric import numeric_verifier

VERIFIERS: dict[str, Callable[[str, str], float]] = {
    "math": math_verifier,
    "numeric": numeric_verifier,
    "choice": choice_verifier,
    "exact": exact_verifier,
}
FILES = sorted(Path(__file__).parent.glob("verifier_cases*.jsonl"))
CASES = [json.loads(line) for file in FILES for line in file.read_text("utf-8").splitlines()]
KINDS = sorted({case["kind"] for case in CASES})


@pytest.mark.parametrize("kind", KINDS)
def test_verdicts(kind: str) -> None:
    wrong = []
    for case in CASES:
        if case["kind"] == kind:
            score = VERIFIERS[case["verifier"]](case["answer"], case["truth"])
            if score != case["expected"]:
                wrong.append({**case, "got": score})
    assert not wrong


def test_every_kind_has_right_and_wrong_answers() -> None:
    verdicts = {(case["kind"], case["expected"]) for case in CASES}
    assert verdicts == {(kind, expected) for kind in KINDS for expected in (0.0, 1.0)}


@pytest.mark.parametrize("name", sorted(VERIFIERS))
def test_a_truth_is_right_for_itself(name: str) -> None:
    truths = {case["truth"] for case in CASES if case["verifier"] == name}
    assert {VERIFIERS[name](f" {truth}\n", truth) for truth in truths} == {1.0}


def test_hostile_answers_here(tmp_path: Path) -> None:
    """``exact``, ``numeric`` and ``choice`` run in the run's own process: a megabyte must be a matter of a second."""
    mark = tmp_path / "executed"
    for answer, _ in hostile(240, str(mark)):
        start = time.perf_counter()
        assert [numeric_verifier(answer, "8"), choice_verifier(answer, "C"), exact_verifier(answer, "red")] == [0, 0, 0]
        assert time.perf_counter() - start < 5.0
    assert not mark.exists()


def test_hostile_mathematics(tmp_path: Path) -> None:
    """Wrong, or killed when its time is up; nothing else."""
    mark = tmp_path / "executed"
    with closing(VerifierRunner(timeout=2.0)) as runner:
        for answer, truth in hostile(64, str(mark), seed=1):
            verdict = runner.verify("math", answer, truth)
            assert verdict.score == 0.0 or "killed after 2 s" in str(verdict.error), (answer[:80], truth, verdict)
    assert not mark.exists()
