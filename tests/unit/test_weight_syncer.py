"""A weight sync is proved, sent once more if the proof fails, and then given up."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from skyrl.crew.pools import RayWeightSyncer
from skyrl.records import SyncError
from skyrl.settings import Config


class Scripted(RayWeightSyncer):
    """Sends nothing; the probes give the scripted gaps one after the other."""

    def __init__(self, gaps: Sequence[float], cfg: Config | None = None) -> None:
        super().__init__([], [], cfg or Config())
        self.gaps, self.sent = list(gaps), 0

    def _send(self, version: int) -> dict[str, float]:
        self.sent += 1
        return {}

    def gap(self) -> dict[str, float]:
        return {"largest": 4 * self.gaps[0], "mean": self.gaps.pop(0)}


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
