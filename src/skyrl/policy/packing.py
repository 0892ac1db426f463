"""Which rank runs which items in which micro-batch: pure functions of the rows, the same on every rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from skyrl.records import PreferencePair, Prompt, TrainItem

MicroBatch = list[int]
"""Indices into ``TrainBatch.items``."""
Row = tuple[Prompt, np.ndarray, np.ndarray]
"""Prompt, its ids int32 [P] as the model that runs sees them, answer ids int32 [T]."""


def distinct_rows(rows: Sequence[Row]) -> tuple[list[Row], list[int]]:
    """The different rows in order of their first appearance, and for each given row its place among them.

    A sure policy often repeats its answer; equal rows have equal log-probabilities and need one forward pass.

    Example: rows a, b, a give ``([a, b], [0, 1, 0])``.
    """
    keys = [(prompt.key, answer_ids.tobytes()) for prompt, _, answer_ids in rows]
    kept: dict[tuple[tuple[str, str], bytes], Row] = {}
    for key, row in zip(keys, rows, strict=True):
        kept.setdefault(key, row)
    places = {key: place for place, key in enumerate(kept)}
    return list(kept.values()), [places[key] for key in keys]


def plan_micro_batches(
    lengths: list[int], pairs: list[PreferencePair], num_ranks: int, token_budget: int
) -> list[list[MicroBatch]]:
    """Deal items to ranks and pack each rank's share into micro-batches of similar length: ``plan[rank]``.

    Both members of a preference pair stay in one micro-batch, so that the preference loss needs no second forward pass.
    Every rank gets the same number of micro-batches, because forward passes are collective under ZeRO-3; a rank that
    has fewer is filled up with empty ones (see :func:`ghost_row`).

    Args:
        lengths: Prompt plus answer tokens of each item.
        pairs: Pairs of item indices; an item may be in one pair only.
        token_budget: Largest ``rows x longest row`` of a micro-batch. A unit (an item or a pair) that is larger on its
            own still gets a micro-batch of its own.

    Example: four items of length 10, a budget of 20 and one rank give two micro-batches of two.
    """
    in_pair = {index for pair in pairs for index in (pair.chosen, pair.rejected)}
    units = [[pair.chosen, pair.rejected] for pair in pairs] + [[i] for i in range(len(lengths)) if i not in in_pair]
    units.sort(key=lambda unit: (-max(lengths[i] for i in unit), unit))
    plan: list[list[MicroBatch]] = [[] for _ in range(num_ranks)]
    loads = [0] * num_ranks
    for unit in units:  # longest first, each to the rank with the least work
        rank = loads.index(min(loads))
        loads[rank] += sum(lengths[i] for i in unit)
        parts = plan[rank]
        # No later unit is longer, so a micro-batch's first row is its longest.
        if parts and (len(parts[-1]) + len(unit)) * lengths[parts[-1][0]] <= token_budget:
            parts[-1] += unit
        else:
            parts.append(sorted(unit, key=lambda i: -lengths[i]))
    most = max(len(parts) for parts in plan)
    return [parts + [[] for _ in range(most - len(parts))] for parts in plan]


def common_beginning(one: np.ndarray, other: np.ndarray) -> int:
    """How many tokens two answers have in common before they part."""
    most = min(len(one), len(other))
    differ = one[:most] != other[:most]
    return int(differ.argmax()) if differ.any() else most


def forest_tokens(rows: Sequence[Row]) -> int:
    """Tokens that a forest of the rows runs: each prompt once, and once what its answers have in common."""
    trees: dict[tuple[str, str], tuple[int, list[np.ndarray]]] = {}
    for prompt, prompt_ids, answer_ids in rows:
        trees.setdefault(prompt.key, (len(prompt_ids), []))[1].append(answer_ids)
    total = 0
    for trunk, answers in trees.values():
        answers.sort(key=np.ndarray.tobytes)
        shared = sum(common_beginning(one, other) for one, other in pairwise(answers))
        total += trunk + sum(map(len, answers)) - shared
    return total


def plan_forests(
    rows: Sequence[Row], pairs: list[PreferencePair], num_ranks: int, token_budget: int
) -> list[list[MicroBatch]]:
    """As :func:`plan_micro_batches`, for micro-batches that are forests: the answers to a prompt stay together as long
    as they fit, and the ranks' work does not become uneven by it.

    Args:
        token_budget: Largest number of tokens of a micro-batch, those that are shared counted once. A single item or
            pair that is larger on its own still gets a micro-batch of its own.
    """
    in_pair = {index for pair in pairs for index in (pair.chosen, pair.rejected)}
    units = [[pair.chosen, pair.rejected] for pair in pairs] + [[i] for i in range(len(rows)) if i not in in_pair]
    groups: dict[tuple[str, str], list[list[int]]] = {}
    for unit in sorted(units, key=lambda unit: (rows[unit[0]][2].tobytes(), unit)):  # common beginnings together
        groups.setdefault(rows[unit[0]][0].key, []).append(unit)

    def size(items: list[int]) -> int:
        return forest_tokens([rows[i] for i in items])

    plan, uneven = [], np.inf
    pieces = 1
    while pieces <= num_ranks:
        cut = [part for group in groups.values() for part in _pieces(group, pieces, size, token_budget)]
        dealt, loads = _deal([(size(part), part) for part in cut], num_ranks, token_budget)
        if max(loads) < uneven:
            plan, uneven = dealt, max(loads)
        if max(loads) <= 1.1 * sum(loads) / num_ranks:  # finer pieces run prompts more than once
            break
        pieces *= 2
    return plan


def _pieces(group: list[list[int]], pieces: int, size: Callable[[list[int]], int], budget: int) -> list[list[int]]:
    """Units of one prompt in so many pieces of about equal work, or in more where the budget asks for it."""
    whole = [i for unit in group for i in unit]
    total = size(whole)
    if pieces == 1 and total <= budget:
        return [whole]
    share = -(-len(whole) // pieces)
    found: list[list[int]] = []
    for unit in group:
        if found and len(found[-1]) + len(unit) <= share and size(found[-1] + unit) <= budget:
            found[-1] += unit
        else:
            found.append(list(unit))
    return found


def _deal(units: list[tuple[int, list[int]]], num_ranks: int, budget: int) -> tuple[list[list[MicroBatch]], list[int]]:
    """Units of (tokens, items): the largest first to the rank with the least work, and there to the first micro-batch
    with room. Returns ``plan[rank]`` and each rank's tokens."""
    plan: list[list[MicroBatch]] = [[] for _ in range(num_ranks)]
    room: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [0] * num_ranks
    for tokens, items in sorted(units, key=lambda unit: (-unit[0], unit[1])):
        rank = loads.index(min(loads))
        loads[rank] += tokens
        place = next((at for at, left in enumerate(room[rank]) if left >= tokens), None)
        if place is None:
            place = len(plan[rank])
            plan[rank].append([])
            room[rank].append(budget)
        plan[rank][place] += items
        room[rank][place] -= tokens
    most = max(len(parts) for parts in plan)
    return [parts + [[] for _ in range(most - len(parts))] for parts in plan], loads


def ghost_row(items: list[TrainItem], part: MicroBatch) -> int | None:
    """The item to run beside ``part`` with weight 0, or None if none is needed.

    Every forward pass of a step must run the same modules: under ZeRO-3 the passes are collective module by module, and
    in every stage a gradient that only some ranks have would be averaged with another parameter's. So a micro-batch
    that is empty, or has no picture in a step with pictures, gets a ghost: the step's shortest item with a picture (the
    shortest item if the step has no picture).

    Args:
        items: The items of the whole step, at least one.
        part: One micro-batch of the plan, indices into them.
    """
    pictured = [i for i, item in enumerate(items) if item.prompt.images]
    if part and (not pictured or any(items[i].prompt.images for i in part)):
        return None
    return min(pictured or range(len(items)), key=lambda i: len(items[i].prompt_ids) + len(items[i].sample.token_ids))
