"""The hybrid objective and the metrics of a whole step.

::

    L = grpo weight · L_GRPO + mpo weight · L_MPO

with the weights that ``AlgorithmConfig.weights`` gives for the step: 0 for a term that the stage does not train then.
The two terms see different samples of one batch: GRPO the effective (fresh and replayed) ones, MPO the preference
pairs of the fresh groups.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from skyrl.objective.grpo import Stats, step_denominator
from skyrl.records import SkyrlError
from skyrl.settings import AlgorithmConfig

MAX_SUFFIX = "_max"
"""Ending of the statistics that are maxima; all others are sums."""

OPTIONAL_MEANS = {
    "grpo_kl_reference": "grpo/kl_reference",
    "grpo_dual_clipped": "grpo/dual_clip_fraction",
    "grpo_masked": "grpo/masked_fraction",
    "grpo_truncated": "grpo/truncated_fraction",
    "grpo_mismatch": "grpo/mismatch_mean",
}
"""Means over the GRPO tokens of the step that only some settings have: statistics and their metrics."""


def combine(grpo: Tensor | None, mpo: Tensor | None, weights: tuple[float, float]) -> Tensor:
    """The hybrid loss ``weights[0] · L_GRPO + weights[1] · L_MPO`` of one micro-batch.

    Args:
        grpo: scalar of :func:`skyrl.objective.grpo.grpo_loss`, or ``None`` if the micro-batch has no such sample.
        mpo: scalar of :func:`skyrl.objective.mpo.mpo_loss`, or ``None`` if it has no pair.
        weights: of the two terms at this step (``AlgorithmConfig.weights``).

    Raises:
        ValueError: if both are ``None``.
    """
    if grpo is not None and mpo is not None:
        return weights[0] * grpo + weights[1] * mpo
    if grpo is not None:
        return weights[0] * grpo
    if mpo is not None:
        return weights[1] * mpo
    raise ValueError("both loss terms are None; allowed: at most one")


def merge_stats(parts: Iterable[Mapping[str, Tensor]]) -> Stats:
    """Statistics of several micro-batches (or ranks) as one: sums add, ``…_max`` take the maximum.

    A name that only some parts have is merged over those.
    """
    merged: Stats = {}
    for part in parts:
        for name, value in part.items():
            if name not in merged:
                merged[name] = value
            elif name.endswith(MAX_SUFFIX):
                merged[name] = torch.maximum(merged[name], value)
            else:
                merged[name] = merged[name] + value
    return merged


def finalise(
    sums: Mapping[str, Tensor | float],
    cfg: AlgorithmConfig,
    weights: tuple[float, float],
    grpo_samples: int,
    grpo_tokens: int,
    pairs: int,
    max_new_tokens: int,
    delta: float | None = None,
) -> dict[str, float]:
    """Metrics of a step from the merged sums of all micro-batches and ranks.

    A term that is absent (no sample or pair, or weight 0 at this step) gives no key at all, rather than a 0 that would
    look like a perfect loss: no ``loss/grpo`` and no ``grpo/…``; no ``loss/mpo``, its three parts or ``mpo/…`` except
    ``mpo/pairs``, which is a count. ``loss/total`` needs one of the two. ``grpo/kl_reference`` comes only with a
    reference; the fractions of the dual clip and of the mismatch correction only if they are on.

    Args:
        sums: of :func:`merge_stats`, summed over ranks too.
        cfg: the aggregation.
        weights: of the two terms at this step (``AlgorithmConfig.weights``).
        grpo_samples, grpo_tokens, pairs: counts of the whole step (``TrainBatch``).
        max_new_tokens: ``rollout.max_new_tokens``, the length of the ``fixed`` aggregation.
        delta: δ that the step used.

    Raises:
        SkyrlError: if the sums cover another number of tokens or pairs than the step has, which means that a
            micro-batch was lost or counted twice.
    """
    values = {name: float(value) for name, value in sums.items()}
    metrics: dict[str, float] = {}
    if grpo_samples and weights[0] > 0:
        _same_count("GRPO tokens", values.get("grpo_tokens", 0.0), grpo_tokens)
        denominator = step_denominator(cfg.grpo.aggregation, grpo_samples, grpo_tokens, max_new_tokens)
        metrics["loss/grpo"] = values["grpo_loss"] / denominator
        metrics["grpo/clip_fraction"] = values["grpo_clipped"] / grpo_tokens
        metrics["grpo/ratio_mean"] = values["grpo_ratio"] / grpo_tokens
        metrics["grpo/ratio_max"] = values["grpo_ratio_max"]
        metrics["grpo/kl_behaviour"] = values["grpo_kl_behaviour"] / grpo_tokens
        metrics |= {metric: values[name] / grpo_tokens for name, metric in OPTIONAL_MEANS.items() if name in values}
    metrics["mpo/pairs"] = float(pairs)
    if pairs and weights[1] > 0:
        _same_count("pairs", values.get("mpo_pairs", 0.0), pairs)
        metrics["loss/mpo"] = values["mpo_loss"] / pairs
        for part in ("preference", "quality", "generation"):
            metrics[f"loss/{part}"] = values[f"mpo_{part}"] / pairs
        metrics["mpo/margin"] = values["mpo_margin"] / pairs
        metrics["mpo/accuracy"] = values["mpo_correct"] / pairs
        metrics["mpo/chosen_reward"] = values["mpo_chosen_reward"] / pairs
        metrics["mpo/rejected_reward"] = values["mpo_rejected_reward"] / pairs
        if delta is not None:
            metrics["mpo/delta"] = delta
    terms = [
        weight * metrics[key] for weight, key in zip(weights, ("loss/grpo", "loss/mpo"), strict=True) if key in metrics
    ]
    if terms:
        metrics["loss/total"] = sum(terms)
    return metrics


def _same_count(what: str, got: float, want: int) -> None:
    if round(got) != want:
        raise SkyrlError(f"statistics cover {got:g} {what}; the step has {want}")
