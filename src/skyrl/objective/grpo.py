"""The GRPO term (Skywork R1V2, Eq. 8) and its relatives, which are settings of ``GrpoConfig``.

========================  ============================================================================================
``aggregation=token``     one mean over all tokens of the step (DAPO, arXiv 2503.14476)
``aggregation=fixed``     division by a constant length instead of each answer's own (Dr. GRPO, arXiv 2503.20783)
``clip_high > clip_low``  room for unlikely tokens to grow (DAPO)
``dual_clip``             a bound on what a token with A < 0 can cost (arXiv 1912.09729)
``ratio=sequence``        GSPO (arXiv 2507.18071); its ratios stay so near 1 that the paper clips at 3e-4 and 4e-4
``surrogate=cispo``       CISPO (MiniMax-M1, arXiv 2506.13585)
``mismatch``              truncated or masked importance weights round a decoupled objective (arXiv 2110.00641)
========================  ============================================================================================

The token loss l_t and the step's loss L, where sg(·) has no gradient, k_t is the KL estimator of ``kl``, ρ_t the ratio,
w_t the mismatch weight (1 without one) and m_t ∈ {0, 1} the mismatch mask::

    A_t     = A, or with kl_place=reward A − kl_weight · sg(k_t)
    clip:    o_t = min(ρ_t A_t, clip(ρ_t, 1−ε_low, 1+ε_high) A_t); with a dual clip c and A_t < 0 at least c A_t
    cispo:   o_t = sg(clip(ρ_t, 1−ε_low, 1+ε_high)) · A_t · log π_θ(y_t)
    l_t     = −m_t w_t o_t, and with kl_place=loss + m_t · kl_weight · k_t

    sample:  L = Σ_i weight_i · (1/|y_i| Σ_t l_t) / (GRPO samples of the whole step)
    token:   L = Σ_i weight_i · Σ_t l_t / (GRPO tokens of the whole step)
    fixed:   L = Σ_i weight_i · Σ_t l_t / (GRPO samples of the whole step · max_new_tokens)

ρ_t = π_θ(y_t) / π_behaviour(y_t), or with a mismatch correction π_θ(y_t) / sg(π_θ(y_t)): one optimizer step is taken
per batch, so sg(π_θ) is the policy at the start of the step. Then ρ is 1, no clip acts, and w = sg(π_θ) / π_behaviour
alone corrects: numerical noise for fresh samples, the drift for replayed ones. The ratio ``sequence`` is
s_i = exp(mean_t log ρ_t) at every token of sample i, and its gradient flows through the mean: with ``kl_place=reward``
all tokens of a sample share the mean of their A_t.

Tokens that a mismatch mask leaves out stay in |y_i| and in all denominators: they add 0. Otherwise a denominator
would depend on the policy and on how the step is cut.

**Convention of the statistics**, here and in :mod:`skyrl.objective.mpo`: every value is a plain sum over the
samples, tokens or pairs of this call, float64, detached; a name that ends in ``_max`` is a maximum. The caller
adds (or takes the maximum) over micro-batches and ranks with :func:`skyrl.objective.hybrid.merge_stats`
and divides once, by counts of the whole step. So neither the micro-batch size nor the number of ranks changes a
reported number. Means of means would.

The sums of :func:`grpo_loss`: ``grpo_loss`` (before the division), ``grpo_tokens``, ``grpo_clipped`` (tokens where
the clip decides), ``grpo_ratio`` (Σρ of the ratio that the surrogate sees), ``grpo_ratio_max``, ``grpo_kl_behaviour``
(k3 of KL(behaviour ‖ π_θ), which the behaviour's own tokens estimate without bias), and, if a reference is given,
``grpo_kl_reference`` (k3 of KL(π_θ ‖ π_ref); on replayed tokens, which π_θ did not draw, only an indication). With the
setting on: ``grpo_dual_clipped`` (tokens where the dual clip decides), ``grpo_mismatch`` (Σw over all tokens, left-out
ones too), ``grpo_truncated`` (tokens whose w was cut), ``grpo_masked`` (tokens left out).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from skyrl.objective.kl import ESTIMATORS, LOG_RATIO_LIMIT, kl_k3
from skyrl.settings import Aggregation, GrpoConfig, KlPlace, Mismatch, Ratio, Surrogate

Stats = dict[str, Tensor]


def step_denominator(aggregation: Aggregation, samples: int, tokens: int, max_new_tokens: int) -> int:
    """What the sum over a whole step is divided by.

    Args:
        aggregation: ``sample``: the samples; ``token``: the tokens; ``fixed``: samples times ``max_new_tokens``.
        samples, tokens: ``TrainBatch.grpo_samples`` and ``grpo_tokens``.
        max_new_tokens: ``rollout.max_new_tokens``.
    """
    if aggregation is Aggregation.token:
        return tokens
    return samples * max_new_tokens if aggregation is Aggregation.fixed else samples


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
    """Surrogate loss of one micro-batch of a step, to be minimised; by default Skywork R1V2, Eq. 8, negated.

    Dividing by counts of the whole step makes the losses of all micro-batches and ranks add up to the loss of the
    step. A rank average (DeepSpeed) must be undone by multiplying with the number of ranks.

    Args:
        logprobs: [B, T] log π_θ, with gradient. Masked positions may hold anything, -inf and nan included.
        behaviour_logprobs: [B, T] log-probabilities stored when the sample was drawn (replayed ones too).
        mask: [B, T] bool or 0/1, the answer tokens.
        advantages, weights: [B]; the weight is ``TrainItem.grpo_weight``; 0 leaves a sample out of loss and statistics.
        cfg: every choice that the module lists; ``cfg.weight`` is not applied here (see ``objective``).
        denominator: of :func:`step_denominator`; 0 if the step has no sample.
        reference_logprobs: [B, T] log π_ref; needed if ``cfg.kl_weight`` is not 0.

    Returns:
        ``(loss, sums)``: a scalar and the sums that the module describes.

    Raises:
        ValueError: for shapes that do not fit, a negative denominator, a KL weight without a reference, or a dual clip
            with ``cispo``.
    """
    _check(logprobs, behaviour_logprobs, advantages, mask, weights, denominator)
    _check_settings(logprobs, reference_logprobs, cfg)
    # Like padding, a sample of weight 0 may hold anything.
    real = mask.bool() & (weights != 0).unsqueeze(-1)
    # Filling before exp: exp(nan or inf) times a zero mask would still give a nan gradient.
    current = _fill(logprobs, real)
    drift = current - _fill(behaviour_logprobs, real)
    advantage = advantages.to(current.dtype).masked_fill(weights == 0, 0.0).unsqueeze(-1)
    correction, kept, sums = _mismatch(drift.detach(), real, cfg)
    ratio = _ratio(drift if cfg.mismatch is Mismatch.none else current - current.detach(), real, cfg.ratio)
    sums |= _statistics(drift.detach(), ratio.detach(), real)

    penalty = None
    if reference_logprobs is not None:
        reference = _fill(reference_logprobs, real)
        sums["grpo_kl_reference"] = _total(kl_k3(current, reference))
        if cfg.kl_weight != 0:
            penalty = cfg.kl_weight * ESTIMATORS[cfg.kl_estimator](current, reference)
    if penalty is not None and cfg.kl_place is KlPlace.reward:
        advantage = advantage - penalty.detach()
    objective, surrogate_sums = _surrogate(ratio, advantage, current, real, cfg)
    sums |= surrogate_sums
    token_loss = -correction * objective
    if penalty is not None and cfg.kl_place is KlPlace.loss:
        token_loss = token_loss + penalty * kept

    per_sample = (token_loss * real).sum(-1)
    if cfg.aggregation is Aggregation.sample:
        per_sample = per_sample / real.sum(-1).clamp(min=1)
    weighted = (weights.to(per_sample.dtype) * per_sample).sum()
    sums["grpo_loss"] = weighted.detach().double()
    return weighted / max(denominator, 1), sums


def _ratio(log_ratio: Tensor, real: Tensor, kind: Ratio) -> Tensor:
    """ρ [B, T] from its logarithm, which is 0 where ``real`` is not set: of each token, or s_i at all of a sample's."""
    if kind is Ratio.sequence:
        mean = log_ratio.sum(-1, keepdim=True) / real.sum(-1, keepdim=True).clamp(min=1)
        log_ratio = mean.expand_as(log_ratio)
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def _surrogate(
    ratio: Tensor, advantage: Tensor, current: Tensor, real: Tensor, cfg: GrpoConfig
) -> tuple[Tensor, Stats]:
    """The objective o_t [B, T], to be maximised, and what its clips did; ``advantage`` is [B, 1] or [B, T]."""
    bounded = ratio.clamp(1 - cfg.clip_low, 1 + cfg.clip_high)
    if cfg.surrogate is Surrogate.cispo:
        cut = (bounded != ratio) & (advantage != 0)
        return bounded.detach() * advantage * current, {"grpo_clipped": _total(cut & real)}
    plain, clipped = ratio * advantage, bounded * advantage
    sums = {"grpo_clipped": _total((clipped < plain) & real)}
    objective = torch.minimum(plain, clipped)
    if cfg.dual_clip is not None:
        floor = (cfg.dual_clip * advantage).expand_as(objective)
        deep = (advantage < 0) & (objective < floor)
        sums["grpo_dual_clipped"] = _total(deep & real)
        objective = torch.where(deep, floor, objective)
    return objective, sums


def _mismatch(log_w: Tensor, real: Tensor, cfg: GrpoConfig) -> tuple[Tensor, Tensor, Stats]:
    """Correction of log w [B, T] (no gradient, 0 where ``real`` is not set).

    Returns:
        ``(correction, kept, sums)``: [B, T] m·w of the surrogate, [B, T] m, and what was cut or left out. A nan in w
        reaches the correction under every kind, so that it is noticed and not left out in silence.
    """
    ones = torch.ones_like(log_w)
    if cfg.mismatch is Mismatch.none:
        return ones, ones, {}
    limit = math.log(cfg.mismatch_cap)
    w = log_w.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    sums = {"grpo_mismatch": _total(w * real)}
    if cfg.mismatch is Mismatch.token_truncate:
        sums["grpo_truncated"] = _total((log_w > limit) & real)
        return w.clamp(max=cfg.mismatch_cap), ones, sums
    if cfg.mismatch is Mismatch.sequence_mask:
        # The logarithm of the product over the tokens, which can't overflow.
        log_w = log_w.sum(-1, keepdim=True).expand_as(log_w)
        w = ones.masked_fill(log_w.isnan(), math.nan)
    left_out = (log_w.abs() > limit) & real
    sums["grpo_masked"] = _total(left_out)
    return w.masked_fill(left_out, 0.0), ones.masked_fill(left_out, 0.0), sums


def _statistics(drift: Tensor, ratio: Tensor, real: Tensor) -> Stats:
    """The sums that need no reference; ``drift`` [B, T] is log π_θ − log π_behaviour, 0 where ``real`` is not set."""
    ratio = ratio * real
    return {
        "grpo_tokens": _total(real),
        "grpo_ratio": _total(ratio),
        "grpo_ratio_max": ratio.amax().double() if ratio.numel() else _total(real),
        "grpo_kl_behaviour": _total(kl_k3(torch.zeros_like(drift), drift)),
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


def _check_settings(logprobs: Tensor, reference: Tensor | None, cfg: GrpoConfig) -> None:
    if reference is None and cfg.kl_weight != 0:
        raise ValueError(f"kl_weight is {cfg.kl_weight} but reference_logprobs is None; allowed: [B, T] or kl_weight 0")
    if reference is not None and reference.shape != logprobs.shape:
        got, want = tuple(reference.shape), tuple(logprobs.shape)
        raise ValueError(f"reference_logprobs has shape {got}; allowed: {want}")
    if cfg.surrogate is Surrogate.cispo and cfg.dual_clip is not None:
        raise ValueError(f"dual_clip is {cfg.dual_clip} with surrogate cispo; allowed: None, as it clips no objective")
