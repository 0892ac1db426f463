"""The hybrid objective and the metrics of a step, by hand."""

from __future__ import annotations

import pytest
import torch

from skyrl.objective.hybrid import combine, finalise, merge_stats
from skyrl.records import SkyrlError
from skyrl.settings import Aggregation, AlgorithmConfig, Stage

GRPO_SUMS = {
    "grpo_loss": 4.0,
    "grpo_tokens": 10.0,
    "grpo_clipped": 1.0,
    "grpo_ratio": 11.0,
    "grpo_ratio_max": 1.5,
    "grpo_kl_behaviour": 0.2,
}
MPO_SUMS = {
    "mpo_loss": 6.0,
    "mpo_pairs": 2.0,
    "mpo_preference": 1.0,
    "mpo_quality": 2.0,
    "mpo_generation": 3.0,
    "mpo_margin": 0.4,
    "mpo_correct": 1.0,
    "mpo_chosen_reward": 0.6,
    "mpo_rejected_reward": 0.2,
}
BOTH = (1.0, 0.5)


def test_combine_weighs_the_terms() -> None:
    a, b = torch.tensor(2.0), torch.tensor(8.0)
    assert combine(a, b, (0.5, 0.25)).item() == 3.0
    assert combine(a, None, (0.5, 0.25)).item() == 1.0
    assert combine(None, b, (0.5, 0.25)).item() == 2.0
    with pytest.raises(ValueError, match="None"):
        combine(None, None, (0.5, 0.25))


def test_finalise_divides_by_the_whole_step() -> None:
    sums = {**GRPO_SUMS, **MPO_SUMS, "grpo_kl_reference": 0.3}
    assert finalise(sums, AlgorithmConfig(), BOTH, 5, 10, 2, 8, 0.05) == pytest.approx(
        {
            "loss/total": 0.8 + 0.5 * 3.0,
            "loss/grpo": 0.8,
            "loss/mpo": 3.0,
            "loss/preference": 0.5,
            "loss/quality": 1.0,
            "loss/generation": 1.5,
            "grpo/clip_fraction": 0.1,
            "grpo/ratio_mean": 1.1,
            "grpo/ratio_max": 1.5,
            "grpo/kl_behaviour": 0.02,
            "grpo/kl_reference": 0.03,
            "mpo/margin": 0.2,
            "mpo/accuracy": 0.5,
            "mpo/chosen_reward": 0.3,
            "mpo/rejected_reward": 0.1,
            "mpo/pairs": 2.0,
            "mpo/delta": 0.05,
        }
    )


@pytest.mark.parametrize(("aggregation", "loss"), [("sample", 0.8), ("token", 0.4), ("fixed", 0.1)])
def test_grpo_loss_is_divided_as_it_was_aggregated(aggregation: str, loss: float) -> None:
    cfg = AlgorithmConfig()
    cfg.grpo.aggregation = Aggregation(aggregation)
    metrics = finalise(GRPO_SUMS, cfg, (3.0, 0.5), 5, 10, 0, 8)
    assert (metrics["loss/grpo"], metrics["loss/total"]) == pytest.approx((loss, 3 * loss))


@pytest.mark.parametrize(
    ("name", "metric"),
    [
        ("grpo_dual_clipped", "grpo/dual_clip_fraction"),
        ("grpo_masked", "grpo/masked_fraction"),
        ("grpo_truncated", "grpo/truncated_fraction"),
        ("grpo_mismatch", "grpo/mismatch_mean"),
    ],
)
def test_optional_metrics(name: str, metric: str) -> None:
    plain = finalise(GRPO_SUMS, AlgorithmConfig(), BOTH, 5, 10, 0, 8)
    more = finalise({**GRPO_SUMS, name: 4.0}, AlgorithmConfig(), BOTH, 5, 10, 0, 8)
    assert metric not in plain and more == plain | {metric: 0.4}


def test_finalise_leaves_absent_terms_out() -> None:
    cfg = AlgorithmConfig()
    grpo_only = finalise(GRPO_SUMS, cfg, BOTH, 5, 10, 0, 8)
    assert grpo_only["mpo/pairs"] == 0 and not {"loss/mpo", "mpo/margin", "grpo/kl_reference"} & grpo_only.keys()
    mpo_only = finalise(MPO_SUMS, cfg, (1.0, 0.25), 0, 0, 2, 8)
    assert "loss/grpo" not in mpo_only and mpo_only["loss/total"] == pytest.approx(0.75)
    assert finalise({}, cfg, BOTH, 0, 0, 0, 8) == {"mpo/pairs": 0.0}


def test_a_term_of_weight_zero_is_absent() -> None:
    """In a stage that does not train it there are samples or pairs in the batch, but no statistics of them."""
    cfg = AlgorithmConfig(stage=Stage.mpo_then_grpo, mpo_steps=2)
    first = finalise(MPO_SUMS, cfg, cfg.weights(2), 5, 10, 2, 8)
    assert first["loss/total"] == pytest.approx(0.25 * 3.0) and "loss/grpo" not in first
    second = finalise(GRPO_SUMS, cfg, cfg.weights(3), 5, 10, 2, 8)
    assert second["loss/total"] == pytest.approx(0.8) and "loss/mpo" not in second
    assert second["mpo/pairs"] == 2


def test_finalise_notices_a_lost_micro_batch() -> None:
    with pytest.raises(SkyrlError, match="cover 10 GRPO tokens; the step has 12"):
        finalise(GRPO_SUMS, AlgorithmConfig(), BOTH, 5, 12, 0, 8)
    with pytest.raises(SkyrlError, match="cover 2 pairs; the step has 3"):
        finalise(MPO_SUMS, AlgorithmConfig(), BOTH, 0, 0, 3, 8)


def test_maxima_merge_as_maxima() -> None:
    parts = [{"a": 1.0, "b_max": 3.0}, {"a": 2.0, "b_max": 2.0}, {"c": 1.0}]
    merged = merge_stats({name: torch.tensor(value) for name, value in part.items()} for part in parts)
    assert {name: value.item() for name, value in merged.items()} == {"a": 3.0, "b_max": 3.0, "c": 1.0}
