"""Offline MPO from a file of pairs, over Ray and DeepSpeed: nothing is sampled for training, only the pairs are learnt.
The engine, which probes and evaluates here, is the plain one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from skyrl.data.preference_pairs import TextPair, write_pairs
from skyrl.digits.scenes import DigitScenes
from skyrl.run import run
from skyrl.settings import Config, Stage

pytestmark = pytest.mark.integration


def test_pairs_from_a_file_train_the_policy(make_config: Callable[..., Config], tmp_path: Path) -> None:
    scenes = DigitScenes("train", 200, 0.2, seed=3)
    pairs = []
    for row in range(len(scenes)):
        (prompt, faithful), (_, careless) = scenes.with_reasoning(row), scenes.with_reasoning(row, careless=True)
        if faithful != careless:
            pairs.append(TextPair(prompt, faithful, careless, 1.0))
    write_pairs(tmp_path / "pairs.parquet", pairs[:24])

    cfg = make_config("offline", tmp_path / "run")
    cfg.algorithm.stage, cfg.algorithm.mpo.weight = Stage.mpo, 1.0
    cfg.data.pairs_path, cfg.data.pairs_per_step = str(tmp_path / "pairs.parquet"), 12
    cfg.rollout.engine = "tests.plain_engine:PlainEngine"
    cfg.controller.steps, cfg.learner.warmup_steps, cfg.learner.lr = 6, 0, 2e-4
    run(cfg)

    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "time/step" in record]
    assert [record["mpo/pairs"] for record in steps] == [12.0] * 6
    assert not any("time/rollout" in record or "reward/total" in record for record in steps)
    # The first step starts at the reference; after three passes the chosen answers have become the likelier ones.
    assert steps[0]["loss/preference"] == pytest.approx(0.693147, abs=1e-5)
    assert steps[-1]["loss/preference"] < steps[0]["loss/preference"] and steps[-1]["mpo/accuracy"] > 0.6
    assert steps[-1]["loss/generation"] < steps[0]["loss/generation"]
