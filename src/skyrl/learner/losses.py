"""From one micro-batch's log-probabilities to its share of the step's loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from skyrl.algorithms.grpo import grpo_loss
from skyrl.algorithms.mpo import implicit_reward_sum, mpo_loss
from skyrl.algorithms.objective import MAX_SUFFIX, combine
from skyrl.config import Aggregation, AlgorithmConfig
from skyrl.types import PreferencePair, SkyrlError, TrainBatch

STAT_NAMES = (
    *("grpo_loss", "grpo_tokens", "grpo_clipped", "grpo_ratio", "grpo_kl_behaviour", "grpo_kl_reference"),
    *("mpo_loss", "mpo_preference", "mpo_quality", "mpo_generation", "mpo_margin", "mpo_correct"),
    *("mpo_chosen_reward", "mpo_rejected_reward", "mpo_pairs", "entropy", "tokens"),
    *("grpo_ratio_max", "fresh_gap_max"),
)
"""Every statistic of a step, in the order in which ranks exchange them; the convention of
:mod:`skyrl.algorithms.grpo` says which are sums and which maxima."""


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
    gap = (current - behaviour).detach().abs().masked_fill(~fresh, 0.0).max().double()
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
    total = implicit_reward_sum(sums[chosen], sums[rejected], reference_sums[chosen], reference_sums[rejected], beta)
    return float(total)


def _places(pairs: list[PreferencePair], part: list[int]) -> tuple[list[int], list[int]]:
    row_of = {index: row for row, index in enumerate(part)}
    return [row_of[pair.chosen] for pair in pairs], [row_of[pair.rejected] for pair in pairs]


def _rows(flat: torch.Tensor, lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """[N] values row after row → [B, T] padded with 0, and the mask of real entries."""
    lens = torch.tensor(lengths, device=flat.device)
    mask = torch.arange(int(lens.max()), device=flat.device)[None, :] < lens[:, None]
    return torch.zeros(mask.shape, dtype=flat.dtype, device=flat.device).masked_scatter(mask, flat), mask


def reduce_stats(stats: Mapping[str, torch.Tensor], device: torch.device, world_size: int) -> dict[str, float]:
    """Statistics of a step over all ranks, from those of each: sums add, ``…_max`` take the maximum.

    A name that no rank has is left out. Collective if ``world_size`` is above 1.

    Raises:
        SkyrlError: for a statistic that :data:`STAT_NAMES` does not know, which would silently be lost.
    """
    unknown = sorted(set(stats) - set(STAT_NAMES))
    if unknown:
        raise SkyrlError(f"statistics {unknown} are not in skyrl.learner.losses.STAT_NAMES")
    zero = torch.zeros((), dtype=torch.float64, device=device)
    values = torch.stack([stats.get(name, zero).double() for name in STAT_NAMES])
    is_max = [name.endswith(MAX_SUFFIX) for name in STAT_NAMES]
    # One exchange of sums: how many ranks have a name, and the value.
    present = torch.tensor([float(name in stats) for name in STAT_NAMES], dtype=torch.float64, device=device)
    sums, maxima = torch.stack([present, values]), values.clone()
    if world_size > 1:
        dist.all_reduce(sums)
        dist.all_reduce(maxima, op=dist.ReduceOp.MAX)
    rows = zip(STAT_NAMES, is_max, sums[0].tolist(), sums[1].tolist(), maxima.tolist(), strict=True)
    return {name: largest if maximum else total for name, maximum, have, total, largest in rows if have}
