import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from skyrl.algorithms.pairs import select_pairs


def pairs(scores, threshold=1.0, count=4, valid=None):
    scores = np.array(scores, dtype=float)
    return select_pairs(scores, np.ones(len(scores), bool) if valid is None else np.array(valid), threshold, count)


def test_best_with_worst_then_the_next():
    assert pairs([0.0, 5.0, 3.0, -2.0, 1.0]) == [(1, 3, 7.0), (2, 0, 3.0)]
    assert pairs([0.0, 5.0, 3.0, -2.0, 1.0], count=1) == [(1, 3, 7.0)]
    assert pairs([0.0, 5.0, 3.0, -2.0, 1.0], threshold=3.5) == [(1, 3, 7.0)]
    assert pairs([0.0, 5.0], threshold=5.0) == [(1, 0, 5.0)]
    assert pairs([0.0, 5.0], threshold=5.1) == pairs([1.0]) == pairs([]) == pairs([0.0, 5.0], count=0) == []


def test_ties_are_ordered_by_index_and_equal_scores_make_no_pair():
    assert pairs([2.0, 2.0, 0.0, 0.0]) == [(0, 3, 2.0), (1, 2, 2.0)]
    many = [2.0, 0.0] * 20  # long enough for an unstable sort to show
    assert pairs(many, count=20) == [(2 * k, 39 - 2 * k, 2.0) for k in range(20)]
    assert pairs([1.0, 1.0], threshold=0.0) == pairs([1.0, 1.0], threshold=-3.0) == []


def test_invalid_answers_are_left_out_even_if_nan():
    assert pairs([math.nan, 0.0, 9.0, 4.0], valid=[False, True, False, True]) == [(3, 1, 4.0)]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_broken_scores_raise(bad):
    with pytest.raises(ValueError, match=r"samples \[1\]"):
        pairs([0.0, bad])


def test_refuses_bad_arguments():
    with pytest.raises(ValueError, match=r"\(2,\).*\(3,\)"):
        select_pairs(np.zeros(2), np.ones(3, bool), 1.0, 1)
    with pytest.raises(ValueError, match="nan"):
        pairs([0.0, 1.0], threshold=math.nan)
    with pytest.raises(ValueError, match="pairs_per_prompt -1"):
        pairs([0.0, 1.0], count=-1)


@given(st.lists(st.tuples(st.floats(-20, 20), st.booleans()), max_size=12), st.floats(0, 10), st.integers(0, 6))
def test_properties(rows, threshold, count):
    scores = np.array([score for score, _ in rows])
    valid = np.array([ok for _, ok in rows], dtype=bool)
    found = select_pairs(scores, valid, threshold, count)
    used = [place for chosen, rejected, _ in found for place in (chosen, rejected)]
    assert len(found) <= count and len(set(used)) == len(used) and all(valid[used])
    margins = [margin for _, _, margin in found]
    assert margins == sorted(margins, reverse=True) and all(margin >= threshold and margin > 0 for margin in margins)
    assert all(margin == scores[chosen] - scores[rejected] for chosen, rejected, margin in found)
    if found and valid.any():
        assert margins[0] == scores[valid].max() - scores[valid].min()
