import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skyrl.replay.priorities import EvictionQueue, Recency, SumTree, _descend, draw_mixture


def tree_of(weights):
    tree = SumTree(len(weights))
    tree.set(np.arange(len(weights)), np.array(weights, dtype=float))
    return tree


def draw(tree, n, rng):
    return draw_mixture([(tree, 1.0)], n, rng)


def chi_square(observed, expected):
    return sum((observed[key] - want) ** 2 / want for key, want in expected.items())


def test_successive_sampling_has_exactly_the_enumerated_law():
    weights = [5.0, 1.0, 0.0, 3.0, 0.5]
    tree, rng, runs = tree_of(weights), np.random.default_rng(7), 4000
    counts = Counter(tuple(draw(tree, 3, rng).tolist()) for _ in range(runs))
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
    drawn = draw(tree, 10 * size, np.random.default_rng(0))
    assert sorted(drawn.tolist()) == positive.tolist()


def test_one_leaf_that_holds_almost_everything():
    tree = tree_of([1e12] + [1e-9] * 50)
    drawn = draw(tree, 51, np.random.default_rng(0))
    assert drawn[0] == 0 and sorted(drawn.tolist()) == list(range(51))


@given(
    st.lists(st.one_of(st.just(0.0), st.floats(1e-12, 1e6)), min_size=1, max_size=40),
    st.integers(0, 50),
    st.integers(0, 2**32),
)
def test_draw_leaves_the_tree_as_it_was(weights, n, seed):
    tree = tree_of(weights)
    before = [level.copy() for level in tree._levels]
    drawn = draw(tree, n, np.random.default_rng(seed))
    assert all(np.array_equal(old, new) for old, new in zip(before, tree._levels, strict=True))
    assert len(set(drawn.tolist())) == drawn.size == min(n, np.count_nonzero(weights))
    assert (tree.get(drawn) > 0).all()


def test_a_mixture_of_two_trees_has_the_enumerated_law_and_both_stay_as_they_were():
    first, second, share = [8.0, 1.0, 0.0, 1.0], [1.0, 1.0, 1.0, 0.0], (0.7, 0.1)
    mixed = [share[0] * a + share[1] * b for a, b in zip(first, second, strict=True)]
    trees, rng, runs = (tree_of(first), tree_of(second)), np.random.default_rng(3), 4000
    before = [level.copy() for tree in trees for level in tree._levels]
    pairs = list(zip(trees, share, strict=True))
    counts = Counter(tuple(draw_mixture(pairs, 2, rng).tolist()) for _ in range(runs))
    left = {i: sum(mixed) - mixed[i] for i in range(4)}
    expected = {
        (i, j): runs * mixed[i] / sum(mixed) * mixed[j] / left[i] for i, j in itertools.permutations(range(4), 2)
    }
    # 11 degrees of freedom: 31.3 is the 0.1 % point.
    assert chi_square(counts, expected) < 31.3
    after = [level for tree in trees for level in tree._levels]
    assert all(np.array_equal(old, new) for old, new in zip(before, after, strict=True))


def test_scaling_by_a_power_of_two_is_exact():
    tree = tree_of([0.1, 0.7, 1e-5, 3.3, 2.0])
    wanted = [level * 2.0**-300 for level in tree._levels]
    tree.scale(-300)
    assert all(np.array_equal(a, b) for a, b in zip(wanted, tree._levels, strict=True))
    tree.set(np.array([2]), np.array([0.0]))
    tree.set(np.array([2]), np.array([1e-5 * 2.0**-300]))
    assert all(np.array_equal(a, b) for a, b in zip(wanted, tree._levels, strict=True))


@given(st.floats(0.01, 1.0), st.integers(0, 100_000), st.integers(0, 60))
def test_ratios_of_recency_factors_are_powers_of_the_recency(recency, version, age):
    scale = Recency(recency)
    (new, high), (old, low) = scale.split(version + age), scale.split(version)
    assert 1 <= new < 2 and 1 <= old < 2
    assert old / new * 2.0 ** (low - high) == pytest.approx(recency**age, rel=1e-8)
    assert Recency(1.0).split(version) == (1.0, 0)


@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 7), st.sampled_from([0.0, 1.5, -2.0, 1.51, -2.005])), max_size=200)
)
@settings(max_examples=50)
def test_the_queue_agrees_with_a_sorted_list(calls):
    queue, model, arrivals = EvictionQueue(8), {}, 0
    for add, leaf, key in calls:
        if leaf in model:
            queue.remove(leaf)
            del model[leaf]
        if add:
            assert queue.next_number == arrivals
            queue.push(leaf, key)
            model[leaf], arrivals = (key, arrivals), arrivals + 1
        assert len(queue) == len(model)
        assert queue.by_arrival() == sorted(model, key=lambda one: model[one][1])
        if model and calls[0][0]:  # and sometimes nobody asks
            first = min(model, key=lambda one: model[one])
            assert queue.first() == (model[first][0], first)
        elif not model:
            with pytest.raises(IndexError):
                queue.first()
        assert [queue.number(one) for one in range(8)] == [model.get(one, (0, -1))[1] for one in range(8)]


def test_a_leaf_that_left_from_the_middle_takes_no_memory_for_long():
    queue = EvictionQueue(1001)
    queue.push(1000, 0.0)
    for round_ in range(5):
        for leaf in range(1000):
            queue.push(leaf, 1.0 + (7 * leaf + round_) % 5)
        for leaf in range(1000):
            queue.remove(leaf)
    assert len(queue) == 1 and len(queue._line) + sum(map(len, queue._buckets.values())) <= 66
    assert queue.first() == (0.0, 1000)


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
    assert (tree.get(_descend([(tree, 1.0)], points)) > 0).all()


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
        draw(tree, -1, np.random.default_rng(0))
    assert draw(tree, 5, np.random.default_rng(0)).size == 0
