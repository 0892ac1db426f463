"""The pools of ``interfaces.py``, implemented with Ray. Every call that can hang has a time limit."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from skyrl.interfaces import Handle, Metrics
from skyrl.records import RolloutRequest, SkyrlError, SyncError
from skyrl.settings import Config, WeightSync

logger = logging.getLogger(__name__)

GAP_LIMITS = {"float32": 1e-4, "bfloat16": 0.1, "float16": 0.1}
"""Limit of the largest gap after a sync: measured on CPU are 2e-6 in float32 and 5e-3 in bfloat16."""
CUDA_MEAN_GAP_LIMIT = 0.05
"""Limit of the mean gap in 16 bits on CUDA, where single tokens are said to differ by several tenths between two right
implementations. Not measured here. It tells the right weights from wrong ones, not from those of the step before."""
POLL_SECONDS = 5.0


def fetch(handles: Any, timeout: float, what: str) -> Any:
    """``ray.get`` with a limit.

    Raises:
        SkyrlError: if it is exceeded; the message names the phase and the setting.
    """
    try:
        return ray.get(handles, timeout=timeout)
    except ray.exceptions.GetTimeoutError as error:
        raise SkyrlError(f"{what} took longer than controller.timeout={timeout:g} s") from error


class RayRolloutPool:
    """Spreads rows over the rollout actors."""

    def __init__(self, actors: list[Any], cfg: Config) -> None:
        self.actors, self.cfg = actors, cfg

    def generate(self, request: RolloutRequest) -> list[Handle]:
        """Handles of ``list[SampleGroup]`` in the order of the rows; returns at once."""
        # Several handles per worker, so that every reward worker gets a share.
        parts = -(-self.cfg.reward.num_workers // len(self.actors))
        size = -(-len(request.rows) // len(self.actors))
        handles: list[Handle] = []
        for i, actor in enumerate(self.actors):
            rows = request.rows[i * size : (i + 1) * size]
            if rows:
                made = actor.generate.options(num_returns=parts).remote(replace(request, rows=rows), parts)
                handles += [made] if parts == 1 else made
        return handles

    def continue_blind(self, groups: list[Handle], step: int) -> list[Handle]:
        """Handles of the groups with ``SampleGroup.blind`` filled; returns at once."""
        return [self.actors[i % len(self.actors)].continue_blind.remote(part, step) for i, part in enumerate(groups)]

    def wait(self, handles: list[Handle]) -> None:
        """Block until all are there, without fetching them. A failed part raises where its value is needed."""
        wait_for(handles, self.cfg.controller.timeout, "the rollout")


class RayRewardPool:
    """Deals groups to the reward actors in turn."""

    def __init__(self, actors: list[Any], cfg: Config) -> None:
        self.actors, self.cfg = actors, cfg

    def score(self, groups: list[Handle]) -> list[Handle]:
        """Handles of the scored groups; returns at once."""
        return [self.actors[i % len(self.actors)].score.remote(handle) for i, handle in enumerate(groups)]

    def wait(self, handles: list[Handle]) -> None:
        wait_for(handles, self.cfg.controller.timeout, "the reward")

    def evaluate(
        self, groups: list[Handle], blind: list[Handle], gallery: list[dict[str, Any]] | None
    ) -> tuple[Metrics, list[dict[str, Any]]]:
        """Evaluation metrics of scored groups, and the gallery (see ``skyrl.evaluation.summary.summarise``)."""
        handle = self.actors[0].evaluate.remote(gallery, len(groups), *groups, *blind)
        return fetch(handle, self.cfg.controller.timeout, "the evaluation")


class RayBufferService:
    """The one buffer actor."""

    def __init__(self, actor: Any, cfg: Config) -> None:
        self.actor, self.timeout = actor, cfg.controller.timeout

    def exchange(self, groups: list[Handle], step: int, version: int) -> tuple[Handle, Metrics]:
        batch, metrics = self.actor.exchange.options(num_returns=2).remote(step, version, *groups)
        return batch, fetch(metrics, self.timeout, "the sample buffer")

    def offline(self, step: int) -> tuple[Handle, Metrics]:
        batch, metrics = self.actor.offline.options(num_returns=2).remote(step)
        return batch, fetch(metrics, self.timeout, "the offline pairs")

    def save(self, path: Path) -> None:
        fetch(self.actor.save.remote(path), self.timeout, "saving the sample buffer")

    def load(self, path: Path) -> None:
        fetch(self.actor.load.remote(path), self.timeout, "loading the sample buffer")


class RayLearnerPool:
    """All learner ranks; every call goes to each of them."""

    def __init__(self, actors: list[Any], cfg: Config) -> None:
        self.actors, self.timeout = actors, cfg.controller.timeout

    def _all(self, method: str, what: str, *args: Any) -> list[Any]:
        return fetch([getattr(actor, method).remote(*args) for actor in self.actors], self.timeout, what)

    def train_step(self, batch: Handle) -> Metrics:
        return self._all("train_step", "the learner step", batch)[0]

    def picture_drop(self, groups: list[Handle]) -> Metrics:
        return self._all("picture_drop", "the masked-picture probe", *groups)[0]

    def save(self, folder: Path) -> None:
        self._all("save", "saving the learner", folder)

    def load(self, folder: Path) -> None:
        self._all("load", "loading the learner", folder)

    def export(self, folder: Path) -> None:
        self._all("export", "exporting the policy", folder)


class RayWeightSyncer:
    """Sends the learner's weights to every rollout actor and proves that they arrived."""

    def __init__(self, learners: list[Any], rollouts: list[Any], cfg: Config) -> None:
        self.learners, self.rollouts, self.cfg = learners, rollouts, cfg
        by_mean = cfg.rollout.device == "cuda" and cfg.model.dtype != "float32"
        self.judged = "mean" if by_mean else "largest"
        limit = cfg.rollout.logprob_gap_limit
        if limit is None:
            limit = CUDA_MEAN_GAP_LIMIT if by_mean else GAP_LIMITS[cfg.model.dtype]
        self.limit = limit

    def sync(self, version: int) -> Metrics:
        """See ``interfaces.WeightSyncer``."""
        started = time.perf_counter()
        metrics = self._send(version)
        gap = self.gap()
        metrics["sync/retries"] = 0.0
        if not gap[self.judged] <= self.limit:  # once more: what is wrong twice is no accident
            logger.warning("weight sync %d: %s gap above the limit %g; sending again", version, gap, self.limit)
            self._send(version)
            gap = self.gap()
            metrics["sync/retries"] = 1.0
        if not gap[self.judged] <= self.limit:
            raise SyncError(
                f"after weight sync {version} rollout and learner differ in log-probability on the probe: "
                f"{gap['largest']:.3g} at most, {gap['mean']:.3g} in the mean; rollout.logprob_gap_limit for the "
                f"{self.judged} is {self.limit:g} with model.dtype={self.cfg.model.dtype}. "
                "The rollout workers do not hold the learner's weights; nothing was trained on them"
            )
        seconds = time.perf_counter() - started
        return metrics | {
            "sync/logprob_gap": gap["largest"],
            "sync/logprob_gap_mean": gap["mean"],
            "sync/seconds": seconds,
        }

    def _send(self, version: int) -> Metrics:
        timeout = self.cfg.controller.timeout
        if self.cfg.rollout.weight_sync is WeightSync.shm:
            snapshot, *_ = [learner.snapshot.remote(version) for learner in self.learners]
            loads = [rollout.load_weights.remote(snapshot) for rollout in self.rollouts]
            return {"sync/megabytes": fetch(loads, timeout, "the weight sync")[0]}
        sends = [learner.send_weights.remote(self.rollouts, version) for learner in self.learners]
        self._watch(sends, timeout)
        fetch([rollout.finish_transfer.remote(version) for rollout in self.rollouts], timeout, "the weight sync")
        return {}

    def _watch(self, sends: list[Any], timeout: float) -> None:
        """Return once every learner has sent. Raise what one raised, though others may wait for it, or why an engine
        could not receive: the learner then waits inside NCCL and can't say."""
        deadline = time.monotonic() + timeout
        while True:
            done, left = ray.wait(sends, num_returns=len(sends), timeout=POLL_SECONDS)
            ray.get(done)
            if not left:
                return
            if time.monotonic() > deadline:
                raise SkyrlError(f"the weight sync took longer than controller.timeout={timeout:g} s")
            failures = [rollout.transfer_failure.remote() for rollout in self.rollouts]  # waits for a running transfer
            for failure in ray.get(ray.wait(failures, num_returns=len(failures), timeout=POLL_SECONDS)[0]):
                if failure is not None:
                    raise SyncError(f"a rollout worker could not take the new weights: {failure}")

    def gap(self) -> dict[str, float]:
        """The probe alone: ``largest`` and ``mean`` |log π_rollout − log π_learner| over the tokens that the rollout
        actors sample now."""
        probes = [rollout.probe.remote() for rollout in self.rollouts]
        gaps = [learner.probe_gap.remote(*probes) for learner in self.learners]
        return fetch(gaps, self.cfg.controller.timeout, "the sync probe")[0]


def wait_for(handles: list[Handle], timeout: float, what: str) -> None:
    """Block until all handles are ready, without moving their values here.

    Raises:
        SkyrlError: after ``timeout`` seconds.
    """
    _, pending = ray.wait(handles, num_returns=len(handles), timeout=timeout, fetch_local=False)
    if pending:
        raise SkyrlError(f"{what} took longer than controller.timeout={timeout:g} s")
