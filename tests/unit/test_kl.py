"""KL estimators: values by hand, and what their gradients are in expectation."""

from __future__ import annotations

import math

import pytest
import torch
from learner_views import grpo_loss

from skyrl.objective.kl import ESTIMATORS
from skyrl.settings import GrpoConfig, KlEstimator, KlPlace


@pytest.mark.parametrize(
    ("place", "kind", "forward", "reverse"),
    [("loss", "k1", 0, 0), ("loss", "k2", 1, 0), ("loss", "k3", 0, 1), ("reward", "k1", 1, 0), ("reward", "k3", 1, -1)],
)
def test_expected_gradients_of_the_kl_estimators(place, kind, forward, reverse) -> None:
    """Over all tokens of a small vocabulary: ``forward`` · ∇ KL(π ‖ π_ref) + ``reverse`` · ∇ KL(π_ref ‖ π).

    One sample a token, weighted by its probability, advantage 0: what is left is the penalty.
    """
    logits = torch.tensor([0.3, -0.5, 1.1, 0.0], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-0.2, 0.4, 0.1, 0.9], dtype=torch.float64).log_softmax(0)
    logps = logits.log_softmax(0)
    p, q = logps.exp(), reference.exp()
    cfg = GrpoConfig(kl_weight=0.5, kl_estimator=KlEstimator(kind), kl_place=KlPlace(place))
    column = logps.unsqueeze(1)
    mask = torch.ones_like(column)
    loss, _ = grpo_loss(column, column.detach(), 0 * p.detach(), mask, p.detach(), cfg, 1, reference.unsqueeze(1))
    want = forward * (p * (logps - reference)).sum() + reverse * (q * (reference - logps)).sum()
    grads = [torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (loss, 0.5 * want)]
    assert torch.allclose(*grads, rtol=1e-12, atol=1e-15)


def test_estimators_by_name() -> None:
    """Ratio π / π_ref of 2 (and 0.5 for k3)."""
    logs, zero = torch.tensor([math.log(2), math.log(0.5)], dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    want = {"k1": (0.693147, -0.693147), "k2": (0.240227, 0.240227), "k3": (0.193147, 0.306853)}
    assert want == {
        kind.value: pytest.approx(tuple(estimator(logs, zero).tolist()), abs=1e-6)
        for kind, estimator in ESTIMATORS.items()
    }
