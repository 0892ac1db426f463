"""Group advantages against hand-worked values and their invariants."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from skyrl.rewards.hybrid import float32_noise, group_advantages, tied
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


@given(groups, st.sampled_from(list(Std)), st.floats(-1e6, 1e6))
def test_a_common_shift_changes_nothing_but_float64_rounding(rewards: np.ndarray, std: Std, shift: float) -> None:
    assume(np.ptp(rewards) > 0.01)
    found, want = group_advantages(rewards + shift, std), group_advantages(rewards, std)
    # A value near 1e6 is rounded by 6e-11; divided by a standard deviation of at least 0.01 / sqrt(12) · 0.4.
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-6)
    assert found.any()


@pytest.mark.parametrize("shift", [-1e12, -1e9, 1e9, 1e12])
def test_a_shift_of_any_size_makes_no_tie_of_right_and_wrong(shift: float) -> None:
    np.testing.assert_allclose(group_advantages(shift + np.array([0.0, 1.0, 1.0, 0.0]), Std.population), [-1, 1, 1, -1])


@given(groups, st.sampled_from([Std.population, Std.sample]), st.floats(1e-6, 1e6))
def test_rewards_scaled_with_their_noise_tie_as_before(rewards: np.ndarray, std: Std, factor: float) -> None:
    noise = 0.03
    assume(abs(np.ptp(rewards) - noise) > 1e-6)
    found, want = group_advantages(factor * rewards, std, factor * noise), group_advantages(rewards, std, noise)
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-6)
    assert found.any() == (np.ptp(rewards) > noise)


@given(st.sampled_from([10.0, -10.0, 1e4, -1e4, 3e30]), st.lists(st.integers(-4, 4), min_size=2, max_size=12))
def test_scores_of_equal_answers_tie_whatever_their_size(size: float, ulps: list[int]) -> None:
    """Up to eight units in the last place apart, as float32 models differ over batches of another shape."""
    scores = np.float32(size) + np.array(ulps, np.float32) * np.spacing(np.float32(abs(size)))
    assert scores.dtype == np.float32
    noise = float32_noise(scores.astype(np.float64))
    assert not group_advantages(scores, Std.population, noise).any()
    apart = scores.astype(np.float64)
    apart[0] += 20 * float(np.spacing(np.float32(abs(size)))) + np.ptp(apart)  # a difference that they can tell
    assert group_advantages(apart, Std.population, float32_noise(apart)).any()


def test_rounding_of_float64_itself_is_a_tie() -> None:
    rewards = 1e12 * np.array([0.1 + 0.2, 0.3])
    assert np.ptp(rewards) > 1e-5 and not group_advantages(rewards, Std.population).any()
    assert group_advantages(1e12 + np.array([0.0, 0.1]), Std.population).any()


def test_noise_of_a_part() -> None:
    assert float32_noise(np.array([0.0, 1.0])) == 1e-6
    assert float32_noise(np.array([-2e4, 1.0])) == pytest.approx(0.02)
    assert float32_noise(np.array([1e9, 1e9])) == 0.0  # equal: whatever rounding they have, all have the same
    assert float32_noise(np.array([10.0, 10.0 + 1e-6])) == pytest.approx(1e-6)  # its whole spread, not 1e-5
    assert tied(np.array([10.0, 10.0 + 1e-6]), float32_noise(np.array([10.0, 10.0 + 1e-6])))
    assert tied(np.array([0.0, 1e-160]), 0.0) and not tied(np.array([0.0, 1e-140]), 0.0)


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
