"""The whole system as one side of a comparison: the real loop, which asks before each of its steps."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks._turns import EndedError, Turns
from skyrl.monitoring.sink import MetricSink
from skyrl.records import Event, Metrics, SkyrlError, TrainBatch
from skyrl.settings import Config

MODELS = "SKYRL_BENCHMARK_MODELS"
"""Environment variable, which children inherit: a folder with ``policy`` and ``reward`` instead of the
embedded models for the code as it is. So two versions of the code can be compared with the same models."""
Report = Callable[[int, Metrics, TrainBatch | None], dict[str, Any]]


def embedded_models() -> tuple[str, str]:
    """Folders of the policy and the reward model of the default, made now unless they are cached."""
    from skyrl.digits.embedded import embedded_models as made

    if given := os.environ.get(MODELS):
        return str(Path(given, "policy").absolute()), str(Path(given, "reward").absolute())
    policy, reward = made(Config())
    return str(policy), str(reward)


def serve(cfg: Config, policy: str, reward: str | None, turns: Turns, report: Report, batches: bool = False) -> None:
    """Train step by step as the parent orders, until it wants no more.

    Args:
        policy, reward: Folders of the models.
        report: Of the step, its metrics and its batch: what the parent is told. Called when the step has been timed.
        batches: Fetch each step's batch for ``report``.
    """
    from skyrl.crew.ray_executor import ray_session
    from skyrl.data.stream import PromptStream
    from skyrl.loop import Loop
    from skyrl.settings import validate
    from skyrl.system import start_system

    validate(cfg.model_copy(update={"model": cfg.model.model_copy(update={"policy": policy, "reward": reward})}))
    with ExitStack() as stack:
        work = stack.enter_context(tempfile.TemporaryDirectory())
        cfg = cfg.model_copy(update={"run_dir": work})  # before the members start: the buffer's journal lies there
        stack.enter_context(ray_session(cfg, f"benchmark-{cfg.name}"))
        system = stack.enter_context(start_system(cfg, policy, reward))
        sink = _Turns(turns, report)
        if batches:
            pair = system.buffer.pair

            def noted(*call: Any) -> Any:
                batch, told = pair(*call)
                sink.batch = lambda: system.buffer.fetch([batch])[0]
                return batch, told

            system.buffer.pair = noted  # type: ignore[method-assign,assignment]
        with contextlib.suppress(EndedError):
            Loop(cfg, system, PromptStream(system.sizes()["train"], cfg.data.seed), sink, Path(work)).run()


class _Turns(MetricSink):
    """The loop's sink: it hands over what a step gave, and waits for the order to go on."""

    def __init__(self, turns: Turns, report: Report) -> None:
        self.turns, self.report = turns, report
        self.batch: Callable[[], TrainBatch | None] = lambda: None

    def event(self, event: Event) -> None:
        """A member was replaced, or the run went back: what is timed then is not a step."""
        raise SkyrlError(f"not a measurement any more: {event.text}")

    def log(self, step: int, metrics: Metrics) -> None:
        if "time/step" in metrics:
            self.turns.wait(**self.report(step, metrics, self.batch()))
        elif any(name.startswith("eval/") for name in metrics):  # before the first step
            self.turns.wait(ready=True)
