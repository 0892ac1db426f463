import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from skyrl.batch.pairs import NO_THRESHOLD, reward_margin_pairs, rule_pairs


def pairs(scores, threshold=1.0, count=4, valid=None):
    scores = np.array(scores, dtype=float)
    all_of_them = np.ones(len(scores), bool)
    return reward_margin_pairs(scores, all_of_them if valid is None else np.array(valid), all_of_them, threshold, count)


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


def test_an_answer_that_may_not_be_chosen_can_still_be_rejected():
    def choosable(*places, count=4):
        scores = np.array([5.0, 3.0, 1.0, 0.0])
        return reward_margin_pairs(scores, np.ones(4, bool), np.isin(np.arange(4), places), 0.0, count)

    assert choosable(1, 2) == [(1, 3, 3.0)]  # 2 is not better than what is left but 0, and 0 is better than it
    assert choosable(0, 1) == [(0, 3, 5.0), (1, 2, 2.0)]
    assert choosable(3) == choosable() == []
    assert choosable(0, count=1) == [(0, 3, 5.0)]


def ruled(rules, scores, threshold=NO_THRESHOLD, count=4, valid=None, choosable=None):
    all_of_them = np.ones(len(rules), bool)
    valid, choosable = (all_of_them if one is None else np.array(one) for one in (valid, choosable))
    scores = None if scores is None else np.array(scores, dtype=float)
    return rule_pairs(np.array(rules) == 1, scores, valid, choosable, threshold, count)


def test_rule_pairs_take_the_best_right_and_the_worst_wrong_answer():
    rules, scores = [1.0, 0.0, 1.0, 0.5, 0.0], [1.0, 4.0, 3.0, -2.0, 0.5]
    assert ruled(rules, scores) == [(2, 3, 5.0), (0, 4, 0.5)]
    assert ruled(rules, scores, threshold=0.5) == [(2, 3, 5.0), (0, 4, 0.5)]
    assert ruled(rules, scores, threshold=0.6) == ruled(rules, scores, count=1) == [(2, 3, 5.0)]
    assert ruled(rules, scores, valid=[True, True, True, False, True]) == [(2, 4, 2.5), (0, 1, -3.0)]
    assert ruled(rules, scores, choosable=np.array([True, True, False, True, True])) == [(0, 3, 3.0)]
    assert ruled(rules, [7.0] * 5) == [(0, 1, 0.0), (2, 3, 0.0)]  # ties by index
    assert ruled([1.0, 1.0], [0.0, 1.0]) == ruled([0.0, 0.9], [0.0, 1.0]) == ruled([], []) == []


def test_rule_pairs_without_a_reward_model_go_by_index_and_pass_only_without_a_threshold():
    assert ruled([0.0, 1.0, 0.0, 1.0], None) == [(1, 0, None), (3, 2, None)]
    assert ruled([0.0, 1.0, 0.0, 1.0], None, threshold=-1e300) == []
    assert ruled([0.0, 1.0], [math.nan, 2.0], valid=[False, True]) == []


@given(
    st.lists(
        st.tuples(st.sampled_from([0.0, 0.4, 1.0]), st.floats(-20, 20), st.booleans(), st.booleans()), max_size=12
    ),
    st.floats(-10, 10),
    st.integers(0, 6),
)
def test_rule_properties(rows, threshold, count):
    rules, scores = np.array([row[0] for row in rows]), np.array([row[1] for row in rows])
    valid, choosable = np.array([row[2] for row in rows], bool), np.array([row[3] for row in rows], bool)
    found = rule_pairs(rules == 1, scores, valid, choosable, threshold, count)
    used = [place for chosen, rejected, _ in found for place in (chosen, rejected)]
    assert len(found) <= count and len(set(used)) == len(used) and all(valid[used])
    assert all(rules[c] == 1 and choosable[c] and rules[r] < 1 and m == scores[c] - scores[r] for c, r, m in found)
    margins = [margin for _, _, margin in found]
    assert margins == sorted(margins, reverse=True) and all(margin >= threshold for margin in margins)
    # As many as there could be: no right and wrong answer that are left over would pass.
    right, wrong = np.flatnonzero(valid & choosable & (rules == 1)), np.flatnonzero(valid & (rules < 1))
    left = [scores[c] - scores[r] for c in right for r in wrong if c not in used and r not in used]
    assert len(found) == count or all(margin < threshold for margin in left)


@given(st.lists(st.tuples(st.floats(-20, 20), st.booleans()), max_size=12), st.floats(0, 10), st.integers(0, 6))
def test_properties(rows, threshold, count):
    scores = np.array([score for score, _ in rows])
    valid = np.array([ok for _, ok in rows], dtype=bool)
    found = reward_margin_pairs(scores, valid, np.ones(len(scores), bool), threshold, count)
    used = [place for chosen, rejected, _ in found for place in (chosen, rejected)]
    assert len(found) <= count and len(set(used)) == len(used) and all(valid[used])
    margins = [margin for _, _, margin in found]
    assert margins == sorted(margins, reverse=True) and all(margin >= threshold and margin > 0 for margin in margins)
    assert all(margin == scores[chosen] - scores[rejected] for chosen, rejected, margin in found)
    if found and valid.any():
        assert margins[0] == scores[valid].max() - scores[valid].min()
