"""The order of the prompts, and going on exactly where it stopped."""

from __future__ import annotations

import json
from collections import Counter
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skyrl.data.stream import MixedStream, PromptStream, prompt_stream, rows_used, shares
from skyrl.records import DataError


@given(size=st.integers(1, 30), seed=st.integers(0, 5), takes=st.lists(st.integers(0, 30), max_size=12))
def test_no_row_twice_in_a_take_and_each_once_per_epoch(size: int, seed: int, takes: list[int]) -> None:
    stream = PromptStream(size, seed)
    rows: list[int] = []
    for n in takes:
        part = stream.take(n)
        assert len(part) == n
        if n <= size:
            assert len(set(part)) == n
        rows += part
    for start in range(0, len(rows) - size + 1, size):
        assert sorted(rows[start : start + size]) == list(range(size))


@given(
    size=st.integers(1, 20),
    before=st.lists(st.integers(0, 25), max_size=6),
    after=st.lists(st.integers(0, 25), max_size=6),
)
def test_a_loaded_stream_goes_on_with_the_same_rows(size: int, before: list[int], after: list[int]) -> None:
    stream = PromptStream(size, seed=3)
    for n in before:
        stream.take(n)
    state = json.loads(json.dumps(stream.state_dict()))  # checkpoints keep it as JSON
    resumed = PromptStream(size, seed=3)
    resumed.load_state_dict(state)
    assert [stream.take(n) for n in after] == [resumed.take(n) for n in after]
    assert stream.state_dict() == resumed.state_dict()


def test_the_order_is_shuffled_anew_each_epoch_and_by_seed() -> None:
    stream = PromptStream(50, seed=0)
    first, second = stream.take(50), stream.take(50)
    assert first != second and first != tuple(range(50))
    assert first == PromptStream(50, seed=0).take(50) != PromptStream(50, seed=1).take(50)
    assert {type(row) for row in first} == {int}


def test_more_rows_than_there_are() -> None:
    counts = Counter(PromptStream(4, seed=0).take(12))
    assert counts == {0: 3, 1: 3, 2: 3, 3: 3}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 9}, "saved prompt stream has size 9, this run 10"),
        ({"seed": 1}, "saved prompt stream has seed 1, this run 0"),
        ({"position": 11}, "out of range"),
        ({"epoch": -1}, "out of range"),
        ({"taken": [10]}, "out of range"),
        ({"taken": [1, 2], "head": 9}, "out of range"),
        ({"more": 1}, "allowed: exactly"),
    ],
)
def test_a_state_of_another_run_is_refused_and_changes_nothing(change: dict[str, object], message: str) -> None:
    stream = PromptStream(10, seed=0)
    stream.take(7)
    state = stream.state_dict()
    with pytest.raises(DataError, match=message):
        stream.load_state_dict(state | change)
    assert stream.state_dict() == state


@pytest.mark.parametrize(("size", "seed"), [(0, 0), (5, -1)])
def test_impossible_sizes_and_seeds(size: int, seed: int) -> None:
    with pytest.raises(DataError, match="allowed: 1 or more, and 0 or more"):
        PromptStream(size, seed)


def test_a_negative_take() -> None:
    with pytest.raises(DataError, match="asked for -1 rows"):
        PromptStream(3, 0).take(-1)


# ---------------------------------------------------------------- mixtures


@given(
    sizes=st.lists(st.integers(8, 30), min_size=2, max_size=4),
    weights=st.lists(st.floats(0.1, 10), min_size=4, max_size=4),
    takes=st.lists(st.integers(0, 8), min_size=1, max_size=12),
)
def test_the_share_of_each_part_follows_its_weight_in_every_step(
    sizes: list[int], weights: list[float], takes: list[int]
) -> None:
    weights = weights[: len(sizes)]
    stream, starts = MixedStream(sizes, weights, seed=0), [0, *accumulate(sizes)]
    counts, drawn = [0] * len(sizes), [list[int]() for _ in sizes]
    for n in takes:
        rows = stream.take(n)
        assert len(rows) == n and len(set(rows)) == n
        for row in rows:
            place = max(p for p in range(len(sizes)) if starts[p] <= row)
            counts[place] += 1
            drawn[place].append(row - starts[place])
        total = sum(counts)
        # Always giving to the part that is most behind keeps each within one row of its share, two for many parts.
        for count, weight in zip(counts, weights, strict=True):
            assert abs(count - total * weight / sum(weights)) < len(sizes)
    for size, rows_of_part in zip(sizes, drawn, strict=True):
        for start in range(0, len(rows_of_part) - size + 1, size):  # its own epochs
            assert sorted(rows_of_part[start : start + size]) == list(range(size))


def test_shares_by_hand() -> None:
    stream = MixedStream([6, 100], [1, 3], seed=0)
    for _ in range(5):
        assert sum(row < 6 for row in stream.take(4)) == 1
    assert shares([1, 1, 1], 4) == [2, 1, 1] and shares([3, 1], 4) == [3, 1] and shares([1, 2], 0) == [0, 0]


def test_a_mixture_goes_on_where_it_was_saved() -> None:
    one, two = MixedStream([9, 5], [2, 1], seed=3), MixedStream([9, 5], [2, 1], seed=3)
    for n in (4, 7, 1):
        one.take(n)
    two.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert [one.take(n) for n in (5, 9, 2)] == [two.take(n) for n in (5, 9, 2)]
    assert one.state_dict() == two.state_dict()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (MixedStream([9, 5], [1, 1], 3), "the saved prompt stream has the weights .*0.5.* this run .*data.weights"),
        (MixedStream([9, 4], [2, 1], 3), "size 4, this run 5"),
        (MixedStream([9, 5], [2, 1], 4), "seed"),
        (MixedStream([9, 5, 2], [2, 1, 1], 3), "weights"),
        (PromptStream(14, 3), "the weights of one file, this run"),
    ],
)
def test_a_position_in_another_mixture_is_refused_and_changes_nothing(other: MixedStream, message: str) -> None:
    stream = MixedStream([9, 5], [2, 1], 3)
    stream.take(5)
    before = stream.state_dict()
    with pytest.raises(DataError, match=message):
        stream.load_state_dict(other.state_dict())
    assert stream.state_dict() == before


def test_one_file_has_the_plain_stream_whatever_its_weight() -> None:
    assert prompt_stream([50], 7, 8, [3.0]).take(20) == PromptStream(50, 7).take(20)
    assert prompt_stream([50], 7, 8, None, range(10, 30)).take(20) == PromptStream(20, 7).take(20)


def test_a_mixture_of_chosen_rows_counts_what_is_left_of_each_file() -> None:
    rows = [0, 1, 2, 3, 4, 12, 15, 17, 18]  # five of the first ten, four of the others
    stream = prompt_stream([10, 10], 0, 4, [1, 1], rows)
    places = stream.take(4)
    assert sum(place < 5 for place in places) == 2 and max(places) < len(rows)
    with pytest.raises(
        DataError, match=r"file 2 of data.train_path has 2 prompts to train on, but its share .* may be 3"
    ):
        prompt_stream([10, 10], 0, 4, [1, 1], rows[:7])
    with pytest.raises(DataError, match=r"file 2 of data.train_path has 0 prompts"):
        prompt_stream([10, 10], 0, 4, None, rows[:5])


def test_weights_that_are_none() -> None:
    for weights in ([1.0], [1.0, 0.0], [1.0, -1.0]):
        with pytest.raises(DataError, match="allowed: one above 0 for each"):
            MixedStream([5, 5], weights, 0)


@given(takes=st.lists(st.integers(0, 30), max_size=12), mixed=st.booleans())
def test_a_state_says_how_many_rows_were_given(takes: list[int], mixed: bool) -> None:
    stream = MixedStream([7, 40], [1.0, 3.0], 0) if mixed else PromptStream(11, 0)
    for n in takes:
        stream.take(n)
    assert rows_used(json.loads(json.dumps(stream.state_dict()))) == sum(takes)
