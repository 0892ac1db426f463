"""A weight sync is proved, sent once more if the proof fails, and then given up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from skyrl.crew.crew import Crew, LocalExecutor
from skyrl.records import Prompt, Sample, SampleGroup, SkyrlError, SyncError
from skyrl.settings import Config
from skyrl.sync.syncer import Gap, Syncer, probe_gap


class Scripted(Syncer):
    """Sends nothing; the probes give the scripted gaps one after the other."""

    def __init__(self, gaps: Sequence[float], cfg: Config | None = None) -> None:
        nobody: Crew[Any] = Crew(LocalExecutor(), [], 1.0)
        super().__init__(nobody, nobody, cfg or Config())
        self.gaps, self.sent = list(gaps), 0

    def _send(self, version: int) -> dict[str, float]:
        self.sent += 1
        return {}

    def gap(self) -> Gap:
        return Gap(4 * self.gaps[0], self.gaps.pop(0))


def test_a_good_sync_is_sent_once() -> None:
    syncer = Scripted([2e-6])
    metrics = syncer.sync(1)
    assert (syncer.sent, metrics["sync/retries"]) == (1, 0.0)
    assert (metrics["sync/logprob_gap"], metrics["sync/logprob_gap_mean"]) == (8e-6, 2e-6)


@pytest.mark.parametrize("first", [2e-4, math.nan])
def test_a_bad_one_is_sent_again_and_counted(first: float) -> None:
    syncer = Scripted([first, 2e-6])
    metrics = syncer.sync(1)
    assert (syncer.sent, metrics["sync/retries"], metrics["sync/logprob_gap"]) == (2, 1.0, 8e-6)


@pytest.mark.parametrize("second", [2e-4, math.nan])
def test_wrong_twice_is_an_error(second: float) -> None:
    syncer = Scripted([2e-4, second])
    with pytest.raises(SyncError, match="after weight sync 3"):
        syncer.sync(3)
    assert syncer.sent == 2


def test_the_limit_follows_dtype_and_device_unless_it_is_set() -> None:
    cfg = Config()
    for device in ("cpu", "cuda"):
        cfg.rollout.device, cfg.model.dtype = device, "float32"
        # The largest is 4 times the mean here, and the one that is judged.
        assert Scripted([2.4e-5], cfg).sync(1)["sync/retries"] == 0.0
        assert Scripted([2.6e-5, 1e-6], cfg).sync(1)["sync/retries"] == 1.0
    cfg.rollout.device, cfg.model.dtype = "cpu", "bfloat16"
    assert Scripted([0.024], cfg).sync(1)["sync/retries"] == 0.0
    assert Scripted([0.026, 0.01], cfg).sync(1)["sync/retries"] == 1.0
    cfg.rollout.device = "cuda"
    assert Scripted([0.049], cfg).sync(1)["sync/retries"] == 0.0
    assert Scripted([0.051, 0.01], cfg).sync(1)["sync/retries"] == 1.0
    cfg.rollout.logprob_gap_limit = 0.01
    with pytest.raises(SyncError, match=r"logprob_gap_limit for the mean is 0\.01"):
        Scripted([0.049, 0.049], cfg).sync(1)


class Recalls:
    """A learner whose log-probabilities are the recorded ones plus some shift."""

    def __init__(self, *shifts: float) -> None:
        self.shifts = shifts

    def logprobs(self, groups: list[SampleGroup]) -> list[np.ndarray]:
        own = [sample.logprobs for group in groups for sample in group.samples]
        return [a + np.float32(shift) for a, shift in zip(own, self.shifts, strict=True)]


def probed(*lengths: int) -> list[SampleGroup]:
    samples = [
        Sample(i, np.ones(n, np.int32), np.full(n, -1.0, np.float32), "", False, 0) for i, n in enumerate(lengths)
    ]
    return [SampleGroup(Prompt("p", "?", (), "1", "exact"), np.zeros(1, np.int32), samples)]


def test_the_gap_is_over_the_tokens_of_all_parts() -> None:
    gap = probe_gap(Recalls(0.5, -0.25), probed(3), probed(1))  # type: ignore[arg-type]
    assert (gap.largest, gap.mean) == (0.5, (3 * 0.5 + 0.25) / 4)


def test_a_nan_is_no_small_gap_and_no_tokens_are_no_proof() -> None:
    assert math.isnan(probe_gap(Recalls(0.0, math.nan), probed(1, 1)).largest)  # type: ignore[arg-type]
    with pytest.raises(SkyrlError, match="the sync probe has no tokens"):
        probe_gap(Recalls(0.0), probed(0))  # type: ignore[arg-type]
