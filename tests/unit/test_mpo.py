import math

import pytest
import torch

from skyrl.algorithms.mpo import RunningDelta, implicit_reward_sum, mpo_loss
from skyrl.algorithms.objective import combine, finalise, merge_stats
from skyrl.config import Aggregation, AlgorithmConfig, GrpoConfig, MpoConfig
from skyrl.types import SkyrlError

NO_NLL = MpoConfig(generation_weight=0.0)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def run(h_chosen, h_rejected, delta, cfg=NO_NLL):
    chosen, rejected = tensor(h_chosen - 7.0), tensor(h_rejected - 9.0)
    loss, sums = mpo_loss(chosen, rejected, tensor(-7.0), tensor(-9.0), tensor(4.0), delta, cfg, 1)
    return loss.item(), {name: value.item() for name, value in sums.items()}


@pytest.mark.parametrize(
    ("h", "delta", "dpo", "bco", "total"),
    [
        ((0.0, 0.0), 0.0, 0.693147, 1.386294, 0.831777),
        ((2.0, -1.0), 0.0, 0.554355, 1.242536, 0.691991),
        ((2.0, -1.0), 0.05, 0.554355, 1.241914, 0.691867),
    ],
)
def test_known_values(h, delta, dpo, bco, total):
    loss, sums = run(*h, delta)
    assert sums["mpo_preference"] == pytest.approx(dpo, abs=1e-6)
    assert sums["mpo_quality"] == pytest.approx(bco, abs=1e-6)
    assert loss == pytest.approx(total, abs=1e-6)


def test_generation_is_the_mean_negative_log_likelihood_of_the_chosen():
    loss, sums = run(0.0, 0.0, 0.0, MpoConfig())
    assert sums["mpo_generation"] == pytest.approx(7.0 / 4)
    assert loss == pytest.approx(0.831777 + 7.0 / 4, abs=1e-6)


def test_preference_gradient_at_the_reference_is_half_beta():
    chosen, rejected = tensor(-3.0).requires_grad_(), tensor(-4.0).requires_grad_()
    cfg = MpoConfig(preference_weight=1.0, quality_weight=0.0, generation_weight=0.0)
    mpo_loss(chosen, rejected, tensor(-3.0), tensor(-4.0), tensor(2.0), 0.0, cfg, 1)[0].backward()
    assert chosen.grad.item() == pytest.approx(-cfg.beta / 2)
    assert rejected.grad.item() == pytest.approx(cfg.beta / 2)


def test_a_shared_shift_of_h_changes_only_the_quality_term():
    _, sums = run(2.0, -1.0, 0.0)
    _, shifted = run(5.0, 2.0, 0.0)
    assert shifted["mpo_preference"] == pytest.approx(sums["mpo_preference"], abs=1e-12)
    assert abs(shifted["mpo_quality"] - sums["mpo_quality"]) > 0.01
    _, with_delta = run(5.0, 2.0, 0.3)  # β · 3: δ takes the shift up
    assert with_delta["mpo_quality"] == pytest.approx(sums["mpo_quality"], abs=1e-12)


def random_pairs(n=4):
    torch.manual_seed(1)
    return [-torch.rand(n, dtype=torch.float64) * 20 for _ in range(4)] + [torch.arange(1, n + 1)]


def test_loss_and_sums_agree_with_an_independent_reference():
    cfg = MpoConfig(preference_weight=0.7, quality_weight=0.4, generation_weight=0.9, beta=0.3)
    data = random_pairs()
    delta = -0.2
    loss, sums = mpo_loss(*data, delta, cfg, 6)
    total, correct, margin = 0.0, 0, 0.0
    for c, r, ref_c, ref_r, length in zip(*(x.tolist() for x in data), strict=True):
        bc, br = cfg.beta * (c - ref_c), cfg.beta * (r - ref_r)
        total += 0.7 * -math.log(1 / (1 + math.exp(br - bc)))
        total += 0.4 * (-math.log(1 / (1 + math.exp(delta - bc))) - math.log(1 / (1 + math.exp(br - delta))))
        total += 0.9 * -c / length
        correct += bc > br
        margin += bc - br
    assert loss.item() == pytest.approx(total / 6, rel=1e-12)
    assert sums["mpo_loss"].item() == pytest.approx(total, rel=1e-12)
    assert sums["mpo_margin"].item() == pytest.approx(margin)
    assert sums["mpo_correct"].item() == correct and sums["mpo_pairs"].item() == 4


def test_gradient_agrees_with_finite_differences_and_skips_the_reference():
    chosen, rejected, ref_chosen, ref_rejected, lengths = random_pairs()
    ref_chosen.requires_grad_()

    def loss(c, r):
        return mpo_loss(c, r, ref_chosen.detach(), ref_rejected, lengths, 0.1, MpoConfig(), 4)[0]

    leaves = chosen.clone().requires_grad_(), rejected.clone().requires_grad_()
    assert torch.autograd.gradcheck(loss, leaves)
    mpo_loss(*leaves, ref_chosen, ref_rejected, lengths, 0.1, MpoConfig(), 4)[0].backward()
    assert ref_chosen.grad is None


def test_micro_batches_change_nothing():
    data = random_pairs()
    whole, sums = mpo_loss(*data, 0.1, MpoConfig(), 4)
    parts = [mpo_loss(*(x[rows] for x in data), 0.1, MpoConfig(), 4) for rows in ([2], [0, 3], [1])]
    assert sum(part[0].item() for part in parts) == pytest.approx(whole.item(), rel=1e-12)
    merged = merge_stats(part[1] for part in parts)
    assert {k: v.item() for k, v in merged.items()} == pytest.approx({k: v.item() for k, v in sums.items()})


def test_extreme_log_probabilities_stay_finite():
    leaf = torch.tensor([-1e5, 0.0], requires_grad=True)
    loss, _ = mpo_loss(leaf, leaf.flip(0), torch.zeros(2), torch.zeros(2), torch.ones(2), 0.0, MpoConfig(), 2)
    loss.backward()
    assert math.isfinite(loss.item()) and torch.isfinite(leaf.grad).all()


def test_no_pairs_give_loss_zero():
    empty = torch.zeros(0, requires_grad=True)
    loss, sums = mpo_loss(empty, empty, empty, empty, empty, 0.0, MpoConfig(), 0)
    loss.backward()
    assert loss.item() == 0 and sums["mpo_pairs"].item() == 0


def test_refuses_shapes_and_denominator():
    one, two = torch.zeros(1), torch.zeros(2)
    with pytest.raises(ValueError, match="four times"):
        mpo_loss(one, two, one, one, one, 0.0, MpoConfig(), 1)
    with pytest.raises(ValueError, match="chosen_lengths"):
        mpo_loss(one, one, one, one, two, 0.0, MpoConfig(), 1)
    with pytest.raises(ValueError, match="denominator is -2"):
        mpo_loss(one, one, one, one, one, 0.0, MpoConfig(), -2)


def test_delta_is_the_cumulative_mean_and_survives_a_checkpoint():
    delta = RunningDelta()
    assert delta.update(0.2) == pytest.approx(0.2)
    assert delta.update(0.4) == pytest.approx(0.3)
    resumed = RunningDelta()
    resumed.load_state_dict(delta.state_dict())
    assert resumed.update(-0.3) == delta.update(-0.3) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="nan"):
        delta.update(math.nan)


def test_delta_of_the_first_step_is_the_mean_over_all_ranks():
    # h = (2, −1) with β 0.1: mean of 0.2 and −0.1.
    chosen, rejected = tensor(2.0, 2.0), tensor(-1.0, -1.0)
    zero = tensor(0.0)
    parts = [implicit_reward_sum(chosen[i : i + 1], rejected[i : i + 1], zero, zero, 0.1) for i in range(2)]
    assert RunningDelta().update(sum(parts).item() / 4) == pytest.approx(0.05)


def test_combine_weighs_the_terms():
    cfg = AlgorithmConfig(grpo=GrpoConfig(weight=0.5), mpo=MpoConfig(weight=0.25))
    a, b = tensor(2.0)[0], tensor(8.0)[0]
    assert combine(a, b, cfg).item() == 3.0
    assert combine(a, None, cfg).item() == 1.0
    assert combine(None, b, cfg).item() == 2.0
    with pytest.raises(ValueError, match="None"):
        combine(None, None, cfg)


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


def test_finalise_divides_by_the_whole_step():
    cfg = AlgorithmConfig(mpo=MpoConfig(weight=0.5))
    metrics = finalise({**GRPO_SUMS, **MPO_SUMS, "grpo_kl_reference": 0.3}, cfg, 5, 10, 2, 0.05)
    assert metrics == pytest.approx(
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
    cfg.grpo.aggregation = Aggregation.token
    assert finalise(GRPO_SUMS, cfg, 5, 10, 0)["loss/grpo"] == pytest.approx(0.4)


def test_finalise_leaves_absent_terms_out():
    cfg = AlgorithmConfig()
    grpo_only = finalise(GRPO_SUMS, cfg, 5, 10, 0)
    assert grpo_only["mpo/pairs"] == 0 and not {"loss/mpo", "mpo/margin", "grpo/kl_reference"} & grpo_only.keys()
    mpo_only = finalise(MPO_SUMS, cfg, 0, 0, 2)
    assert "loss/grpo" not in mpo_only and mpo_only["loss/total"] == pytest.approx(0.75)
    assert finalise({}, cfg, 0, 0, 0) == {"mpo/pairs": 0.0}


def test_finalise_notices_a_lost_micro_batch():
    with pytest.raises(SkyrlError, match="cover 10 GRPO tokens; the step has 12"):
        finalise(GRPO_SUMS, AlgorithmConfig(), 5, 12, 0)
    with pytest.raises(SkyrlError, match="cover 2 pairs; the step has 3"):
        finalise(MPO_SUMS, AlgorithmConfig(), 0, 0, 3)


def test_maxima_merge_as_maxima():
    merged = merge_stats(
        [{"a": tensor(1.0), "b_max": tensor(3.0)}, {"a": tensor(2.0), "b_max": tensor(2.0)}, {"c": tensor(1.0)}]
    )
    assert {name: value.item() for name, value in merged.items()} == {"a": 3.0, "b_max": 3.0, "c": 1.0}
