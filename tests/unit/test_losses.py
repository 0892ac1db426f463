"""One micro-batch's share of the step: by hand, and the same however the step is cut."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from skyrl.learner.losses import micro_loss, pair_sums, pairs_in, reduce_stats
from skyrl.objective.hybrid import finalise, merge_stats
from skyrl.records import PreferencePair, Prompt, Sample, SkyrlError, TrainBatch, TrainItem
from skyrl.settings import Aggregation, AlgorithmConfig, GrpoConfig, KlPlace, Mismatch, MpoConfig, Ratio, Stage

CPU = torch.device("cpu")


def item(behaviour: list[float], advantage: float, weight: float = 1.0, replayed: bool = False) -> TrainItem:
    sample = Sample(
        0, np.arange(len(behaviour), dtype=np.int32), np.array(behaviour, np.float32), "", False, 0, advantage=advantage
    )
    return TrainItem(Prompt("p", "q", (), "1", "exact"), np.zeros(3, np.int32), sample, weight, replayed)


def step_of(items: list[TrainItem], pairs: list[PreferencePair]) -> TrainBatch:
    counted = [len(i.sample.token_ids) for i in items if i.grpo_weight != 0]
    return TrainBatch(1, items, pairs, len(counted), sum(counted))


def test_both_terms_by_hand() -> None:
    """θ = π_0 = behaviour, two answers: every ratio is 1, every h is 0."""
    batch = step_of([item([-1.0, -2.0], 1.0), item([-3.0], -0.5, 0.0)], [PreferencePair(0, 1, 2.0)])
    logprobs = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    cfg = AlgorithmConfig(mpo=MpoConfig(weight=0.25))
    result = micro_loss(batch, [0, 1], logprobs, torch.tensor([0.1, 0.2, 0.3]), logprobs.detach(), 0.0, cfg, 8, 0.0)
    # GRPO: -1 · 1 over one sample. MPO: 0.8 · 0.693147 + 0.2 · 1.386294 + 1.0 · (1 + 2) / 2.
    assert result.loss.item() == pytest.approx(-1 + 0.25 * (0.831777 + 1.5), abs=1e-5)
    result.loss.backward()
    # Token 1 of the chosen one: -1/2 from GRPO; 0.25 · (-0.8 β/2 - 0.2 β/2 - 1/2) from MPO.
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx([-0.6375, -0.6375, 0.0125], abs=1e-6)
    stats = {name: float(value) for name, value in result.stats.items()}
    assert (stats["tokens"], stats["grpo_tokens"], stats["mpo_pairs"]) == (3, 2, 1)
    assert stats["entropy"] == pytest.approx(0.6)
    assert stats["fresh_gap_max"] == 0


def test_gap_is_that_of_fresh_answers_only() -> None:
    batch = step_of([item([-1.0], 1.0), item([-1.0], 1.0, replayed=True)], [])
    logprobs = torch.tensor([-1.25, -7.0])
    stats = micro_loss(batch, [0, 1], logprobs, torch.zeros(2), None, 0.0, AlgorithmConfig(), 8, 0.0).stats
    assert float(stats["fresh_gap_max"]) == pytest.approx(0.25)
    both_replayed = replace(batch, items=[replace(i, replayed=True) for i in batch.items])
    stats = micro_loss(both_replayed, [0, 1], logprobs, torch.zeros(2), None, 0.0, AlgorithmConfig(), 8, 0.0).stats
    assert float(stats["fresh_gap_max"]) == 0


def random_step() -> tuple[TrainBatch, list[torch.Tensor], list[torch.Tensor]]:
    rng = np.random.default_rng(0)
    items = []
    for i in range(9):
        behaviour = rng.normal(-1, 0.5, rng.integers(1, 7)).tolist()
        items.append(item(behaviour, float(rng.normal()), (1.0, 0.5, 0.0)[i % 3], i % 3 == 1))
    current = [torch.tensor(i.sample.logprobs + rng.normal(0, 0.3, len(i.sample.logprobs))).float() for i in items]
    reference = [c + torch.tensor(rng.normal(0, 0.3, len(c))).float() for c in current]
    return step_of(items, [PreferencePair(0, 2, 1.0), PreferencePair(6, 3, 1.0)]), current, reference


def run(parts: list[list[int]], cfg: AlgorithmConfig) -> tuple[float, list[list[float]], dict[str, float]]:
    batch, current, reference = random_step()
    leaves = [c.clone().requires_grad_() for c in current]
    total, stats = 0.0, []
    for part in parts:
        joined = torch.cat([leaves[i] for i in part])
        entropy = -joined.detach()
        result = micro_loss(batch, part, joined, entropy, torch.cat([reference[i] for i in part]), 0.05, cfg, 8, 0.0)
        result.loss.backward()
        total += result.loss.item()
        stats.append(result.stats)
    metrics = finalise(
        reduce_stats(merge_stats(stats), CPU, 1),
        cfg,
        cfg.weights(batch.step),
        batch.grpo_samples,
        batch.grpo_tokens,
        len(batch.pairs),
        8,
        0.05,
    )
    return total, [leaf.grad.tolist() if leaf.grad is not None else [0.0] * len(leaf) for leaf in leaves], metrics


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
def test_cutting_the_step_changes_nothing(aggregation: Aggregation, settings: dict[str, Any]) -> None:
    cfg = AlgorithmConfig(grpo=GrpoConfig(aggregation=aggregation, **settings))
    whole = run([list(range(9))], cfg)
    cut = run([[6, 3], [8], [1, 0, 2, 7], [5, 4]], cfg)
    assert cut[0] == pytest.approx(whole[0], rel=1e-5)
    for a, b in zip(cut[1], whole[1], strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-7)
    assert cut[2] == pytest.approx(whole[2], rel=1e-5, abs=1e-7)
    assert cut[2]["loss/total"] == pytest.approx(whole[0], rel=1e-5)


@pytest.mark.parametrize("off", ["grpo", "mpo"])
def test_a_term_of_weight_zero_leaves_no_trace(off: str) -> None:
    cfg = AlgorithmConfig()
    getattr(cfg, off).weight = 0.0
    batch, current, reference = random_step()
    if off == "mpo":  # as the buffer makes it then
        batch.pairs.clear()
    logprobs = torch.cat(current).requires_grad_()
    stats = micro_loss(
        batch, list(range(9)), logprobs, torch.zeros_like(logprobs), torch.cat(reference), 0.0, cfg, 8, 0.0
    ).stats
    assert not [name for name in stats if name.startswith(off)]


@pytest.mark.parametrize(("step", "trained", "other"), [(2, "mpo", "grpo"), (3, "grpo", "mpo")])
def test_each_stage_trains_its_own_term(step: int, trained: str, other: str) -> None:
    batch, current, reference = random_step()
    batch.step = step
    logprobs = torch.cat(current).requires_grad_()
    arguments = (batch, list(range(9)), logprobs, torch.zeros_like(logprobs), torch.cat(reference), 0.05)
    staged = micro_loss(*arguments, AlgorithmConfig(stage=Stage.mpo_then_grpo, mpo_steps=2), 8, 0.0)
    assert not [name for name in staged.stats if name.startswith(other)]
    alone = micro_loss(*arguments, AlgorithmConfig(stage=Stage(trained)), 8, 0.0)
    assert staged.loss.item() == alone.loss.item() != 0


def test_fixed_aggregation_divides_by_the_length_limit() -> None:
    batch, current, _ = random_step()
    logprobs = torch.cat(current)
    losses = [
        micro_loss(
            batch,
            list(range(9)),
            logprobs,
            torch.zeros_like(logprobs),
            None,
            0.0,
            AlgorithmConfig(stage=Stage.grpo, grpo=GrpoConfig(aggregation=aggregation)),
            limit,
            0.0,
        ).loss.item()
        for aggregation, limit in ((Aggregation.fixed, 8), (Aggregation.fixed, 16), (Aggregation.token, 8))
    ]
    assert losses[1] == pytest.approx(losses[0] / 2, rel=1e-6)
    assert losses[0] * batch.grpo_samples * 8 == pytest.approx(losses[2] * batch.grpo_tokens, rel=1e-6)


def test_a_micro_batch_without_any_term_has_a_zero_loss_with_a_graph() -> None:
    batch = step_of([item([-1.0], 1.0, 0.0), item([-1.0], 1.0)], [])
    logprobs = torch.tensor([-1.0], requires_grad=True)
    result = micro_loss(batch, [0], logprobs, torch.zeros(1), None, 0.0, AlgorithmConfig(), 8, 0.0)
    result.loss.backward()
    assert (result.loss.item(), logprobs.grad.tolist()) == (0, [0])
    assert float(result.stats["tokens"]) == 1


def test_pair_sums_by_hand() -> None:
    batch, _, reference = random_step()
    want = 0.0
    for i in (0, 2, 6, 3):
        want += 0.1 * (float(batch.items[i].sample.logprobs.astype(np.float64).sum()) - float(reference[i].sum()))
    got = [pair_sums(batch, part, torch.cat([reference[i] for i in part]), 0.1) for part in ([2, 5, 0], [3, 6], [1, 4])]
    assert sum(got) == pytest.approx(want, rel=1e-5)
    assert got[2] == 0
    alone = 0.1 * sum(float(batch.items[i].sample.logprobs.sum()) for i in (0, 2))
    assert pair_sums(batch, [0, 2], None, 0.1) == pytest.approx(alone, rel=1e-5)  # without a reference h = log π_θ


def test_pairs_in() -> None:
    batch = random_step()[0]
    assert pairs_in(batch, [2, 0, 1]) == batch.pairs[:1]
    assert pairs_in(batch, [1, 4]) == []
    assert pairs_in(batch, list(range(9))) == batch.pairs


def test_reduce_on_one_rank() -> None:
    stats = {"tokens": torch.tensor(3.0), "fresh_gap_max": torch.tensor(0.5), "grpo_ratio_max": torch.tensor(-1.0)}
    assert reduce_stats(stats, CPU, 1) == {"tokens": 3.0, "fresh_gap_max": 0.5, "grpo_ratio_max": -1.0}
    assert reduce_stats({}, CPU, 1) == {}


def test_reduce_refuses_a_statistic_that_it_would_lose() -> None:
    with pytest.raises(SkyrlError, match="grpo_new"):
        reduce_stats({"grpo_new": torch.tensor(1.0)}, CPU, 1)


def test_nan_is_not_hidden() -> None:
    batch = step_of([item([math.nan, -1.0], 1.0)], [])
    result = micro_loss(batch, [0], torch.tensor([-1.0, -1.0]), torch.zeros(2), None, 0.0, AlgorithmConfig(), 8, 0.0)
    assert math.isnan(result.loss.item())
    assert math.isnan(reduce_stats(result.stats, CPU, 1)["grpo_loss"])
