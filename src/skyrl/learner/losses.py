"""From one micro-batch's log-probabilities to its share of the step's loss."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from skyrl.algorithms.grpo import grpo_loss
from skyrl.algorithms.mpo import implicit_reward_sum, mpo_loss
from skyrl.algorithms.objective import combine
from skyrl.config import Aggregation, AlgorithmConfig
from skyrl.types import PreferencePair, TrainBatch

STAT_NAMES = (
    *("grpo_loss", "grpo_tokens", "grpo_clipped", "grpo_ratio", "grpo_kl_behaviour", "grpo_kl_reference"),
    *("mpo_loss", "mpo_preference", "mpo_quality", "mpo_generation", "mpo_margin", "mpo_correct"),
    *("mpo_chosen_reward", "mpo_rejected_reward", "mpo_pairs", "entropy", "tokens"),
)
MAX_NAMES = ("grpo_ratio_max", "fresh_gap_max")


@dataclass(slots=True)
class MicroLoss:
    """A scalar loss and statistics that add up over micro-batches and ranks (``…_max``: the maximum)."""

    loss: torch.Tensor
    stats: dict[str, torch.Tensor]


def micro_loss(
    batch: TrainBatch,
    part: list[int],
    logprobs: torch.Tensor,
    entropy: torch.Tensor,
    reference: torch.Tensor | None,
    delta: float,
    cfg: AlgorithmConfig,
) -> MicroLoss:
    """GRPO and MPO from the same forward pass.

    Args:
        batch: The whole step; its counts are the denominators.
        part: Items of this micro-batch, in the order of its rows.
        logprobs: [N] log π_θ of their answer tokens, row after row, with gradient.
        entropy: [N].
        reference: [N] log π_0, read at pair members (and everywhere with a KL penalty).
        delta: δ of this step.
        cfg: Both algorithms.
    """
    items = [batch.items[i] for i in part]
    lengths = [len(item.sample.token_ids) for item in items]
    behaviour_flat = torch.from_numpy(np.concatenate([item.sample.logprobs for item in items])).to(logprobs.device)
    # -inf is a legal value of masked positions only, so nothing here may be hidden by it.
    current, mask = _rows(logprobs, lengths)
    behaviour, _ = _rows(behaviour_flat, lengths)
    references = None if reference is None else _rows(reference, lengths)[0]

    def per_item(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=logprobs.device)

    grpo = mpo = None
    stats: dict[str, torch.Tensor] = {}
    if cfg.grpo.weight > 0 and any(item.grpo_weight != 0 for item in items):
        by_sample = cfg.grpo.aggregation is Aggregation.sample
        grpo, grpo_stats = grpo_loss(
            current,
            behaviour,
            per_item([item.sample.advantage for item in items]),
            mask,
            per_item([item.grpo_weight for item in items]),
            cfg.grpo,
            batch.grpo_samples if by_sample else batch.grpo_tokens,
            references if cfg.grpo.kl_weight > 0 else None,
        )
        stats |= grpo_stats
    pairs = pairs_in(batch, part)
    if pairs and references is not None:
        chosen, rejected = _places(pairs, part)
        sums, reference_sums = (current * mask).sum(1), (references * mask).sum(1)
        mpo, mpo_stats = mpo_loss(
            sums[chosen],
            sums[rejected],
            reference_sums[chosen],
            reference_sums[rejected],
            mask.sum(1)[chosen],
            delta,
            cfg.mpo,
            len(batch.pairs),
        )
        stats |= mpo_stats
    fresh = torch.tensor([not item.replayed for item in items], device=logprobs.device).unsqueeze(1) & mask
    gap = ((current - behaviour).abs() * fresh).max().detach().double()
    stats |= {
        "entropy": entropy.detach().double().sum(),
        "tokens": torch.tensor(float(sum(lengths)), dtype=torch.float64, device=logprobs.device),
        "fresh_gap_max": gap,
    }
    loss = logprobs.sum() * 0.0 if grpo is None and mpo is None else combine(grpo, mpo, cfg)
    return MicroLoss(loss, stats)


def pairs_in(batch: TrainBatch, part: list[int]) -> list[PreferencePair]:
    """The pairs whose members this micro-batch holds."""
    present = set(part)
    return [pair for pair in batch.pairs if pair.chosen in present]


def pair_sums(batch: TrainBatch, part: list[int], reference: torch.Tensor | None, beta: float) -> float:
    """Σ (β h_c + β h_r) over this micro-batch's pairs, for δ.

    Pairs are on-policy, so log π_θ at the start of the step is what the rollout recorded: no forward pass is needed.
    """
    pairs = pairs_in(batch, part)
    if not pairs or reference is None:
        return 0.0
    items = [batch.items[i] for i in part]
    rows, mask = _rows(reference.float(), [len(item.sample.token_ids) for item in items])
    reference_sums = (rows * mask).sum(1).cpu()
    sums = torch.tensor([float(item.sample.logprobs.sum()) for item in items])
    chosen, rejected = _places(pairs, part)
    total = implicit_reward_sum(
        sums[chosen], sums[rejected], reference_sums[chosen], reference_sums[rejected], beta
    )
    return float(total)


def _places(pairs: list[PreferencePair], part: list[int]) -> tuple[list[int], list[int]]:
    row_of = {index: row for row, index in enumerate(part)}
    return [row_of[pair.chosen] for pair in pairs], [row_of[pair.rejected] for pair in pairs]


def _rows(flat: torch.Tensor, lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """[N] values row after row → [B, T] padded with 0, and the mask of real entries."""
    lens = torch.tensor(lengths, device=flat.device)
    mask = torch.arange(int(lens.max()), device=flat.device)[None, :] < lens[:, None]
    return torch.zeros(mask.shape, dtype=flat.dtype, device=flat.device).masked_scatter(mask, flat), mask


def add_stats(total: dict[str, torch.Tensor], part: dict[str, torch.Tensor]) -> None:
    """Add one micro-batch's statistics to the step's, in place."""
    for name, value in part.items():
        if name not in total:
            total[name] = value
        else:
            total[name] = torch.maximum(total[name], value) if name in MAX_NAMES else total[name] + value


def reduce_stats(stats: dict[str, torch.Tensor], device: torch.device, world_size: int) -> dict[str, float]:
    """Sum (or maximum) over ranks. A name that no rank has is left out."""
    zero = torch.zeros((), dtype=torch.float64, device=device)
    names = (*STAT_NAMES, *MAX_NAMES)
    unknown = set(stats) - set(names)
    if unknown:
        raise KeyError(f"statistics without a place in STAT_NAMES or MAX_NAMES: {sorted(unknown)}")
    present = torch.tensor([float(name in stats) for name in names], dtype=torch.float64, device=device)
    sums = torch.stack([stats.get(name, zero).double() for name in STAT_NAMES])
    maxima = torch.stack([stats.get(name, zero).double() for name in MAX_NAMES])
    if world_size > 1:
        dist.all_reduce(present)
        dist.all_reduce(sums)
        dist.all_reduce(maxima, op=dist.ReduceOp.MAX)
    values = [*sums.tolist(), *maxima.tolist()]
    return {name: value for name, value, have in zip(names, values, present.tolist(), strict=True) if have}
