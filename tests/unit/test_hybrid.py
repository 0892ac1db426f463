"""Squashing and the sum of the reward's parts."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from skyrl.records import ConfigError, DataError
from skyrl.rewards.hybrid import group_advantages, hybrid_reward, length_penalty, squash
from skyrl.settings import RewardConfig, Squash, Std

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
    np.testing.assert_allclose(hybrid_reward(RULE, SCORES, FORMAT, cfg)[0], [0.0, 1.0, 4.5])


def test_weights_and_squash() -> None:
    cfg = RewardConfig(model_weight=0.5, format_weight=0.1, squash=Squash.sigmoid, squash_scale=2.0)
    # 1 + 0.5 * 0.268941 + 0.1;  0 + 0.5 * 0.5 + 0.1;  0.5 + 0.5 * 0.880797
    np.testing.assert_allclose(hybrid_reward(RULE, SCORES, FORMAT, cfg)[0], [1.234471, 0.35, 0.940399], atol=1e-6)


def test_no_reward_model_adds_nothing() -> None:
    np.testing.assert_allclose(hybrid_reward(RULE, None, FORMAT, RewardConfig())[0], [1.1, 0.1, 0.5])


def test_length_penalty_is_added() -> None:
    total, _ = hybrid_reward(RULE, None, FORMAT, RewardConfig(), np.array([0.0, -0.25, -1.0]))
    np.testing.assert_allclose(total, [1.1, -0.15, -0.5])


@pytest.mark.parametrize(
    ("tokens", "penalty"),
    # DAPO's own figures: 16,384 expected and a cache of 4,096 tokens.
    [
        *((0, 0.0), (16_384, 0.0), (16_385, -1 / 4096), (17_408, -0.25), (18_432, -0.5), (20_479, -4095 / 4096)),
        *((20_480, -1.0), (20_481, -1.0), (10**9, -1.0)),
    ],
)
def test_soft_overlong_punishment_by_hand(tokens: int, penalty: float) -> None:
    (found,) = length_penalty(np.array([tokens]), 20_480, 4096)
    assert found == pytest.approx(penalty, abs=1e-15)


@given(st.lists(st.integers(0, 300), min_size=1, max_size=20), st.integers(1, 200), st.integers(1, 200))
def test_soft_overlong_punishment_is_eq_13(lengths: list[int], longest: int, margin: int) -> None:
    def equation(y: int) -> float:
        if y <= longest - margin:
            return 0.0
        return ((longest - margin) - y) / margin if y <= longest else -1.0

    if margin > longest:
        with pytest.raises(ConfigError, match=f"soft_penalty_tokens is {margin}; allowed: 1 … .*is {longest}"):
            length_penalty(np.array(lengths), longest, margin)
        return
    found = length_penalty(np.array(lengths), longest, margin)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, [equation(y) for y in lengths], rtol=0, atol=1e-15)


RAW = RewardConfig(model_weight=1.0, format_weight=1.0, squash=Squash.none)
ULPS = np.array([0, 1, -2, 3])


@pytest.mark.parametrize("squash", [Squash.none, Squash.sigmoid, Squash.tanh])
@pytest.mark.parametrize("size", [10.0, -10.0, 1e4, 1e9])
def test_reward_model_noise_alone_is_a_tie_and_a_large_score_hides_nothing(size: float, squash: Squash) -> None:
    cfg = RewardConfig(model_weight=1.0, format_weight=1.0, squash=squash)
    equal = np.float32(size) + ULPS.astype(np.float32) * np.spacing(np.float32(abs(size)))
    ones, rule = np.ones(4), np.array([1.0, 0.0, 1.0, 0.0])
    total, noise = hybrid_reward(ones, equal, ones, cfg)
    assert not group_advantages(total, Std.population, noise).any()
    # All answers have one and the same score, as large as you like: right and wrong are all the difference.
    total, noise = hybrid_reward(rule, np.full(4, equal[0]), ones, cfg)
    np.testing.assert_allclose(group_advantages(total, Std.population, noise), [1, -1, 1, -1], atol=1e-6)


def test_parts_that_cancel_are_a_tie() -> None:
    model = np.array([0.5, 1.5 + 3e-7])
    total, noise = hybrid_reward(np.array([1.0, 0.0]), model, np.ones(2), RAW)
    assert total[0] != total[1] and not group_advantages(total, Std.population, noise).any()
    total, noise = hybrid_reward(np.array([1.0, 0.0]), model + np.array([0.0, 1e-4]), np.ones(2), RAW)
    np.testing.assert_allclose(group_advantages(total, Std.population, noise), [-1, 1])


def test_no_scored_sample_has_no_reward() -> None:
    total, noise = hybrid_reward(np.zeros(0), np.zeros(0), np.zeros(0), RewardConfig())
    assert total.shape == (0,) and noise == 1e-6


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
