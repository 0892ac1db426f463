"""The hybrid objective and the metrics of a step, by hand."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from learner_views import make_view

from skyrl.objective.grpo import Grpo
from skyrl.objective.hybrid import (
    COVERED,
    active_terms,
    check_weights,
    hybrid_loss,
    run_terms,
    step_metrics,
    step_stats,
)
from skyrl.objective.mpo import Mpo
from skyrl.objective.term import Counts, Term
from skyrl.records import SkyrlError, TrainBatch
from skyrl.settings import Aggregation, AlgorithmConfig, GrpoConfig, Mismatch, MpoConfig, Stage

COVER = {"samples": 7.0, "tokens": 30.0, "grpo_tokens": 10.0, "pairs": 2.0, "places": 60.0}
GAPS = {"learner/logprob_gap_fresh": 0.25, "learner/logprob_gap_fresh_mean": 0.5}
STEP = {"learner/entropy": 60.0} | GAPS
GRPO_SUMS = {
    "loss/grpo": 4.0,
    "grpo/clip_fraction": 1.0,
    "grpo/ratio_mean": 11.0,
    "grpo/ratio_max": 1.5,
    "grpo/kl_behaviour": 0.2,
}
MPO_SUMS = {
    "loss/mpo": 6.0,
    "loss/preference": 1.0,
    "loss/quality": 2.0,
    "loss/generation": 3.0,
    "mpo/margin": 0.4,
    "mpo/accuracy": 1.0,
    "mpo/chosen_reward": 0.6,
    "mpo/rejected_reward": 0.2,
    "mpo/kl_reference": 2.0,
}
EVERY_STEP = {"learner/entropy": 2.0, "learner/logprob_gap_fresh": 0.25, "learner/logprob_gap_fresh_mean": 0.025}
GRPO_METRICS = {"grpo/clip_fraction": 0.1, "grpo/ratio_mean": 1.1, "grpo/ratio_max": 1.5, "grpo/kl_behaviour": 0.02}
MPO_METRICS = {
    "loss/mpo": 3.0,
    "loss/preference": 0.5,
    "loss/quality": 1.0,
    "loss/generation": 1.5,
    "mpo/margin": 0.2,
    "mpo/accuracy": 0.5,
    "mpo/chosen_reward": 0.3,
    "mpo/rejected_reward": 0.1,
    "mpo/kl_reference": 0.2,
}


def counts(**changes: int) -> Counts:
    """Five GRPO samples with ten tokens, two pairs with ten, seven samples in all."""
    known = {"samples": 7, "tokens": 30, "on_policy_tokens": 20, "grpo_samples": 5, "grpo_tokens": 10}
    return Counts(**(known | {"grpo_max_tokens": 40, "pairs": 2, "pair_tokens": 10, "places": 60} | changes))


def grpo(**settings: object) -> tuple[Term, float]:
    return Grpo(GrpoConfig(**settings)), 1.0  # type: ignore[arg-type]


MPO = (Mpo(MpoConfig()), 0.5)


def test_the_loss_weighs_the_terms_and_divides_by_the_whole_step() -> None:
    logprobs = torch.tensor([[-1.0, -2.0], [-3.0, -1.0]], requires_grad=True)
    view = make_view(
        logprobs,
        reference=logprobs.detach(),
        advantages=torch.tensor([1.0, -3.0]),
        chosen=torch.tensor([0]),
        rejected=torch.tensor([1]),
        counts=counts(),
    )
    # GRPO: −1 + 3 over 5 samples. MPO at π_0: 0.8 log 2 + 0.2 · 2 log 2 + 3/2 over 2 pairs.
    parts = (2 / 5, (0.8 * 0.693147 + 0.2 * 1.386294 + 1.5) / 2)
    for active, want in (([grpo()], parts[0]), ([MPO], 0.5 * parts[1]), ([grpo(), MPO], parts[0] + 0.5 * parts[1])):
        loss, stats = hybrid_loss(view, active)
        assert loss.item() == pytest.approx(want, rel=1e-5)
        assert stats.keys() == {stat.name for stat in step_stats(active)}
        assert all(value.dtype is torch.float64 and not value.requires_grad for value in stats.values())


def test_metrics_are_divided_by_the_whole_step() -> None:
    sums = COVER | STEP | GRPO_SUMS | MPO_SUMS | {"grpo/kl_reference": 0.3}
    assert step_metrics([grpo(kl_weight=0.1), MPO], sums, counts()) == pytest.approx(
        EVERY_STEP
        | GRPO_METRICS
        | MPO_METRICS
        | {"loss/total": 0.8 + 0.5 * 3.0, "loss/grpo": 0.8, "grpo/kl_reference": 0.03}
    )


@pytest.mark.parametrize(("aggregation", "loss"), [("sample", 0.8), ("token", 0.4), ("fixed", 0.1)])
def test_grpo_loss_is_divided_as_it_was_aggregated(aggregation: str, loss: float) -> None:
    term = Grpo(GrpoConfig(aggregation=Aggregation(aggregation)))
    metrics = step_metrics([(term, 3.0)], COVER | STEP | GRPO_SUMS, counts())
    assert (metrics["loss/grpo"], metrics["loss/total"]) == pytest.approx((loss, 3 * loss))


@pytest.mark.parametrize(
    ("settings", "metrics"),
    [
        ({"dual_clip": 3.0}, ["grpo/dual_clip_fraction"]),
        ({"mismatch": Mismatch.token_mask}, ["grpo/masked_fraction", "grpo/mismatch_mean"]),
        ({"mismatch": Mismatch.sequence_mask}, ["grpo/masked_fraction", "grpo/mismatch_mean"]),
        ({"mismatch": Mismatch.token_truncate}, ["grpo/truncated_fraction", "grpo/mismatch_mean"]),
        ({"kl_weight": 0.1}, ["grpo/kl_reference"]),
    ],
)
def test_optional_metrics(settings: dict[str, object], metrics: list[str]) -> None:
    plain = step_metrics([grpo()], COVER | STEP | GRPO_SUMS, counts())
    more = step_metrics([grpo(**settings)], COVER | STEP | GRPO_SUMS | dict.fromkeys(metrics, 4.0), counts())
    assert not set(metrics) & plain.keys() and more == plain | dict.fromkeys(metrics, 0.4)


def test_what_a_step_has_nothing_of_is_left_out() -> None:
    nothing = counts(grpo_samples=0, grpo_tokens=0, grpo_max_tokens=0)
    mpo_only = step_metrics([grpo(), MPO], COVER | STEP | GRPO_SUMS | MPO_SUMS | {"grpo_tokens": 0.0}, nothing)
    assert mpo_only == pytest.approx(EVERY_STEP | MPO_METRICS | {"loss/total": 1.5})
    nothing = counts(pairs=0, pair_tokens=0, on_policy_tokens=0)
    grpo_only = step_metrics([grpo(), MPO], COVER | STEP | GRPO_SUMS | MPO_SUMS | {"pairs": 0.0}, nothing)
    assert grpo_only == pytest.approx(GRPO_METRICS | {"loss/grpo": 0.8, "loss/total": 0.8, "learner/entropy": 2.0})
    assert step_metrics([], COVER | STEP, counts()) == EVERY_STEP


def test_terms_of_a_run_and_of_a_step() -> None:
    cfg = AlgorithmConfig(stage=Stage.mpo_then_grpo, mpo_steps=2)
    assert [term.name for term in run_terms(cfg)] == ["grpo", "mpo"]
    assert [term.name for term in run_terms(AlgorithmConfig(stage=Stage.mpo))] == ["mpo"]
    assert [term.name for term in run_terms(AlgorithmConfig(mpo=MpoConfig(weight=0.0)))] == ["grpo"]
    for step, want in ((2, [("mpo", 0.25)]), (3, [("grpo", 1.0)])):
        batch = TrainBatch(step, 0, cfg.weights(step), [], [], 0, 0)
        assert [(term.name, weight) for term, weight in active_terms(run_terms(cfg), batch)] == want


@pytest.mark.parametrize("what", [stat.name for stat in COVERED])
def test_a_lost_micro_batch_or_wrong_counts_are_noticed(what: str) -> None:
    sums = COVER | STEP | GRPO_SUMS | MPO_SUMS
    shown = what.replace("grpo_", "GRPO ")
    with pytest.raises(SkyrlError, match=f"cover {COVER[what]:g} {shown}; the step has {COVER[what] + 1:g}"):
        step_metrics([grpo(), MPO], sums, counts(**{what: int(COVER[what]) + 1}))


@pytest.mark.parametrize(
    ("minimised", "mpo", "problem"),
    [
        (0.8 + 0.5 * 1.5, 1.5, None),
        (0.8 + 0.5 * 1.5 + 5e-5, 1.5, None),  # rounding
        (0.8 + 1.5, 1.5, r"the loss .* is 2.3, but 1 · 0.8 \(loss/grpo\) \+ 0.5 · 1.5 \(loss/mpo\) = 1.55"),
        (0.8 + 0.5 * 0.7, 0.7, r"loss/mpo .* is 0.7, but 0.8 · 0.5 \(loss/preference\) \+ 0.2 · 1 .*= 1.5"),
        (0.8, 0.0, "loss_weight: .*a weight or a denominator has no effect"),
    ],
)
def test_a_weight_without_effect_is_refused(minimised: float, mpo: float, problem: str | None) -> None:
    metrics = GRPO_METRICS | MPO_METRICS | {"loss/grpo": 0.8, "loss/mpo": mpo, "loss/generation": 0.9}
    with nullcontext() if problem is None else pytest.raises(SkyrlError, match=problem):
        check_weights([grpo(), MPO], {"minimised": minimised}, metrics, progress=0.0)
