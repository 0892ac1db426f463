import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from skyrl.replay.race import race


def enumerated(weights, n):
    """Chance of each ordered draw of ``n`` places by successive sampling, by its definition."""
    expected = {}
    for order in itertools.permutations([i for i, weight in enumerate(weights) if weight], n):
        chance, left = 1.0, sum(weights)
        for place in order:
            chance *= weights[place] / left
            left -= weights[place]
        expected[order] = chance
    assert sum(expected.values()) == pytest.approx(1)
    return expected


def chi_square(weights, n, runs, seed):
    """Pearson's statistic of ``runs`` draws against the enumerated law."""
    rng, weights = np.random.default_rng(seed), np.array(weights, dtype=float)
    counts = Counter(tuple(race(weights, n, rng).tolist()) for _ in range(runs))
    expected = enumerated(weights.tolist(), n)
    assert set(counts) <= set(expected)
    return sum((counts[order] - runs * chance) ** 2 / (runs * chance) for order, chance in expected.items())


@pytest.mark.parametrize(
    ("weights", "n", "limit"),  # the 0.1 % points of 23, 11, 5, 59 and 23 degrees of freedom
    [
        ([5.0, 1.0, 0.0, 3.0, 0.5], 3, 49.7),
        # A mixture of two parts, as P is one of priorities and a uniform share.
        ([0.7 * a + 0.1 * b for a, b in zip([8.0, 1.0, 0.0, 1.0], [1.0, 1.0, 1.0, 0.0], strict=True)], 2, 31.3),
        ([2.0, 2.0, 2.0], 3, 20.5),  # ties
        ([0.1, 0.2, 0.3, 0.2, 0.2], 3, 98.3),
        ([3e-50, 1e-50, 2e-50, 1.5e-50], 3, 49.7),
    ],
)
def test_the_race_has_exactly_the_enumerated_law_of_successive_sampling(weights, n, limit):
    assert chi_square(weights, n, 4000, seed=7) < limit


def test_places_that_hold_almost_nothing_have_the_right_law_among_themselves():
    weights, rng, runs = np.array([1e50, 3e-50, 1e-50]), np.random.default_rng(1), 3000
    orders = Counter(tuple(race(weights, 3, rng).tolist()) for _ in range(runs))
    assert set(orders) == {(0, 1, 2), (0, 2, 1)}
    # 3.3 standard deviations: the 0.1 % point.
    assert abs(orders[0, 1, 2] - 0.75 * runs) < 3.3 * (runs * 0.75 * 0.25) ** 0.5


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 33])
def test_everything_with_weight_is_drawn_once_when_more_is_asked_for(size):
    weights = np.arange(size) % 3 + (size == 1)
    for n in (np.count_nonzero(weights), 10 * size):
        drawn = race(weights, n, np.random.default_rng(0))
        assert sorted(drawn.tolist()) == np.flatnonzero(weights).tolist()


def test_one_place_that_holds_almost_everything():
    weights = np.array([1e-9] * 25 + [1e12] + [1e-9] * 25)
    drawn = race(weights, 51, np.random.default_rng(0))
    assert drawn[0] == 25 and sorted(drawn.tolist()) == list(range(51))


@given(
    st.lists(st.one_of(st.just(0.0), st.floats(1e-50, 1e50)), min_size=1, max_size=40),
    st.integers(0, 50),
    st.integers(0, 2**32),
)
def test_distinct_places_with_weight_and_the_weights_stay(weights, n, seed):
    given = np.array(weights)
    drawn = race(given, n, np.random.default_rng(seed))
    assert given.tolist() == weights
    assert len(set(drawn.tolist())) == drawn.size == min(n, np.count_nonzero(weights))
    assert (given[drawn] > 0).all()


@given(st.lists(st.floats(1e-50, 1e50), min_size=1, max_size=40), st.integers(0, 40), st.integers(0, 2**32))
def test_a_shorter_draw_is_the_beginning_of_a_longer_one_and_scale_does_not_matter(weights, n, seed):
    weights = np.array(weights)
    whole = race(weights, len(weights), np.random.default_rng(seed)).tolist()
    assert race(weights, n, np.random.default_rng(seed)).tolist() == whole[:n]
    assert race(weights * 2.0**-300, n, np.random.default_rng(seed)).tolist() == whole[:n]


def test_no_weight_at_all():
    for weights in (np.zeros(0), np.zeros(3)):
        for n in (0, 5):
            drawn = race(weights, n, np.random.default_rng(0))
            assert drawn.size == 0 and drawn.dtype == np.int64
