"""What one rank runs of a step, and the forward passes without gradient: log π_0, log π_θ before the step, probes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from skyrl.policy.encode import EncodedBatch, PromptEncoder
from skyrl.policy.packing import MicroBatch, Row, distinct_rows, ghost_row, plan_micro_batches
from skyrl.records import SampleGroup, TrainBatch, TrainItem

Forward = Callable[[EncodedBatch], torch.Tensor]
"""Log-probabilities [N] of the answer tokens of a batch."""


@dataclass(slots=True)
class Rows:
    """Rows for one forward pass, equal ones only once."""

    encoded: EncodedBatch
    """The distinct rows, with M answer tokens."""
    places: torch.Tensor
    """int64 [N]: of each answer token of all rows, row after row, its place among the M: ``logprobs[places]`` are all
    rows' log-probabilities, and the gradients of equal rows add up."""

    @classmethod
    def of(cls, rows: Sequence[Row], encoder: PromptEncoder, device: torch.device) -> Rows:
        kept, of_row = distinct_rows(rows)
        lengths = [len(answer_ids) for _, _, answer_ids in kept]
        starts = np.cumsum([0, *lengths])
        places = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in of_row])
        return cls(encoder.collate(kept).to(device), torch.from_numpy(places).to(device))


def _row(item: TrainItem) -> Row:
    return item.prompt, item.prompt_ids, item.sample.token_ids


@dataclass(slots=True)
class Share:
    """One rank's micro-batches of a step."""

    batch: TrainBatch
    """The whole step, the same on every rank."""
    parts: list[MicroBatch]
    rows: list[Rows]
    """Of each micro-batch, the rows of its items, then of its ghost if it has one."""

    @classmethod
    def of(cls, batch: TrainBatch, parts: list[MicroBatch], encoder: PromptEncoder, device: torch.device) -> Share:
        with_ghosts = [(part, ghost_row(batch.items, part)) for part in parts]
        run = [part if ghost is None else [*part, ghost] for part, ghost in with_ghosts]
        return cls(batch, parts, [Rows.of([_row(batch.items[i]) for i in part], encoder, device) for part in run])

    def tokens(self, part: MicroBatch) -> int:
        """Answer tokens of a micro-batch, masked ones too, without its ghost's."""
        return sum(len(self.batch.items[i].sample.token_ids) for i in part)


def distinct_share(batch: TrainBatch) -> float:
    """Share of the step's items that are left when equal answers to one prompt count once."""
    return len(distinct_rows([_row(item) for item in batch.items])[0]) / len(batch.items)


@torch.no_grad()
def score_share(
    forward: Forward, share: Share, wanted: set[int], encoder: PromptEncoder, device: torch.device, collective: bool
) -> list[torch.Tensor | None]:
    """Per micro-batch, log-probabilities [N] of its answer tokens under ``forward``.

    Args:
        wanted: Items of the whole step, the same on every rank. Only their entries are sure to be there; if there are
            none, nothing runs and every micro-batch has None.
        collective: True under ZeRO-3: every rank runs every micro-batch, whatever it holds.
    """
    if not wanted:
        return [None] * len(share.parts)
    found: list[torch.Tensor | None] = []
    for part, rows in zip(share.parts, share.rows, strict=True):
        keep = [i for i in part if i in wanted]
        if collective or (part and len(keep) == len(part)):
            found.append(forward(rows.encoded)[rows.places[: share.tokens(part)]])
            continue
        filled = torch.zeros(share.tokens(part), device=device)
        if keep:
            kept = np.repeat([i in wanted for i in part], [len(share.batch.items[i].sample.token_ids) for i in part])
            some = Rows.of([_row(share.batch.items[i]) for i in keep], encoder, device)
            filled[torch.from_numpy(kept).to(device)] = forward(some.encoded)[some.places]
        found.append(filled)
    return found


@torch.no_grad()
def score_groups(
    forward: Forward, groups: list[SampleGroup], encoder: PromptEncoder, device: torch.device, token_budget: int
) -> list[np.ndarray]:
    """Log-probabilities float32 [T] of every sample of the groups, in order, in micro-batches of ``token_budget``."""
    rows, places = distinct_rows([(g.prompt, g.prompt_ids, s.token_ids) for g in groups for s in g.samples])
    lengths = [len(prompt_ids) + len(answer_ids) for _, prompt_ids, answer_ids in rows]
    found: dict[int, np.ndarray] = {}
    for part in plan_micro_batches(lengths, [], 1, token_budget)[0]:
        some = [rows[i] for i in part]
        flat = forward(encoder.collate(some).to(device)).cpu().numpy()
        ends = np.cumsum([len(answer_ids) for _, _, answer_ids in some])[:-1]
        found |= dict(zip(part, np.split(flat, ends), strict=True))
    return [found[place] for place in places]
