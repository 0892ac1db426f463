"""A weight sync: send the learner's weights to every rollout member, and prove that they arrived.

The proof: each rollout member samples a few short answers with the new weights and records their log-probabilities; the
learner computes the same ones; the largest difference must be within rounding. It is the behaviour that is compared, so
a stale cache, a swapped tensor or a packed copy of an old weight shows as surely as a lost message.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from skyrl.crew.crew import Crew
from skyrl.learner.step import LearnerStep
from skyrl.records import Metrics, SampleGroup, SkyrlError, SyncError, flatten
from skyrl.rollout.sampler import Sampler
from skyrl.settings import Config, WeightSync

logger = logging.getLogger(__name__)

GAP_LIMITS = {"float32": 1e-4, "bfloat16": 0.1, "float16": 0.1}
"""Limit of the largest gap after a sync: measured on CPU are 2e-6 in float32 and 5e-3 in bfloat16."""
CUDA_MEAN_GAP_LIMIT = 0.05
"""Limit of the mean gap in 16 bits on CUDA, where single tokens are said to differ by several tenths between two right
implementations. Not measured here. It tells the right weights from wrong ones, not from those of the step before."""
POLL_SECONDS = 5.0


@dataclass(slots=True, frozen=True)
class Gap:
    """|log π_rollout − log π_learner| over the tokens of the probe, nats."""

    largest: float
    mean: float


class Syncer:
    """Sends the weights of one crew to the other.

    Args:
        learners: Rank 0 has, or gathers, the whole policy.
        rollouts: All of them receive it.
        cfg: ``rollout.weight_sync``, the limit of the gap, the time limit.
    """

    def __init__(self, learners: Crew[LearnerStep], rollouts: Crew[Sampler], cfg: Config) -> None:
        self.learners, self.rollouts, self.cfg = learners, rollouts, cfg
        self.by_mean = cfg.rollout.device == "cuda" and cfg.model.dtype != "float32"
        limit = cfg.rollout.logprob_gap_limit
        if limit is None:
            limit = CUDA_MEAN_GAP_LIMIT if self.by_mean else GAP_LIMITS[cfg.model.dtype]
        self.limit = limit

    def sync(self, version: int) -> Metrics:
        """Send, and probe. A probe that fails is tried once more: what is wrong twice is no accident.

        Raises:
            SyncError: if the gap on the probe is above its limit.
        """
        started = time.perf_counter()
        metrics = self._send(version)
        gap = self.gap()
        metrics["sync/retries"] = 0.0
        if not self._within(gap):
            logger.warning("weight sync %d: %s above the limit %g; sending again", version, gap, self.limit)
            self._send(version)
            gap = self.gap()
            metrics["sync/retries"] = 1.0
        if not self._within(gap):
            raise SyncError(
                f"after weight sync {version} rollout and learner differ in log-probability on the probe: "
                f"{gap.largest:.3g} at most, {gap.mean:.3g} in the mean; rollout.logprob_gap_limit for the "
                f"{'mean' if self.by_mean else 'largest'} is {self.limit:g} with model.dtype={self.cfg.model.dtype}. "
                "The rollout workers do not hold the learner's weights; nothing was trained on them"
            )
        seconds = time.perf_counter() - started
        return metrics | {"sync/logprob_gap": gap.largest, "sync/logprob_gap_mean": gap.mean, "sync/seconds": seconds}

    def gap(self) -> Gap:
        """The probe alone."""
        return self.learners.each(probe_gap, *self.rollouts.ask(Sampler.probe))[0]

    def _within(self, gap: Gap) -> bool:
        return (gap.mean if self.by_mean else gap.largest) <= self.limit  # a nan is not

    def _send(self, version: int) -> Metrics:
        if self.cfg.rollout.weight_sync is WeightSync.shm:
            snapshot: Any = self.learners.ask(LearnerStep.snapshot, version)[0]
            return {"sync/megabytes": self.rollouts.each(Sampler.load_weights, snapshot)[0]}
        from skyrl.sync.gpu_control import send_weights

        self._watch(self.learners.ask(send_weights, self.rollouts, self.learners.hosts()[0]))
        self.rollouts.each(Sampler.finish_transfer, version)
        return {}

    def _watch(self, sends: list[None]) -> None:
        """Return once every learner has sent. Raise what one raised, though others may wait for it, or why an engine
        could not receive: the learner then waits inside NCCL and can't say."""
        limit = self.cfg.controller.timeout
        deadline = time.monotonic() + limit
        while True:
            done, left = self.learners.poll(sends, POLL_SECONDS)
            self.learners.fetch(done)
            if not left:
                return
            if time.monotonic() > deadline:
                raise SkyrlError(f"the weight sync took longer than controller.timeout={limit:g} s")
            asked = self.rollouts.ask(Sampler.transfer_failure)  # waits for a running transfer
            for failure in self.rollouts.fetch(self.rollouts.poll(asked, POLL_SECONDS)[0]):
                if failure is not None:
                    raise SyncError(f"a rollout worker could not take the new weights: {failure}")


def probe_gap(learner: LearnerStep, *parts: list[SampleGroup]) -> Gap:
    """Compare what the rollout members recorded with the learner's own log-probabilities. Collective under ZeRO-3.

    Raises:
        SkyrlError: if the probe has no tokens.
    """
    groups = [group for part in parts for group in part]
    recorded = [sample.logprobs for sample in flatten(groups)]
    own = learner.logprobs(groups)
    gaps = np.concatenate([np.empty(0), *(np.abs(a - b) for a, b in zip(recorded, own, strict=True))])
    if not len(gaps):
        raise SkyrlError("the sync probe has no tokens; raise rollout.probe_new_tokens")
    # Of numpy: max() over Python floats would lose a nan, and a nan must not pass for a small gap.
    return Gap(float(np.max(gaps)), float(np.mean(gaps)))
