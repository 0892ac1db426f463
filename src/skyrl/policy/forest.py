"""Prompts once: all answers to a prompt in one row, and all prompts of a micro-batch one after the other, no padding.

A micro-batch is a forest. Each prompt is the trunk of a tree, its answers are the branches, and what two answers have
in common at their beginning is one branch until they part. The columns of the row are the tokens of all trees in
depth-first order. So what a token sees in its own plain row are those columns up to its own whose subtree it is in, and
its place there is its depth. Equal answers are one branch. Log-probabilities and gradients are those of plain rows
(:meth:`skyrl.policy.encode.PromptEncoder.collate`).

Example: answers ``5 6 7`` and ``5 8`` to the prompt ``1 2`` are the columns ``1 2 5 6 7 8`` of depths ``0 1 2 3 4 3``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from skyrl.policy.encode import TYPE_KEYS, EncodedBatch, PromptEncoder
from skyrl.policy.packing import Row, common_beginning, distinct_rows


@dataclass(slots=True)
class Forest:
    """The structure of a micro-batch; S columns."""

    trees: list[Row]
    """Of each tree, one after the other: prompt, its ids, and all branches' tokens."""
    ends: np.ndarray
    """int64 [S]: the column behind the token's subtree. Column q sees column k if ``k <= q < ends[k]``."""
    depths: np.ndarray
    """int64 [S]: the token's column in a plain row."""
    parents: np.ndarray
    """int64 [S]: the column of the token before it in its plain row; a prompt's first token names itself."""
    places: np.ndarray
    """int64 [N]: of each answer token of the given rows, row after row, its place among the branches' tokens."""

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Forest:
        members: dict[tuple[tuple[str, str], bytes], list[int]] = {}
        for i, (prompt, prompt_ids, _) in enumerate(rows):
            members.setdefault((prompt.key, prompt_ids.tobytes()), []).append(i)
        most = sum(len(prompt_ids) + len(answer_ids) for _, prompt_ids, answer_ids in rows)
        ends, depths, parents = (np.zeros(most, np.int64) for _ in range(3))
        trees: list[Row] = []
        paths = [np.zeros(0, np.int64)] * len(rows)
        column = prompts = 0  # those that are taken, and how many of them are prompts'
        for tree in members.values():
            prompt, prompt_ids, _ = rows[tree[0]]
            start, trunk = column, column + len(prompt_ids)
            depths[start:trunk] = np.arange(len(prompt_ids))
            parents[start:trunk] = np.maximum(np.arange(start, trunk) - 1, start)
            column, prompts = trunk, prompts + len(prompt_ids)
            last, path, branches = np.zeros(0, np.int32), np.zeros(0, np.int64), [np.zeros(0, np.int32)]
            # Sorted by their bytes, so that those of one beginning stand together.
            for i in sorted(tree, key=lambda i: rows[i][2].tobytes()):
                answer = rows[i][2]
                shared = common_beginning(last, answer)
                ends[path[shared:]] = column  # nothing more will grow there
                new = np.arange(column, column + len(answer) - shared)
                depths[new], parents[new] = len(prompt_ids) + shared + new - column, new - 1
                parents[new[:1]] = path[shared - 1] if shared else trunk - 1
                last, path = answer, np.concatenate([path[:shared], new])
                branches.append(answer[shared:])
                paths[i], column = path - prompts, column + len(new)
            ends[path] = ends[start:trunk] = column
            trees.append((prompt, prompt_ids, np.concatenate(branches)))
        return cls(trees, ends[:column], depths[:column], parents[:column], np.concatenate(paths))


def collate_forest(rows: Sequence[Row], encoder: PromptEncoder) -> tuple[EncodedBatch, np.ndarray]:
    """The rows, at least one, as one row of S columns without padding, for a model prepared by
    :func:`skyrl.policy.attention.share_prompts`; and their ``places`` (see :class:`Forest`).

    Raises:
        DataError: as :meth:`skyrl.policy.encode.PromptEncoder.collate`.
    """
    forest = Forest.of(rows)
    trees = encoder.collate(forest.trees)
    real = trees.attention_mask.bool()
    ends, depths, parents = (torch.from_numpy(array) for array in (forest.ends, forest.depths, forest.parents))
    pictures = {name: t[real][None] if name in TYPE_KEYS else t for name, t in trees.pictures.items()}
    ids, answers = trees.input_ids[real][None], trees.answer_mask[real][None]
    return EncodedBatch(ids, ends[None, None, None], answers, pictures, depths[None], parents), forest.places


@dataclass(slots=True)
class Rows:
    """Rows for one forward pass, with nothing twice: equal ones, or in a forest whatever two have in common."""

    encoded: EncodedBatch
    """The distinct rows, or the forest, with M answer tokens."""
    places: torch.Tensor
    """int64 [N]: of each answer token of all rows, row after row, its place among the M: ``logprobs[places]`` are all
    rows' log-probabilities, and the gradients of equal ones add up."""

    @classmethod
    def of(cls, rows: Sequence[Row], encoder: PromptEncoder, device: torch.device, forest: bool) -> Rows:
        if forest:
            encoded, places = collate_forest(rows, encoder)
            return cls(encoded.to(device), torch.from_numpy(places).to(device))
        kept, of_row = distinct_rows(rows)
        lengths = [len(answer_ids) for _, _, answer_ids in kept]
        starts = np.cumsum([0, *lengths])
        places = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in of_row])
        return cls(encoder.collate(kept).to(device), torch.from_numpy(places).to(device))
