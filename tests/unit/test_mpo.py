"""The MPO term and δ against numbers worked out by hand and plain float64 formulas."""

import math

import pytest
import torch
from learner_views import make_view, merged, mpo_loss

from skyrl.objective.mpo import Mpo, RunningDelta, compares_with_reference, loss_weights, uses_delta
from skyrl.settings import DeltaKind, MpoConfig

NO_NLL = (0.8, 0.2, 0.0)
DEFAULT = (0.8, 0.2, 1.0)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def run(h_chosen, h_rejected, delta, weights=NO_NLL, cfg=MpoConfig()):  # noqa: B008
    chosen, rejected = tensor(h_chosen - 7.0), tensor(h_rejected - 9.0)
    loss, sums = mpo_loss(chosen, rejected, tensor(-7.0), tensor(-9.0), tensor(4.0), delta, cfg, 1, weights)
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
    assert sums["loss/preference"] == pytest.approx(dpo, abs=1e-6)
    assert sums["loss/quality"] == pytest.approx(bco, abs=1e-6)
    assert loss == pytest.approx(total, abs=1e-6)


def test_generation_is_the_mean_negative_log_likelihood_of_the_chosen():
    loss, sums = run(0.0, 0.0, 0.0, DEFAULT)
    assert sums["loss/generation"] == pytest.approx(7.0 / 4)
    assert loss == pytest.approx(0.831777 + 7.0 / 4, abs=1e-6)


def test_preference_gradient_at_the_reference_is_half_beta():
    chosen, rejected = tensor(-3.0).requires_grad_(), tensor(-4.0).requires_grad_()
    cfg = MpoConfig()
    mpo_loss(chosen, rejected, tensor(-3.0), tensor(-4.0), tensor(2.0), 0.0, cfg, 1, (1.0, 0.0, 0.0))[0].backward()
    assert chosen.grad.item() == pytest.approx(-cfg.beta / 2)
    assert rejected.grad.item() == pytest.approx(cfg.beta / 2)


def test_a_shared_shift_of_h_changes_only_the_quality_term():
    _, sums = run(2.0, -1.0, 0.0)
    _, shifted = run(5.0, 2.0, 0.0)
    assert shifted["loss/preference"] == pytest.approx(sums["loss/preference"], abs=1e-12)
    assert abs(shifted["loss/quality"] - sums["loss/quality"]) > 0.01
    _, with_delta = run(5.0, 2.0, 0.3)  # β · 3: δ takes the shift up
    assert with_delta["loss/quality"] == pytest.approx(sums["loss/quality"], abs=1e-12)


def random_pairs(n=4):
    torch.manual_seed(1)
    return [-torch.rand(n, dtype=torch.float64) * 20 for _ in range(4)] + [torch.arange(1, n + 1)]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


CASES = [MpoConfig(beta=0.3), MpoConfig(label_smoothing=0.15), MpoConfig(beta=0.05, reference_free=True)]


@pytest.mark.parametrize("cfg", CASES)
def test_loss_and_sums_agree_with_plain_formulas(cfg):
    data = random_pairs()
    delta, weights = -0.2, (0.7, 0.4, 0.9)
    loss, sums = mpo_loss(*data, delta, cfg, 6, weights)
    total, correct, margin, preference = 0.0, 0, 0.0, 0.0
    for c, r, ref_c, ref_r, length in zip(*(x.tolist() for x in data), strict=True):
        if cfg.reference_free:
            ref_c = ref_r = 0.0
        bc, br = cfg.beta * (c - ref_c), cfg.beta * (r - ref_r)
        eps = cfg.label_smoothing
        dpo = -(1 - eps) * math.log(sigmoid(bc - br)) - eps * math.log(sigmoid(br - bc))
        bco = -math.log(sigmoid(bc - delta)) - math.log(sigmoid(delta - br))
        total += 0.7 * dpo + 0.4 * bco + 0.9 * -c / length
        preference += dpo
        correct += bc > br
        margin += bc - br
    assert loss.item() == pytest.approx(total / 6, rel=1e-12)
    assert sums["loss/mpo"].item() == pytest.approx(total, rel=1e-12)
    assert sums["loss/preference"].item() == pytest.approx(preference, rel=1e-12)
    assert sums["mpo/margin"].item() == pytest.approx(margin)
    assert sums["mpo/accuracy"].item() == correct and sums["pairs"].item() == 4


@pytest.mark.parametrize("cfg", CASES)
def test_gradient_agrees_with_finite_differences_and_skips_the_reference(cfg):
    chosen, rejected, ref_chosen, ref_rejected, lengths = random_pairs()
    ref_chosen.requires_grad_()

    def loss(c, r):
        return mpo_loss(c, r, ref_chosen.detach(), ref_rejected, lengths, 0.1, cfg, 4, DEFAULT)[0]

    leaves = chosen.clone().requires_grad_(), rejected.clone().requires_grad_()
    assert torch.autograd.gradcheck(loss, leaves)
    mpo_loss(*leaves, ref_chosen, ref_rejected, lengths, 0.1, cfg, 4, DEFAULT)[0].backward()
    assert ref_chosen.grad is None


def test_smoothed_preference_is_least_where_the_labels_are_as_unsure():
    """−(1−ε) log σ(m) − ε log σ(−m) has its minimum at σ(m) = 1 − ε; without smoothing it falls for ever."""
    best = math.log(0.9 / 0.1) / 0.1  # m = β h_c with β 0.1
    for h, slope in ((best - 1, -1), (best, 0), (best + 1, 1)):
        chosen = tensor(h).requires_grad_()
        cfg = MpoConfig(label_smoothing=0.1)
        zero = tensor(0.0)
        mpo_loss(chosen, zero, zero, zero, tensor(1.0), 0.0, cfg, 1, (1.0, 0.0, 0.0))[0].backward()
        assert (chosen.grad.item() > 1e-9) - (chosen.grad.item() < -1e-9) == slope
    # By hand at θ = π_0: −log ½ whatever ε.
    assert run(0.0, 0.0, 0.0, cfg=MpoConfig(label_smoothing=0.3))[1]["loss/preference"] == pytest.approx(math.log(2))


def test_reference_free_reads_no_reference():
    chosen, rejected, ref_chosen, ref_rejected, lengths = random_pairs()
    cfg = MpoConfig(reference_free=True)
    want = mpo_loss(chosen, rejected, ref_chosen * 0, ref_rejected * 0, lengths, 0.1, MpoConfig(), 4, DEFAULT)
    for references in ((None, None), (ref_chosen, ref_rejected * math.nan)):
        got = mpo_loss(chosen, rejected, *references, lengths, 0.1, cfg, 4, DEFAULT)
        assert got[0].item() == want[0].item()
        assert got[1]["mpo/margin"].item() == want[1]["mpo/margin"].item()
    with pytest.raises(ValueError, match="reference is None"):
        mpo_loss(chosen, rejected, None, None, lengths, 0.1, MpoConfig(), 4, DEFAULT)


def test_generation_alone_needs_no_reference():
    chosen, rejected, _, _, lengths = random_pairs()
    cfg = MpoConfig(preference_weight=0.0, quality_weight=0.0, generation_weight=2.0)
    loss, _ = mpo_loss(chosen, rejected, None, None, lengths, 0.0, cfg, 4, loss_weights(cfg, 0.0))
    assert loss.item() == pytest.approx(2.0 * (-chosen / lengths).mean().item(), rel=1e-12)


@pytest.mark.parametrize(
    ("changes", "compares", "delta"),
    [
        ({}, True, True),
        ({"reference_free": True}, False, True),
        ({"preference_weight": 0.0, "quality_weight": 0.0}, False, False),
        ({"preference_weight": 0.0, "quality_weight": 0.0, "quality_weight_end": 0.1}, True, True),
        ({"preference_weight": 0.0, "quality_weight": 0.0, "preference_weight_end": 0.1}, True, False),
        ({"quality_weight": 0.0, "quality_weight_end": 0.0}, True, False),
        ({"preference_weight_end": 0.0, "quality_weight_end": 0.0}, True, True),
    ],
)
def test_what_needs_a_reference_and_delta(changes, compares, delta):
    cfg = MpoConfig(**changes)
    assert (compares_with_reference(cfg), uses_delta(cfg)) == (compares, delta)


@pytest.mark.parametrize(
    ("progress", "want"), [(0.0, (0.8, 0.2, 1.0)), (0.25, (0.8, 0.4, 0.75)), (1.0, (0.8, 1.0, 0.0))]
)
def test_weights_move_linearly(progress, want):
    cfg = MpoConfig(quality_weight_end=1.0, generation_weight_end=0.0)
    assert loss_weights(cfg, progress) == pytest.approx(want)
    with pytest.raises(ValueError, match=r"progress is 1\.5"):
        loss_weights(cfg, 1.5)


def test_micro_batches_change_nothing():
    data = random_pairs()
    whole, sums = mpo_loss(*data, 0.1, MpoConfig(), 4, DEFAULT)
    parts = [mpo_loss(*(x[rows] for x in data), 0.1, MpoConfig(), 4, DEFAULT) for rows in ([2], [0, 3], [1])]
    assert sum(part[0].item() for part in parts) == pytest.approx(whole.item(), rel=1e-12)
    both = merged([part[1] for part in parts], [(Mpo(MpoConfig()), 1.0)])
    assert both == pytest.approx({k: v.item() for k, v in sums.items()})


def test_extreme_log_probabilities_stay_finite():
    leaf = torch.tensor([-1e5, 0.0], requires_grad=True)
    loss, _ = mpo_loss(leaf, leaf.flip(0), torch.zeros(2), torch.zeros(2), torch.ones(2), 0.0, MpoConfig(), 2, DEFAULT)
    loss.backward()
    assert math.isfinite(loss.item()) and torch.isfinite(leaf.grad).all()


def test_no_pairs_give_loss_zero():
    empty = torch.zeros(0, requires_grad=True)
    loss, sums = mpo_loss(empty, empty, empty, empty, empty, 0.0, MpoConfig(), 0, DEFAULT)
    loss.backward()
    assert loss.item() == 0 and sums["pairs"].item() == 0


def test_masked_tokens_are_as_if_they_were_not_there():
    """In the sums, |y_c| and the KL: the middle token of the chosen answer is a tool's, and forbidden to the policy. A
    rejected answer without any token left has h = 0."""
    logprobs = torch.tensor([[-1.0, -math.inf, -2.0], [-3.0, -4.0, math.nan]], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([[-1.5, math.nan, -2.5], [-2.0, -4.5, 0.0]], dtype=torch.float64)
    mask = torch.tensor([[True, False, True], [True, True, False]])
    pair = {"chosen": torch.tensor([0]), "rejected": torch.tensor([1]), "delta": 0.1}
    loss, stats = Mpo(MpoConfig()).loss(make_view(logprobs, reference=reference, mask=mask, **pair))
    loss.backward()
    want = run(1.0, -0.5, 0.1, DEFAULT)  # the generation term of run() is 6 / 4
    assert loss.item() == pytest.approx(want[0] - 6 / 4 + 3 / 2)
    assert stats["loss/generation"].item() == pytest.approx(3 / 2)
    d = [-0.5, -0.5, 1.0, -0.5]
    assert stats["mpo/kl_reference"].item() == pytest.approx(sum(math.exp(x) - x - 1 for x in d))
    assert torch.isfinite(logprobs.grad).all() and not logprobs.grad[~mask].any() and logprobs.grad[mask].all()
    empty = mask & torch.tensor([[True], [False]])
    loss, stats = Mpo(MpoConfig()).loss(make_view(logprobs, reference=reference, mask=empty, **pair))
    assert stats["mpo/rejected_reward"].item() == 0 and math.isfinite(loss.item())
    loss, stats = Mpo(MpoConfig()).loss(make_view(logprobs, reference=reference, mask=mask & False, **pair))
    assert loss.item() == pytest.approx(run(0.0, 0.0, 0.1)[0])  # no division by an empty answer


def test_delta_is_the_cumulative_mean_and_survives_a_checkpoint():
    delta = RunningDelta(DeltaKind.cumulative, 0.9)
    assert delta.update(0.2) == pytest.approx(0.2)
    assert delta.update(0.4) == pytest.approx(0.3)
    resumed = RunningDelta(DeltaKind.cumulative, 0.9, delta.value, delta.updates)
    assert resumed.update(-0.3) == delta.update(-0.3) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="nan"):
        delta.update(math.nan)


def test_exponential_delta():
    """Means 0.2, 0.4, −0.3 with decay 0.75: 0.2; 0.75 · 0.2 + 0.25 · 0.4 = 0.25; 0.75 · 0.25 − 0.25 · 0.3 = 0.1125."""
    delta = RunningDelta(DeltaKind.exponential, 0.75)
    assert [delta.update(mean) for mean in (0.2, 0.4)] == pytest.approx([0.2, 0.25])
    resumed = RunningDelta(DeltaKind.exponential, 0.75, delta.value, delta.updates)
    assert resumed.update(-0.3) == delta.update(-0.3) == pytest.approx(0.1125)
    assert [RunningDelta(DeltaKind.exponential, 0.0).update(mean) for mean in (5.0, -3.0)] == [5.0, -3.0]
