"""Views of micro-batches made by hand, for the tests of the loss terms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from skyrl.objective.grpo import Grpo
from skyrl.objective.hybrid import hybrid_loss, merge_stats
from skyrl.objective.mpo import Mpo
from skyrl.objective.term import BatchView, Counts, Stats, Term
from skyrl.settings import GrpoConfig, MpoConfig


def all_counts(value: int) -> Counts:
    """Counts of a step in which there are ``value`` of everything."""
    return Counts(*[value] * 8)


def make_view(logprobs: Tensor, **fields: Any) -> BatchView:
    """A view of [B, T] log-probabilities; what is not given is neutral: nothing masked, on-policy, no pairs."""
    rows = logprobs.shape[0]
    neutral = {
        "behaviour": logprobs.detach().clone(),
        "reference": None,
        "entropy": torch.zeros(logprobs.shape),
        "mask": torch.ones(logprobs.shape, dtype=torch.bool),
        "advantages": torch.zeros(rows),
        "weights": torch.ones(rows),
        "off_policy": torch.zeros(rows, dtype=torch.bool),
        "recorded": torch.ones(rows, dtype=torch.bool),
        "chosen": torch.zeros(0, dtype=torch.int64),
        "rejected": torch.zeros(0, dtype=torch.int64),
        "items": [],
        "counts": all_counts(1),
        "progress": 0.0,
        "delta": 0.0,
    }
    return BatchView(logprobs, **(neutral | fields))


def grpo_loss(
    logprobs: Tensor,
    behaviour: Tensor,
    advantages: Tensor,
    mask: Tensor,
    weights: Tensor,
    cfg: GrpoConfig,
    denominator: int,
    reference: Tensor | None = None,
) -> tuple[Tensor, Stats]:
    """The GRPO term, alone and with weight 1, divided by ``denominator``; and its statistics."""
    view = make_view(
        logprobs,
        behaviour=behaviour,
        advantages=advantages,
        mask=mask.bool(),
        weights=weights,
        reference=reference,
        counts=all_counts(denominator),
    )
    return hybrid_loss(view, [(Grpo(cfg), 1.0)])


def mpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor | None,
    ref_rejected: Tensor | None,
    lengths: Tensor,
    delta: float,
    cfg: MpoConfig,
    denominator: int,
    weights: tuple[float, float, float],
) -> tuple[Tensor, Stats]:
    """The MPO term with ``weights`` of its three parts, divided by ``denominator``, of pairs [n] that are given by the
    sums of their log-probabilities: each answer has its sum at the first of ``lengths`` tokens, 0 at the others."""
    names = ("preference_weight", "quality_weight", "generation_weight")
    cfg = cfg.model_copy(update=dict(zip(names, weights, strict=True)))
    pairs, longest = len(chosen), int(max([1, *lengths.tolist()]))

    def spread(first: Tensor, second: Tensor) -> Tensor:
        return torch.nn.functional.pad(torch.cat([first, second]).unsqueeze(1), (0, longest - 1))

    view = make_view(
        spread(chosen, rejected),
        reference=None if ref_chosen is None or ref_rejected is None else spread(ref_chosen, ref_rejected),
        mask=torch.arange(longest)[None] < torch.cat([lengths, lengths])[:, None],
        chosen=torch.arange(pairs),
        rejected=torch.arange(pairs, 2 * pairs),
        delta=delta,
        counts=all_counts(denominator),
    )
    return hybrid_loss(view, [(Mpo(cfg), 1.0)])


def merged(parts: list[Stats], active: list[tuple[Term, float]]) -> dict[str, float]:
    """Statistics of several micro-batches on one rank."""
    return merge_stats(parts, active, "cpu", lambda values, operation: values)
