"""What the control plane itself takes: the real loop, crews, sync and buffer with members that take no time.

In this process it is processor time, the members' own code taken out, so that a load beside it changes nothing. With
Ray (``--ray``) it is the processor time of the loop's process, Ray's threads in it included, and the wall time of the
whole step, in which members, Ray's processes and the loop share the cores: 256 actors do not fit on a small machine, so
256 members are served by a few actors, which makes as many calls and promises.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from skyrl.crew.executor import MemberSpec, call_name
from skyrl.crew.ray_executor import RayExecutor
from skyrl.data.stream import PromptStream
from skyrl.learner.step import LearnerStep
from skyrl.loop import Loop
from skyrl.monitoring.sink import MetricSink
from skyrl.records import MemberLost, Metrics
from skyrl.rewards.rewarder import Rewarder
from skyrl.rollout.sampler import Sampler
from skyrl.simulate.cost import CostModel, EngineCost, LearnerCost
from skyrl.simulate.executor import Took
from skyrl.simulate.lengths import Lengths
from skyrl.simulate.members import TimedLearner, TimedRewarder, TimedSampler, World
from skyrl.simulate.world import Plan, settings, simulate
from skyrl.system import start_system

NO_TIME = CostModel(
    about="no time",
    engines=[EngineCost(running=[1], tokens_per_second=[1e12], max_running=4096)],
    learner=LearnerCost(tokens_per_second=1e12),
)
SAMPLES = 8


def plan(workers: int, steps: int, lag: int = 1, prompts: int | None = None) -> Plan:
    """One prompt a worker, unless it is said otherwise; a reward worker for eight rollout workers."""
    return Plan(prompts or workers, SAMPLES, workers, 1, lag, steps, reward_workers=max(1, workers // 8))


def in_process(workers: int, lengths: Lengths, steps: int = 24, prompts: int | None = None) -> dict[str, float]:
    """Milliseconds of processor time in a median step: of the loop with all that it calls, and of the buffer."""
    found = simulate(plan(workers, steps, prompts=prompts), NO_TIME, lengths)[0]
    return {
        "workers": workers, "answers": (prompts or workers) * SAMPLES, "answer_tokens": round(lengths.mean),
        "calls": found.calls, "control_ms": found.control_ms, "buffer_ms": found.buffer_ms,
    }  # fmt: skip


# ------------------------------------------------------------------ with Ray


class ByName:
    """The stand-in's function of the same name as a role's, if it has one."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.__qualname__ = function, call_name(function)

    def __call__(self, part: Any, *args: Any, **kwargs: Any) -> Any:
        own = getattr(part, self.function.__name__, None)
        made = self.function(part, *args, **kwargs) if own is None else own(*args, **kwargs)
        return made.value if isinstance(made, Took) else made


class PooledRay(RayExecutor):
    """Ray actors of stand-ins; of a crew's members ``actors`` have one of their own, the others share those."""

    def __init__(self, world: World, actors: int) -> None:
        super().__init__()
        self.world, self.actors = world, actors
        self._pool: dict[str, Any] = {}
        self.calls = 0

    def start(self, spec: MemberSpec[Any], lost: Callable[[Any, MemberLost], Any]) -> Any:
        name, _, number = spec.name.rpartition("-")
        roles: dict[Any, tuple[Any, tuple[Any, ...]]] = {
            Sampler: (TimedSampler, (self.world,)), LearnerStep: (TimedLearner, (self.world,)),
            Rewarder: (TimedRewarder, (self.world, 0)),
        }  # fmt: skip
        if spec.role not in roles:
            return super().start(replace(spec, cpus=0.0, strategy="DEFAULT"), lost)
        own = f"{name}-{int(number) % self.actors}"
        if own not in self._pool:
            role, args = roles[spec.role]
            own_spec = replace(spec, name=own, role=role, args=args, cpus=0.0, strategy="DEFAULT")
            self._pool[own] = super().start(own_spec, lost)
        return self._pool[own]

    def call(self, member: Any, function: Callable[..., Any], pieces: int, args: Any, kwargs: Any) -> Any:
        self.calls += 1
        stands_in = any(member is one for one in self._pool.values())
        return super().call(member, ByName(function) if stands_in else function, pieces, args, kwargs)


class _Marks(MetricSink):
    def __init__(self, executor: PooledRay) -> None:
        self.executor = executor
        self.marks: list[tuple[float, float, int]] = []
        self.laps: list[Metrics] = []

    def log(self, step: int, metrics: Metrics) -> None:
        self.marks.append((time.perf_counter(), time.process_time(), self.executor.calls))
        self.laps.append(metrics)


def with_ray(workers: int, lengths: Lengths, actors: int, steps: int = 16) -> dict[str, float]:
    """Milliseconds of a median step: the loop's process (processor time), and the whole (wall)."""
    from skyrl.crew.ray_executor import ray_session

    job = plan(workers, steps)
    with tempfile.TemporaryDirectory() as folder:
        cfg = settings(job, round(lengths.quantiles[-1]), lengths.prompt_tokens, folder)
        cfg.rollout.num_cpus = cfg.reward.num_cpus = cfg.learner.num_cpus = 0.0
        cfg.cluster.dashboard, cfg.controller.timeout = False, 300.0
        world = World(cfg, NO_TIME, NO_TIME.engines[0], lengths, 1, 4 * job.prompts, mixed=False)
        executor = PooledRay(world, actors)
        with ray_session(cfg, f"control-{workers}"), start_system(cfg, "none", None, executor) as system:
            sink = _Marks(executor)
            Loop(cfg, system, PromptStream(world.rows, 0), sink, Path(folder)).run()
        between = list(pairwise(sink.marks))[4:-2]
        laps = [one for one in sink.laps if "time/step" in one][2:-1]
    return {
        "workers": workers, "actors": actors, "answers": workers * SAMPLES,
        "calls": median(b[2] - a[2] for a, b in between),
        "driver_cpu_ms": 1e3 * median(b[1] - a[1] for a, b in between),
        "wall_ms": 1e3 * median(b[0] - a[0] for a, b in between),
        **{name.replace("time/", "lap_") + "_ms": 1e3 * median(one[name] for one in laps)
           for name in laps[0] if name.startswith("time/")},
    }  # fmt: skip
