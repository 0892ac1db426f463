"""Dealing items to ranks and micro-batches: every property of the plan, and the ghost rows that keep ranks in step."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skyrl.policy.packing import (
    Row,
    common_beginning,
    distinct_rows,
    forest_tokens,
    ghost_row,
    plan_forests,
    plan_micro_batches,
)
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


# ---------------------------------------------------------------- forests


@st.composite
def forests(draw: st.DrawFn) -> tuple[list[Row], list[PreferencePair], int, int]:
    """Up to four prompts with answers that begin alike; pairs within a prompt or with its blind variant."""
    count = draw(st.integers(0, 24))
    owners = draw(st.lists(st.integers(0, 3), min_size=count, max_size=count))
    pairs, rows = [], []
    for i, owner in enumerate(owners):
        answer = np.array(draw(st.lists(st.integers(0, 1), min_size=1, max_size=8)), np.int32)
        free = [j for j in range(i) if owners[j] == owner and all(j not in (p.chosen, p.rejected) for p in pairs)]
        blind = False
        if free and draw(st.booleans()):
            pairs.append(PreferencePair(free[0], i, 1.0))
            blind = draw(st.booleans())
        prompt = Prompt(str(owner), "q", (), "1", "exact", variant="blind" if blind else "")
        rows.append((prompt, np.zeros(3 + 7 * owner, np.int32), answer))
    return rows, pairs, draw(st.integers(1, 5)), draw(st.integers(1, 120))


def tokens(rows: list[Row], part: list[int]) -> int:
    return forest_tokens([rows[i] for i in part])


@settings(deadline=None)
@given(forests())
def test_forests_run_every_item_once_and_pairs_together(step: tuple[list[Row], list[PreferencePair], int, int]) -> None:
    rows, pairs, ranks, budget = step
    plan = plan_forests(rows, pairs, ranks, budget)
    assert plan == plan_forests(list(rows), list(pairs), ranks, budget)
    assert len(plan) == ranks and len({len(parts) for parts in plan}) == 1
    assert sorted(i for parts in plan for part in parts for i in part) == list(range(len(rows)))
    members = {frozenset((pair.chosen, pair.rejected)) for pair in pairs}
    for parts in plan:
        filled = [bool(part) for part in parts]
        assert filled == sorted(filled, reverse=True)
        for part in parts:
            assert tokens(rows, part) <= budget or len(part) == 1 or frozenset(part) in members
            assert all(pair <= set(part) or not pair & set(part) for pair in members)
    if rows:
        assert any(all(parts) for parts in plan)


def answers(name: str, prompt: int, *lengths: int) -> list[Row]:
    """Answers that have nothing in common."""
    asked = Prompt(name, "q", (), "1", "exact")
    return [(asked, np.zeros(prompt, np.int32), np.full(t, i, np.int32)) for i, t in enumerate(lengths)]


def test_forests_by_hand() -> None:
    rows = [*answers("a", 10, 5, 5), *answers("b", 10, 5), *answers("a", 10, 9, 9)]
    # Prompt a: the second 5 ends where the second 9 goes on, so 10 + 9 + 9 tokens; b: 15.
    assert tokens(rows, [0, 1, 3, 4]) == 28 and tokens(rows, [2]) == 15
    assert [sorted(part) for part in plan_forests(rows, [], 1, 43)[0]] == [[0, 1, 2, 3, 4]]
    assert [sorted(part) for part in plan_forests(rows, [], 1, 42)[0]] == [[0, 1, 3, 4], [2]]
    # Larger than the budget: cut, and what begins alike stays together.
    assert sorted(sorted(part) for part in plan_forests(rows, [], 1, 19)[0]) == [[0, 3], [1, 4], [2]]
    assert plan_forests([], [], 2, 10) == [[], []]


def test_a_single_prompt_is_shared_by_the_ranks() -> None:
    rows = answers("a", 1000, *[100] * 32)
    plan = plan_forests(rows, [], 4, 8192)
    assert [[len(part) for part in parts] for parts in plan] == [[8]] * 4
    # Two of three ranks would have twice the work of the third if no prompt were run twice.
    rows = [row for name in "abcd" for row in answers(name, 100, *[100] * 8)]
    loads = [sum(tokens(rows, part) for part in parts) for parts in plan_forests(rows, [], 3, 8192)]
    assert max(loads) == 1500 < 1800
    # Even as they are: no prompt runs twice.
    plan = plan_forests(rows, [], 2, 8192)
    assert sum(tokens(rows, part) for parts in plan for part in parts) == 4 * 900


def test_common_beginning() -> None:
    for one, other, want in (([], [], 0), ([1, 2], [1, 2], 2), ([1, 2], [1, 3], 1), ([1], [1, 5], 1), ([2], [1], 0)):
        assert common_beginning(np.array(one, np.int32), np.array(other, np.int32)) == want


# ---------------------------------------------------------------- ghosts


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
