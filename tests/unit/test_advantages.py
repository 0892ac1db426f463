"""Group advantages against hand-worked values and their invariants."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from skyrl.rewards.advantages import effective_share, expected_effective_share, group_advantages
from skyrl.settings import Std

ONE_RIGHT = np.array([1, 0, 0, 0, 0, 0, 0, 0])
groups = st.lists(st.floats(-10, 10, allow_nan=False), min_size=2, max_size=12).map(np.array)


@pytest.mark.parametrize(
    ("std", "right", "wrong"),
    # mean 1/8; population variance 7/64, sample variance 1/8.
    [(Std.population, 2.645751, -0.377964), (Std.sample, 2.474874, -0.353553), (Std.none, 0.875, -0.125)],
)
def test_one_right_of_eight(std: Std, right: float, wrong: float) -> None:
    advantages = group_advantages(ONE_RIGHT, std)
    assert advantages.dtype == np.float64
    np.testing.assert_allclose(advantages, [right] + [wrong] * 7, atol=1e-6)


def test_float32_and_read_only_input() -> None:
    rewards = np.array([0.1, 0.1, 0.7], dtype=np.float32)
    rewards.flags.writeable = False
    np.testing.assert_allclose(group_advantages(rewards, Std.population), [-(0.5**0.5), -(0.5**0.5), 2**0.5], atol=1e-6)


@given(groups, st.sampled_from(Std))
def test_sums(rewards: np.ndarray, std: Std) -> None:
    advantages = group_advantages(rewards, std)
    assert abs(advantages.sum()) < 1e-6
    if advantages.any() and std is not Std.none:
        size = len(rewards) - (std is Std.sample)
        assert (advantages**2).sum() == pytest.approx(size, abs=1e-6)


@given(groups, st.sampled_from([Std.population, Std.sample]), st.floats(0.01, 100), st.floats(-100, 100))
def test_positive_affine_change_leaves_advantages(rewards: np.ndarray, std: Std, factor: float, shift: float) -> None:
    assume(np.ptp(rewards) > 0.1)
    np.testing.assert_allclose(
        group_advantages(factor * rewards + shift, std), group_advantages(rewards, std), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("std", list(Std))
@pytest.mark.parametrize(
    "rewards",
    [[0.0] * 8, [1.0] * 8, [0.1] * 3, [0.1 + 0.2, 0.3], [1e6 / 3] * 7, [2.5, 2.5 + 2e-7, 2.5 - 2e-7]],
    ids=["zeros", "ones", "inexact", "float64 rounding", "large", "float32 rounding"],
)
def test_ties_are_exact_zeros(rewards: list[float], std: Std) -> None:
    assert not group_advantages(np.array(rewards), std).any()


@pytest.mark.parametrize("rewards", [[], [1.0], [[1.0, 0.0]]])
def test_too_few_or_wrong_shape(rewards: list[float]) -> None:
    with pytest.raises(ValueError, match="at least 2"):
        group_advantages(np.array(rewards), Std.population)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite(bad: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        group_advantages(np.array([bad, 1.0]), Std.population)


def test_effective_share() -> None:
    assert effective_share(np.array([[0.0, 0.0], [1.0, -1.0], [0.0, 0.0], [0.0, 0.0]])) == 0.25
    assert np.isnan(effective_share(np.array([])))


def test_expected_effective_share() -> None:
    assert expected_effective_share(0.9, 8) == pytest.approx(0.5695, abs=5e-5)
    assert expected_effective_share(0.95, 8) == pytest.approx(0.3366, abs=5e-5)
    assert expected_effective_share(0.5, 2) == 0.5
    assert [expected_effective_share(p, 8) for p in (0.0, 1.0)] == [0.0, 0.0]
    assert expected_effective_share(0.3, 1) == 0.0
    for bad in ((1.1, 8), (-0.1, 8), (0.5, 0)):
        with pytest.raises(ValueError):
            expected_effective_share(*bad)


def test_expectation_agrees_with_sampling() -> None:
    rewards = np.random.default_rng(0).random((4000, 8)) < 0.9
    share = effective_share(np.stack([group_advantages(row, Std.population) for row in rewards]))
    assert share == pytest.approx(expected_effective_share(0.9, 8), abs=0.02)
