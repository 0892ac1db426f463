"""The GRPO term (Skywork R1V2, Eq. 8) and estimators of the KL divergence.

**Convention of the statistics**, here and in :mod:`skyrl.algorithms.mpo`: every value is a plain sum over the
samples, tokens or pairs of this call, float64, detached; a name that ends in ``_max`` is a maximum. The caller
adds (or takes the maximum) over micro-batches and ranks with :func:`skyrl.algorithms.objective.merge_stats`
and divides once, by counts of the whole step. So neither the micro-batch size nor the number of ranks changes a
reported number. Means of means would.

The sums of :func:`grpo_loss`: ``grpo_loss`` (before the division), ``grpo_tokens``, ``grpo_clipped`` (tokens where
the clip decides), ``grpo_ratio`` (Σρ), ``grpo_ratio_max``, ``grpo_kl_behaviour`` (k3 of KL(behaviour ‖ π_θ), which
the behaviour's own tokens estimate without bias), and, if a reference is given, ``grpo_kl_reference`` (k3 of
KL(π_θ ‖ π_ref); on replayed tokens, which π_θ did not draw, only an indication).
"""

from __future__ import annotations

import torch
from torch import Tensor

from skyrl.config import Aggregation, GrpoConfig

LOG_RATIO_LIMIT = 20.0
"""|log ρ| is cut here: e^20 ≈ 4.9e8 is far outside any clip range, while e^89 overflows float32. Beyond it a
token has no gradient through ρ."""

Stats = dict[str, Tensor]


def kl_k1(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """−d per token, d = log π_ref − log π: unbiased for KL(π ‖ π_ref) on tokens of π, high variance, any sign."""
    return logprobs - reference_logprobs


def kl_k2(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """d² / 2 per token, d = log π_ref − log π: biased, low variance, never negative."""
    return (reference_logprobs - logprobs).square() / 2


def kl_k3(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """e^d − d − 1 per token, d = log π_ref − log π: unbiased for KL(π ‖ π_ref) on tokens of π, never negative.

    d is cut at ±:data:`LOG_RATIO_LIMIT` against overflow.
    """
    d = (reference_logprobs - logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return d.expm1() - d


def grpo_loss(
    logprobs: Tensor,
    behaviour_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    weights: Tensor,
    cfg: GrpoConfig,
    denominator: int,
    reference_logprobs: Tensor | None = None,
) -> tuple[Tensor, Stats]:
    """Clipped surrogate of Skywork R1V2, Eq. 8, negated so that it is minimised; one micro-batch of a step.

    With ρ_t = π_θ(y_t) / π_behaviour(y_t) and l_t = −min(ρ_t A, clip(ρ_t, 1−ε_low, 1+ε_high) A) + kl_weight · k3_t::

        sample:  L = Σ_i weight_i · (1/|y_i| Σ_t l_t) / (GRPO samples of the whole step)
        token:   L = Σ_i weight_i · Σ_t l_t / (GRPO tokens of the whole step)

    Dividing by counts of the whole step makes the losses of all micro-batches and ranks add up to the loss of the
    step. A rank average (DeepSpeed) must be undone by multiplying with the number of ranks.

    Args:
        logprobs: [B, T] log π_θ, with gradient. Masked positions may hold anything, -inf and nan included.
        behaviour_logprobs: [B, T] log-probabilities stored when the sample was drawn (replayed ones too).
        mask: [B, T] bool or 0/1, the answer tokens.
        advantages, weights: [B]; the weight is ``TrainItem.grpo_weight``; 0 leaves a sample out of loss and statistics.
        cfg: clip range, aggregation and KL weight; ``cfg.weight`` is not applied here (see ``objective``).
        denominator: ``TrainBatch.grpo_samples`` or ``grpo_tokens``, as ``cfg.aggregation`` says; 0 if it has none.
        reference_logprobs: [B, T] log π_ref; needed if ``cfg.kl_weight`` is not 0.

    Returns:
        ``(loss, sums)``: a scalar and the sums that the module describes.

    Raises:
        ValueError: for shapes that do not fit, a negative denominator, or a KL weight without a reference.
    """
    _check(logprobs, behaviour_logprobs, advantages, mask, weights, denominator)
    _check_reference(logprobs, reference_logprobs, cfg.kl_weight)
    # Like padding, a sample of weight 0 may hold anything.
    real = mask.bool() & (weights != 0).unsqueeze(-1)
    current = _fill(logprobs, real)
    # Filling before exp: exp(nan or inf) times a zero mask would still give a nan gradient.
    log_ratio = (current - _fill(behaviour_logprobs, real)).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio = log_ratio.exp()
    advantage = advantages.to(ratio.dtype).masked_fill(weights == 0, 0.0).unsqueeze(-1)
    plain = ratio * advantage
    clipped = ratio.clamp(1 - cfg.clip_low, 1 + cfg.clip_high) * advantage
    token_loss = -torch.minimum(plain, clipped)
    sums = _statistics(log_ratio.detach(), (clipped < plain) & real, real)
    if reference_logprobs is not None:
        k3 = kl_k3(current, _fill(reference_logprobs, real))
        sums["grpo_kl_reference"] = _total(k3)
        if cfg.kl_weight != 0:
            token_loss = token_loss + cfg.kl_weight * k3

    per_sample = (token_loss * real).sum(-1)
    if cfg.aggregation is Aggregation.sample:
        per_sample = per_sample / real.sum(-1).clamp(min=1)
    weighted = (weights.to(per_sample.dtype) * per_sample).sum()
    sums["grpo_loss"] = weighted.detach().double()
    return weighted / max(denominator, 1), sums


def _statistics(log_ratio: Tensor, clipped: Tensor, real: Tensor) -> Stats:
    """The sums that need no reference; ``log_ratio`` [B, T] is 0 where ``real`` is not set."""
    ratio = log_ratio.exp() * real
    return {
        "grpo_tokens": _total(real),
        "grpo_clipped": _total(clipped),
        "grpo_ratio": _total(ratio),
        "grpo_ratio_max": ratio.amax().double() if ratio.numel() else _total(real),
        "grpo_kl_behaviour": _total(log_ratio.expm1() - log_ratio),
    }


def _fill(logprobs: Tensor, real: Tensor) -> Tensor:
    """At least float32, with 0 at the padding."""
    wide = logprobs.to(torch.promote_types(logprobs.dtype, torch.float32))
    return wide.masked_fill(~real, 0.0)


def _total(values: Tensor) -> Tensor:
    # float64: float32 can't count beyond 2^24 tokens.
    return values.detach().sum(dtype=torch.float64)


def _check(
    logprobs: Tensor, behaviour: Tensor, advantages: Tensor, mask: Tensor, weights: Tensor, denominator: int
) -> None:
    shape = tuple(logprobs.shape)
    if len(shape) != 2:
        raise ValueError(f"logprobs have shape {shape}; allowed: [B, T]")
    for name, tensor, want in (
        ("behaviour_logprobs", behaviour, shape),
        ("mask", mask, shape),
        ("advantages", advantages, shape[:1]),
        ("weights", weights, shape[:1]),
    ):
        if tuple(tensor.shape) != want:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; allowed: {want}")
    if denominator < 0:
        raise ValueError(f"denominator is {denominator}; allowed: 0 or more")


def _check_reference(logprobs: Tensor, reference: Tensor | None, kl_weight: float) -> None:
    if reference is None and kl_weight != 0:
        raise ValueError(f"kl_weight is {kl_weight} but reference_logprobs is None; allowed: [B, T] or kl_weight 0")
    if reference is not None and reference.shape != logprobs.shape:
        got, want = tuple(reference.shape), tuple(logprobs.shape)
        raise ValueError(f"reference_logprobs has shape {got}; allowed: {want}")
