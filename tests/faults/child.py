"""One run over Ray whose members and driver can be struck: ``python -m tests.faults.child FOLDER``.

FOLDER has ``run.json``: the settings of :class:`Plan`. The run itself is :func:`skyrl.run.run` in ``FOLDER/run``; with
a checkpoint there it goes on from it. Exit codes as those of ``skyrl.launch``.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from skyrl.cli import run_command
from skyrl.crew.local_executor import LocalExecutor
from skyrl.settings import Config, KeptSamples
from tests.faults.striking import Folder, Strike, Watch, make_mortal, points_of, send


@dataclass(frozen=True)
class Plan:
    """A run and what is done to it."""

    policy: str
    """Folder of the policy."""
    steps: int
    lag: int = 0
    oversample: float = 0.0
    rollouts: int = 2
    rewards: int = 2
    ranks: int = 1
    real: bool = False
    """vLLM and DeepSpeed instead of the plain engine and backend."""
    evaluate: int = 5
    save: int = 2
    timeout: float = 30.0
    """``controller.timeout``: what a stopped member costs."""
    hosts: int = 1
    """Ray nodes on this machine."""
    look: int = 0
    """Steps between two looks at the processes (``benchmarks.soak``)."""
    kept: int | None = None
    """Steps whose samples are kept; None: all."""
    local: bool = False
    """All in the driver's process, without Ray and without strikes: a reference that takes seconds."""
    strikes: list[Strike] = field(default_factory=list)

    @property
    def kinds(self) -> frozenset[str]:
        return frozenset({"real" if self.real else "plain", "oversample" if self.oversample else "whole"})

    def write(self, folder: Path) -> None:
        (folder / "run.json").write_text(json.dumps(asdict(self), indent=1))

    @staticmethod
    def read(folder: Path) -> Plan:
        found = json.loads((folder / "run.json").read_text())
        return Plan(**(found | {"strikes": [Strike(**one) for one in found["strikes"]]}))

    def config(self, run_dir: Path) -> Config:
        """Short steps on 400 scenes, every sample kept."""
        from tests import tiny_runs

        cfg = tiny_runs.config(run_dir, self.steps, self.lag)
        cfg.rollout.engine, cfg.learner.backend = "tests.plain_engine:PlainEngine", "tests.plain_backend:PlainBackend"
        if self.real:
            cfg.rollout.engine, cfg.learner.backend = (
                type(cfg.rollout).model_fields["engine"].default,
                type(cfg.learner).model_fields["backend"].default,
            )
        cfg.digits.train_size = 4_000  # no prompt comes twice
        cfg.learner.lr = 5e-5  # the policy stays one that is sometimes right
        cfg.model.policy, cfg.resume = self.policy, "auto"
        cfg.rollout.oversample, cfg.rollout.num_workers, cfg.reward.num_workers = (
            self.oversample,
            self.rollouts,
            self.rewards,
        )
        cfg.learner.num_workers = self.ranks
        cfg.evaluation.every, cfg.checkpoint.every, cfg.checkpoint.keep = self.evaluate, self.save, 2
        cfg.checkpoint.export, cfg.monitoring.samples = True, KeptSamples.all
        if self.kept is not None:
            cfg.monitoring.samples, cfg.monitoring.samples_kept = KeptSamples.last, self.kept
        cfg.controller.timeout, cfg.cluster.dashboard = self.timeout, False
        for worker in (cfg.rollout, cfg.reward, cfg.learner):
            worker.num_cpus = 0.1
        cfg.controller.restarts = 1000
        return cfg


MISSED = 12
"""Steps after which a strike that nobody came to is given up, and the next one has its turn."""


class Order:
    """Arms one strike after the other as the steps go by, and notes when each step ended."""

    def __init__(self, plan: Plan, folder: Folder) -> None:
        self.plan, self.folder = plan, folder
        self._last: dict[str, float] = {}
        self._armed_at = 0
        self.progress = (folder.path / "progress.jsonl").open("a+")
        self.progress.seek(0)
        self._top = max((json.loads(line)["step"] for line in self.progress), default=0)

    def logged(self, step: int, metrics: dict[str, float]) -> str:
        """After the metrics of a ``step``, or ``more`` (an evaluation, a first sync), were logged: which of both."""
        if metrics is self._last:  # one sink hands it on to another
            return ""
        self._last = metrics
        kind = "step" if "time/step" in metrics else "more"
        self.progress.write(json.dumps({"time": round(time.time(), 3), "step": step, "kind": kind}) + "\n")
        self.progress.flush()
        if kind == "step":
            if self.folder.armed() and step > self._armed_at + MISSED:
                self.folder.disarm()
            # Not while steps are done again: what the strike before cost would be mixed with this one's.
            if not self.folder.armed() and step > self._top:
                self._arm(step)
            self._top = max(step, self._top)
        return kind

    def _arm(self, step: int) -> None:
        left = [strike for strike in self.plan.strikes if not self.folder.is_done(strike)]
        turn = [strike for place, strike in enumerate(left) if place == 0 or all(s.along for s in left[1 : place + 1])]
        if not turn or turn[0].step > step:
            return
        self._armed_at = step
        for strike in reversed(turn):
            self.folder.arm(strike)
            if strike.point.endswith("/idle") and self.folder.take(strike):
                send(strike.how, self._pid(strike))

    def _pid(self, strike: Strike) -> int:
        import ray

        role = strike.point.partition("/")[0]
        if role == "host":
            return int(HOSTS[-1].all_processes["raylet"][0].process.pid)
        if role in ("gcs", "raylet"):
            kind = {"gcs": "gcs_server"}.get(role, role)
            return int(ray._private.worker._global_node.all_processes[kind][0].process.pid)
        return os.getpid() if role == "driver" else self.folder.pid(strike.member)


HOSTS: list[Any] = []
"""Nodes beside the head."""


@contextmanager
def _cluster(plan: Plan) -> Iterator[str | None]:
    """A cluster of several nodes on this machine; its address."""
    if plan.hosts == 1:
        yield None
        return
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    try:
        HOSTS.extend(cluster.add_node(num_cpus=2) for _ in range(plan.hosts - 1))
        cluster.wait_for_nodes()
        yield cluster.address
    finally:
        cluster.shutdown()


def work(path: Path, look: Callable[[int], None] = lambda _: None) -> None:
    """The run.

    Args:
        look: Called in the driver after each step.
    """
    from skyrl.monitoring.sinks import Sinks
    from skyrl.run import run

    plan, folder = Plan.read(path), Folder(path)
    folder.make()
    Watch(folder, "driver").install(points_of("driver", plan.kinds))
    order, log = Order(plan, folder), Sinks.log

    def logged(self: Sinks, step: int, metrics: dict[str, float]) -> None:
        log(self, step, metrics)
        if order.logged(step, metrics) == "step":
            look(step)

    Sinks.log = logged  # type: ignore[method-assign]
    cfg = plan.config(path / "run")
    if plan.local:
        run(cfg, LocalExecutor())
        return
    make_mortal(folder, plan.kinds)
    with _cluster(plan) as cfg.cluster.address:
        run(cfg)


def main() -> None:
    logging.basicConfig(level=logging.WARNING)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    run_command(lambda: work(Path(sys.argv[1]).absolute()), "interrupted")


if __name__ == "__main__":
    main()
