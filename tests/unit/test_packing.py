"""Dealing items to ranks and micro-batches: every property of the plan, and the ghost rows that keep ranks in step."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from skyrl.policy.packing import distinct_rows, ghost_row, plan_micro_batches
from skyrl.records import PreferencePair, Prompt, Sample, TrainItem


@st.composite
def steps(draw: st.DrawFn) -> tuple[list[int], list[PreferencePair], int, int]:
    lengths = draw(st.lists(st.integers(1, 60), max_size=40))
    order = draw(st.permutations(range(len(lengths))))
    members = order[: 2 * draw(st.integers(0, len(lengths) // 2))]
    pairs = [PreferencePair(c, r, 1.0) for c, r in zip(members[::2], members[1::2], strict=True)]
    return lengths, pairs, draw(st.integers(1, 5)), draw(st.integers(1, 200))


def padded(part: list[int], lengths: list[int]) -> int:
    return len(part) * max((lengths[i] for i in part), default=0)


@given(steps())
def test_every_item_runs_exactly_once(step: tuple[list[int], list[PreferencePair], int, int]) -> None:
    plan = plan_micro_batches(*step)
    assert len(plan) == step[2]
    assert sorted(i for rank in plan for part in rank for i in part) == list(range(len(step[0])))


@given(steps())
def test_pairs_stay_together(step: tuple[list[int], list[PreferencePair], int, int]) -> None:
    parts = [set(part) for rank in plan_micro_batches(*step) for part in rank]
    for pair in step[1]:
        assert any({pair.chosen, pair.rejected} <= part for part in parts)


@given(steps())
def test_ranks_have_equal_numbers_and_empty_ones_come_last(
    step: tuple[list[int], list[PreferencePair], int, int],
) -> None:
    plan = plan_micro_batches(*step)
    assert len({len(rank) for rank in plan}) == 1
    for rank in plan:
        filled = [bool(part) for part in rank]
        assert filled == sorted(filled, reverse=True)
    if step[0]:
        assert any(all(rank) for rank in plan)  # no rank waits for nothing


@given(steps())
def test_only_a_single_unit_may_exceed_the_budget(step: tuple[list[int], list[PreferencePair], int, int]) -> None:
    lengths, pairs, _, budget = step
    units = {frozenset((pair.chosen, pair.rejected)) for pair in pairs}
    for rank in plan_micro_batches(*step):
        for part in rank:
            alone = len(part) == 1 or frozenset(part) in units
            assert padded(part, lengths) <= budget or alone


@given(steps())
def test_the_load_is_even(step: tuple[list[int], list[PreferencePair], int, int]) -> None:
    """Greedy dealing: ranks differ by one unit's length at most."""
    lengths, pairs, _, _ = step
    loads = [sum(lengths[i] for part in rank for i in part) for rank in plan_micro_batches(*step)]
    in_pair = {i for pair in pairs for i in (pair.chosen, pair.rejected)}
    units = [lengths[p.chosen] + lengths[p.rejected] for p in pairs]
    units += [length for i, length in enumerate(lengths) if i not in in_pair]
    assert max(loads) - min(loads) <= max(units, default=0)


@given(steps())
def test_the_plan_is_a_function_of_its_arguments(step: tuple[list[int], list[PreferencePair], int, int]) -> None:
    lengths, pairs, ranks, budget = step
    assert plan_micro_batches(*step) == plan_micro_batches(list(lengths), list(pairs), ranks, budget)


def test_by_hand() -> None:
    assert plan_micro_batches([10, 10, 10, 10], [], 1, 20) == [[[0, 1], [2, 3]]]
    # Longest first: 9 to rank 0; 8 to rank 1; 2 and 1 to whichever has less.
    assert plan_micro_batches([2, 9, 1, 8], [], 2, 1000) == [[[1, 2]], [[3, 0]]]
    # The pair (0, 3) is one unit of padded length 2 x 9 and goes first.
    assert plan_micro_batches([9, 5, 5, 1], [PreferencePair(3, 0, 1.0)], 1, 18) == [[[0, 3], [1, 2]]]
    assert plan_micro_batches([7], [], 3, 10) == [[[0]], [[]], [[]]]
    assert plan_micro_batches([], [], 2, 10) == [[], []]


def item(prompt_tokens: int, answer_tokens: int, picture: bool) -> TrainItem:
    images = (np.zeros((4, 4, 3), dtype=np.uint8),) if picture else ()
    sample = Sample(0, np.zeros(answer_tokens, np.int32), np.zeros(answer_tokens, np.float32), "", False, 0)
    return TrainItem(Prompt("p", "q", images, "1", "exact"), np.zeros(prompt_tokens, np.int32), sample, 1.0)


@pytest.mark.parametrize(
    ("part", "ghost"),
    [
        ([], 2),  # the shortest with a picture
        ([0], 2),  # text only
        ([0, 4], 2),
        ([1], None),
        ([0, 3], None),
    ],
)
def test_ghost_of_a_step_with_pictures(part: list[int], ghost: int | None) -> None:
    items = [item(5, 5, False), item(9, 9, True), item(4, 3, True), item(2, 8, True), item(1, 1, False)]
    assert ghost_row(items, part) == ghost


def test_ghost_of_a_step_without_pictures() -> None:
    items = [item(5, 5, False), item(1, 1, False)]
    assert ghost_row(items, []) == 1
    assert ghost_row(items, [0]) is None


def test_rows_are_equal_in_prompt_variant_and_answer() -> None:
    def row(name: str, variant: str, *answer: int) -> tuple[Prompt, np.ndarray, np.ndarray]:
        return Prompt(name, "q", (), "1", "exact", variant=variant), np.array([1, 2]), np.array(answer, np.int32)

    different = [
        row("a", "", 5, 6),
        row("a", "", 5),
        row("a", "blind", 5, 6),
        row("b", "", 5, 6),
        row("a#blind", "", 5),
    ]
    kept, places = distinct_rows([*different, *different[::-1]])
    assert [(r[0].key, r[2].tolist()) for r in kept] == [(r[0].key, r[2].tolist()) for r in different]
    assert places == [0, 1, 2, 3, 4, 4, 3, 2, 1, 0]
    assert distinct_rows([]) == ([], [])
