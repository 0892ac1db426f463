"""Calibrated thresholds on reward-model scores and margins: what passes, and how often that is a hallucination.

A *candidate* is something that a threshold τ may let pass (an answer that is right by the rule; a preference pair),
with its score and, where facts about the picture are known, whether it is *bad*: it says something false. It passes if
its score is at least τ. Numpy and scipy only.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import betaincinv

from skyrl.records import DataError, Metrics
from skyrl.settings import RISK_STARTS, ThresholdConfig, ThresholdFallback, ThresholdKind, fewest_candidates

LEVELS = 20
"""The thresholds that are looked at let 2/20, 3/20, … 20/20 of the samples pass, or just enough to show anything."""
LOWEST = 2


class SavedThreshold(TypedDict):
    """What :meth:`Threshold.state_dict` gives: strict JSON."""

    kind: str
    value: float | None
    """τ; ``None`` stands for ±inf."""
    controlled: bool
    unlabelled: int
    window: list[tuple[float, bool | None]]


@dataclass(slots=True, frozen=True)
class Candidate:
    """What a threshold looks at, whether it lets it pass or not."""

    score: float
    """What the threshold is compared with; finite."""
    bad: bool | None
    """``None`` if nothing is known of its picture, or there is none."""


def clopper_pearson_upper(bad: int, total: int, confidence: float) -> float:
    """Exact one-sided upper bound of a binomial share (Clopper and Pearson 1934): that at which ``bad`` or fewer of
    ``total`` have probability 1 − confidence, the confidence-quantile of Beta(bad + 1, total − bad). 1.0 if ``total``
    is 0 or all are bad.

    Raises:
        ValueError: unless 0 ≤ bad ≤ total and 0 < confidence < 1.
    """
    if not 0 <= bad <= total or not 0 < confidence < 1:
        raise ValueError(f"bad={bad}, total={total}, confidence={confidence}; allowed: 0 <= bad <= total, 0 < it < 1")
    return 1.0 if bad == total else float(betaincinv(bad + 1, total - bad, confidence))


def risk_controlled(
    scores: ArrayLike, bad: ArrayLike, target_risk: float, confidence: float, starts: Sequence[int] = RISK_STARTS
) -> float | None:
    """The smallest threshold at which the share of bad ones among those that pass is at most ``target_risk``.

    Fixed-sequence testing with several starts, as in Learn then Test (Angelopoulos et al., arXiv 2110.01052). Each walk
    goes through a fixed list of thresholds from the highest down. At each one the null hypothesis "more than
    ``target_risk`` of what passes is bad" is rejected if the Clopper-Pearson bound is at most ``target_risk``; the
    first that is not rejected ends the walk. The lowest threshold that any walk rejected is returned. A walk is wrong
    only if it rejects the first true null of its list: a single test, at the level (1 − ``confidence``)/J for each of
    J walks. So a threshold that is too low is returned with a probability of at most 1 − ``confidence``. Why two:
    from 2/20 alone two bad samples among the first fifty end the search, though further down the bound would hold
    easily (``benchmarks/risk_control.py`` weighs what the second gains and costs).

    **What is assumed.** Given the scores, labels are independent draws with P(bad | score), and the risk is the mean of
    P(bad | score) over the samples that pass. The lists, which depend on the scores alone, are fixed then. The sum S of
    n such draws with the mean m has P(S ≤ c) ≤ P(B ≤ c), B binomial with the same mean, for c ≤ m − 1 (Hoeffding 1956).
    Every c that rejects a risk t is so small: P(B ≤ n·t) > 1/4 for t ≤ 1/2 (Greenberg and Mohri 2014), so a level of at
    most 1/4 rejects only below the whole part of n·t. Hence the limits of ``target_risk`` and ``confidence``. Not
    covered is dependence (docs/hallucination.md): answers about one picture, a prompt that comes back within the
    window, steps whose policy learned from earlier labels of the same window.

    Args:
        scores: [N], finite. Higher is better.
        bad: [N] of bool or 0/1.
        target_risk: above 0, at most 1/2.
        confidence: below 1, at least 1 − J/4.
        starts: first level of each walk, 1 … 20.

    Returns:
        One of ``scores``, or ``None`` if no walk passes its first test, as with fewer than ``fewest_candidates``.

    Raises:
        ValueError: for shapes, scores, labels or levels other than these.
    """
    values, labels = _checked(scores, bad)
    level = (1 - confidence) / len(starts)
    if not (0 < target_risk <= 0.5 and 0 < confidence < 1 and level <= 0.25):
        raise ValueError(
            f"target_risk={target_risk}, confidence={confidence}, {len(starts)} walks; allowed: a target above 0 and "
            f"at most 0.5, a confidence of at least {1 - len(starts) / 4:g} and below 1"
        )
    total, fewest = len(values), fewest_candidates(target_risk, confidence, len(starts))
    found = None
    for start in starts:
        for place in range(start, LEVELS + 1):
            count = max(fewest, math.ceil(place * total / LEVELS))
            if count > total:
                break
            tau, bad_ones, passing = _passing(values, labels, count)
            if clopper_pearson_upper(bad_ones, passing, 1 - level) > target_risk:
                break
            found = tau if found is None else min(found, tau)
    return found


def safest(scores: ArrayLike, bad: ArrayLike, confidence: float) -> float:
    """Of the thresholds that let 2/20, 3/20, … 20/20 of N ≥ 1 samples pass, the one with the lowest Clopper-Pearson
    bound on the share of bad ones; among equals the lowest. That bound says nothing any more: it was chosen for being
    low. Args and errors are those of :func:`risk_controlled`.
    """
    values, labels = _checked(scores, bad)
    counts = sorted({math.ceil(level * len(values) / LEVELS) for level in range(LOWEST, LEVELS + 1)})
    at = [_passing(values, labels, count) for count in counts]
    return min((clopper_pearson_upper(bad_ones, n, confidence), tau) for tau, bad_ones, n in at)[1]


def strictest(scores: ArrayLike) -> float:
    """The threshold that lets the highest tenth of N ≥ 1 scores pass, at least one."""
    values = np.asarray(scores, dtype=np.float64)
    return _passing(values, np.zeros(len(values)), math.ceil(LOWEST * len(values) / LEVELS))[0]


def _passing(values: np.ndarray, labels: np.ndarray, count: int) -> tuple[float, int, int]:
    """The threshold that lets the ``count`` highest pass, and how many bad ones and how many in all it lets pass:
    samples of equal score pass together."""
    tau = float(np.partition(values, len(values) - count)[len(values) - count])
    passes = values >= tau
    return tau, int(labels[passes].sum()), int(passes.sum())


class Threshold:
    """A threshold with its window of the candidates seen last, and its state.

    In each step: :meth:`calibrate`, use :attr:`value`, :meth:`observe` *all* candidates, also those that did not pass:
    a threshold that saw only what it let pass could never come down again. ``key`` names its settings in messages.
    """

    def __init__(self, cfg: ThresholdConfig, key: str = "threshold") -> None:
        self.cfg, self.key = cfg, key
        self._by_risk = cfg.kind is ThresholdKind.risk_controlled
        self._learns = self._by_risk or cfg.kind is ThresholdKind.quantile
        self.value = -math.inf if cfg.kind is ThresholdKind.off else cfg.value
        """τ. −inf: everything passes (``off``); +inf: nothing does (``fallback=nothing``)."""
        self.controlled = False
        """Whether the last calibration of ``risk_controlled`` found a threshold."""
        self._unlabelled = 0
        self._window: deque[Candidate] = deque(maxlen=cfg.window)

    def observe(self, candidates: Iterable[Candidate]) -> None:
        """Append candidates; the oldest beyond ``cfg.window`` are forgotten. ``risk_controlled`` has no use for those
        without known facts and skips them.

        Raises:
            ValueError: for a score that is not finite.
        """
        new = list(candidates)
        if broken := [one.score for one in new if not math.isfinite(one.score)]:
            raise ValueError(f"scores hold {broken}; allowed: finite")
        if self._by_risk:
            self._unlabelled += sum(one.bad is None for one in new)
            new = [one for one in new if one.bad is not None]
        self._window.extend(new)

    def calibrate(self, step: int) -> bool:
        """Set τ anew if ``kind`` says so, the step is due (1 + every, 1 + 2·every, …) and the window holds
        ``min_labelled`` candidates. Returns whether it did.

        Raises:
            DataError: if ``risk_controlled`` is due and none of the candidates seen so far had known facts: τ would
                stay at its first value for ever, in units of a reward model that nobody chose it for.
        """
        cfg = self.cfg
        if not self._learns or step <= 1 or (step - 1) % cfg.every:
            return False
        if self._by_risk and self._unlabelled and not self._window:
            raise DataError(
                f"{self.key}.kind=risk_controlled learns from answers whose claims about a picture can be checked, but "
                f"none of the {self._unlabelled} candidates so far has facts that a checker knows; use "
                f"{self.key}.kind=quantile, fixed or off, or give the data facts (docs/hallucination.md)"
            )
        if len(self._window) < cfg.min_labelled:
            return False
        scores = [one.score for one in self._window]
        if self._by_risk:
            labels = [bool(one.bad) for one in self._window]
            found = risk_controlled(scores, labels, cfg.target_risk, cfg.confidence)
            self.controlled = found is not None
            self.value = self._fallback(scores, labels) if found is None else found
        else:
            self.value = float(np.quantile(scores, cfg.quantile))
        return True

    def _fallback(self, scores: list[float], labels: list[bool]) -> float:
        if self.cfg.fallback is ThresholdFallback.safest:
            return safest(scores, labels, self.cfg.confidence)
        return strictest(scores) if self.cfg.fallback is ThresholdFallback.strictest else math.inf

    def metrics(self, prefix: str = "threshold/") -> Metrics:
        """What is defined of ``tau``, ``controlled``, ``labelled``, ``acceptance``, ``risk`` and ``risk_bound``
        (docs/metrics.md). The last three are of the window as it is now, with what came after the last calibration.

        ``risk_controlled`` chooses τ by labels, one of at most 20 thresholds that the scores alone decide. Its bound
        holds for all 20 at once (each has a twentieth of the error), hence for the chosen one. The bound of a τ fixed
        beforehand would be too low in 25 to 30 % of useless windows under ``safest``. It may lie above the target while
        ``controlled`` is 1: the search, in its fixed order, asks for less.
        """
        cfg, passing = self.cfg, [one for one in self._window if one.score >= self.value]
        labels = [one.bad for one in passing if one.bad is not None]
        known = sum(one.bad is not None for one in self._window)
        metrics: Metrics = {f"{prefix}labelled": float(known)}
        if math.isfinite(self.value):
            metrics[f"{prefix}tau"] = self.value
        if self._by_risk:
            metrics[f"{prefix}controlled"] = float(self.controlled)
        if self._window:
            metrics[f"{prefix}acceptance"] = len(passing) / len(self._window)
        if labels:
            metrics[f"{prefix}risk"] = sum(labels) / len(labels)
        if known:
            confidence = 1 - (1 - cfg.confidence) / LEVELS if self._by_risk else cfg.confidence
            metrics[f"{prefix}risk_bound"] = clopper_pearson_upper(sum(labels), len(labels), confidence)
        return metrics

    def state_dict(self) -> SavedThreshold:
        """The window and τ, and how they came about."""
        return {
            "kind": self.cfg.kind.value,
            "value": self.value if math.isfinite(self.value) else None,
            "controlled": self.controlled,
            "unlabelled": self._unlabelled,
            "window": [(one.score, one.bad) for one in self._window],
        }

    def load_state_dict(self, state: SavedThreshold) -> None:
        """Take over a saved window, cut to the newest ``cfg.window``, and τ if the kind is the same and a calibrated
        one; else τ starts as the settings say."""
        self._window.clear()
        self.observe(Candidate(*one) for one in state["window"])
        self._unlabelled = state["unlabelled"] if self._by_risk else 0
        if self._learns and state["kind"] == self.cfg.kind.value:
            self.value = math.inf if state["value"] is None else state["value"]
            self.controlled = state["controlled"]


def _checked(scores: ArrayLike, bad: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Both as float64 [N]."""
    values, labels = np.asarray(scores, dtype=np.float64), np.asarray(bad, dtype=np.float64)
    if values.ndim != 1 or values.shape != labels.shape:
        raise ValueError(f"scores have shape {values.shape}, bad {labels.shape}; allowed: [N] and [N]")
    if not (np.isfinite(values).all() and np.isin(labels, (0, 1)).all()):
        raise ValueError(f"scores are {values.tolist()}, bad {labels.tolist()}; allowed: finite, and 0 or 1")
    return values, labels
