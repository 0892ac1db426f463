"""From the log-probabilities of a micro-batch's answer tokens, row after row, to what the terms of the loss see."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import torch

from skyrl.objective.term import BatchView, Counts
from skyrl.policy.packing import MicroBatch
from skyrl.records import PreferencePair, TrainBatch


def batch_view(
    batch: TrainBatch,
    part: MicroBatch,
    logprobs: torch.Tensor,
    entropy: torch.Tensor,
    reference: torch.Tensor | None,
    counts: Counts,
    progress: float,
    delta: float,
) -> BatchView:
    """The view of one micro-batch.

    Args:
        batch: The whole step.
        part: Its items, in the order of the rows; at least one.
        logprobs, entropy: [N] of all their answer tokens, masked ones too.
        reference: [N] log π_0, or None.
        counts, progress, delta: As in :class:`BatchView`.
    """
    items = [batch.items[i] for i in part]
    lengths = [len(item.sample.token_ids) for item in items]
    device = logprobs.device

    def padded(arrays: list[np.ndarray]) -> torch.Tensor:
        return _rows(torch.from_numpy(np.concatenate(arrays)).to(device), lengths)

    def per_item(values: Sequence[float], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    chosen, rejected = _places(pairs_in(batch, part), part)
    records = [(item.sample.logprobs, np.zeros(len(item.sample.token_ids), np.float32)) for item in items]
    return BatchView(
        logprobs=_rows(logprobs, lengths),
        behaviour=padded([nothing if own is None else own for own, nothing in records]),
        reference=None if reference is None else _rows(reference, lengths),
        entropy=_rows(entropy, lengths),
        mask=padded([item.sample.mask for item in items]),
        advantages=per_item([item.sample.advantage for item in items]),
        weights=per_item([item.grpo_weight for item in items]),
        off_policy=per_item([batch.off_policy(item) for item in items], torch.bool),
        recorded=per_item([item.sample.logprobs is not None for item in items], torch.bool),
        chosen=per_item(chosen, torch.int64),
        rejected=per_item(rejected, torch.int64),
        items=items,
        counts=counts,
        progress=progress,
        delta=delta,
    )


def pairs_in(batch: TrainBatch, part: MicroBatch) -> list[PreferencePair]:
    """The pairs whose members this micro-batch holds."""
    present = set(part)
    return [pair for pair in batch.pairs if pair.chosen in present]


def reward_sum(
    batch: TrainBatch,
    part: MicroBatch,
    reference: torch.Tensor | None,
    beta: float,
    start: torch.Tensor | None,
    scored: Collection[int],
) -> float:
    """Σ (β h_c + β h_r) over this micro-batch's pairs, for δ.

    log π_θ at the start of the step is what the rollout recorded, except for the members ``scored`` by a forward pass:
    those without a record, or with one that is not exactly the learner's.

    Args:
        batch, part: As in :func:`batch_view`.
        reference: [N] log π_0, read at pair members; None without a reference.
        beta: β.
        start: [N] log π_θ at the start of the step, read at the items ``scored``; None if there are none.
        scored: Items of the whole step.
    """
    pairs = pairs_in(batch, part)
    if not pairs:
        return 0.0
    samples = [batch.items[i].sample for i in part]
    lengths = [len(sample.token_ids) for sample in samples]
    mask = _rows(torch.from_numpy(np.concatenate([sample.mask for sample in samples])), lengths)

    def row_sums(flat: torch.Tensor) -> torch.Tensor:
        return _rows(flat.float().cpu(), lengths).masked_fill(~mask, 0.0).sum(1)

    sums = torch.tensor([0.0 if s.logprobs is None else float(s.logprobs[s.mask].sum()) for s in samples])
    if start is not None:
        sums = torch.where(torch.tensor([i in scored for i in part]), row_sums(start), sums)
    shifts = sums if reference is None else sums - row_sums(reference)
    chosen, rejected = _places(pairs, part)
    return float(beta * (shifts[chosen] + shifts[rejected]).double().sum())


def _places(pairs: list[PreferencePair], part: MicroBatch) -> tuple[list[int], list[int]]:
    row_of = {index: row for row, index in enumerate(part)}
    return [row_of[pair.chosen] for pair in pairs], [row_of[pair.rejected] for pair in pairs]


def _rows(flat: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """[N] values row after row → [B, T], padded with 0 (False)."""
    lens = torch.tensor(lengths, device=flat.device)
    real = torch.arange(int(lens.max()), device=flat.device)[None, :] < lens[:, None]
    return torch.zeros(real.shape, dtype=flat.dtype, device=flat.device).masked_scatter(real, flat)
