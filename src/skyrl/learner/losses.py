"""From one micro-batch's log-probabilities to its share of the step's loss."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from skyrl.objective.grpo import grpo_loss, step_denominator
from skyrl.objective.hybrid import MAX_SUFFIX, combine
from skyrl.objective.kl import kl_k3
from skyrl.objective.mpo import implicit_reward_sum, loss_weights, mpo_loss
from skyrl.records import PreferencePair, Sample, SkyrlError, TrainBatch
from skyrl.settings import AlgorithmConfig, MpoConfig

STAT_NAMES = (
    *("grpo_loss", "grpo_tokens", "grpo_clipped", "grpo_ratio", "grpo_kl_behaviour", "grpo_kl_reference"),
    *("grpo_dual_clipped", "grpo_masked", "grpo_truncated", "grpo_mismatch"),
    *("mpo_loss", "mpo_preference", "mpo_quality", "mpo_generation", "mpo_margin", "mpo_correct"),
    *("mpo_chosen_reward", "mpo_rejected_reward", "mpo_pairs", "mpo_kl", "mpo_tokens", "entropy", "tokens"),
    *("grpo_ratio_max", "fresh_gap_max"),
)
"""Every statistic of a step, in the order in which ranks exchange them; the convention of
:mod:`skyrl.objective.grpo` says which are sums and which maxima."""


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
    max_new_tokens: int,
    progress: float,
) -> MicroLoss:
    """GRPO and MPO from the same forward pass; a term that the stage does not train in this step is left out.

    Args:
        batch: The whole step; its counts are the denominators.
        part: Items of this micro-batch, in the order of its rows.
        logprobs: [N] log π_θ of their answer tokens, row after row, with gradient.
        entropy: [N].
        reference: [N] log π_0, read at pair members (and everywhere with a KL penalty); None where nothing compares
            with it.
        delta: δ of this step.
        cfg: Both algorithms.
        max_new_tokens: ``rollout.max_new_tokens``, the divisor of ``aggregation=fixed``.
        progress: 0 at the first step that may train MPO, 1 at the last, for the weights of the MPO term's parts.
    """
    items = [batch.items[i] for i in part]
    lengths = [len(item.sample.token_ids) for item in items]
    behaviour_flat = torch.from_numpy(np.concatenate([item.sample.logprobs for item in items])).to(logprobs.device)
    current, mask = _rows(logprobs, lengths)
    behaviour, _ = _rows(behaviour_flat, lengths)
    references = None if reference is None else _rows(reference, lengths)[0]

    def per_item(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=logprobs.device)

    weights = cfg.weights(batch.step)
    grpo = mpo = None
    stats: dict[str, torch.Tensor] = {}
    if weights[0] > 0 and any(item.grpo_weight != 0 for item in items):
        grpo, grpo_stats = grpo_loss(
            current,
            behaviour,
            per_item([item.sample.advantage for item in items]),
            mask,
            per_item([item.grpo_weight for item in items]),
            cfg.grpo,
            step_denominator(cfg.grpo.aggregation, batch.grpo_samples, batch.grpo_tokens, max_new_tokens),
            references if cfg.grpo.kl_weight > 0 else None,
        )
        stats |= grpo_stats
    pairs = pairs_in(batch, part)
    if pairs and weights[1] > 0:
        mpo, mpo_stats = _mpo_term(batch, part, current, mask, references, delta, cfg.mpo, progress)
        stats |= mpo_stats
    fresh = torch.tensor([not (item.replayed or unrecorded(item.sample)) for item in items], device=logprobs.device)
    gap = (current - behaviour).detach().abs().masked_fill(~(fresh.unsqueeze(1) & mask), 0.0).max().double()
    stats |= {
        "entropy": entropy.detach().double().sum(),
        "tokens": torch.tensor(float(sum(lengths)), dtype=torch.float64, device=logprobs.device),
        "fresh_gap_max": gap,
    }
    loss = logprobs.sum() * 0.0 if grpo is None and mpo is None else combine(grpo, mpo, weights)
    return MicroLoss(loss, stats)


def _mpo_term(
    batch: TrainBatch,
    part: list[int],
    current: torch.Tensor,
    mask: torch.Tensor,
    references: torch.Tensor | None,
    delta: float,
    cfg: MpoConfig,
    progress: float,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The MPO term of this micro-batch's pairs from [B, T] log-probabilities.

    With a reference it also counts ``mpo_kl``, the k3 of KL(π_θ ‖ π_0) summed over the pair members' tokens, and
    ``mpo_tokens``. On tokens that π_θ did not draw (offline pairs, blind continuations) that is only an indication.
    """
    chosen, rejected = _places(pairs_in(batch, part), part)
    if cfg.reference_free:
        references = None
    sums = (current * mask).sum(1)
    reference_sums = None if references is None else (references * mask).sum(1)
    loss, stats = mpo_loss(
        sums[chosen],
        sums[rejected],
        None if reference_sums is None else reference_sums[chosen],
        None if reference_sums is None else reference_sums[rejected],
        mask.sum(1)[chosen],
        delta,
        cfg,
        len(batch.pairs),
        loss_weights(cfg, progress),
    )
    if references is not None:
        members = [*chosen, *rejected]
        k3 = kl_k3(current.detach()[members], references[members]) * mask[members]
        stats |= {"mpo_kl": k3.double().sum(), "mpo_tokens": mask[members].double().sum()}
    return loss, stats


def pairs_in(batch: TrainBatch, part: list[int]) -> list[PreferencePair]:
    """The pairs whose members this micro-batch holds."""
    present = set(part)
    return [pair for pair in batch.pairs if pair.chosen in present]


def unrecorded(sample: Sample) -> bool:
    """True if the behaviour's log-probabilities are not known: offline pairs, and answers continued without the
    picture. A single nan among numbers is something else: an error that shows in the loss."""
    return bool(np.isnan(sample.logprobs).all())


def pair_sums(
    batch: TrainBatch,
    part: list[int],
    reference: torch.Tensor | None,
    beta: float,
    start: torch.Tensor | None = None,
    scored: Collection[int] = (),
) -> float:
    """Σ (β h_c + β h_r) over this micro-batch's pairs, for δ.

    Pairs are on-policy, so log π_θ at the start of the step is what the rollout recorded and no forward pass is needed,
    except for members without a record or with one that is not exactly the learner's.

    Args:
        batch, part: As in :func:`micro_loss`.
        reference: [N] log π_0, read at pair members; None without a reference.
        beta: β.
        start: [N] log π_θ at the start of the step, read at the items ``scored``; None if there are none.
        scored: Items of the whole step.
    """
    pairs = pairs_in(batch, part)
    if not pairs:
        return 0.0
    items = [batch.items[i] for i in part]
    lengths = [len(item.sample.token_ids) for item in items]
    sums = torch.tensor([float(item.sample.logprobs.sum()) for item in items])
    if start is not None:
        sums = torch.where(torch.tensor([i in scored for i in part]), _row_sums(start, lengths), sums)
    references = None if reference is None else _row_sums(reference, lengths)
    chosen, rejected = _places(pairs, part)
    total = implicit_reward_sum(
        sums[chosen],
        sums[rejected],
        None if references is None else references[chosen],
        None if references is None else references[rejected],
        beta,
    )
    return float(total)


def _row_sums(flat: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """[N] values row after row → float32 [B] sums, on the CPU."""
    rows, mask = _rows(flat.float(), lengths)
    return (rows * mask).sum(1).cpu()


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
