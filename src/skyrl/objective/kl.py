"""Estimators of KL(π ‖ π_ref) on single tokens, with d = log π_ref − log π, for tokens that π drew.

As values, k1 and k3 are unbiased and k2 is not (Schulman, 2020). Their *gradients* are another matter. In the
loss, where they are differentiated, the expected gradients over tokens of π are:

* k1: E[∇ log π] = 0. It adds noise and pulls nowhere.
* k2: E[(log π − log π_ref) ∇ log π] = ∇ KL(π ‖ π_ref): the right one.
* k3: E[−(π_ref / π) ∇ log π] = ∇ KL(π_ref ‖ π): the reverse divergence, which vanishes at the same place.

In the reward, as a constant in front of ∇ log π, k1 gives ∇ KL(π ‖ π_ref), the right one; k3 gives
∇ KL(π ‖ π_ref) − ∇ KL(π_ref ‖ π), which is of second order near the reference; k2 is biased as well.

This holds token by token, given what came before. No token answers for the divergence of later ones, and on replayed
tokens, which π did not draw, it is an approximation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from skyrl.settings import KlEstimator

if TYPE_CHECKING:
    from torch import Tensor

LOG_RATIO_LIMIT = 20.0
"""|log ρ| is cut here: e^20 ≈ 4.9e8 is far outside any clip range, while e^89 overflows float32. Beyond it a
token has no gradient through ρ."""


def kl_k1(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """−d per token: unbiased, high variance, any sign."""
    return logprobs - reference_logprobs


def kl_k2(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """d² / 2 per token: biased, low variance, never negative."""
    return (reference_logprobs - logprobs).square() / 2


def kl_k3(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """e^d − d − 1 per token: unbiased, never negative. d is cut at ±:data:`LOG_RATIO_LIMIT` against overflow."""
    d = (reference_logprobs - logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return d.expm1() - d


ESTIMATORS = {KlEstimator.k1: kl_k1, KlEstimator.k2: kl_k2, KlEstimator.k3: kl_k3}
