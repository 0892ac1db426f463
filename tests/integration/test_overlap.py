"""Sampling runs beside the learner with a lag of one, and every lap of a step holds what its name says.

Ray with an engine and a learner that take a known time; neither vLLM nor DeepSpeed starts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from skyrl.crew.ray_executor import ray_session
from skyrl.data.stream import PromptStream
from skyrl.loop import Loop
from skyrl.run import model_folders
from skyrl.settings import Config
from skyrl.system import start_system
from tests import tiny_runs
from tests.plain_backend import PlainBackend
from tests.plain_engine import PlainEngine

pytestmark = pytest.mark.integration
SAMPLING, LEARNING = 2.0, 1.0


class SlowEngine(PlainEngine):
    def generate(self, requests: Any) -> Any:
        if requests and requests[0].n > 1:  # a rollout, not a probe or an evaluation
            time.sleep(SAMPLING)
        return super().generate(requests)


class SlowBackend(PlainBackend):
    def update(self, lr: float) -> float:
        time.sleep(LEARNING)
        return super().update(lr)


def test_a_lag_hides_the_learner_behind_the_engine_and_the_sync_holds_no_sampling(
    tmp_path: Path, make_config: Callable[..., Config]
) -> None:
    policy = model_folders(make_config("policy"))[0]
    cfg = tiny_runs.config(tmp_path, steps=3, lag=1)
    cfg.rollout.engine, cfg.learner.backend = f"{__name__}:SlowEngine", f"{__name__}:SlowBackend"
    cfg.data.eval_size, cfg.hallucination.probe_prompts, cfg.checkpoint.every = 2, 0, 0
    cfg.cluster.dashboard = False
    sinks = {}
    with ray_session(cfg, "test-overlap"), start_system(cfg, policy, None) as system:
        for lag in (0, 1):  # the members of a run with a lag of one also take a batch without
            sinks[lag] = tiny_runs.Sink()
            own = cfg.model_copy(update={"controller": cfg.controller.model_copy(update={"lag": lag})})
            Loop(own, system, PromptStream(system.sizes()["train"], lag), sinks[lag], tmp_path).run()
    for lag, sink in sinks.items():
        metrics = sink.steps[2]  # the first waits for its own rollout, the last asks for none
        laps = [value for name, value in metrics.items() if name.startswith("time/") and name != "time/step"]
        assert sum(laps) == pytest.approx(metrics["time/step"], abs=1e-6)
        # No claim about speed: the sleeps are the least that must stand where they belong.
        assert metrics["time/learner"] >= LEARNING
        if lag:
            assert metrics["overlap/rollout"] >= LEARNING * 0.9
            assert metrics["time/sync"] < SAMPLING - LEARNING  # it would hold the rest of the sampling
            assert metrics["time/rollout"] < SAMPLING
        else:
            assert metrics["time/rollout"] >= SAMPLING and "overlap/rollout" not in metrics
