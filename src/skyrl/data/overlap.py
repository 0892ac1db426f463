"""Whether prompts to evaluate on are also trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from skyrl.data.datasets import PromptDataset
from skyrl.records import Check, DataError, Prompt, Turn

LOOKED_AT = 64
"""Pairs of rows that are made, with their pictures, to be compared."""


PLACE = "<image>"
"""Where pictures inside a file are passed over, it stays in the text."""


class Overlap(NamedTuple):
    """Evaluation prompts that also stand in the training data."""

    same: str
    """How many: at least so many, where not all were looked at."""
    first: tuple[str, str]
    """Ids of the first one, in the evaluation and in the training data."""

    @property
    def number(self) -> int:
        return int(self.same.rpartition(" ")[2])


def overlap(held_out: PromptDataset, train: PromptDataset) -> Overlap | None:
    """Prompts that stand in both, by conversation, truth and pictures; None if none was found, or if the data sets are
    neither files nor lists and can't be gone through.

    Texts are compared by their hashes, all of them; pictures of :data:`LOOKED_AT` pairs of rows at most. Where several
    rows have one text, the first is compared with the first, the second with the second, and so on.
    """
    theirs, ours = contents(held_out), contents(train)
    if theirs is None or ours is None:
        return None
    order = np.argsort(ours, kind="stable")
    starts, ends = (np.searchsorted(ours[order], theirs, side) for side in ("left", "right"))
    found = np.flatnonzero(ends > starts)
    rank = np.empty(len(theirs), dtype=np.int64)
    alike = np.argsort(theirs, kind="stable")
    rank[alike] = np.arange(len(theirs)) - np.searchsorted(theirs[alike], theirs[alike])
    pairs = [(int(row), int(order[starts[row] + rank[row] % (ends[row] - starts[row])])) for row in found]
    looked_at = pairs
    if len(pairs) > LOOKED_AT:
        looked_at = [pairs[place] for place in np.linspace(0, len(pairs) - 1, LOOKED_AT).astype(int)]
    same = [both for one, other in looked_at if (both := _same(held_out, one, train, other))]
    if not same:
        return None
    return Overlap(f"{'at least ' if len(looked_at) < len(pairs) else ''}{len(same)}", same[0])


def contents(dataset: PromptDataset) -> np.ndarray | None:
    """int64 [N], hashes of conversation and truth of all rows; they hold for this process only."""
    if isinstance(dataset, list):
        return np.array([_of(prompt) for prompt in dataset], dtype=np.int64)
    found: np.ndarray | None = getattr(dataset, "contents", None)
    return found


def content(turns: Sequence[Turn], checks: Sequence[Check]) -> int:
    """Hash of a conversation, without its pictures and their places, and of its truths."""
    said = ["".join(part for part in turn.parts if part is not None) for turn in turns]
    return hash((*(text.replace(PLACE, "").strip() for text in said), *(check.truth for check in checks)))


def _of(prompt: Prompt) -> int:
    return content(prompt.conversation, prompt.all_checks)


def _same(held_out: PromptDataset, row: int, train: PromptDataset, other: int) -> tuple[str, str] | None:
    """The ids of two rows that are one prompt."""
    try:
        one, two = held_out[row], train[other]
    except DataError:  # a broken picture: the check of the rows names it
        return None
    alike = _of(one) == _of(two) and len(one.images) == len(two.images)
    return (one.id, two.id) if alike and all(map(np.array_equal, one.images, two.images)) else None
