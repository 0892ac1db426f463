"""The MPO side of a micro-batch: unknown behaviour log-probabilities, no reference, KL to the reference, schedules."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from skyrl.learner.views import batch_view, reward_sum
from skyrl.objective.hybrid import active_terms, hybrid_loss, run_terms
from skyrl.objective.term import Counts
from skyrl.records import PreferencePair, Prompt, Sample, TrainBatch, TrainItem
from skyrl.settings import AlgorithmConfig, MpoConfig, Stage

NAN = math.nan
LOGPROBS = [-1.0, -2.0, -3.0, -0.5]
"""Current ones: two tokens of the chosen answer, one of the rejected, one of a third."""
UNKNOWN: tuple[None, None] = (None, None)
"""Nobody recorded the pair."""


def item(length: int, behaviour: list[float] | None, weight: float) -> TrainItem:
    recorded = None if behaviour is None else np.array(behaviour, np.float32)
    sample = Sample(0, np.arange(length, dtype=np.int32), recorded, "", False, 0, advantage=1.0)
    return TrainItem(Prompt("p", "q", (), "1", "exact"), np.zeros(3, np.int32), sample, weight)


def batch(chosen: list[float] | None, rejected: list[float] | None, stage: Stage = Stage.joint) -> TrainBatch:
    items = [item(2, chosen, 0.0), item(1, rejected, 0.0), item(1, [-0.25], 1.0)]
    weights = {"grpo": 1.0 if stage is Stage.joint else 0.0, "mpo": 0.25 if stage is Stage.joint else 1.0}
    return TrainBatch(1, 0, weights, items, [PreferencePair(0, 1, 2.0)], 1, 1)


def run(step: TrainBatch, cfg: AlgorithmConfig, reference: list[float] | None, progress: float = 0.0):
    leaf = torch.tensor(LOGPROBS, requires_grad=True)
    given = None if reference is None else torch.tensor(reference)
    view = batch_view(step, [0, 1, 2], leaf, torch.zeros(4), given, Counts.of(step, 8), progress, 0.1)
    loss, stats = hybrid_loss(view, active_terms(run_terms(cfg), step))
    loss.backward()
    assert leaf.grad is not None
    return loss.item(), leaf.grad.tolist(), {name: float(value) for name, value in stats.items()}


REFERENCE = [-1.5, -2.5, -2.0, NAN]
"""The third answer is no pair member, so its reference is never read."""


def test_unknown_behaviour_reaches_neither_loss_nor_gap() -> None:
    known = run(batch([-1.0, -2.0], [-3.0]), AlgorithmConfig(), REFERENCE)
    unknown = run(batch(*UNKNOWN), AlgorithmConfig(), REFERENCE)
    assert unknown == known
    assert all(math.isfinite(value) for value in [unknown[0], *unknown[1], *unknown[2].values()])
    assert unknown[2]["learner/logprob_gap_fresh"] == pytest.approx(0.25)  # the third answer's


def test_a_single_nan_is_no_unknown_record() -> None:
    broken = batch([NAN, -2.0], [-3.0])
    assert Counts.of(broken, 8).on_policy_tokens == 4
    assert math.isnan(reward_sum(broken, [0, 1, 2], torch.tensor(REFERENCE), 0.1, None, ()))


def test_delta_takes_unknown_members_from_the_pass_before_the_step() -> None:
    step = batch(None, [-3.25])
    start = torch.tensor([-1.0, -2.0, 99.0, 99.0])  # only the unknown member's are read
    got = reward_sum(step, [0, 1, 2], torch.tensor(REFERENCE), 0.1, start, {0})
    assert got == pytest.approx(0.1 * ((-3.0 + 4.0) + (-3.25 + 2.0)))
    assert reward_sum(step, [0, 1, 2], None, 0.1, start, {0}) == pytest.approx(0.1 * (-3.0 - 3.25))
    # A recorded member is scored anew where the record is not exact.
    start[2] = -3.0
    assert reward_sum(step, [0, 1, 2], None, 0.1, start, {0, 1}) == pytest.approx(0.1 * (-3.0 - 3.0))


def test_kl_to_the_reference_by_hand() -> None:
    """d = log π_0 − log π_θ is −½, −½, +1 on the three tokens of the pair."""
    _, _, stats = run(batch([-1.0, -2.0], [-3.0]), AlgorithmConfig(), REFERENCE)
    want = 2 * (math.exp(-0.5) + 0.5 - 1) + (math.e - 1 - 1)
    assert stats["mpo/kl_reference"] == pytest.approx(want, rel=1e-6)
    assert Counts.of(batch([-1.0, -2.0], [-3.0]), 8).pair_tokens == 3


def test_reference_free_has_its_loss_without_any_reference() -> None:
    cfg = AlgorithmConfig(stage=Stage.mpo, mpo=MpoConfig(weight=1.0, reference_free=True))
    loss, _, stats = run(batch(*UNKNOWN, Stage.mpo), cfg, None)
    c = r = 0.1 * -3.0  # β log π_θ of both
    bco = math.log(1 + math.exp(0.1 - c)) + math.log(1 + math.exp(r - 0.1))
    assert loss == pytest.approx(0.8 * math.log(2) + 0.2 * bco + 3.0 / 2, rel=1e-6)
    assert "mpo/kl_reference" not in stats
    assert run(batch(*UNKNOWN, Stage.mpo), cfg, REFERENCE)[0] == loss


def test_progress_moves_the_weights() -> None:
    cfg = AlgorithmConfig(stage=Stage.mpo, mpo=MpoConfig(weight=1.0, generation_weight=1.0, generation_weight_end=0.0))
    first, half, last = (run(batch([-1.0, -2.0], [-3.0], Stage.mpo), cfg, REFERENCE, at)[0] for at in (0.0, 0.5, 1.0))
    assert first - last == pytest.approx(1.5, rel=1e-5)  # the chosen answer's negative log-likelihood a token
    assert half == pytest.approx((first + last) / 2, rel=1e-6)
