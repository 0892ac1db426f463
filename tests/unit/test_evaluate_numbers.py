"""The numbers of an evaluation, by hand and by brute force."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from skyrl.evaluation.numbers import estimate, majority, pass_at_k, pass_sizes, wilson


def test_pass_at_k_is_the_share_of_all_subsets_with_a_right_answer() -> None:
    assert pass_at_k(5, 2, 2) == pytest.approx(0.7)  # 3 of the 10 pairs have none of the two right ones
    for n in range(1, 7):
        for right in range(n + 1):
            answers = [place < right for place in range(n)]
            for k in range(1, n + 1):
                drawn = list(combinations(answers, k))
                assert pass_at_k(n, right, k) == pytest.approx(sum(map(any, drawn)) / len(drawn))
            assert pass_at_k(n, right, 1) == pytest.approx(right / n) and pass_at_k(n, right, n) == (right > 0)


@pytest.mark.parametrize(("n", "right", "k"), [(4, 2, 5), (4, 5, 1), (4, -1, 1), (4, 2, 0)])
def test_pass_at_k_refuses_what_makes_no_sense(n: int, right: int, k: int) -> None:
    with pytest.raises(ValueError, match="allowed: 1 ≤ k ≤ n"):
        pass_at_k(n, right, k)


def test_wilson_by_hand() -> None:
    # (p + z²/2n ± z √(pq/n + z²/4n²)) / (1 + z²/n) with p = 0.8, n = 10, z = 1.959964
    assert wilson(8, 10) == pytest.approx((0.49016, 0.94332), abs=1e-5)
    low, high = wilson(0, 10)  # a plain normal interval would be empty
    assert low == 0 and high == pytest.approx(0.27753, abs=1e-5)


def test_one_answer_each_has_wilsons_interval() -> None:
    found = estimate([1.0] * 8 + [0.0] * 2)
    assert (found.value, found.interval, found.questions) == (0.8, "wilson", 10)
    assert (found.low, found.high) == wilson(8, 10)


def test_shares_have_the_interval_clustered_by_question() -> None:
    # s = √(0.125 / 3) = 0.204124, s / √4 = 0.102062, t of 3 degrees = 3.182446
    found = estimate([0.5, 0.75, 0.5, 0.25])
    assert (found.value, found.interval) == (0.5, "clustered")
    assert (found.low, found.high) == pytest.approx((0.175193, 0.824807), abs=1e-5)
    assert estimate([0.9, 1.0]).high == 1.0  # cut off
    alone = estimate([0.5, 0.5])
    assert (alone.value, alone.low, alone.high, alone.interval) == (0.5, None, None, "none")


@pytest.mark.parametrize("values", [[], [0.5, 1.5], [-0.1], [float("nan")]])
def test_values_that_are_no_shares_are_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match=r"each in \[0, 1\]"):
        estimate(values)


def test_the_interval_covers_the_truth_though_answers_to_one_question_agree() -> None:
    rng, inside, naive_inside, k = np.random.default_rng(0), 0, 0, 8
    for _ in range(400):  # questions are of very different difficulty, their mean is 0.5
        chances = rng.beta(0.5, 0.5, 60)
        rights = rng.binomial(k, chances)
        found = estimate(rights / k)
        assert found.low is not None and found.high is not None
        inside += found.low <= 0.5 <= found.high
        low, high = wilson(int(rights.sum()), 60 * k)  # as if all 480 answers were independent
        naive_inside += low <= 0.5 <= high
    assert 0.92 <= inside / 400 <= 0.98 and naive_inside / 400 < 0.8


@pytest.mark.parametrize(
    ("votes", "right", "value"),
    [
        ([0, 0, 2], [True, True, False], 1.0),
        ([0, 0, 2], [False, False, True], 0.0),
        ([0, 1], [True, False], 0.5),
        ([0, 1, 2], [True, False, False], 1 / 3),
        ([0, 0, 2, 2, 4], [True, True, False, False, True], 0.5),
        ([None, None, 2], [False, False, True], 1.0),  # who says nothing does not vote
        ([None, None], [False, False], 0.0),
        ([0, 0], [True, False], 0.5),  # equal answers that are judged differently
    ],
)
def test_the_majority_shares_ties(votes: list[int | None], right: list[bool], value: float) -> None:
    assert majority(votes, right) == pytest.approx(value)


def test_sizes_of_pass_at_k() -> None:
    assert [pass_sizes(n) for n in (1, 2, 3, 4, 6, 8)] == [
        [1],
        [1, 2],
        [1, 2, 3],
        [1, 2, 4],
        [1, 2, 4, 6],
        [1, 2, 4, 8],
    ]
