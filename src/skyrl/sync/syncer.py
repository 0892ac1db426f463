"""A weight sync: send the learner's weights to every rollout member, and prove that they arrived.

The proof: each rollout member samples a few short answers with the new weights and records their log-probabilities; the
learner computes the same ones; they must agree within rounding. It is the behaviour that is compared, so a stale cache,
a swapped tensor or a packed copy of an old weight shows as surely as a lost message. What rounding can do to this model
is measured (:mod:`skyrl.policy.rounding`): where it is little, as in float32, weights of one step before are seen; in
16 bits only those that move log-probabilities by more than the model's own rounding does.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from skyrl.crew.crew import Crew
from skyrl.learner.step import LearnerStep
from skyrl.records import Metrics, SampleGroup, SkyrlError, SyncError, flatten
from skyrl.rollout.sampler import Sampler
from skyrl.settings import Config, WeightSync

logger = logging.getLogger(__name__)

FLOOR = 1e-4
"""Least limit: a smaller gap passes without a measurement. In float32 right weights are mostly within 1e-5, and those
of one step before far beyond it."""
LARGEST, MEAN = 3.0, 2.0
"""Limits of a gap, in units of what rounding errors did to the learner alone: they were put on outputs of modules, and
kernels round within them too. The largest of few tokens varies more than their mean."""
DRAWS = 2
"""Of rounding errors; the largest counts."""
POLL_SECONDS = 5.0


@dataclass(slots=True, frozen=True)
class Gap:
    """|log π_rollout − log π_learner| over the tokens of the probe, nats; or a limit of it."""

    largest: float
    mean: float

    def within(self, limit: Gap) -> bool:
        return self.largest <= limit.largest and self.mean <= limit.mean  # a nan is not


class Syncer:
    """Sends the weights of one crew to the other.

    Args:
        learners: Rank 0 has, or gathers, the whole policy.
        rollouts: All of them receive it.
        cfg: ``rollout.weight_sync``, the limit of the gap, the time limit.
    """

    def __init__(self, learners: Crew[LearnerStep], rollouts: Crew[Sampler], cfg: Config) -> None:
        self.learners, self.rollouts, self.cfg = learners, rollouts, cfg
        self.limit = Gap(FLOOR, FLOOR)
        """Of the last sync."""
        self._proved: int | None = None
        """The version that all rollout members hold by the last probe: the next sync need not send what can't have
        changed since. None: unknown."""
        self._parts = True
        """Partial syncs are tried."""

    def sync(self, version: int) -> Metrics:
        """Send what can have changed, and probe. A probe that fails is tried once more, with all weights: what is wrong
        twice is no accident.

        Raises:
            SyncError: if the gap on the probe is above its limit.
        """
        started = time.perf_counter()
        base, self._proved = self._proved if self._parts else None, None
        megabytes, probes = self._send(version, base)
        gap, self.limit = self._compared(probes)
        metrics = {"sync/retries": 0.0}
        if not gap.within(self.limit):
            logger.warning("weight sync %d: %s above the limit %s; sending all weights", version, gap, self.limit)
            more, probes = self._send(version, None)
            megabytes += more
            gap, self.limit = self._compared(probes)
            metrics["sync/retries"] = 1.0
        if not gap.within(self.limit):
            asked, limit = self.cfg.rollout.logprob_gap_limit, self.limit
            whence = "the setting" if asked is not None else "what rounding can do to this policy"
            raise SyncError(
                f"after weight sync {version} rollout and learner differ in log-probability on the probe: "
                f"{gap.largest:.3g} at most, {gap.mean:.3g} in the mean. rollout.logprob_gap_limit allows "
                f"{limit.largest:.3g} and {limit.mean:.3g}, by {whence}, with model.dtype={self.cfg.model.dtype}. The "
                "rollout workers do not hold the learner's weights, or compute otherwise; nothing was trained on them"
            )
        self._proved = version
        metrics |= {"sync/logprob_gap": gap.largest, "sync/logprob_gap_mean": gap.mean}
        metrics |= {"sync/megabytes": megabytes} if megabytes else {}
        return metrics | {"sync/logprob_gap_limit": self.limit.largest, "sync/seconds": time.perf_counter() - started}

    def bring(self, place: int, version: int) -> None:
        """Give a rollout member that was built anew the learner's weights, and prove that it has them.

        Raises:
            SyncError: if the gap on its probe is above its limit.
        """
        if self.cfg.rollout.weight_sync is not WeightSync.shm:
            self._proved = None
            self.sync(version)
            return
        snapshot: Any = self.learners.ask(LearnerStep.snapshot, version, None)[0]
        probe, _ = made = list[Any](self.rollouts.deal(Sampler.update, [snapshot], pieces=2, first=place))
        self.rollouts.fetch(made[1:])
        gap, limit = self._compared([probe])
        if not gap.within(limit):
            raise SyncError(
                f"rollout member {place} was built anew and given version {version}, but differs from the learner in "
                f"log-probability on the probe by {gap.largest:.3g} at most, {gap.mean:.3g} in the mean; allowed: "
                f"{limit.largest:.3g} and {limit.mean:.3g}"
            )

    def forget(self) -> None:
        """The learner was built anew: the next sync sends all weights."""
        self._proved = None

    def gap(self) -> Gap:
        """The probe alone."""
        return self._compared(self.rollouts.ask(Sampler.probe))[0]

    def _compared(self, probes: list[list[SampleGroup]]) -> tuple[Gap, Gap]:
        """Gap and limit. Without a limit in the settings it is measured where the gap is above the least one, so with
        the weights and on the tokens that it is for."""
        gap, asked = self.learners.each(probe_gap, *probes)[0], self.cfg.rollout.logprob_gap_limit
        if asked is not None:
            return gap, Gap(asked, asked)
        if gap.within(Gap(FLOOR, FLOOR)):
            return gap, Gap(FLOOR, FLOOR)
        rounding = self.learners.each(rounding_gap, *probes)[0]
        return gap, limit_of(rounding)

    def _send(self, version: int, base: int | None) -> tuple[float, list[list[SampleGroup]]]:
        """Send all weights, or those that can have changed since ``base``. Returns megabytes for each rollout member, 0
        where vLLM sends, which is always everything; and the (promised) probes."""
        if self.cfg.rollout.weight_sync is WeightSync.shm:
            snapshot: Any = self.learners.ask(LearnerStep.snapshot, version, base)[0]
            try:
                made: list[Any] = self.rollouts.deal(Sampler.update, [snapshot] * len(self.rollouts), pieces=2)
                return self.rollouts.fetch(made[1::2])[0], made[0::2]
            except SyncError as error:
                if base is None:
                    raise
                logger.warning("%s; from now on each weight sync sends all weights", error)
                self._parts = False
                return self._send(version, None)
        from skyrl.sync.gpu_control import send_weights

        self._watch(self.learners.ask(send_weights, self.rollouts, self.learners.hosts()[0]))
        self.rollouts.each(Sampler.finish_transfer, version)
        return 0.0, self.rollouts.ask(Sampler.probe)

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
    return _gap([sample.logprobs for sample in flatten(groups)], learner.logprobs(groups))


def limit_of(rounding: Gap) -> Gap:
    """What a sync may differ by, given what rounding errors did. If that is not finite it says nothing, and must not
    let everything pass: the least limit."""
    largest, mean = LARGEST * rounding.largest, MEAN * rounding.mean
    finite = np.isfinite([largest, mean]).all()
    return Gap(max(FLOOR, largest), max(FLOOR, mean)) if finite else Gap(FLOOR, FLOOR)


def rounding_gap(learner: LearnerStep, *parts: list[SampleGroup]) -> Gap:
    """How far rounding errors alone move the learner's log-probabilities of a probe. Collective under ZeRO-3."""
    from skyrl.policy.rounding import rounding_errors

    groups, gaps = [group for part in parts for group in part], list[Gap]()
    exact = learner.logprobs(groups)
    for seed in range(DRAWS):
        with rounding_errors(learner.backend.model, seed):
            gaps.append(_gap(exact, learner.logprobs(groups)))
    return Gap(float(np.max([gap.largest for gap in gaps])), float(np.max([gap.mean for gap in gaps])))


def _gap(recorded: Sequence[np.ndarray | None], own: Sequence[np.ndarray]) -> Gap:
    gaps = np.concatenate([np.empty(0), *(np.abs(a - b) for a, b in zip(recorded, own, strict=True))])
    if not len(gaps):
        raise SkyrlError("the sync probe has no tokens; raise rollout.probe_new_tokens")
    # Of numpy: max() over Python floats would lose a nan, and a nan must not pass for a small gap.
    return Gap(float(np.max(gaps)), float(np.mean(gaps)))
