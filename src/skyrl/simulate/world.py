"""One simulated run: the real loop over simulated members."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

from skyrl.crew.crew import Crew
from skyrl.data.stream import PromptStream
from skyrl.learner.step import LearnerStep
from skyrl.loop import Loop
from skyrl.monitoring.sink import MetricSink
from skyrl.records import Metrics
from skyrl.rewards.rewarder import Rewarder
from skyrl.rollout.sampler import Sampler
from skyrl.settings import Config, KeptSamples, PairSource, Stage, ThresholdKind, WandbMode
from skyrl.settings.run import validate
from skyrl.simulate.cost import CostModel, EngineCost
from skyrl.simulate.executor import VirtualExecutor
from skyrl.simulate.lengths import Lengths
from skyrl.simulate.members import TimedLearner, TimedRewarder, TimedSampler, World
from skyrl.system import System, start_system

FOREVER = 1e12
"""Seconds of ``controller.timeout``: simulated time may be long."""


@dataclass(slots=True)
class Plan:
    """A run to be simulated."""

    prompts: int
    """``rollout.prompts_per_step``."""
    samples: int
    """``rollout.samples_per_prompt``."""
    engines: int
    """``rollout.num_workers``."""
    learner_gpus: int
    lag: int = 0
    steps: int = 20
    oversample: float = 0.0
    """``rollout.oversample``."""
    colocated: bool = False
    reward_workers: int = 1
    ranks: int = 1
    """Members of the learner's crew; its cost follows ``learner_gpus``."""
    replay: bool = True
    """With the Selective Sample Buffer, and groups that tie. Without, every answer is trained on."""
    seed: int = 0


@dataclass(slots=True)
class Result:
    """What was simulated. Seconds are simulated ones, unless it says otherwise."""

    step: float
    """Median step of those in the steady state."""
    mean_step: float
    laps: dict[str, float]
    """Means of the laps of those steps."""
    rollout_busy: float
    """Share of the time in which the engines sample, mean over the engines."""
    learner_busy: float
    tokens_per_second: float
    """Of the answers."""
    real_seconds: float
    """Real time of the whole simulation."""
    control_ms: float
    """Processor time of the loop, the crews, the sync and the stream in a median step, milliseconds."""
    buffer_ms: float
    """The buffer's."""
    calls: float
    """Calls to members in a step."""


class Steps(MetricSink):
    """A sink that keeps what each step measured, and how far clocks and counters were by then."""

    def __init__(self, executor: VirtualExecutor) -> None:
        self.executor = executor
        self.metrics: list[Metrics] = []
        self.marks: list[_Mark] = []

    def log(self, step: int, metrics: Metrics) -> None:
        if "time/step" in metrics:
            own = self.executor.own
            self.metrics.append(metrics)
            self.marks.append(
                _Mark(
                    time.thread_time(),
                    sum(own.values()),
                    own["Batcher.exchange"],
                    self.executor.calls,
                    self.executor.now,
                )
            )


class _Mark(NamedTuple):
    real: float
    own: float
    buffer: float
    calls: int
    now: float


def settings(plan: Plan, most_tokens: int, prompt_tokens: int, run_dir: str) -> Config:
    """The configuration of a simulated run: GRPO with the Selective Sample Buffer, nothing on disk."""
    cfg = Config(name="simulation", run_dir=run_dir)
    cfg.model.policy, cfg.model.reward, cfg.reward.model_weight = run_dir, None, 0.0  # no model is read
    cfg.algorithm.stage, cfg.algorithm.mpo.pairs = Stage.grpo, PairSource.rule
    cfg.algorithm.mpo.threshold.kind = ThresholdKind.off
    cfg.buffer.enabled = plan.replay
    cfg.rollout.prompts_per_step, cfg.rollout.samples_per_prompt = plan.prompts, plan.samples
    cfg.rollout.num_workers, cfg.reward.num_workers = plan.engines, plan.reward_workers
    cfg.learner.num_workers = plan.ranks
    cfg.rollout.oversample = plan.oversample
    cfg.rollout.max_new_tokens, cfg.rollout.max_prompt_tokens = most_tokens, prompt_tokens
    cfg.controller.steps, cfg.controller.lag, cfg.controller.seed = plan.steps, plan.lag, plan.seed
    cfg.controller.timeout = FOREVER
    cfg.hallucination.probe_prompts = cfg.evaluation.every = cfg.checkpoint.every = 0
    cfg.checkpoint.export = False
    cfg.monitoring.samples, cfg.monitoring.wandb = KeptSamples.off, WandbMode.off
    validate(cfg)
    return cfg


def simulate(
    plan: Plan, costs: CostModel, lengths: Lengths, engine: EngineCost | None = None, call_seconds: float = 0.0
) -> tuple[Result, VirtualExecutor, World]:
    """Run the loop.

    Args:
        engine: One of ``costs.engines``; None means the first.
        call_seconds: What making one call costs the loop's process.

    Raises:
        ConfigError: if such a run would be refused, as for engines that do not divide the prompts.
    """
    began = time.perf_counter()
    most = max(1, round(lengths.quantiles[-1]))
    with tempfile.TemporaryDirectory() as folder:
        cfg = settings(plan, most, lengths.prompt_tokens, folder)
        rows = 4 * plan.prompts
        world = World(
            cfg, costs, engine or costs.engines[0], lengths, plan.learner_gpus, rows,
            mixed=not plan.replay, colocated=plan.colocated,
        )  # fmt: skip
        executor = VirtualExecutor(
            {
                Sampler: lambda spec: TimedSampler(world),
                Rewarder: lambda spec: TimedRewarder(world, int(spec.name.rpartition("-")[2])),
                LearnerStep: lambda spec: TimedLearner(world),
            },
            {"Batcher.exchange": costs.buffer_seconds},
            call_seconds,
        )
        with start_system(cfg, "none", None, executor) as system:
            sink = Steps(executor)
            Loop(cfg, system, PromptStream(rows, 0), sink, Path(folder), clock=executor.clock).run()
            return _result(plan, sink, system, world, time.perf_counter() - began), executor, world


def _result(plan: Plan, sink: Steps, system: System, world: World, real: float) -> Result:
    """Over the steady state: after the first quarter, and before the last steps, during which nothing is asked for."""
    first = max(plan.lag + 1, plan.steps // 4)
    steady = sink.metrics[first : plan.steps - plan.lag] or sink.metrics[-1:]
    pairs = list(pairwise(sink.marks[first - 1 : plan.steps - plan.lag])) or [(sink.marks[-1], sink.marks[-1])]
    times = [one["time/step"] for one in steady]
    names = sorted({name for one in steady for name in one if name.startswith("time/") and name != "time/step"})
    start, end = pairs[0][0].now, pairs[-1][1].now

    def busy(crew: Crew[Any], call: str) -> float:
        spans = [span for member in crew.members for span in member.spans if span.call == call]
        inside = sum(max(0.0, min(span.end, end) - max(span.start, start)) for span in spans)
        return inside / (len(crew) * (end - start)) if end > start else 0.0

    return Result(
        step=median(times),
        mean_step=fmean(times),
        laps={name: fmean(one.get(name, 0.0) for one in steady) for name in names},
        rollout_busy=busy(system.rollouts, "Sampler.generate_enough" if plan.oversample else "Sampler.generate"),
        learner_busy=busy(system.learners, "LearnerStep.train_step"),
        tokens_per_second=fmean(one["throughput/tokens_per_second"] for one in steady),
        real_seconds=real,
        control_ms=1e3 * median(b.real - a.real - (b.own - a.own) for a, b in pairs),
        buffer_ms=1e3 * median(b.buffer - a.buffer for a, b in pairs),
        calls=median(b.calls - a.calls for a, b in pairs),
    )
