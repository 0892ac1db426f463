"""Repeated n-grams, by hand and against a plain search."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from skyrl.rewards.metrics import SHORT, repeated_share


@pytest.mark.parametrize(
    ("tokens", "share"),
    [
        ([], 0.0),
        ([5, 5, 5], 0.0),  # no 4-gram
        ([5, 5, 5, 5], 0.0),
        ([5] * 10, 6 / 7),  # seven 4-grams, one distinct
        ([1, 2, 3, 4, 1, 2, 3, 4], 1 / 5),  # 1234 twice, 2341, 3412, 4123
        ([1, 2, 3, 4, 5, 1, 2, 3, 5], 0.0),
        ([2**31 - 1, 0, 7, 2**31 - 1] * 2, 1 / 5),
    ],
)
def test_repetition_by_hand(tokens: list[int], share: float) -> None:
    assert repeated_share(np.array(tokens, dtype=np.int32)) == pytest.approx(share)


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 6))
def test_repetition_against_a_set(tokens: list[int], n: int) -> None:
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    want = sum(gram in grams[:i] for i, gram in enumerate(grams)) / len(grams) if grams else 0.0
    assert repeated_share(np.array(tokens, dtype=np.int32), n) == pytest.approx(want)


@pytest.mark.parametrize("kinds", [2, 6, 2**31])
def test_repetition_in_long_answers_against_a_set(kinds: int) -> None:
    """Beyond some length hashes are counted, not tuples."""
    for seed, length in enumerate((SHORT + 3, SHORT + 4, 500, 3000)):
        tokens = np.random.default_rng(seed).integers(0, kinds, length).astype(np.int32)
        grams = list(zip(*(tokens[start:].tolist() for start in range(4)), strict=False))
        assert repeated_share(tokens) == 1 - len(set(grams)) / len(grams)


def test_repetition_of_nonsense() -> None:
    with pytest.raises(ValueError, match="allowed"):
        repeated_share(np.zeros((2, 2), dtype=np.int32))
    with pytest.raises(ValueError, match="allowed"):
        repeated_share(np.zeros(4, dtype=np.int32), 0)
