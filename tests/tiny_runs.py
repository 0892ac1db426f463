"""Whole runs in one process: every part is the real one, but a plain engine and a plain backend stand in for vLLM and
DeepSpeed, so that a run takes seconds."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from skyrl.crew.local_executor import LocalExecutor
from skyrl.data.stream import PromptStream
from skyrl.learner.step import LearnerStep
from skyrl.loop import Loop
from skyrl.monitoring.sink import MetricSink
from skyrl.records import Event, TrainBatch
from skyrl.settings import Config, PairSource, ThresholdKind, WandbMode
from skyrl.system import start_system

PROMPTS, SAMPLES = 6, 4


@lru_cache(maxsize=1)
def policy_folder(root: Path) -> str:
    """A policy of the embedded architecture that was taught for some seconds, on batches of 16 instead of 64: it keeps
    the form, and is often wrong. Made once for one ``root``."""
    import pytest
    import torch
    from tiny_models import encoder, random_model

    from skyrl.digits import training
    from skyrl.digits.scenes import DigitScenes

    folder, made = root / "policy", encoder()
    torch.set_num_threads(1)
    model = random_model(seed=1, scale=1.0)
    scenes = DigitScenes("train", 2_000, text_share=0.0, seed=0, kinds=("max",))
    with pytest.MonkeyPatch.context() as small:
        small.setattr(training, "BATCH", 16)
        training.warm_start(model, made, scenes, steps=120, show=lambda *_: None)
    model.save_pretrained(folder)
    made.processor.save_pretrained(folder)
    return str(folder)


def config(run_dir: Path, steps: int, lag: int = 0) -> Config:
    """GRPO with the SSB and MPO on pairs by the rule, without a reward model."""
    cfg = Config(name="tiny", run_dir=str(run_dir))
    cfg.rollout.engine, cfg.learner.backend = "plain_engine:PlainEngine", "plain_backend:PlainBackend"
    cfg.model.reward, cfg.reward.model_weight = None, 0.0
    cfg.algorithm.mpo.pairs, cfg.algorithm.mpo.threshold.kind = PairSource.rule, ThresholdKind.off
    cfg.digits.train_size, cfg.digits.text_share, cfg.digits.kinds = 400, 0.0, ["max"]
    cfg.data.eval_size = 4
    cfg.rollout.prompts_per_step, cfg.rollout.samples_per_prompt = PROMPTS, SAMPLES
    cfg.rollout.max_new_tokens, cfg.rollout.probe_prompts, cfg.rollout.probe_new_tokens = 24, 2, 4
    cfg.rollout.threads = cfg.reward.threads = cfg.learner.threads = 1
    cfg.learner.lr, cfg.learner.warmup_steps = 3e-4, 0  # a step must be visible in the weights
    cfg.controller.steps, cfg.controller.lag = steps, lag
    cfg.hallucination.probe_prompts = 2
    cfg.evaluation.every = 0
    cfg.checkpoint.every, cfg.checkpoint.keep, cfg.checkpoint.export = 1, 100, False
    cfg.monitoring.wandb, cfg.monitoring.console, cfg.monitoring.ray_metrics = WandbMode.off, False, False
    return cfg


class Killed(BaseException):
    """Stands for SIGKILL: nothing may catch it."""


class Watched(LocalExecutor):
    """The in-process executor, which also notes what was trained on.

    Args:
        before_step: Called with the learner and each batch before it is trained on.
    """

    def __init__(self, before_step: Callable[[LearnerStep, TrainBatch], None] = lambda *_: None) -> None:
        super().__init__()
        self.before_step = before_step
        self.calls: list[str] = []
        self.batches: list[TrainBatch] = []

    def call(self, member: Any, function: Callable[..., Any], pieces: int, args: Any, kwargs: Any) -> Any:
        self.calls.append(function.__name__)
        if function is LearnerStep.train_step:
            self.batches.append(args[0])
            self.before_step(member.build(), args[0])
        return super().call(member, function, pieces, args, kwargs)


class Sink(MetricSink):
    """Keeps the metrics of each step.

    Args:
        kill_at: The process "dies" after this step was trained and before anything of it was saved.
    """

    def __init__(self, kill_at: int | None = None) -> None:
        self.kill_at = kill_at
        self.steps: dict[int, dict[str, float]] = {}
        self.all: list[tuple[int, dict[str, float]]] = []
        self.events: list[Event] = []
        self.rewound: list[int] = []

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.all.append((step, metrics))
        if "time/step" in metrics:
            if step == self.kill_at:
                raise Killed
            self.steps[step] = metrics

    def event(self, event: Event) -> None:
        self.events.append(event)

    def rewind(self, step: int) -> None:
        self.rewound.append(step)


def run_loop(
    cfg: Config,
    policy: str,
    executor: LocalExecutor | None = None,
    kill_at: int | None = None,
    resume: bool = False,
    rows: list[int] | None = None,
    clock: Callable[[], float] | None = None,
) -> Sink:
    """The loop over a system in this process; ``resume`` goes on from the newest checkpoint in ``cfg.run_dir``."""
    sink, run_dir = Sink(kill_at), Path(cfg.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    with start_system(cfg, policy, cfg.model.reward, executor or LocalExecutor()) as system:
        size = len(rows) if rows is not None else system.sizes()["train"]
        more = {} if clock is None else {"clock": clock}
        loop = Loop(cfg, system, PromptStream(size, cfg.data.seed), sink, run_dir, rows, **more)
        if resume:
            loop.restore(loop.checkpoints.complete()[0])
        with contextlib.suppress(Killed):
            loop.run()
    return sink


def numbers(sink: Sink) -> dict[int, dict[str, float]]:
    """What each step measured, without wall times."""
    times = ("time/", "overlap/", "throughput/", "sync/seconds")
    return {
        step: {name: value for name, value in metrics.items() if not name.startswith(times)}
        for step, metrics in sink.steps.items()
    }
