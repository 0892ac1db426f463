"""A weight sync is proved, sent once more if the proof fails, and then given up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from learner_cases import build_policy, make_batch
from learner_plain import joined, plain_settings

from skyrl.crew.crew import Crew
from skyrl.crew.local_executor import LocalExecutor
from skyrl.learner.step import LearnerStep
from skyrl.policy.rounding import rounding_errors
from skyrl.records import Prompt, Sample, SampleGroup, SkyrlError, SyncError
from skyrl.settings import Config
from skyrl.sync.syncer import FLOOR, LARGEST, Gap, Syncer, limit_of, probe_gap, rounding_gap


class Scripted(Syncer):
    """Sends nothing; the probes give the scripted gaps one after the other, the largest 4 times the mean, and the
    measurements of rounding the scripted ones."""

    def __init__(self, gaps: Sequence[float], rounding: Sequence[float] = (), limit: float | None = None) -> None:
        crew: Crew[Any] = Crew(LocalExecutor(), [], 1.0)
        super().__init__(crew, crew, Config())
        self.cfg.rollout.logprob_gap_limit = limit
        self.learners = self.rollouts = self  # type: ignore[assignment]
        self.gaps, self.rounding = list(gaps), list(rounding)
        self.sent: list[int | None] = []
        """The version that each sending builds on."""

    def ask(self, function: Any) -> list[Any]:
        return []

    def each(self, function: Any, *_: Any) -> list[Gap]:
        values = self.gaps if function is probe_gap else self.rounding
        return [Gap(4 * values[0], values.pop(0))]

    def _send(self, version: int, base: int | None) -> tuple[float, list[Any]]:
        self.sent.append(base)
        return (10.0 if base is None else 1.0), []


def test_a_good_sync_is_sent_once_and_nothing_is_measured() -> None:
    syncer = Scripted([2e-6])
    metrics = syncer.sync(1)
    assert (syncer.sent, metrics["sync/retries"], metrics["sync/megabytes"]) == ([None], 0.0, 10.0)
    assert (metrics["sync/logprob_gap"], metrics["sync/logprob_gap_mean"]) == (8e-6, 2e-6)
    assert metrics["sync/logprob_gap_limit"] == FLOOR


@pytest.mark.parametrize("first", [2e-4, math.nan])
def test_a_bad_one_is_sent_again_and_counted(first: float) -> None:
    syncer = Scripted([first, 2e-6], [1e-6])
    metrics = syncer.sync(1)
    assert (syncer.sent, metrics["sync/retries"], metrics["sync/logprob_gap"]) == ([None, None], 1.0, 8e-6)


def test_a_sync_builds_on_the_one_before_and_its_second_try_on_nothing() -> None:
    syncer = Scripted([2e-6, 2e-4, 2e-6, 2e-6, 2e-4, 2e-4, 2e-6], [1e-6] * 3)
    assert [syncer.sync(version)["sync/megabytes"] for version in (4, 5, 6)] == [10.0, 11.0, 1.0]
    with pytest.raises(SyncError):
        syncer.sync(7)
    syncer.sync(7)
    assert syncer.sent == [None, 4, None, 5, 6, None, None]


@pytest.mark.parametrize("second", [2e-4, math.nan])
def test_wrong_twice_is_an_error(second: float) -> None:
    syncer = Scripted([2e-4, second], [1e-6, 1e-6])
    with pytest.raises(SyncError, match=r"after weight sync 3.*by what rounding can do to this policy"):
        syncer.sync(3)
    assert syncer.sent == [None, None]


def test_the_limit_is_what_rounding_does_at_this_sync() -> None:
    syncer = Scripted([0.03, 2e-6, 0.03, 0.03], [0.02, 0.005, 0.005])
    assert syncer.sync(1)["sync/logprob_gap_limit"] == pytest.approx(LARGEST * 0.08)
    assert syncer.sync(2)["sync/logprob_gap_limit"] == FLOOR
    with pytest.raises(SyncError, match=r"allows 0\.06 and 0\.01,"):
        syncer.sync(3)


def test_a_mean_above_its_limit_is_seen_though_no_token_is() -> None:
    assert not Gap(0.1, 0.05).within(Gap(0.2, 0.04))
    assert not Gap(0.3, 0.01).within(Gap(0.2, 0.04))
    assert Gap(0.1, 0.01).within(Gap(0.2, 0.04))


def test_a_limit_that_is_set_is_not_measured() -> None:
    assert Scripted([0.02], limit=0.1).sync(1)["sync/logprob_gap_limit"] == 0.1
    assert Scripted([10.0], limit=math.inf).sync(1)["sync/retries"] == 0.0
    with pytest.raises(SyncError, match=r"allows 0\.01 and 0\.01, by the setting"):
        Scripted([0.02, 0.02], limit=0.01).sync(1)


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


# ---------------------------------------------------------------- a real policy


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("policy")
    build_policy(folder)
    return str(folder)


def learner_of(policy: str, dtype: str) -> LearnerStep:
    cfg = plain_settings()
    cfg.model.dtype, cfg.learner.warmup_steps = dtype, 0  # type: ignore[assignment]
    return joined(cfg, policy)


def answered(learner: LearnerStep) -> list[SampleGroup]:
    """Answers with the log-probabilities that this learner gives them now: a rollout that holds its weights."""
    batch = make_batch(learner.encoder, 1, num_prompts=6)
    groups = [SampleGroup(item.prompt, item.prompt_ids, [item.sample]) for item in batch.items]
    for group, own in zip(groups, learner.logprobs(groups), strict=True):
        group.samples[0].logprobs = own
    return groups


def limit_for(learner: LearnerStep, groups: list[SampleGroup]) -> Gap:
    return limit_of(rounding_gap(learner, groups))


def test_rounding_errors_leave_no_trace(policy: str) -> None:
    learner = learner_of(policy, "float32")
    groups, state = answered(learner), torch.get_rng_state()
    with rounding_errors(learner.backend.model, 0):
        off = learner.logprobs(groups)
    assert probe_gap(learner, groups) == Gap(0.0, 0.0)  # hooks are gone
    assert any((a != b.samples[0].logprobs).any() for a, b in zip(off, groups, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("dtype", "least", "most"), [("float32", 1e-7, 1e-4), ("bfloat16", 1e-3, 1.0)])
def test_what_rounding_does_follows_the_type(policy: str, dtype: str, least: float, most: float) -> None:
    learner = learner_of(policy, dtype)
    gap = rounding_gap(learner, answered(learner))
    assert least < gap.largest < most and 0 < gap.mean < gap.largest


def test_in_float32_weights_of_the_step_before_are_seen(policy: str) -> None:
    learner = learner_of(policy, "float32")
    groups = answered(learner)
    learner.train_step(make_batch(learner.encoder, 1))  # at the default's learning rate
    assert not probe_gap(learner, groups).within(limit_for(learner, groups))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_permuted_tensor_is_seen(policy: str, dtype: str) -> None:
    learner = learner_of(policy, dtype)
    groups = answered(learner)
    weight = next(p for n, p in learner.backend.model.named_parameters() if n.endswith("layers.1.mlp.down_proj.weight"))
    with torch.no_grad():
        weight.copy_(weight.roll(1, 0).clone())
    assert not probe_gap(learner, groups).within(limit_for(learner, groups))


def test_bfloat16_against_float32_passes_and_is_no_accident(policy: str) -> None:
    """An independent implementation: the same weights, computed in float32, differ by rounding alone."""
    learner = learner_of(policy, "bfloat16")
    groups = answered(learner)
    learner.backend.model.float()
    gap = probe_gap(learner, groups)
    learner.backend.model.bfloat16()
    limit = limit_for(learner, groups)
    assert gap.largest > FLOOR and gap.within(limit)
    assert not Gap(gap.largest, 10 * gap.mean).within(limit)


@pytest.mark.parametrize("rounding", [(math.inf, 0.1), (math.nan, math.nan), (0.2, math.inf)])
def test_a_limit_that_could_not_be_measured_lets_nothing_pass(rounding: tuple[float, float]) -> None:
    assert limit_of(Gap(*rounding)) == Gap(FLOOR, FLOOR)
    assert limit_of(Gap(0.2, 0.01)) == Gap(pytest.approx(0.6), pytest.approx(0.02))
