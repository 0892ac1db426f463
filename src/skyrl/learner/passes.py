"""What one rank runs of a step, and the forward passes without gradient: log π_0, log π_θ before the step, probes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from skyrl.policy.encode import EncodedBatch, PromptEncoder
from skyrl.policy.forest import Rows
from skyrl.policy.packing import MicroBatch, Row, distinct_rows, ghost_row, plan_forests, plan_micro_batches
from skyrl.records import PreferencePair, SampleGroup, TrainBatch, TrainItem

Forward = Callable[[EncodedBatch], torch.Tensor]
"""Log-probabilities [N] of the answer tokens of a batch."""


def plan_rows(
    rows: Sequence[Row], pairs: list[PreferencePair], num_ranks: int, token_budget: int, forest: bool
) -> list[list[MicroBatch]]:
    """Each rank's micro-batches, of forests or of plain rows."""
    if forest:
        return plan_forests(rows, pairs, num_ranks, token_budget)
    lengths = [len(prompt_ids) + len(answer_ids) for _, prompt_ids, answer_ids in rows]
    return plan_micro_batches(lengths, pairs, num_ranks, token_budget)


def row_of(item: TrainItem) -> Row:
    return item.prompt, item.prompt_ids, item.sample.token_ids


@dataclass(slots=True)
class Share:
    """One rank's micro-batches of a step."""

    batch: TrainBatch
    """The whole step, the same on every rank."""
    parts: list[MicroBatch]
    rows: list[Rows]
    """Of each micro-batch, the rows of its items, then of its ghost if it has one."""
    forest: bool

    @classmethod
    def of(
        cls, batch: TrainBatch, parts: list[MicroBatch], encoder: PromptEncoder, device: torch.device, forest: bool
    ) -> Share:
        with_ghosts = [(part, ghost_row(batch.items, part)) for part in parts]
        run = [part if ghost is None else [*part, ghost] for part, ghost in with_ghosts]
        rows = [Rows.of([row_of(batch.items[i]) for i in part], encoder, device, forest) for part in run]
        return cls(batch, parts, rows, forest)

    def tokens(self, part: MicroBatch) -> int:
        """Answer tokens of a micro-batch, masked ones too, without its ghost's."""
        return sum(len(self.batch.items[i].sample.token_ids) for i in part)


def distinct_share(batch: TrainBatch) -> float:
    """Share of the step's items that are left when equal answers to one prompt count once."""
    return len(distinct_rows([row_of(item) for item in batch.items])[0]) / len(batch.items)


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
            some = Rows.of([row_of(share.batch.items[i]) for i in keep], encoder, device, share.forest)
            filled[torch.from_numpy(kept).to(device)] = forward(some.encoded)[some.places]
        found.append(filled)
    return found


@torch.no_grad()
def score_groups(
    forward: Forward,
    groups: list[SampleGroup],
    encoder: PromptEncoder,
    device: torch.device,
    token_budget: int,
    forest: bool = False,
) -> list[np.ndarray]:
    """Log-probabilities float32 [T] of every sample of the groups, in order, in micro-batches of ``token_budget``."""
    rows, places = distinct_rows([(g.prompt, g.prompt_ids, s.token_ids) for g in groups for s in g.samples])
    found: dict[int, np.ndarray] = {}
    for part in plan_rows(rows, [], 1, token_budget, forest)[0]:
        some = Rows.of([rows[i] for i in part], encoder, device, forest)
        flat = forward(some.encoded)[some.places].cpu().numpy()
        ends = np.cumsum([len(rows[i][2]) for i in part])[:-1]
        found |= dict(zip(part, np.split(flat, ends), strict=True))
    return [found[place] for place in places]
