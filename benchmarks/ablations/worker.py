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
    from skyrl.crew.ray_executor import COMMON_ENVIRONMENT
    from skyrl.rollout.engine import rollout_environment
    from skyrl.settings import RolloutConfig

    environment = COMMON_ENVIRONMENT | rollout_environment(RolloutConfig(), 1) | {"DS_ACCELERATOR": "cpu"}
    os.environ.update(environment)


class Worker:
    """Runs jobs one after the other in this process: the loop and the members are those of every run, without Ray.

    The vLLM engine starts once and gets the warm-started weights back before each run; all else is made anew.
    """

    def __init__(self) -> None:
        self.rollouts: Any = None

    def run(self, job: Job, commit: str) -> Row:
        from skyrl.cli import compose_config
        from skyrl.crew.crew import Crew
        from skyrl.crew.local_executor import LocalExecutor
        from skyrl.crew.placement import Placement
        from skyrl.data.stream import PromptStream
        from skyrl.loop import Loop
        from skyrl.run import model_folders
        from skyrl.system import rollout_specs, start_system

        cfg = compose_config(job.overrides())
        cfg.rollout.num_workers = cfg.reward.num_workers = 1  # in one process a second one has nothing to gain
        policy, reward = model_folders(cfg)
        executor = LocalExecutor()
        if self.rollouts is None:
            here = Placement(cfg, [{"Resources": {"CPU": 1}}])
            self.rollouts = Crew(executor, rollout_specs(cfg, here, policy), cfg.controller.timeout)
        self.rollouts.each(_use, cfg)
        started = time.monotonic()
        sink = _Sink()
        with (
            tempfile.TemporaryDirectory() as folder,
            start_system(cfg, policy, reward, executor, rollouts=self.rollouts) as system,
        ):
            stream = PromptStream(system.sizes()["train"], cfg.controller.seed)
            Loop(cfg, system, stream, sink, Path(folder)).run()  # type: ignore[arg-type]
        del system
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


def _use(sampler: Any, cfg: Any) -> None:
    """The next run's settings; its engine's own (lengths, sequences) are the same in every run of the grid."""
    sampler.cfg = cfg


class _Sink:
    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.evaluations: list[dict[str, float]] = []

    def event(self, event: Any) -> None:
        """Nothing is lost in one process."""

    def rewind(self, step: int) -> None:
        """Nor does a run go back."""

    def close(self) -> None:
        """Nothing is open."""

    def log(self, step: int, metrics: dict[str, float]) -> None:
        if "eval/accuracy" in metrics:
            self.evaluations.append(_rounded(step, metrics, [n for n in metrics if n.startswith("eval/")]))
        elif "time/step" in metrics:
            self.steps.append(_rounded(step, metrics, [n for n in STEP_METRICS if n in metrics]))


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
