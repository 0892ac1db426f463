"""The pools of ``skyrl.interfaces`` in one process, without Ray.

The grid runs many short trainings. vLLM starts once a process and gets the warm-started weights back before each run;
everything else is made anew. The parts are the very objects that the Ray actors hold, and the loop is skyrl's own
controller, so a run here does what ``python -m skyrl.launch`` does with the same overrides, one part after the other.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from skyrl.crew.workers import BufferActor, LearnerActor, RewardActor, RolloutActor
from skyrl.interfaces import Metrics
from skyrl.loop import Pools
from skyrl.records import RolloutRequest, SampleGroup, SyncError
from skyrl.settings import Config

Groups = list[SampleGroup]
GAP_LIMIT = 1e-4


class LocalRollout:
    """One engine; a handle is the value itself."""

    def __init__(self, actor: RolloutActor) -> None:
        self.actor = actor

    def generate(self, request: RolloutRequest) -> list[Groups]:
        return [self.actor.generate(request, 1)]

    def continue_blind(self, groups: list[Groups], step: int) -> list[Groups]:
        return [self.actor.continue_blind(part, step) for part in groups]

    def wait(self, handles: list[Groups]) -> None:
        """Nothing runs beside."""


class LocalReward:
    def __init__(self, actor: RewardActor) -> None:
        self.actor = actor

    def score(self, groups: list[Groups]) -> list[Groups]:
        return [self.actor.score(part) for part in groups]

    def wait(self, handles: list[Groups]) -> None:
        """Nothing runs beside."""

    def evaluate(
        self, groups: list[Groups], blind: list[Groups], gallery: list[dict[str, Any]] | None
    ) -> tuple[Metrics, list[dict[str, Any]]]:
        return self.actor.evaluate(gallery, len(groups), *groups, *blind)


class LocalBuffer:
    def __init__(self, actor: BufferActor) -> None:
        self.actor = actor

    def exchange(self, groups: list[Groups], step: int, version: int) -> tuple[Any, Metrics]:
        return self.actor.exchange(step, version, *groups)

    def offline(self, step: int) -> tuple[Any, Metrics]:
        return self.actor.offline(step)

    def save(self, path: Path) -> None:
        self.actor.save(path)

    def load(self, path: Path) -> None:
        self.actor.load(path)


class LocalLearner:
    def __init__(self, actor: LearnerActor) -> None:
        self.actor = actor

    def train_step(self, batch: Any) -> Metrics:
        return self.actor.train_step(batch)

    def picture_drop(self, groups: list[Groups]) -> Metrics:
        return self.actor.picture_drop(*groups)

    def save(self, folder: Path) -> None:
        self.actor.save(folder)

    def load(self, folder: Path) -> None:
        self.actor.load(folder)

    def export(self, folder: Path) -> None:
        self.actor.export(folder)


class LocalSyncer:
    """Sends and proves, as the Ray one does; no second try."""

    def __init__(self, learner: LearnerActor, rollout: RolloutActor) -> None:
        self.learner, self.rollout = learner, rollout

    def sync(self, version: int) -> Metrics:
        snapshot = self.learner.snapshot(version)
        assert snapshot is not None  # the only rank has the weights
        megabytes = self.rollout.load_weights(snapshot)
        gap = self.learner.probe_gap(self.rollout.probe())["largest"]
        if not gap <= GAP_LIMIT:
            raise SyncError(f"after weight sync {version} rollout and learner differ by {gap:.3g} on the probe")
        return {"sync/logprob_gap": gap, "sync/megabytes": megabytes}


def local_pools(cfg: Config, rollout: RolloutActor, policy: str, reward: str | None) -> Pools:
    """Fresh reward worker, buffer and learner round a running engine."""
    rollout.engine.cfg = cfg
    learner = LearnerActor(cfg, policy, rank=0, threads=1)
    learner.start("127.0.0.1", 0)  # vLLM has made this process's group of one already
    return Pools(
        rollout=LocalRollout(rollout),
        reward=LocalReward(RewardActor(cfg, policy, reward, threads=1)),
        buffer=LocalBuffer(BufferActor(cfg, policy)),
        learner=LocalLearner(learner),
        syncer=LocalSyncer(learner, rollout),
    )
