"""The GRPO term (Skywork R1V2, Eq. 8) and its relatives, which are settings of ``GrpoConfig``.

========================  ============================================================================================
``aggregation=token``     one mean over all tokens of the step (DAPO, arXiv 2503.14476)
``aggregation=fixed``     division by a constant length instead of each answer's own (Dr. GRPO, arXiv 2503.20783)
``clip_high > clip_low``  room for unlikely tokens to grow (DAPO)
``dual_clip``             a bound on what a token with A < 0 can cost (arXiv 1912.09729)
``ratio=sequence``        GSPO (arXiv 2507.18071); its ratios stay so near 1 that the paper clips at 3e-4 and 4e-4
``surrogate=cispo``       CISPO (MiniMax-M1, arXiv 2506.13585), which has no lower clip: ``clip_low=null``
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

All sums and |y_i| go over the tokens of ``Sample.mask``. ρ_t = π_θ(y_t) / π_behaviour(y_t), or with a mismatch
correction π_θ(y_t) / sg(π_θ(y_t)): one optimizer step is taken per batch, so sg(π_θ) is the policy at the start of the
step. Then ρ is 1, no clip acts, and w = sg(π_θ) / π_behaviour alone corrects: numerical noise for fresh samples, the
drift for older ones.

The ratio ``sequence`` is s_i = exp(mean_t log ρ_t) at every token of sample i, and its gradient flows through the mean.
A clip of it acts on whole samples (GSPO, Eq. 5: one advantage and one decision for each), so that with
``kl_place=reward`` the clipped objective has A_t = A − kl_weight · sg(mean_t k_t) at every token. CISPO, through whose
ratio no gradient flows, keeps each token's own A_t.

Tokens that a mismatch mask leaves out stay in |y_i| and in all denominators: they add 0. Otherwise a denominator
would depend on the policy and on how the step is cut.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from skyrl.objective.kl import ESTIMATORS, LOG_RATIO_LIMIT, kl_k3
from skyrl.objective.term import BatchView, Stat, Stats, Term
from skyrl.settings import Aggregation, GrpoConfig, KlPlace, Mismatch, Ratio, Surrogate

if TYPE_CHECKING:
    from torch import Tensor

MASKS = (Mismatch.token_mask, Mismatch.sequence_mask)
PER = {Aggregation.sample: "grpo_samples", Aggregation.token: "grpo_tokens", Aggregation.fixed: "grpo_max_tokens"}


class Grpo(Term):
    """Samples of weight 0 are left out of loss and statistics, whatever they hold."""

    name = "grpo"
    text = "GRPO surrogate (with its KL penalty) before its weight, averaged as `algorithm.grpo.aggregation` says."
    Settings = GrpoConfig
    settings: GrpoConfig
    stats = (
        Stat("grpo/clip_fraction", "grpo_tokens", "share",
            "Answer tokens where the clip decides, of the step's GRPO tokens."),
        Stat("grpo/dual_clip_fraction", "grpo_tokens", "share",
            "Answer tokens with a negative advantage whose objective the dual clip holds, of the step's GRPO tokens.",
            when=lambda cfg: cfg.dual_clip is not None),
        Stat("grpo/masked_fraction", "grpo_tokens", "share",
            "Answer tokens left out because learner and sampling policy disagree too much, of the step's GRPO tokens.",
            when=lambda cfg: cfg.mismatch in MASKS),
        Stat("grpo/truncated_fraction", "grpo_tokens", "share",
            "Answer tokens whose mismatch weight was cut to the cap, of the step's GRPO tokens.",
            when=lambda cfg: cfg.mismatch is Mismatch.token_truncate),
        Stat("grpo/mismatch_mean", "grpo_tokens", "-",
            "Mean over GRPO tokens of the probability ratio of the policy at the start of the step to the sampling "
            "policy.", when=lambda cfg: cfg.mismatch is not Mismatch.none),
        Stat("grpo/ratio_mean", "grpo_tokens", "-",
            "Mean over GRPO tokens of the ratio that the surrogate uses, learner to sampling policy; 1 by construction "
            "with a mismatch correction."),
        Stat("grpo/ratio_max", "grpo_tokens", "-", "Largest such ratio over the GRPO tokens of the step.", "max"),
        # The behaviour's own tokens estimate KL(behaviour ‖ π_θ) without bias; KL(π_θ ‖ π_0) on older tokens, which π_θ
        # did not draw, is only an indication.
        Stat("grpo/kl_behaviour", "grpo_tokens", "nats",
            "KL divergence of learner and sampling policy (k3), mean over GRPO tokens."),
        Stat("grpo/kl_reference", "grpo_tokens", "nats",
            "KL divergence of learner and reference policy (k3), mean over GRPO tokens.",
            when=lambda cfg: cfg.kl_weight > 0),
    )  # fmt: skip

    def __init__(self, settings: GrpoConfig, key: str = "") -> None:
        super().__init__(settings, key)
        self.per, self.uses_reference = PER[settings.aggregation], settings.kl_weight > 0

    def loss(self, view: BatchView) -> tuple[Tensor, Stats]:
        """Surrogate loss, to be minimised; by default Skywork R1V2, Eq. 8, negated.

        Raises:
            ValueError: for a KL weight without a reference.
        """
        cfg, weights = self.settings, view.weights
        # Like padding, a sample of weight 0 may hold anything.
        real = view.mask & (weights != 0).unsqueeze(-1)
        # Filling before exp: exp(nan or inf) times a zero mask would still give a nan gradient.
        current = _fill(view.logprobs, real)
        drift = current - _fill(view.behaviour, real)
        advantage = view.advantages.to(current.dtype).masked_fill(weights == 0, 0.0).unsqueeze(-1)
        correction, kept, stats = _mismatch(drift.detach(), real, cfg)
        ratio = _ratio(drift if cfg.mismatch is Mismatch.none else current - current.detach(), real, cfg.ratio)
        stats |= _statistics(drift.detach(), ratio.detach(), real)

        penalty = None
        if cfg.kl_weight > 0:
            if view.reference is None:
                raise ValueError(f"kl_weight is {cfg.kl_weight} but the reference is None; allowed: [B, T]")
            reference = _fill(view.reference, real)
            stats["grpo/kl_reference"] = _total(kl_k3(current, reference))
            penalty = cfg.kl_weight * ESTIMATORS[cfg.kl_estimator](current, reference)
        if penalty is not None and cfg.kl_place is KlPlace.reward:
            charge = penalty.detach()
            if cfg.ratio is Ratio.sequence and cfg.surrogate is Surrogate.clip:
                charge = charge.sum(-1, keepdim=True) / real.sum(-1, keepdim=True).clamp(min=1)
            advantage = advantage - charge
        objective, surrogate_stats = _surrogate(ratio, advantage, current, real, cfg)
        token_loss = -correction * objective
        if penalty is not None and cfg.kl_place is KlPlace.loss:
            token_loss = token_loss + penalty * kept

        per_sample = (token_loss * real).sum(-1)
        if cfg.aggregation is Aggregation.sample:
            per_sample = per_sample / real.sum(-1).clamp(min=1)
        return (weights.to(per_sample.dtype) * per_sample).sum(), stats | surrogate_stats


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
    bounded = ratio.clamp(None if cfg.clip_low is None else 1 - cfg.clip_low, 1 + cfg.clip_high)
    if cfg.surrogate is Surrogate.cispo:
        cut = (bounded != ratio) & (advantage != 0)
        return bounded.detach() * advantage * current, {"grpo/clip_fraction": _total(cut & real)}
    plain, clipped = ratio * advantage, bounded * advantage
    stats = {"grpo/clip_fraction": _total((clipped < plain) & real)}
    objective = plain.minimum(clipped)
    if cfg.dual_clip is not None:
        floor = (cfg.dual_clip * advantage).expand_as(objective)
        deep = (advantage < 0) & (objective < floor)
        stats["grpo/dual_clip_fraction"] = _total(deep & real)
        objective = floor.where(deep, objective)
    return objective, stats


def _mismatch(log_w: Tensor, real: Tensor, cfg: GrpoConfig) -> tuple[Tensor, Tensor, Stats]:
    """Correction of log w [B, T] (no gradient, 0 where ``real`` is not set).

    Returns:
        ``(correction, kept, stats)``: [B, T] m·w of the surrogate, [B, T] m, and what was cut or left out. A nan in w
        reaches the correction under every kind, so that it is noticed and not left out in silence.
    """
    ones = log_w.new_ones(log_w.shape)
    if cfg.mismatch is Mismatch.none:
        return ones, ones, {}
    limit = math.log(cfg.mismatch_cap)
    w = log_w.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    stats = {"grpo/mismatch_mean": _total(w * real)}
    if cfg.mismatch is Mismatch.token_truncate:
        stats["grpo/truncated_fraction"] = _total((log_w > limit) & real)
        return w.clamp(max=cfg.mismatch_cap), ones, stats
    if cfg.mismatch is Mismatch.sequence_mask:
        # The logarithm of the product over the tokens, which can't overflow.
        log_w = log_w.sum(-1, keepdim=True).expand_as(log_w)
        w = ones.masked_fill(log_w.isnan(), math.nan)
    left_out = (log_w.abs() > limit) & real
    stats["grpo/masked_fraction"] = _total(left_out)
    return w.masked_fill(left_out, 0.0), ones.masked_fill(left_out, 0.0), stats


def _statistics(drift: Tensor, ratio: Tensor, real: Tensor) -> Stats:
    """What needs no reference; ``drift`` [B, T] is log π_θ − log π_behaviour, 0 where ``real`` is not set."""
    ratio = ratio * real
    return {
        "grpo/ratio_mean": _total(ratio),
        "grpo/ratio_max": ratio.amax().double() if ratio.numel() else _total(real),
        "grpo/kl_behaviour": _total(kl_k3(drift.new_zeros(drift.shape), drift)),
    }


def _fill(logprobs: Tensor, real: Tensor) -> Tensor:
    """At least float32, with 0 where ``real`` is not set."""
    wide = logprobs.float() if logprobs.element_size() < 4 else logprobs
    return wide.masked_fill(~real, 0.0)


def _total(values: Tensor) -> Tensor:
    # float64: float32 can't count beyond 2^24 tokens.
    return values.detach().double().sum()
