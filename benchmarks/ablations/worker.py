"""One process of the grid: takes jobs from standard input, a line each, and answers each with a line of JSON."""

from __future__ import annotations

import gc
import json
import math
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.ablations.grid import Job, Row

STEP_METRICS = (
    *("buffer/effective_share_fresh", "buffer/effective_share", "reward/accuracy", "hallucination/rate"),
    *(
        "mpo/pairs",
        "threshold/tau",
        "threshold/controlled",
        "threshold/acceptance",
        "threshold/risk",
        "threshold/risk_bound",
        "learner/entropy",
    ),
)
EVALUATION_METRICS = ("eval/",)


def prepare_environment() -> None:
    """One thread for everything: two workers fill two cores better than one worker with two threads."""
    from skyrl.crew.placement import COMMON_ENVIRONMENT
    from skyrl.rollout.environment import rollout_environment
    from skyrl.settings import RolloutConfig

    environment = COMMON_ENVIRONMENT | rollout_environment(RolloutConfig(), 1) | {"DS_ACCELERATOR": "cpu"}
    os.environ.update(environment)


class Worker:
    """Runs jobs one after the other on one vLLM engine."""

    def __init__(self) -> None:
        self.rollout: Any = None

    def run(self, job: Job, commit: str) -> Row:
        from benchmarks.ablations.local import local_pools
        from skyrl.crew.workers import RolloutActor
        from skyrl.data.stream import PromptStream
        from skyrl.launch import compose_config
        from skyrl.loop import Controller
        from skyrl.run import model_folders
        from skyrl.settings.validation import validate

        cfg = compose_config(job.overrides())
        validate(cfg)
        policy, reward = model_folders(cfg)
        if self.rollout is None:
            self.rollout = RolloutActor(cfg, policy)
        started = time.monotonic()
        sink = _Sink()
        with tempfile.TemporaryDirectory() as folder:
            pools = local_pools(cfg, self.rollout, policy, reward)
            sizes = self.rollout.sizes()
            stream = PromptStream(sizes["train"], cfg.controller.seed)
            controller = Controller(cfg, pools, stream, sizes["eval"], sink, Path(folder))
            controller.run()
            pools.reward.actor.scorer.close()  # type: ignore[attr-defined]
        del controller, pools
        gc.collect()
        return {
            "key": job.key,
            "method": job.method,
            "seed": job.seed,
            "overrides": job.overrides(),
            "commit": commit,
            "seconds": round(time.monotonic() - started, 1),
            "evaluations": sink.evaluations,
            "steps": sink.steps,
        }


class _Sink:
    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.evaluations: list[dict[str, float]] = []

    def log(self, step: int, metrics: dict[str, float]) -> None:
        if "eval/accuracy" in metrics:
            self.evaluations.append(_rounded(step, metrics, [n for n in metrics if n.startswith("eval/")]))
        elif "time/step" in metrics:
            self.steps.append(_rounded(step, metrics, [n for n in STEP_METRICS if n in metrics]))

    def close(self) -> None:
        """Nothing is open."""


def _rounded(step: int, metrics: dict[str, float], names: list[str]) -> dict[str, float]:
    values = {name: float(f"{metrics[name]:.5g}") for name in names if math.isfinite(metrics[name])}
    return {"step": step, **values}


def main() -> None:
    prepare_environment()
    # Libraries print to standard output; the answers must not mix with that.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    import torch

    torch.set_num_threads(1)
    worker = Worker()
    commit = sys.argv[1]
    for line in sys.stdin:
        row = worker.run(Job(**json.loads(line)), commit)
        answers.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
