"""Calibrated thresholds: bounds by hand, and coverage by simulation with a known truth."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from skyrl.batch.thresholds import Candidate, Threshold, clopper_pearson_upper, risk_controlled, safest, strictest
from skyrl.records import DataError
from skyrl.settings import ThresholdConfig, ThresholdFallback, ThresholdKind, fewest_candidates

TARGET, CONFIDENCE = 0.1, 0.9


@pytest.mark.parametrize(
    ("bad", "total", "confidence", "bound"),
    [
        (0, 29, 0.95, 1 - 0.05 ** (1 / 29)),  # (1 - p)^29 = 0.05
        (0, 1, 0.9, 0.9),
        (4, 5, 0.9, 0.9 ** (1 / 5)),  # p^5 = 0.9: all five bad has the rest of the probability
        (1, 2, 0.75, math.sqrt(0.75)),  # 1 - p^2 = 0.25
        (7, 7, 0.9, 1.0),
        (0, 0, 0.9, 1.0),
    ],
)
def test_bound_by_hand(bad: int, total: int, confidence: float, bound: float) -> None:
    assert clopper_pearson_upper(bad, total, confidence) == pytest.approx(bound, rel=1e-12)


@settings(deadline=None)  # the first call of scipy is slow
@given(st.integers(1, 200), st.data(), st.floats(0.5, 0.99))
def test_bound_is_the_share_at_which_so_few_have_the_stated_probability(
    total: int, data: st.DataObject, confidence: float
) -> None:
    bad = data.draw(st.integers(0, total - 1))
    share = clopper_pearson_upper(bad, total, confidence)
    tail = sum(math.comb(total, k) * share**k * (1 - share) ** (total - k) for k in range(bad + 1))
    assert tail == pytest.approx(1 - confidence, rel=1e-6)
    assert bad / total < share < clopper_pearson_upper(bad + 1, total, confidence)


@pytest.mark.parametrize(("bad", "total", "confidence"), [(2, 1, 0.9), (-1, 1, 0.9), (0, 1, 1.0), (0, 1, 0.0)])
def test_bound_of_nonsense(bad: int, total: int, confidence: float) -> None:
    with pytest.raises(ValueError, match="allowed"):
        clopper_pearson_upper(bad, total, confidence)


def walk(scores: object, bad: object, target: float, confidence: float) -> float | None:
    """One walk from the first level."""
    return risk_controlled(scores, bad, target, confidence, starts=(2,))


def test_walk_by_hand() -> None:
    # Target 0.5, confidence 0.75: (1 - 0.5)^n = 0.25 at n = 2, so the walk begins with three samples.
    scores = np.arange(10, 0, -1.0)
    good = np.zeros(10, dtype=bool)
    assert walk(scores, good, 0.5, 0.75) == 1.0
    assert walk(scores[:2], good[:2], 0.5, 0.75) is None  # too few, though none is bad
    assert walk(scores[:3], good[:3], 0.5, 0.75) == 8.0
    # One bad of three at p = 0.5: P(at most one) = 4/8 > 0.25: the first test fails, whatever comes below.
    assert walk(scores, scores == 9, 0.5, 0.75) is None
    # Bad are 4th to 10th. One of 4: P(<=1 at 0.5) = 5/16 > 0.25. So only the first three pass.
    assert walk(scores, scores <= 7, 0.5, 0.75) == 8.0
    # Bad are 5th to 10th: 1 of 5: 6/32 <= 0.25 passes, 2 of 6: 22/64 > 0.25 does not.
    assert walk(scores, scores <= 6, 0.5, 0.75) == 6.0
    assert walk([], [], 0.5, 0.75) is None
    # A walk never jumps over a failure: 1 of 4 fails, 1 of 5, 6 … 10 would pass.
    assert walk(scores, scores == 7, 0.5, 0.75) == 8.0


def test_second_walk_by_hand() -> None:
    # Target 0.5, confidence 0.75, two walks: each has 0.125, and 0.5^n = 0.125 at n = 3: at least four samples.
    scores = np.arange(10, 0, -1.0)
    good = np.zeros(10, dtype=bool)
    assert risk_controlled(scores[:3], good[:3], 0.5, 0.75) is None
    assert risk_controlled(scores[:4], good[:4], 0.5, 0.75) == 7.0
    # The first walk fails at once: 1 of 4: 5/16 > 0.125. The second begins at six: 1 of 6: 7/64 <= 0.125, and so on.
    assert risk_controlled(scores, scores == 9, 0.5, 0.75) == 1.0
    # Bad are the 2nd and the 8th to 10th. 1 of 6 and 1 of 7 pass, 2 of 8: 37/256 > 0.125.
    assert risk_controlled(scores, (scores == 9) | (scores <= 3), 0.5, 0.75) == 4.0
    # Bad are the 5th to 10th: the first walk passes at four and fails at 1 of 5 (6/32); the second fails at 2 of 6.
    assert risk_controlled(scores, scores <= 6, 0.5, 0.75) == 7.0
    # Bad are the 2nd and the 5th: neither walk passes its first test, though 2 of 10 (56/1024) would pass.
    assert risk_controlled(scores, (scores == 9) | (scores == 6), 0.5, 0.75) is None


def test_strictest_lets_the_highest_tenth_pass() -> None:
    scores = np.random.default_rng(0).permutation(30).astype(float)
    assert strictest(scores) == 27.0
    assert strictest([4.0]) == 4.0 and strictest([1.0, 5.0, 2.0]) == 5.0
    assert strictest(np.arange(31.0)) == 27.0  # four: at least a tenth


def test_safest_has_the_lowest_bound() -> None:
    scores = np.arange(20, 0, -1.0)
    # None bad: the more that pass, the lower the bound 1 - 0.1^(1/n). All bad: equal bounds of 1, so the lowest.
    assert safest(scores, np.zeros(20), 0.9) == 1.0 and safest(scores, np.ones(20), 0.9) == 1.0
    # The last ten are bad: 0 of 10 has 0.206, 1 of 11 has 0.310, 0 of 9 has 0.226.
    assert safest(scores, scores <= 10, 0.9) == 11.0
    # The best two are bad: 2 of 20 has 0.245, 2 of 10 has 0.450, 2 of 2 has 1.
    assert safest(scores, scores >= 19, 0.9) == 1.0
    # Equal scores pass together: at 5 all forty do, 10 bad of them; at 6 twenty with none.
    assert safest(np.repeat([6.0, 5.0], 20), np.repeat([0, 0, 0, 1], 10), 0.9) == 6.0
    # Below a tenth nothing is looked at: the first of twenty alone would have 0.9, the first two 0.684.
    assert safest(scores, scores <= 18, 0.9) == 19.0
    assert safest([3.0], [1], 0.9) == 3.0


def test_equal_scores_pass_together() -> None:
    scores, bad = np.repeat([3.0, 2.0, 1.0, 0.0], 10), np.repeat([0, 0, 1, 1], 10)
    assert walk(scores, bad, 0.4, 0.75) == 2.0
    # Three of the ten at 3.0 are the first level's count, but all ten pass: five bad are too many.
    assert walk(np.full(10, 3.0), [0] * 5 + [1] * 5, 0.5, 0.75) is None
    assert walk(np.full(30, 3.0), [0] * 30, 0.1, 0.9) == 3.0


def drawn(rng: np.random.Generator, size: int, risk: Callable[[np.ndarray], np.ndarray]) -> tuple:
    scores = rng.random(size)
    return scores, rng.random(size) < risk(scores)


def naive(scores: np.ndarray, bad: np.ndarray) -> float | None:
    """The smallest threshold with an empirical share of at most the target."""
    order = np.argsort(-scores)
    good = np.flatnonzero(np.cumsum(bad[order]) <= TARGET * np.arange(1, len(scores) + 1))
    return float(scores[order][good[-1]]) if len(good) else None


def unordered(scores: np.ndarray, bad: np.ndarray) -> float | None:
    """The smallest threshold whose own bound is low enough, whatever the ones above it say."""
    order = np.argsort(-scores)
    counts = np.cumsum(bad[order])
    bounds = [clopper_pearson_upper(int(bad), n, CONFIDENCE) for n, bad in enumerate(counts, start=1)]
    good = np.flatnonzero(np.array(bounds) <= TARGET)
    return float(scores[order][good[-1]]) if len(good) else None


def ours(scores: np.ndarray, bad: np.ndarray) -> float | None:
    return risk_controlled(scores, bad, TARGET, CONFIDENCE)


def too_risky(rule: Callable, risk: Callable, above: Callable, size: int, sets: int, seed: int) -> float:
    """Share of simulated calibration sets whose threshold lets too large a true share of bad ones pass."""
    rng = np.random.default_rng(seed)
    found = [rule(*drawn(rng, size, risk)) for _ in range(sets)]
    return sum(tau is not None and above(tau) > TARGET for tau in found) / sets


def falling(scores: np.ndarray) -> np.ndarray:
    return 0.4 * (1 - scores)  # mean above tau: 0.2 (1 - tau), the target at tau = 0.5


def flat(scores: np.ndarray) -> np.ndarray:
    return np.full(len(scores), 0.101)  # a score that says nothing: every threshold is too risky


@pytest.mark.parametrize("size", [40, 200, 512])
def test_true_risk_is_controlled_as_often_as_stated(size: int) -> None:
    sets = 600
    slack = 3 * math.sqrt(CONFIDENCE * (1 - CONFIDENCE) / sets)
    assert too_risky(ours, falling, lambda tau: 0.2 * (1 - tau), size, sets, 1) <= 1 - CONFIDENCE + slack
    assert too_risky(ours, flat, lambda tau: 0.101, size, sets, 2) <= 1 - CONFIDENCE + slack


def test_simpler_rules_do_not_control_it() -> None:
    assert too_risky(naive, falling, lambda tau: 0.2 * (1 - tau), 200, 300, 1) > 0.4
    assert too_risky(unordered, flat, lambda tau: 0.101, 200, 100, 2) > 0.2


def mild(scores: np.ndarray) -> np.ndarray:
    return 0.03 + 0.08 * (1 - scores)  # all pass at a risk of 0.07


def test_it_is_not_merely_cautious() -> None:
    """Both starts together lose a little where only the best scores are safe and gain much where nearly all are."""
    rng = np.random.default_rng(3)
    passed = {}
    for name, risk in (("falling", falling), ("mild", mild)):
        sets = [drawn(rng, 512, risk) for _ in range(200)]
        for rule in (ours, lambda *one: walk(*one, TARGET, CONFIDENCE)):
            taus = [rule(*one) for one in sets]
            nothing = float(np.mean([tau is None for tau in taus]))
            passed[name, rule is ours] = float(np.mean([0.0 if tau is None else 1 - tau for tau in taus])), nothing
    assert passed["falling", True][0] > 0.15  # of at most 0.5
    assert passed["falling", False][0] > 0.2 and passed["falling", False][1] < 0.1
    assert passed["mild", True][0] > passed["mild", False][0] + 0.1
    assert passed["mild", True][0] > 0.8 and passed["mild", True][1] < 0.12 < passed["mild", False][1]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(-20, 20), st.booleans()), min_size=5, max_size=60), st.integers(0, 10**6))
def test_only_the_order_of_the_scores_matters(rows: list[tuple[int, bool]], seed: int) -> None:
    scores, bad = np.array([row[0] for row in rows], dtype=float), np.array([row[1] for row in rows])
    tau = risk_controlled(scores, bad, 0.4, 0.7)
    shuffled = np.random.default_rng(seed).permutation(len(rows))
    assert risk_controlled(scores[shuffled], bad[shuffled], 0.4, 0.7) == tau
    moved = risk_controlled(np.exp(scores / 7) - 3, bad, 0.4, 0.7)
    if tau is None:
        assert moved is None
    else:
        assert ((np.exp(scores / 7) - 3 >= moved) == (scores >= tau)).all()


@settings(deadline=None)
@given(st.lists(st.booleans(), min_size=10, max_size=80), st.data())
def test_more_caution_or_more_bad_ones_never_lower_the_threshold(labels: list[bool], data: st.DataObject) -> None:
    scores, bad = np.arange(len(labels), dtype=float), np.array(labels)

    def tau(bad: np.ndarray, target: float, confidence: float) -> float:
        found = risk_controlled(scores, bad, target, confidence)
        return math.inf if found is None else found

    base = tau(bad, 0.4, 0.7)
    assert tau(bad, 0.4, 0.7) <= tau(bad | (scores == data.draw(st.sampled_from(scores.tolist()))), 0.4, 0.7)
    # Walks begin with at least four samples at both targets (log 0.15 / log 0.6 = 3.71, log 0.15 / log 0.61 = 3.84).
    assert base <= tau(bad, 0.39, 0.7)


def config(kind: str, **changes: object) -> ThresholdConfig:
    return ThresholdConfig(kind=ThresholdKind(kind), value=2.0, **changes)  # type: ignore[arg-type]


def observe(threshold: Threshold, scores: Sequence[float], bad: Sequence[float | None]) -> None:
    labels = [None if label is None else bool(label) for label in bad]
    threshold.observe([Candidate(float(score), label) for score, label in zip(scores, labels, strict=True)])


def test_off_and_fixed_never_move() -> None:
    for kind, value in (("off", -math.inf), ("fixed", 2.0)):
        threshold = Threshold(config(kind, every=1, min_labelled=1))
        observe(threshold, np.arange(100.0), np.zeros(100))
        assert not any(threshold.calibrate(step) for step in range(1, 20))
        assert threshold.value == value


def test_schedule_window_and_quantile() -> None:
    threshold = Threshold(config("quantile", quantile=0.25, every=3, window=5, min_labelled=4))
    observe(threshold, [100.0, 1.0, 2.0], [0, None, 1])
    assert [threshold.calibrate(step) for step in (1, 4)] == [False, False]  # only three
    assert threshold.value == 2.0
    observe(threshold, [3.0, 4.0, 5.0], [0, 0, 0])  # 100 falls out
    assert [threshold.calibrate(step) for step in (1, 2, 3, 5, 6, 7)] == [False] * 5 + [True]
    assert threshold.value == 2.0  # 1, 2, 3, 4, 5: a quarter of the way from 1 to 5
    observe(threshold, [9.0], [1])
    assert threshold.calibrate(10) and threshold.value == 3.0


@pytest.mark.parametrize(
    ("target", "confidence", "walks"), [(0.1, 0.9, 2), (0.1, 0.9, 1), (0.5, 0.75, 2), (0.03, 0.95, 3)]
)
def test_fewest_candidates_are_just_enough(target: float, confidence: float, walks: int) -> None:
    count = fewest_candidates(target, confidence, walks)
    starts = (2, 12, 20)[:walks]
    scores = np.arange(float(count))
    assert risk_controlled(scores, np.zeros(count), target, confidence, starts) == 0.0
    assert risk_controlled(scores[1:], np.zeros(count - 1), target, confidence, starts) is None


def test_risk_controlled_falls_back_and_recovers() -> None:
    changes = {"target_risk": 0.5, "confidence": 0.75, "every": 1, "window": 10}
    threshold = Threshold(config("risk_controlled", **changes))
    observe(threshold, np.arange(10.0), [None] * 10)  # unknown: of no use
    assert threshold.metrics("gate/") == {"gate/labelled": 0.0, "gate/tau": 2.0, "gate/controlled": 0.0}
    threshold.cfg.min_labelled = 10
    observe(threshold, np.arange(10.0), np.ones(10))
    assert threshold.calibrate(2) and threshold.value == 0.0  # all are equally bad
    threshold.cfg.fallback = ThresholdFallback.strictest
    assert threshold.calibrate(3) and threshold.value == 9.0
    assert threshold.metrics("gate/") == {
        "gate/labelled": 10.0,
        "gate/tau": 9.0,
        "gate/controlled": 0.0,
        "gate/acceptance": 0.1,
        "gate/risk": 1.0,
        "gate/risk_bound": 1.0,
    }
    threshold.cfg.fallback = ThresholdFallback.nothing
    assert threshold.calibrate(4) and threshold.value == math.inf
    metrics = threshold.metrics("gate/")  # nothing passes: no risk
    assert metrics == {"gate/labelled": 10.0, "gate/controlled": 0.0, "gate/acceptance": 0.0, "gate/risk_bound": 1.0}
    observe(threshold, np.arange(10.0), np.arange(10) <= 4)
    # 1 bad of 6: 7/64 <= 0.125 passes, 2 of 7: 29/128 does not.
    assert threshold.calibrate(5) and threshold.value == 4.0
    metrics = threshold.metrics()
    # Chosen among twenty thresholds: each bound may err with 0.25 / 20, and (1 - p)^6 + 6 p (1 - p)^5 is that at p.
    bound = metrics.pop("threshold/risk_bound")
    assert (1 - bound) ** 6 + 6 * bound * (1 - bound) ** 5 == pytest.approx(0.0125)
    assert metrics.pop("threshold/risk") == pytest.approx(1 / 6)
    assert metrics == {
        "threshold/labelled": 10.0,
        "threshold/tau": 4.0,
        "threshold/controlled": 1.0,
        "threshold/acceptance": 0.6,
    }


def test_risk_control_without_anything_to_learn_from_is_an_error() -> None:
    threshold = Threshold(config("risk_controlled", every=5), "algorithm.gate")
    observe(threshold, [], [])
    assert not threshold.calibrate(6)  # no candidate at all yet
    observe(threshold, [1.0, 2.0], [None, None])
    assert not threshold.calibrate(5)
    with pytest.raises(DataError, match=r"algorithm\.gate\.kind=risk_controlled .* none of the 2 candidates"):
        threshold.calibrate(6)
    observe(threshold, [3.0], [1])
    assert not threshold.calibrate(6)  # too few, but some
    blind = Threshold(config("quantile", every=5))
    observe(blind, [1.0], [None])
    assert not blind.calibrate(6)  # the others need no facts


def test_metrics_of_the_other_kinds() -> None:
    assert Threshold(config("off")).metrics() == {"threshold/labelled": 0.0}
    threshold = Threshold(config("fixed"))
    observe(threshold, [1.0, 2.0, 3.0, 4.0], [1, 0, None, 1])
    metrics = threshold.metrics()
    bound = metrics.pop("threshold/risk_bound")
    assert metrics == {
        "threshold/labelled": 3.0,
        "threshold/tau": 2.0,
        "threshold/acceptance": 0.75,
        "threshold/risk": 0.5,
    }
    assert bound == pytest.approx(clopper_pearson_upper(1, 2, 0.9))


@pytest.mark.parametrize("kind", ["off", "fixed", "quantile", "risk_controlled"])
def test_state_goes_through_json(kind: str) -> None:
    changes = {"every": 1, "window": 40, "min_labelled": 10, "target_risk": 0.4, "confidence": 0.7}
    rng = np.random.default_rng(0)
    first, second = Threshold(config(kind, **changes)), Threshold(config(kind, **changes))
    observe(first, rng.normal(size=30), rng.random(30) < 0.2)
    observe(first, rng.normal(size=5), [None] * 5)
    first.calibrate(2)
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    assert second.value == first.value and second.metrics() == first.metrics()
    more = rng.normal(size=20), rng.random(20) < 0.2
    for threshold in (first, second):
        observe(threshold, *more)
        threshold.calibrate(3)
    assert second.value == first.value and second.state_dict() == first.state_dict()


def test_state_of_a_closed_threshold_and_of_other_settings() -> None:
    closed = Threshold(config("risk_controlled", every=1, fallback=ThresholdFallback.nothing))
    observe(closed, np.arange(50.0), np.ones(50))
    closed.calibrate(2)
    state = closed.state_dict()
    again = Threshold(config("risk_controlled"))
    again.load_state_dict(state)
    assert again.value == math.inf
    changed = Threshold(config("quantile", window=10, min_labelled=1, every=1, quantile=0.5))
    changed.load_state_dict(state)
    assert changed.value == 2.0
    assert changed.calibrate(2) and changed.value == 44.5  # of the newest ten, 40 … 49
    with pytest.raises(ValueError, match="finite"):
        changed.load_state_dict(state | {"window": [(math.inf, True)]})


@pytest.mark.parametrize(
    ("scores", "bad", "message"),
    [
        ([1.0], [0, 1], "shape"),
        ([[1.0]], [[0]], "shape"),
        ([math.nan], [0], "finite"),
        ([math.inf], [0], "finite"),
        ([1.0], [2], "0 or 1$"),
        ([1.0], [math.nan], "0 or 1$"),
    ],
)
def test_broken_candidates(scores: list, bad: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        risk_controlled(scores, bad, 0.1, 0.9)
    with pytest.raises(ValueError, match=message):
        safest(scores, bad, 0.9)


@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_scores_that_are_not_finite_are_not_observed(score: float) -> None:
    threshold = Threshold(config("fixed"))
    with pytest.raises(ValueError, match=r"scores hold \[(nan|inf)\]; allowed: finite"):
        threshold.observe([Candidate(1.0, None), Candidate(score, None)])
    assert threshold.state_dict()["window"] == []


@pytest.mark.parametrize(
    ("target", "confidence", "walks"),
    [(1, 0.9, 2), (0, 0.9, 2), (0.51, 0.9, 2), (0.1, 0.49, 2), (0.1, 1.0, 2), (0.1, 0.74, 1), (0.1, -0.1, 5)],
)
def test_levels_at_which_the_bound_is_not_proved_are_refused(target: float, confidence: float, walks: int) -> None:
    starts = (2, 12, 13, 14, 15)[:walks]
    with pytest.raises(ValueError, match=f"target_risk={target}, confidence={confidence}, {walks} walks; allowed: "):
        risk_controlled([1.0], [0], target, confidence, starts)
    risk_controlled([1.0], [0], 0.5, 0.5)
    risk_controlled([1.0], [0], 0.5, 0.75, (2,))


def worst_tail(draws: int, mean: float, most: int) -> float:
    """The largest P(S <= most) of independent 0/1 draws of any chances that add up to ``mean``. Hoeffding (1956) shows
    that it is reached by chances that are 0, 1 or one number in between."""
    tails = []
    for ones in range(draws + 1):
        for rest in range(1, draws - ones + 1):
            chance = (mean - ones) / rest
            if 0 <= chance <= 1:
                tails.append(float(binom.cdf(most - ones, rest, chance)))
    return max(tails)


def test_the_single_test_holds_for_draws_of_unequal_chances_at_the_allowed_levels() -> None:
    """A risk is rejected if P(binomial <= bad) <= level. Whatever the chances of the draws are, this happens at most so
    often while their mean is that risk. Outside of the limits there are chances that break it."""

    def worst(level: float, risks: Sequence[float]) -> float:
        """By how much a true null is rejected too often."""
        excess = []
        for draws in range(1, 19):
            for risk in risks:
                tails = binom.cdf(np.arange(draws), draws, risk)
                if (count := int((tails <= level + 1e-12).sum())) > 0:
                    excess.append(worst_tail(draws, draws * risk, count - 1) - level)
        return max(excess)

    small = np.linspace(0.05, 0.5, 19).tolist()
    assert max(worst(level, small) for level in (0.05, 0.1, 0.25)) <= 1e-9
    assert worst(0.25, [0.9, 0.95, 0.96]) > 0.01  # a target above 1/2
    assert worst(0.5, small) > 0.05  # a level above 1/4


BOUNDED = {"every": 1, "window": 200, "min_labelled": 32}


@pytest.mark.parametrize("fallback", list(ThresholdFallback))
@pytest.mark.parametrize("level", [0.101, 0.2])
def test_the_bound_of_a_chosen_threshold_holds_as_often_as_stated(fallback: ThresholdFallback, level: float) -> None:
    """A score that says nothing: the share of bad ones is ``level`` above every threshold. The bound of a threshold
    fixed beforehand would be too low far more often: ``safest`` chooses the luckiest."""
    rng, sets = np.random.default_rng(5), 400
    missed, naive_missed = 0, 0
    for _ in range(sets):
        threshold = Threshold(config("risk_controlled", fallback=fallback, **BOUNDED))
        observe(threshold, rng.random(200), rng.random(200) < level)
        threshold.calibrate(2)
        observe(threshold, rng.random(20), rng.random(20) < level)  # the window is not that of the calibration any more
        metrics = threshold.metrics()
        missed += metrics["threshold/risk_bound"] < level
        passing = [one.bad for one in threshold._window if one.score >= threshold.value]
        naive_missed += clopper_pearson_upper(sum(passing), len(passing), CONFIDENCE) < level
    assert missed / sets <= 1 - CONFIDENCE
    if fallback is ThresholdFallback.safest:
        assert naive_missed / sets > 0.18


def test_the_bound_of_a_threshold_that_no_label_chose_is_the_plain_one() -> None:
    for kind in ("fixed", "quantile"):
        threshold = Threshold(config(kind, every=1, min_labelled=1))
        observe(threshold, np.arange(10.0), np.arange(10) == 3)
        threshold.calibrate(2)
        bad, total = {"fixed": (1, 8), "quantile": (0, 5)}[kind]
        assert threshold.metrics()["threshold/risk_bound"] == clopper_pearson_upper(bad, total, 0.9)
