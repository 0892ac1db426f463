"""The order of the prompts, and going on exactly where it stopped."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skyrl.data.stream import PromptStream
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
