"""Squashing and the sum of the reward's parts."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from skyrl.records import ConfigError, DataError
from skyrl.rewards.hybrid import hybrid_reward, squash
from skyrl.settings import RewardConfig, Squash

SCORES = np.array([-2.0, 0.0, 4.0], dtype=np.float32)
RULE, FORMAT = np.array([1.0, 0.0, 0.5]), np.array([1.0, 1.0, 0.0])


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        (Squash.none, [-2.0, 0.0, 4.0]),
        (Squash.sigmoid, [1 / (1 + math.e), 0.5, 1 / (1 + math.exp(-2))]),
        (Squash.tanh, [math.tanh(-1), 0.0, math.tanh(2)]),
        # mean 2/3, variance (64 + 4 + 100) / 27 = 56 / 9.
        (Squash.group_standardise, [-8 / math.sqrt(56), -2 / math.sqrt(56), 10 / math.sqrt(56)]),
    ],
)
def test_squash(how: Squash, expected: list[float]) -> None:
    np.testing.assert_allclose(squash(SCORES, how, 2.0), expected, atol=1e-6)


@given(st.lists(st.floats(-1e30, 1e30), min_size=1, max_size=8), st.floats(0.01, 100))
def test_squash_keeps_the_order_and_the_range(scores: list[float], scale: float) -> None:
    ordered = np.sort(np.array(scores))
    with np.errstate(all="raise", under="ignore"):
        sigmoid, tanh = squash(ordered, Squash.sigmoid, scale), squash(ordered, Squash.tanh, scale)
    assert (np.diff(sigmoid) >= 0).all() and (np.diff(tanh) >= 0).all()
    assert sigmoid.min() >= 0 and sigmoid.max() <= 1 and tanh.min() >= -1 and tanh.max() <= 1


def test_standardised_ties_are_zeros() -> None:
    assert not squash(np.array([0.1, 0.1, 0.1]), Squash.group_standardise, 1.0).any()
    assert not squash(np.array([3.3, 3.3000002, 3.3], dtype=np.float32), Squash.group_standardise, 1.0).any()


def test_papers_raw_sum() -> None:
    cfg = RewardConfig(model_weight=1.0, format_weight=1.0, squash=Squash.none)
    np.testing.assert_allclose(hybrid_reward(RULE, SCORES, FORMAT, cfg), [0.0, 1.0, 4.5])


def test_weights_and_squash() -> None:
    cfg = RewardConfig(model_weight=0.5, format_weight=0.1, squash=Squash.sigmoid, squash_scale=2.0)
    # 1 + 0.5 * 0.268941 + 0.1;  0 + 0.5 * 0.5 + 0.1;  0.5 + 0.5 * 0.880797
    np.testing.assert_allclose(hybrid_reward(RULE, SCORES, FORMAT, cfg), [1.234471, 0.35, 0.940399], atol=1e-6)


def test_no_reward_model_adds_nothing() -> None:
    np.testing.assert_allclose(hybrid_reward(RULE, None, FORMAT, RewardConfig()), [1.1, 0.1, 0.5])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_broken_reward_model_is_an_error(bad: float) -> None:
    with pytest.raises(DataError, match="model"):
        hybrid_reward(RULE, np.array([0.0, bad, 0.0]), FORMAT, RewardConfig())


def test_shapes_must_agree() -> None:
    with pytest.raises(DataError, match="shape"):
        hybrid_reward(RULE, SCORES[:2], FORMAT, RewardConfig())


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan])
def test_scale_must_be_positive(scale: float) -> None:
    with pytest.raises(ConfigError, match="squash_scale"):
        squash(SCORES, Squash.sigmoid, scale)
