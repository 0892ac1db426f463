"""The MPO term: Mixed Preference Optimization (Skywork R1V2, Eqs. 2-5).

With h = log π_θ(y|x) − log π_0(y|x), summed over the answer's tokens, c the chosen and r the rejected answer, and
m = β h_c − β h_r::

    L = w1 · L_preference + w2 · L_quality + w3 · L_generation
    L_preference = −(1 − ε) log σ(m) − ε log σ(−m)                     (DPO; conservative DPO where ε > 0)
    L_quality    = −log σ(β h_c − δ) − log σ(−(β h_r − δ))             (BCO)
    L_generation = −log π_θ(y_c|x) / |y_c|                             (NLL)

ε, ``label_smoothing``, is the probability that a pair's labels are the wrong way round (Mitchell, 2023); the paper has
0. Without a reference (``reference_free``, or nothing but L_generation is trained) h = log π_θ, in the statistics too.
All sums and |y_c| go over the tokens of ``Sample.mask``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from skyrl.objective.kl import kl_k3
from skyrl.objective.term import BatchView, Stat, Stats, Term
from skyrl.records import TrainBatch
from skyrl.settings import DeltaKind, MpoConfig

if TYPE_CHECKING:
    from torch import Tensor


def loss_weights(cfg: MpoConfig, progress: float) -> tuple[float, float, float]:
    """``(w1, w2, w3)`` at a point of the run: linear from ``X_weight`` to ``X_weight_end``, constant if that is null.

    Args:
        progress: 0 at the first step of the stage, 1 at its last.

    Raises:
        ValueError: for progress outside 0 … 1.
    """
    if not 0 <= progress <= 1:
        raise ValueError(f"progress is {progress}; allowed: 0 … 1")

    def at(start: float, end: float | None) -> float:
        return start if end is None else start + (end - start) * progress

    return (
        at(cfg.preference_weight, cfg.preference_weight_end),
        at(cfg.quality_weight, cfg.quality_weight_end),
        at(cfg.generation_weight, cfg.generation_weight_end),
    )


def uses_delta(cfg: MpoConfig) -> bool:
    """True if the quality term, which alone reads δ, has a weight at any step."""
    return cfg.quality_weight > 0 or (cfg.quality_weight_end or 0.0) > 0


def compares_with_reference(cfg: MpoConfig) -> bool:
    """True if the preference or the quality term has a weight at any step and is relative to π_0."""
    preference = cfg.preference_weight > 0 or (cfg.preference_weight_end or 0.0) > 0
    return not cfg.reference_free and (preference or uses_delta(cfg))


def pair_members(batch: TrainBatch) -> set[int]:
    """Items of a step that are in a pair."""
    return {i for pair in batch.pairs for i in (pair.chosen, pair.rejected)}


class Mpo(Term):
    """Reads pairs only."""

    name, per = "mpo", "pairs"
    text = "MPO term before its weight: preference, quality and generation terms, each times its own."
    Settings = MpoConfig
    settings: MpoConfig
    stats = (
        Stat("loss/preference", "pairs", "nats",
            "DPO term before its weight, mean over the preference pairs of the step."),
        Stat("loss/quality", "pairs", "nats",
            "BCO term before its weight, mean over the preference pairs of the step."),
        Stat("loss/generation", "pairs", "nats",
            "Negative log-likelihood of the chosen answers before its weight, mean over pairs."),
        Stat("mpo/margin", "pairs", "nats",
            "Implicit reward of the chosen minus that of the rejected answer, mean over pairs."),
        # A tie, as at θ = π_0, does not count.
        Stat("mpo/accuracy", "pairs", "share",
            "Pairs whose chosen answer has the larger implicit reward, of all pairs of the step."),
        Stat("mpo/chosen_reward", "pairs", "nats",
            "Implicit reward beta·log(policy/reference) of chosen answers, mean over pairs."),
        Stat("mpo/rejected_reward", "pairs", "nats",
            "The same implicit reward of the rejected answers, mean over pairs."),
        # On tokens that π_θ did not draw (offline pairs, blind continuations) that is only an indication.
        Stat("mpo/kl_reference", "pair_tokens", "nats",
            "KL divergence of learner and reference policy (k3), mean over the answer tokens of the pairs.",
            when=compares_with_reference),
    )  # fmt: skip

    def __init__(self, settings: MpoConfig, key: str = "") -> None:
        super().__init__(settings, key)
        self.uses_reference = compares_with_reference(settings)

    def compared(self, batch: TrainBatch) -> set[int]:
        return pair_members(batch) if self.uses_reference else set()

    def parts(self, progress: float) -> dict[str, float]:
        names = ("loss/preference", "loss/quality", "loss/generation")
        return dict(zip(names, loss_weights(self.settings, progress), strict=True))

    def loss(self, view: BatchView) -> tuple[Tensor, Stats]:
        """Mixed preference loss, to be minimised, with the δ of the view, already updated with this step.

        Raises:
            ValueError: for a missing reference where the settings have terms that compare with one.
        """
        import torch
        from torch.nn.functional import softplus

        cfg, delta, references = self.settings, view.delta, view.reference
        if cfg.reference_free:
            references = None
        elif references is None and self.uses_reference:
            if len(view.chosen):
                raise ValueError("the reference is None; allowed: [B, T], or algorithm.mpo.reference_free")
            references = view.logprobs.detach()  # a step without a pair has nothing to compare
        sums = view.row_sums(view.logprobs)
        chosen_logps = sums[view.chosen]
        shifts = sums if references is None else sums - view.row_sums(references).detach()
        chosen_reward, rejected_reward = cfg.beta * shifts[view.chosen], cfg.beta * shifts[view.rejected]
        margin = chosen_reward - rejected_reward
        # −log σ(x) = softplus(−x), which does not overflow.
        preference = (1 - cfg.label_smoothing) * softplus(-margin) + cfg.label_smoothing * softplus(margin)
        quality = softplus(delta - chosen_reward) + softplus(rejected_reward - delta)
        generation = -chosen_logps / view.mask.sum(1)[view.chosen].clamp(min=1)
        w1, w2, w3 = loss_weights(cfg, view.progress)
        parts = {
            "loss/preference": preference,
            "loss/quality": quality,
            "loss/generation": generation,
            "mpo/margin": margin,
            "mpo/accuracy": margin > 0,
            "mpo/chosen_reward": chosen_reward,
            "mpo/rejected_reward": rejected_reward,
        }
        stats = {name: part.detach().double().sum() for name, part in parts.items()}
        if self.uses_reference and references is not None:
            members = torch.cat([view.chosen, view.rejected])
            k3 = kl_k3(view.logprobs.detach()[members], references[members])
            stats["mpo/kl_reference"] = k3.masked_fill(~view.mask[members], 0.0).double().sum()
        return (w1 * preference + w2 * quality + w3 * generation).sum(), stats


@dataclass(slots=True)
class RunningDelta:
    """δ of the quality term: a moving average, over steps, of each step's mean of concat(β h_c, β h_r).

    δ enters the loss non-linearly, so it must be known before the first backward pass, and it must be the same for
    every micro-batch and rank: the learner takes log π_θ of all pair members at the start of the step, adds β h over
    ranks, calls :meth:`update` with the mean, and only then computes the loss.

    Every step counts the same, whatever its number of pairs; at the first one δ is its own mean. δ is state: it belongs
    into a checkpoint. When the reference is refreshed (iterated MPO), h falls back to 0 but δ goes on from where it is:
    a cumulative mean then forgets the old reference slowly, an exponential one at the pace of its decay.

    Args:
        kind: ``cumulative``, the mean of all steps, or ``exponential``: δ ← decay · δ + (1 − decay) · mean, started by
            the first step's mean.
        decay: of the exponential one, 0 or more and below 1.
    """

    kind: DeltaKind
    decay: float
    value: float = 0.0
    updates: int = 0

    def update(self, batch_mean: float) -> float:
        """Take in the mean implicit reward of one whole step and return the new δ.

        Args:
            batch_mean: Σ (β h_c + β h_r) / (2 · pairs) over the whole step.

        Raises:
            ValueError: if it is not finite.
        """
        if not math.isfinite(batch_mean):
            raise ValueError(f"mean implicit reward is {batch_mean}; allowed: finite")
        self.updates += 1
        cumulative = self.kind is DeltaKind.cumulative or self.updates == 1
        share = 1 / self.updates if cumulative else 1 - self.decay
        self.value += (batch_mean - self.value) * share
        return self.value
