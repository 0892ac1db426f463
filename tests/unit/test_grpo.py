import math

import pytest
import torch
from learner_views import grpo_loss, merged

from skyrl.objective.grpo import Grpo
from skyrl.objective.kl import kl_k1, kl_k2, kl_k3
from skyrl.objective.term import Counts
from skyrl.settings import Aggregation, GrpoConfig


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def make(seed=0, batch=5, length=6):
    torch.manual_seed(seed)
    lengths = [1 + (3 * row) % length for row in range(batch)]
    mask = torch.arange(length).unsqueeze(0) < torch.tensor(lengths).unsqueeze(1)
    logprobs = -torch.rand(batch, length, dtype=torch.float64) * 2
    behaviour = logprobs + 0.4 * torch.randn(batch, length, dtype=torch.float64)
    reference = logprobs + 0.3 * torch.randn(batch, length, dtype=torch.float64)
    advantages = torch.randn(batch, dtype=torch.float64)
    weights = tensor(1.0, 0.5, 0.0, 1.7, 1.0)[:batch]
    return logprobs, behaviour, advantages, mask, weights, reference


def plain_reference(logprobs, behaviour, advantages, mask, weights, reference, cfg, denominator):
    """Eq. 8 written out token by token in Python floats."""
    total = 0.0
    for i, weight in enumerate(weights.tolist()):
        terms = []
        for t in range(mask.shape[1]):
            if not mask[i, t]:
                continue
            ratio = math.exp(logprobs[i, t] - behaviour[i, t])
            a = advantages[i].item()
            value = -min(ratio * a, min(max(ratio, 1 - cfg.clip_low), 1 + cfg.clip_high) * a)
            d = (reference[i, t] - logprobs[i, t]).item()
            terms.append(value + cfg.kl_weight * (math.exp(d) - d - 1))
        total += weight * (sum(terms) / len(terms) if cfg.aggregation is Aggregation.sample else sum(terms))
    return total / denominator


@pytest.mark.parametrize(
    ("advantage", "ratio", "objective"), [(1, 1.3, 1.2), (1, 0.7, 0.7), (-1, 1.3, -1.3), (-1, 0.7, -0.8), (-1, 5, -5)]
)
def test_clipped_objective_by_hand(advantage, ratio, objective):
    loss, sums = grpo_loss(
        tensor([math.log(ratio)]), tensor([0.0]), tensor(advantage), tensor([1]), tensor(1.0), GrpoConfig(), 1
    )
    assert loss.item() == pytest.approx(-objective)
    assert sums["grpo/clip_fraction"].item() == float(abs(objective) != pytest.approx(ratio))


@pytest.mark.parametrize("aggregation", list(Aggregation))
@pytest.mark.parametrize("kl_weight", [0.0, 0.3])
def test_loss_agrees_with_an_independent_reference(aggregation, kl_weight):
    cfg = GrpoConfig(clip_low=0.1, clip_high=0.3, aggregation=aggregation, kl_weight=kl_weight)
    data = make()
    loss, _ = grpo_loss(*data[:5], cfg, 7, data[5])
    assert loss.item() == pytest.approx(plain_reference(*data, cfg, 7), rel=1e-12)


@pytest.mark.parametrize("aggregation", list(Aggregation))
def test_gradient_agrees_with_finite_differences(aggregation):
    cfg = GrpoConfig(aggregation=aggregation, kl_weight=0.2)
    logprobs, *rest, reference = make()
    assert torch.autograd.gradcheck(
        lambda x: grpo_loss(x, *rest, cfg, 5, reference)[0], logprobs.clone().requires_grad_(), eps=1e-7, atol=1e-6
    )


@pytest.mark.parametrize("aggregation", list(Aggregation))
def test_on_policy_is_the_identity(aggregation):
    logprobs, _, advantages, mask, weights, _ = make()
    weights = torch.ones_like(weights)
    leaf = logprobs.clone().requires_grad_()
    tokens = int(mask.sum())
    cfg = GrpoConfig(aggregation=aggregation)
    denominator = {"sample": 5, "token": tokens, "fixed": 5 * 8}[aggregation.value]
    loss, sums = grpo_loss(leaf, logprobs, advantages, mask, weights, cfg, denominator)
    loss.backward()
    assert sums["grpo/ratio_mean"].item() == tokens and sums["grpo/ratio_max"].item() == 1
    assert sums["grpo/clip_fraction"].item() == 0 and sums["grpo/kl_behaviour"].item() == 0
    # The policy gradient: −A ∇ log π, spread over the tokens as the aggregation says.
    divisor = {"sample": mask.sum(1, keepdim=True) * 5, "token": tokens, "fixed": 5 * 8}[aggregation.value]
    share = mask / divisor
    assert torch.allclose(leaf.grad, -advantages.unsqueeze(1) * share)


@pytest.mark.parametrize("aggregation", list(Aggregation))
def test_micro_batches_and_padding_change_nothing(aggregation):
    cfg = GrpoConfig(aggregation=aggregation, kl_weight=0.1)
    data = make()

    def run(splits, extra):
        leaf = data[0].clone().requires_grad_()
        total, parts = 0.0, []
        for rows in splits:
            pieces = [leaf[rows], data[1][rows], data[2][rows], data[3][rows], data[4][rows], data[5][rows]]
            for place in (0, 1, 5):
                pieces[place] = torch.nn.functional.pad(pieces[place], (0, extra), value=math.nan)
            pieces[3] = torch.nn.functional.pad(pieces[3], (0, extra))
            loss, sums = grpo_loss(*pieces[:5], cfg, 11, pieces[5])
            loss.backward()
            total += loss.item()
            parts.append(sums)
        return total, leaf.grad, merged(parts, [(Grpo(cfg), 1.0)])

    whole, grad, sums = run([[0, 1, 2, 3, 4]], 0)
    for splits, extra in (([[0], [1, 2], [3, 4]], 0), ([[4, 2], [0, 1, 3]], 3), ([[i] for i in range(5)], 9)):
        other, other_grad, other_sums = run(splits, extra)
        assert other == pytest.approx(whole, rel=1e-12)
        assert torch.allclose(other_grad, grad, rtol=1e-12, atol=1e-15)
        assert other_sums == pytest.approx(sums, rel=1e-12)


def test_padding_and_weight_zero_may_hold_anything():
    logprobs = torch.tensor([[-1.0, -math.inf, math.nan], [-math.inf, math.nan, 5.0]], requires_grad=True)
    behaviour = torch.tensor([[-1.1, -math.inf, 3.0], [math.nan, -1.0, -math.inf]])
    mask = torch.tensor([[1, 0, 0], [1, 1, 1]])
    loss, sums = grpo_loss(
        logprobs, behaviour, torch.tensor([1.0, math.nan]), mask, torch.tensor([1.0, 0.0]), GrpoConfig(), 1
    )
    loss.backward()
    assert loss.item() == pytest.approx(-math.exp(0.1), rel=1e-5)
    assert torch.isfinite(logprobs.grad).all() and logprobs.grad.count_nonzero() == 1
    assert sums["grpo_tokens"].item() == 1


@pytest.mark.parametrize("gap", [500.0, -500.0])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_extreme_ratios_stay_finite(gap, advantage):
    logprobs = torch.tensor([[-600.0 + gap]], requires_grad=True)
    loss, sums = grpo_loss(
        logprobs, torch.tensor([[-600.0]]), torch.tensor([advantage]), torch.ones(1, 1), torch.ones(1), GrpoConfig(), 1
    )
    loss.backward()
    assert math.isfinite(loss.item()) and torch.isfinite(logprobs.grad).all()
    assert all(math.isfinite(value.item()) for value in sums.values())


def test_statistics_are_sums():
    ratios = tensor([1.3, 0.7, 1.0], [0.7, 2.0, 9.0])
    mask = tensor([1, 1, 1], [1, 1, 0])
    _, sums = grpo_loss(ratios.log(), 0 * ratios, tensor(1.0, -2.0), mask, tensor(1.0, 3.0), GrpoConfig(), 2)
    got = {name: value.item() for name, value in sums.items()}
    assert got["grpo_tokens"] == 5
    assert got["grpo/clip_fraction"] == 2  # 1.3 at A > 0 and 0.7 at A < 0
    assert got["grpo/ratio_mean"] == pytest.approx(5.7)
    assert got["grpo/ratio_max"] == pytest.approx(2.0)
    kl = sum(r - math.log(r) - 1 for r in (1.3, 0.7, 1.0, 0.7, 2.0))
    assert got["grpo/kl_behaviour"] == pytest.approx(kl)
    assert got["loss/grpo"] == pytest.approx(-(1.2 + 0.7 + 1.0) / 3 - 3 * -2 * (0.8 + 2.0) / 2)
    assert "grpo/kl_reference" not in got
    assert all(value.dtype == torch.float64 and not value.requires_grad for value in sums.values())


def test_a_step_without_samples_has_loss_zero():
    leaf = torch.zeros(0, 3, requires_grad=True)
    loss, _ = grpo_loss(leaf, leaf.detach(), torch.zeros(0), torch.zeros(0, 3), torch.zeros(0), GrpoConfig(), 0)
    loss.backward()
    assert loss.item() == 0


def test_bfloat16_is_computed_in_float32():
    logprobs = torch.full((1, 2), -1.0, dtype=torch.bfloat16)
    loss, _ = grpo_loss(
        logprobs, torch.full((1, 2), -1.001), torch.ones(1), torch.ones(1, 2), torch.ones(1), GrpoConfig(), 1
    )
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(-math.exp(0.001), rel=1e-6)


def test_refuses_a_kl_weight_without_a_reference():
    one = torch.ones(2)
    with pytest.raises(ValueError, match=r"kl_weight is 0\.1 but the reference is None"):
        grpo_loss(torch.zeros(2, 3), torch.zeros(2, 3), one, torch.ones(2, 3), one, GrpoConfig(kl_weight=0.1), 2)


@pytest.mark.parametrize(("aggregation", "denominator"), [("sample", 3), ("token", 17), ("fixed", 30)])
def test_denominator_of_a_step(aggregation, denominator):
    counts = Counts(9, 99, 0, grpo_samples=3, grpo_tokens=17, grpo_max_tokens=30, pairs=2, pair_tokens=8)
    assert getattr(counts, Grpo(GrpoConfig(aggregation=aggregation)).per) == denominator


def test_kl_estimators_by_hand():
    # π / π_ref = 2 and 0.5.
    assert kl_k3(tensor(math.log(2), math.log(0.5)), tensor(0.0, 0.0)).tolist() == pytest.approx(
        [0.193147, 0.306853], abs=1e-6
    )
    p, q = tensor(0.5, 0.3, 0.2), tensor(0.2, 0.5, 0.3)
    logs = p.log(), q.log()
    assert (p * kl_k1(*logs)).sum().item() == pytest.approx(0.223805, abs=1e-6)
    assert (p * kl_k2(*logs)).sum().item() == pytest.approx(0.265479, abs=1e-6)
    assert (p * kl_k3(*logs)).sum().item() == pytest.approx(0.223805, abs=1e-6)
    assert math.isfinite(kl_k3(torch.tensor(-1000.0), torch.tensor(0.0)).item())
