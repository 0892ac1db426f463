"""The hybrid objective and the metrics of a whole step.

::

    L = grpo.weight · L_GRPO + mpo.weight · L_MPO

The two terms see different samples of one batch: GRPO the effective (fresh and replayed) ones, MPO the preference
pairs of the fresh groups.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from skyrl.algorithms.grpo import Stats
from skyrl.config import Aggregation, AlgorithmConfig
from skyrl.types import SkyrlError

MAX_SUFFIX = "_max"
"""Ending of the statistics that are maxima; all others are sums."""


def combine(grpo: Tensor | None, mpo: Tensor | None, cfg: AlgorithmConfig) -> Tensor:
    """The hybrid loss ``grpo.weight · L_GRPO + mpo.weight · L_MPO`` of one micro-batch.

    Args:
        grpo: scalar of :func:`skyrl.algorithms.grpo.grpo_loss`, or ``None`` if the micro-batch has no such sample.
        mpo: scalar of :func:`skyrl.algorithms.mpo.mpo_loss`, or ``None`` if it has no pair.

    Raises:
        ValueError: if both are ``None``.
    """
    if grpo is not None and mpo is not None:
        return cfg.grpo.weight * grpo + cfg.mpo.weight * mpo
    if grpo is not None:
        return cfg.grpo.weight * grpo
    if mpo is not None:
        return cfg.mpo.weight * mpo
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
    grpo_samples: int,
    grpo_tokens: int,
    pairs: int,
    delta: float | None = None,
) -> dict[str, float]:
    """Metrics of a step from the merged sums of all micro-batches and ranks.

    A term that is absent gives no key at all, rather than a 0 that would look like a perfect loss: no GRPO samples,
    no ``loss/grpo`` and no ``grpo/…``; no pairs, no ``loss/mpo``, its three parts or ``mpo/…`` except
    ``mpo/pairs``, which is a count; ``grpo/kl_reference`` only with a reference; ``loss/total`` needs one of the two.

    Args:
        sums: of :func:`merge_stats`, summed over ranks too.
        cfg: weights of the terms and the aggregation.
        grpo_samples, grpo_tokens, pairs: counts of the whole step (``TrainBatch``).
        delta: δ that the step used.

    Raises:
        SkyrlError: if the sums cover another number of tokens or pairs than the step has, which means that a
            micro-batch was lost or counted twice.
    """
    values = {name: float(value) for name, value in sums.items()}
    metrics: dict[str, float] = {}
    if grpo_samples:
        _same_count("GRPO tokens", values.get("grpo_tokens", 0.0), grpo_tokens)
        denominator = grpo_samples if cfg.grpo.aggregation is Aggregation.sample else grpo_tokens
        metrics["loss/grpo"] = values["grpo_loss"] / denominator
        metrics["grpo/clip_fraction"] = values["grpo_clipped"] / grpo_tokens
        metrics["grpo/ratio_mean"] = values["grpo_ratio"] / grpo_tokens
        metrics["grpo/ratio_max"] = values["grpo_ratio_max"]
        metrics["grpo/kl_behaviour"] = values["grpo_kl_behaviour"] / grpo_tokens
        if "grpo_kl_reference" in values:
            metrics["grpo/kl_reference"] = values["grpo_kl_reference"] / grpo_tokens
    metrics["mpo/pairs"] = float(pairs)
    if pairs:
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
    if grpo_samples or pairs:
        metrics["loss/total"] = cfg.grpo.weight * metrics.get("loss/grpo", 0.0) + cfg.mpo.weight * metrics.get(
            "loss/mpo", 0.0
        )
    return metrics


def _same_count(what: str, got: float, want: int) -> None:
    if round(got) != want:
        raise SkyrlError(f"statistics cover {got:g} {what}; the step has {want}")
