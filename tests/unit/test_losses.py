"""One micro-batch's share of the step: by hand, and the same however the step is cut."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from learner_views import merged

from skyrl.learner.views import batch_view, pairs_in, reward_sum
from skyrl.objective.hybrid import active_terms, hybrid_loss, run_terms, step_metrics
from skyrl.objective.mpo import RunningDelta
from skyrl.objective.term import Counts, Stats
from skyrl.records import PreferencePair, Prompt, Sample, SkyrlError, TrainBatch, TrainItem
from skyrl.settings import (
    Aggregation,
    AlgorithmConfig,
    DeltaKind,
    GrpoConfig,
    KlPlace,
    Mismatch,
    MpoConfig,
    Ratio,
    Stage,
)

VERSION = 3


def item(behaviour: list[float], advantage: float, weight: float = 1.0, age: int = 0) -> TrainItem:
    """An answer by the policy of ``age`` versions ago."""
    ids = np.arange(len(behaviour), dtype=np.int32)
    recorded = np.array(behaviour, np.float32)
    sample = Sample(0, ids, recorded, "", False, VERSION - age, advantage=advantage)
    return TrainItem(Prompt("p", "q", (), "1", "exact"), np.zeros(3, np.int32), sample, weight)


def step_of(items: list[TrainItem], pairs: list[PreferencePair], cfg: AlgorithmConfig, step: int = 1) -> TrainBatch:
    counted = [i.sample.trained_tokens for i in items if i.grpo_weight != 0]
    return TrainBatch(step, VERSION, cfg.weights(step), items, pairs, len(counted), sum(counted))


def micro(
    batch: TrainBatch,
    part: list[int],
    cfg: AlgorithmConfig,
    logprobs: torch.Tensor,
    reference: torch.Tensor | None = None,
    delta: float = 0.0,
    entropy: torch.Tensor | None = None,
    max_new_tokens: int = 8,
) -> tuple[torch.Tensor, Stats]:
    """Loss and statistics of one micro-batch."""
    flat = torch.zeros_like(logprobs) if entropy is None else entropy
    counts = Counts.of(batch, max_new_tokens)
    view = batch_view(batch, part, logprobs, flat, reference, counts, 0.0, delta)
    return hybrid_loss(view, active_terms(run_terms(cfg), batch))


def metrics_of(batch: TrainBatch, cfg: AlgorithmConfig, parts: list[Stats]) -> dict[str, float]:
    active = active_terms(run_terms(cfg), batch)
    return step_metrics(active, merged(parts, active), Counts.of(batch, 8))


def test_both_terms_by_hand() -> None:
    """θ = π_0 = behaviour, two answers: every ratio is 1, every h is 0."""
    cfg = AlgorithmConfig(mpo=MpoConfig(weight=0.25))
    batch = step_of([item([-1.0, -2.0], 1.0), item([-3.0], -0.5, 0.0)], [PreferencePair(0, 1, 2.0)], cfg)
    logprobs = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    entropy = torch.tensor([0.1, 0.2, 0.3])
    loss, stats = micro(batch, [0, 1], cfg, logprobs, logprobs.detach(), entropy=entropy)
    # GRPO: -1 · 1 over one sample. MPO: 0.8 · 0.693147 + 0.2 · 1.386294 + 1.0 · (1 + 2) / 2.
    assert loss.item() == pytest.approx(-1 + 0.25 * (0.831777 + 1.5), abs=1e-5)
    loss.backward()
    # Token 1 of the chosen one: -1/2 from GRPO; 0.25 · (-0.8 β/2 - 0.2 β/2 - 1/2) from MPO.
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx([-0.6375, -0.6375, 0.0125], abs=1e-6)
    got = {name: float(value) for name, value in stats.items()}
    assert (got["samples"], got["tokens"], got["grpo_tokens"], got["pairs"]) == (2, 3, 2, 1)
    assert got["learner/entropy"] == pytest.approx(0.6)
    assert got["learner/logprob_gap_fresh"] == 0
    metrics = metrics_of(batch, cfg, [stats])
    assert metrics["learner/entropy"] == pytest.approx(0.2) and metrics["loss/total"] == pytest.approx(loss.item())


def test_gap_is_that_of_recorded_on_policy_answers() -> None:
    """The second is a version old, the third unknown; masked tokens do not count either."""
    cfg = AlgorithmConfig(stage=Stage.grpo)
    items = [item([-1.0, -1.0], 1.0), item([-1.0], 1.0, age=1), item([-1.0], 1.0, 0.0)]
    items[0].sample.mask = np.array([True, False])
    items[2].sample.logprobs = None
    batch = step_of(items, [], cfg)
    logprobs = torch.tensor([-1.25, -9.0, -7.0, -8.0])
    metrics = metrics_of(batch, cfg, [micro(batch, [0, 1, 2], cfg, logprobs)[1]])
    assert metrics["learner/logprob_gap_fresh"] == metrics["learner/logprob_gap_fresh_mean"] == pytest.approx(0.25)
    items[0].sample.mask = np.array([True, True])  # and the other token is off by 8
    longer = step_of(items, [], cfg)
    metrics = metrics_of(longer, cfg, [micro(longer, [0, 1, 2], cfg, logprobs)[1]])
    assert metrics["learner/logprob_gap_fresh"] == 8.0
    assert metrics["learner/logprob_gap_fresh_mean"] == pytest.approx(8.25 / 2)
    items[0].sample.mask = np.array([True, False])
    assert Counts.of(batch, 8).on_policy_tokens == 1
    items[0].sample.policy_version -= 1
    metrics = metrics_of(batch, cfg, [micro(batch, [0, 1, 2], cfg, logprobs)[1]])
    assert not {"learner/logprob_gap_fresh", "learner/logprob_gap_fresh_mean"} & metrics.keys()


def random_step(cfg: AlgorithmConfig, step: int = 1) -> tuple[TrainBatch, list[torch.Tensor], list[torch.Tensor]]:
    rng = np.random.default_rng(0)
    items = []
    for i in range(9):
        behaviour = rng.normal(-1, 0.5, rng.integers(1, 7)).tolist()
        items.append(item(behaviour, float(rng.normal()), (1.0, 0.5, 0.0)[i % 3], age=i % 3 == 1))
    current = [torch.tensor(i.sample.logprobs + rng.normal(0, 0.3, len(i.sample.logprobs))).float() for i in items]
    reference = [c + torch.tensor(rng.normal(0, 0.3, len(c))).float() for c in current]
    return step_of(items, [PreferencePair(0, 2, 1.0), PreferencePair(6, 3, 1.0)], cfg, step), current, reference


def run(
    parts: list[list[int]], cfg: AlgorithmConfig, masked: bool
) -> tuple[float, list[list[float]], dict[str, float]]:
    batch, current, reference = random_step(cfg)
    if masked:
        for i in batch.items:
            i.sample.mask[1::2] = False
        batch.items[8].sample.mask[:] = False
        batch = step_of(batch.items, batch.pairs, cfg)
    leaves = [c.clone().requires_grad_() for c in current]
    total, stats = 0.0, []
    for part in parts:
        joined = torch.cat([leaves[i] for i in part])
        loss, found = micro(
            batch, part, cfg, joined, torch.cat([reference[i] for i in part]), 0.05, entropy=-joined.detach()
        )
        loss.backward()
        total += loss.item()
        stats.append(found)
    gradients = [leaf.grad.tolist() if leaf.grad is not None else [0.0] * len(leaf) for leaf in leaves]
    return total, gradients, metrics_of(batch, cfg, stats)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("aggregation", list(Aggregation))
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"kl_weight": 0.1},
        {"kl_weight": 0.1, "kl_place": KlPlace.reward, "dual_clip": 1.2, "ratio": Ratio.sequence},
        *({"mismatch": kind, "mismatch_cap": 1.3} for kind in Mismatch if kind is not Mismatch.none),
    ],
)
def test_cutting_the_step_changes_nothing(aggregation: Aggregation, settings: dict[str, Any], masked: bool) -> None:
    cfg = AlgorithmConfig(grpo=GrpoConfig(aggregation=aggregation, **settings))
    whole = run([list(range(9))], cfg, masked)
    cut = run([[6, 3], [8], [1, 0, 2, 7], [5, 4]], cfg, masked)
    assert cut[0] == pytest.approx(whole[0], rel=1e-5)
    for a, b in zip(cut[1], whole[1], strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-7)
    assert cut[2] == pytest.approx(whole[2], rel=1e-5, abs=1e-7)
    assert cut[2]["loss/total"] == pytest.approx(whole[0], rel=1e-5)


def test_masked_tokens_get_no_gradient_and_an_all_masked_answer_changes_nothing() -> None:
    cfg = AlgorithmConfig(grpo=GrpoConfig(kl_weight=0.1))
    _, gradients, metrics = run([list(range(9))], cfg, masked=True)
    for i, gradient in enumerate(gradients[:8]):
        assert not any(gradient[1::2]) and (any(gradient[::2]) or i == 5)
    assert not any(gradients[8]) and all(math.isfinite(value) for value in metrics.values())


def test_a_lost_micro_batch_is_noticed() -> None:
    with pytest.raises(SkyrlError, match="statistics cover 7 samples; the step has 9"):
        run([[6, 3], [8], [1, 0, 2, 7]], AlgorithmConfig(), False)


@pytest.mark.parametrize("off", ["grpo", "mpo"])
def test_a_term_of_weight_zero_leaves_no_trace(off: str) -> None:
    cfg = AlgorithmConfig()
    getattr(cfg, off).weight = 0.0
    batch, current, reference = random_step(cfg)
    if off == "mpo":  # as the buffer makes it then
        batch.pairs.clear()
    logprobs = torch.cat(current).requires_grad_()
    stats = micro(batch, list(range(9)), cfg, logprobs, torch.cat(reference))[1]
    assert not [name for name in stats if name.startswith((f"{off}/", f"loss/{off}"))]


@pytest.mark.parametrize(("step", "trained", "other"), [(2, "mpo", "grpo"), (3, "grpo", "mpo")])
def test_each_stage_trains_its_own_term(step: int, trained: str, other: str) -> None:
    losses = []
    for cfg in (AlgorithmConfig(stage=Stage.mpo_then_grpo, mpo_steps=2), AlgorithmConfig(stage=Stage(trained))):
        batch, current, reference = random_step(cfg, step)
        logprobs = torch.cat(current).requires_grad_()
        loss, stats = micro(batch, list(range(9)), cfg, logprobs, torch.cat(reference), 0.05)
        assert not [name for name in stats if name.startswith((f"{other}/", f"loss/{other}"))]
        losses.append(loss.item())
    assert losses[0] == losses[1] != 0


def test_fixed_aggregation_divides_by_the_length_limit() -> None:
    losses = []
    for aggregation, limit in ((Aggregation.fixed, 8), (Aggregation.fixed, 16), (Aggregation.token, 8)):
        cfg = AlgorithmConfig(stage=Stage.grpo, grpo=GrpoConfig(aggregation=aggregation))
        batch, current, _ = random_step(cfg)
        loss, _ = micro(batch, list(range(9)), cfg, torch.cat(current), max_new_tokens=limit)
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0] / 2, rel=1e-6)
    assert losses[0] * batch.grpo_samples * 8 == pytest.approx(losses[2] * batch.grpo_tokens, rel=1e-6)


def test_a_micro_batch_without_any_term_has_a_zero_loss_with_a_graph() -> None:
    cfg = AlgorithmConfig(stage=Stage.grpo)
    batch = step_of([item([-1.0], 1.0, 0.0), item([-1.0], 1.0)], [], cfg)
    batch.weights["grpo"] = 0.0
    logprobs = torch.tensor([-math.inf], requires_grad=True)
    loss, stats = micro(batch, [0], cfg, logprobs)
    loss.backward()
    assert logprobs.grad is not None
    assert (loss.item(), logprobs.grad.tolist()) == (0, [0])
    assert float(stats["tokens"]) == 1


def test_weights_of_a_term_that_the_run_lacks_are_refused() -> None:
    cfg = AlgorithmConfig(stage=Stage.grpo)
    batch = step_of([item([-1.0], 1.0)], [], AlgorithmConfig())
    with pytest.raises(SkyrlError, match="step 1 has weights of mpo; the run has grpo"):
        active_terms(run_terms(cfg), batch)


# ---------------------------------------------------------------- δ


def test_reward_sum_by_hand() -> None:
    batch, _, reference = random_step(AlgorithmConfig())
    want = 0.0
    for i in (0, 2, 6, 3):
        want += 0.1 * (float(batch.items[i].sample.logprobs.astype(np.float64).sum()) - float(reference[i].sum()))
    parts = ([2, 5, 0], [3, 6], [1, 4])
    got = [reward_sum(batch, part, torch.cat([reference[i] for i in part]), 0.1, None, ()) for part in parts]
    assert sum(got) == pytest.approx(want, rel=1e-5)
    assert got[2] == 0
    alone = 0.1 * sum(float(batch.items[i].sample.logprobs.sum()) for i in (0, 2))
    assert reward_sum(batch, [0, 2], None, 0.1, None, ()) == pytest.approx(alone, rel=1e-5)  # h = log π_θ


def test_reward_sum_leaves_masked_tokens_out() -> None:
    pair = [PreferencePair(0, 1, None)]
    batch = step_of([item([-1.0, math.nan, -2.0], 1.0), item([-3.0], 1.0)], pair, AlgorithmConfig())
    batch.items[0].sample.mask[1] = False
    reference = torch.tensor([-1.5, math.inf, -2.5, -2.0])
    assert reward_sum(batch, [0, 1], reference, 0.1, None, ()) == pytest.approx(0.1 * (1.0 - 1.0))
    start = torch.tensor([-1.25, -math.inf, -2.0, 99.0])
    assert reward_sum(batch, [0, 1], reference, 0.1, start, {0}) == pytest.approx(0.1 * (0.75 - 1.0))


def test_delta_of_the_first_step_is_the_mean_over_all_ranks() -> None:
    """h = (2, −1) with β 0.1 on two ranks: mean of 0.2 and −0.1."""
    pairs = [PreferencePair(0, 1, None), PreferencePair(2, 3, None)]
    batch = step_of([item([2.0], 0), item([-1.0], 0), item([2.0], 0), item([-1.0], 0)], pairs, AlgorithmConfig())
    parts = [reward_sum(batch, part, torch.zeros(2), 0.1, None, ()) for part in ([0, 1], [2, 3])]
    assert RunningDelta(DeltaKind.cumulative, 0.9).update(sum(parts) / 4) == pytest.approx(0.05)


def test_pairs_in() -> None:
    batch = random_step(AlgorithmConfig())[0]
    assert pairs_in(batch, [2, 0, 1]) == batch.pairs[:1]
    assert pairs_in(batch, [1, 4]) == []
    assert pairs_in(batch, list(range(9))) == batch.pairs


def test_nan_is_not_hidden() -> None:
    cfg = AlgorithmConfig(stage=Stage.grpo)
    batch = step_of([item([math.nan, -1.0], 1.0)], [], cfg)
    loss, stats = micro(batch, [0], cfg, torch.tensor([-1.0, -1.0]))
    assert math.isnan(loss.item())
    assert math.isnan(metrics_of(batch, cfg, [stats])["loss/grpo"])
