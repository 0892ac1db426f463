"""Ten strikes at one run over Ray, and what must come of them: it goes on, and every value is that of the run that
nobody touched. ``make faults`` strikes a hundred times, in all the ways there are."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_runs

from tests.faults.child import Plan
from tests.faults.plans import strikes
from tests.faults.runs import compare, drive, reference

pytestmark = pytest.mark.integration
TEN = [
    ("rollout/sampling", "rollout-1", "KILL"),
    ("reward/scored", "reward-0", "KILL"),
    ("buffer/kept", "sample-buffer", "KILL"),
    ("rollout/loaded", "rollout-0", "KILL"),
    ("learner/updated", "learner-0", "KILL"),
    ("buffer/saved", "sample-buffer", "KILL"),
    ("reward/verifying", "reward-1", "KILL"),
    ("rollout/idle", "rollout-0", "KILL"),
    ("learner/half_saved", "learner-0", "KILL"),
    ("reward/idle", "reward-1", "KILL"),
]


def test_ten_strikes_change_no_value(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    policy = tiny_runs.policy_folder(tmp_path_factory.getbasetemp())
    plan = Plan(policy, steps=30, save=2, evaluate=10, rollouts=2, rewards=2, timeout=120.0, strikes=strikes(TEN))
    alone = reference(tmp_path / "alone", plan, local=True)
    found = drive(tmp_path / "struck", plan, patience=180.0)
    outcome = compare("ten", alone, tmp_path / "struck", found)
    assert [(one.point, one.error) for one in outcome.strikes if not one.survived] == []
    assert outcome.differing == [] and outcome.lost == [] and outcome.twice == [] and outcome.policy_equal
