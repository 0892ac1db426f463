"""Where a run is struck: about sixty points of a step, each at the beginning or at the end of a function that runs in
the process of a member or of the driver, so that it is hit exactly and not by a clock."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Point:
    """One place of a step.

    Example: ``Point("buffer/drawn", "skyrl.replay.ssb:SelectiveSampleBuffer.draw", after=True)`` ends the buffer's
    process when the replayed samples of a step were drawn and nothing else was done.
    """

    name: str
    """``ROLE/…``: the role whose process is struck."""
    target: str = ""
    """``module:function`` that runs there; "" means between two calls: the driver strikes after a step."""
    after: bool = False
    """Strike when the function has done its work and not returned yet; else before it begins."""
    number: int = 1
    """Strike at so-many-th of the calls that count."""
    when: Callable[..., bool] = lambda *args, **kwargs: True
    """Which calls count, by their arguments."""
    needs: str = ""
    """Runs that have the point: ``plain`` engine and backend, ``real`` ones, ``oversample`` or ``whole`` (without
    ``oversample``); "" all."""

    @property
    def role(self) -> str:
        return self.name.partition("/")[0]


def _train(_: Any, request: Any, *__: Any) -> bool:
    return bool(request.split == "train")


def _eval(_: Any, request: Any, *__: Any) -> bool:
    return bool(request.split == "eval" and not request.blind)


def _blind(_: Any, request: Any, *__: Any) -> bool:
    return bool(request.blind)


def _group(_: Any, request: Any, *__: Any) -> bool:
    return bool(request.n > 1 or request.begun)


SAMPLER, ENGINE, VLLM = "skyrl.rollout.sampler:Sampler", "tests.plain_engine:PlainEngine", "skyrl.rollout.vllm_engine"
REWARDER, BATCHER, SSB = "skyrl.rewards.rewarder:Rewarder", "skyrl.batch.batcher:Batcher", "skyrl.replay.ssb"
LEARNER, BACKEND = "skyrl.learner.step:LearnerStep", "tests.plain_backend:PlainBackend"
LOOP, SYNCER = "skyrl.loop:Loop", "skyrl.sync.syncer"

POINTS = [
    # -------------------------------------------------------- rollout
    Point("rollout/asked", f"{SAMPLER}.generate", when=_train, needs="whole"),
    Point("rollout/sampling", f"{ENGINE}._answers", when=_group, number=3, needs="plain"),
    Point("rollout/engine", f"{VLLM}:VllmEngine.generate", after=True, needs="real"),
    Point("rollout/sampled", f"{SAMPLER}.generate", after=True, when=_train, needs="whole"),
    Point("rollout/going_on", f"{SAMPLER}.generate_enough", needs="oversample"),
    Point("rollout/stopping", f"{ENGINE}._stopped", after=True, needs="oversample"),
    Point("rollout/left", f"{SAMPLER}.generate_enough", after=True, needs="oversample"),
    Point("rollout/receiving", f"{SAMPLER}.load_weights"),
    Point("rollout/loading", f"{ENGINE}.load", after=True, needs="plain"),
    Point("rollout/loaded", f"{SAMPLER}.load_weights", after=True),
    Point("rollout/probing", f"{SAMPLER}.probe"),
    Point("rollout/probed", f"{SAMPLER}.probe", after=True),
    Point("rollout/evaluating", f"{SAMPLER}.generate", when=_eval),
    Point("rollout/evaluated", f"{SAMPLER}.generate", after=True, when=_eval),
    Point("rollout/blind", f"{SAMPLER}.generate", when=_blind),
    Point("rollout/idle"),
    Point("rollout/building", f"{SAMPLER}.__init__", after=True),
    # -------------------------------------------------------- reward
    Point("reward/asked", f"{REWARDER}.score"),
    Point("reward/verifying", f"{REWARDER}._score_group", number=3),
    Point("reward/scored", f"{REWARDER}.score", after=True),
    Point("reward/evaluating", "skyrl.evaluation.summary:evaluate"),
    Point("reward/evaluated", "skyrl.evaluation.summary:evaluate", after=True),
    Point("reward/idle"),
    Point("reward/building", f"{REWARDER}.__init__", after=True),
    # -------------------------------------------------------- buffer
    Point("buffer/asked", f"{BATCHER}.exchange"),
    Point("buffer/drawn", f"{SSB}:SelectiveSampleBuffer.draw", after=True),
    Point("buffer/kept", f"{SSB}:SelectiveSampleBuffer.add", after=True),
    Point("buffer/exchanged", f"{BATCHER}.exchange", after=True),
    Point("buffer/saving", f"{BATCHER}.save"),
    Point("buffer/saved", f"{BATCHER}.save", after=True),
    Point("buffer/idle"),
    Point("buffer/building", f"{BATCHER}.__init__", after=True),
    Point("buffer/recovered", f"{BATCHER}.recover", after=True),
    # -------------------------------------------------------- learner
    Point("learner/asked", f"{LEARNER}.train_step"),
    Point("learner/backward", f"{LEARNER}._backward", after=True),
    Point("learner/updating", f"{BACKEND}.update", needs="plain"),
    Point("learner/updated", f"{BACKEND}.update", after=True, needs="plain"),
    Point("learner/trained", f"{LEARNER}.train_step", after=True),
    Point("learner/sending", f"{LEARNER}.snapshot"),
    Point("learner/sent", f"{LEARNER}.snapshot", after=True),
    Point("learner/proving", f"{SYNCER}:probe_gap"),
    Point("learner/proved", f"{SYNCER}:probe_gap", after=True),
    Point("learner/evaluating", "skyrl.evaluation.picture_drop:picture_drop"),
    Point("learner/saving", f"{LEARNER}.save"),
    Point("learner/half_saved", f"{BACKEND}.save", after=True, needs="plain"),
    Point("learner/saved", f"{LEARNER}.save", after=True),
    Point("learner/exporting", f"{LEARNER}.export"),
    Point("learner/exported", f"{LEARNER}.export", after=True),
    Point("learner/idle"),
    Point("learner/joining", f"{LEARNER}.join"),
    Point("learner/loading", f"{LEARNER}.load", after=True),
    # -------------------------------------------------------- driver
    Point("driver/asked", "skyrl.ahead:Ahead.ask_until", after=True),
    Point("driver/batched", f"{LOOP}._batch", after=True),
    Point("driver/syncing", f"{SYNCER}:Syncer.sync"),
    Point("driver/synced", f"{SYNCER}:Syncer.sync", after=True),
    Point("driver/logged", "skyrl.monitoring.sinks:Sinks.log", after=True),
    Point("driver/evaluated", f"{LOOP}._evaluate", after=True),
    Point("driver/half_saved", "skyrl.ahead:Ahead.save"),
    Point("driver/unmarked", "skyrl.ahead:Ahead.save", after=True),
    Point("driver/saved", f"{LOOP}._save", after=True),
    Point("driver/restoring", f"{LOOP}.restore", after=True),
    Point("driver/reporting", "skyrl.run:write_report"),
    Point("driver/idle"),
    # -------------------------------------------------------- Ray and hosts
    Point("gcs/idle"),
    Point("raylet/idle"),
    Point("host/idle"),
]
BY_NAME = {point.name: point for point in POINTS}
