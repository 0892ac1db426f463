"""On the real stack, with a lag and answers carried from step to step: a run that was stopped and continued is the run
that never stopped."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.same_numbers import values
from skyrl.run import run
from skyrl.settings import Config

pytestmark = pytest.mark.integration


def test_a_run_resumed_at_lag_1_equals_the_one_that_went_on(make_config: Callable[..., Config], tmp_path: Path) -> None:
    cfg = make_config("resume", tmp_path / "whole")
    cfg.controller.steps, cfg.controller.lag = 4, 1
    cfg.rollout.oversample, cfg.rollout.max_num_seqs = 0.5, 22  # of 36 answers, so that some are begun late
    cfg.checkpoint.every, cfg.checkpoint.keep, cfg.checkpoint.export = 2, 10, False
    cfg.rollout.threads = cfg.reward.threads = cfg.learner.threads = 1
    run(cfg)
    whole = values(tmp_path / "whole" / "metrics.jsonl")
    # What a kill after step 2 leaves: its checkpoint, and lines of steps that will be done again.
    shutil.copytree(tmp_path / "whole", tmp_path / "cut", ignore=shutil.ignore_patterns("step_000004"))
    cfg.run_dir, cfg.resume = str(tmp_path / "cut"), "auto"
    run(cfg)
    resumed = values(tmp_path / "cut" / "metrics.jsonl")
    assert {key: value for key, value in whole.items() if key[0] > 2} == {
        key: value for key, value in resumed.items() if key[0] > 2
    }
    assert whole[4, "batch/lag_max"] >= 1.0 and (4, "learner/logprob_gap_fresh") not in whole
    assert whole[4, "rollout/carried"] > 0 and max(whole[step, "rollout/versions_max"] for step in (2, 3, 4)) > 0
