import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skyrl.buffer.priorities import SumTree


def tree_of(weights):
    tree = SumTree(len(weights))
    tree.set(np.arange(len(weights)), np.array(weights, dtype=float))
    return tree


def chi_square(observed, expected):
    return sum((observed[key] - want) ** 2 / want for key, want in expected.items())


def test_successive_sampling_has_exactly_the_enumerated_law():
    weights = [5.0, 1.0, 0.0, 3.0, 0.5]
    tree, rng, runs = tree_of(weights), np.random.default_rng(7), 6000
    counts = Counter(tuple(tree.draw(3, rng).tolist()) for _ in range(runs))
    expected = {}
    for order in itertools.permutations([0, 1, 3, 4], 3):
        probability, left = 1.0, sum(weights)
        for leaf in order:
            probability *= weights[leaf] / left
            left -= weights[leaf]
        expected[order] = probability * runs
    assert set(counts) <= set(expected)
    # 23 degrees of freedom: 49.7 is the 0.1 % point.
    assert chi_square(counts, expected) < 49.7


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 33])
def test_everything_with_weight_is_drawn_once_when_more_is_asked_for(size):
    weights = np.arange(size) % 3
    tree = tree_of(weights) if weights.any() else tree_of([1.0])
    positive = np.flatnonzero(tree.get(np.arange(tree.size)))
    drawn = tree.draw(10 * size, np.random.default_rng(0))
    assert sorted(drawn.tolist()) == positive.tolist()


def test_one_leaf_that_holds_almost_everything():
    tree = tree_of([1e12] + [1e-9] * 50)
    drawn = tree.draw(51, np.random.default_rng(0))
    assert drawn[0] == 0 and sorted(drawn.tolist()) == list(range(51))


@given(
    st.lists(st.one_of(st.just(0.0), st.floats(1e-12, 1e6)), min_size=1, max_size=40),
    st.integers(0, 50),
    st.integers(0, 2**32),
)
def test_draw_leaves_the_tree_as_it_was(weights, n, seed):
    tree = tree_of(weights)
    before = [level.copy() for level in tree._levels]
    drawn = tree.draw(n, np.random.default_rng(seed))
    assert all(np.array_equal(old, new) for old, new in zip(before, tree._levels, strict=True))
    assert len(set(drawn.tolist())) == drawn.size == min(n, np.count_nonzero(weights))
    assert (tree.get(drawn) > 0).all()


@given(st.integers(1, 33), st.lists(st.tuples(st.integers(0, 32), st.floats(0, 1e9)), max_size=30))
@settings(max_examples=50)
def test_updates_give_the_same_sums_as_a_fresh_tree(size, updates):
    tree, weights = SumTree(size), np.zeros(size)
    for leaf, weight in updates:
        weights[leaf % size] = weight
        tree.set(np.array([leaf % size]), np.array([weight]))
    fresh = tree_of(weights)
    assert all(np.array_equal(a, b) for a, b in zip(tree._levels, fresh._levels, strict=True))
    assert tree.total == pytest.approx(weights.sum(), rel=1e-12)


def test_points_at_the_very_end_stay_off_empty_leaves():
    tree = tree_of([0.1, 0.0, 0.2, 0.3, 0.0, 0.0, 0.7, 0.0])
    points = np.array([0.0, tree.total, np.nextafter(tree.total, 0), 2 * tree.total])
    assert (tree.get(tree._descend(points)) > 0).all()


def test_refuses():
    with pytest.raises(ValueError, match="size is 0"):
        SumTree(0)
    tree = SumTree(3)
    for weight in (-1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="finite and 0 or more"):
            tree.set(np.array([0]), np.array([weight]))
    for leaf in (-1, 3):
        with pytest.raises(ValueError, match="0 … 2"):
            tree.set(np.array([leaf]), np.array([1.0]))
    with pytest.raises(ValueError, match="n is -1"):
        tree.draw(-1, np.random.default_rng(0))
    assert tree.draw(5, np.random.default_rng(0)).size == 0
