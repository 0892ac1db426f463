"""Calibrated thresholds on reward-model scores and margins: what passes, and how often that is a hallucination.

A *candidate* is something that a threshold τ may let pass (an answer that is right by the rule; a preference pair),
with its score and, where facts about the picture are known, whether it is *bad*: it says something false. It passes if
its score is at least τ. Numpy and scipy only: the buffer needs no torch.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import betaincinv

from skyrl.interfaces import Metrics
from skyrl.records import DataError
from skyrl.settings import ThresholdConfig, ThresholdFallback, ThresholdKind
from skyrl.settings.ranges import RISK_STARTS, fewest_candidates

LEVELS = 20
"""The candidate thresholds of :func:`risk_controlled` let 2/20, 3/20, … 20/20 of the samples pass."""
LOWEST = 2


def clopper_pearson_upper(bad: int, total: int, confidence: float) -> float:
    """Exact one-sided upper bound of a binomial share (Clopper and Pearson 1934).

    The share at which ``bad`` or fewer of ``total`` have probability 1 − confidence: the confidence-quantile of
    Beta(bad + 1, total − bad). For bad = 0 that is 1 − (1 − confidence)^(1/total).

    Returns:
        A share in (0, 1]; 1.0 if ``total`` is 0 or all are bad.

    Raises:
        ValueError: unless 0 ≤ bad ≤ total and 0 < confidence < 1.
    """
    if not 0 <= bad <= total or not 0 < confidence < 1:
        raise ValueError(
            f"bad={bad}, total={total}, confidence={confidence}; allowed: 0 <= bad <= total, 0 < confidence < 1"
        )
    return 1.0 if bad == total else float(betaincinv(bad + 1, total - bad, confidence))


def risk_controlled(
    scores: ArrayLike, bad: ArrayLike, target_risk: float, confidence: float, starts: Sequence[int] = RISK_STARTS
) -> float | None:
    """The smallest threshold at which the share of bad ones among those that pass is at most ``target_risk``.

    The place of the starts: from 2/20 alone two bad samples among the first fifty end the search, though further down
    the bound would hold easily. Simulated with a risk that grows from 0.03 to 0.11 over 512 samples (target 0.1,
    confidence 0.9), one start found nothing in 26 % of the windows, two in 9 %. The price is half of the error for
    each: where only the best scores are safe, two starts find nothing more often (``benchmarks/risk_control.py``).

    Fixed-sequence testing with several starts, as in Learn then Test (Angelopoulos et al., arXiv 2110.01052). Each walk
    goes through a fixed list of thresholds from the highest down. At each one the null hypothesis "more than
    ``target_risk`` of what passes is bad" is rejected if the Clopper-Pearson bound is at most ``target_risk``; the
    first that is not rejected ends the walk. The lowest threshold that any walk rejected is returned. Take the first
    true null of a walk's list: a true null is rejected by that walk only if this single test errs. Each of the J
    walks tests at the confidence 1 − (1 − ``confidence``)/J, so all in all a threshold that is too low is returned with
    a probability of at most 1 − ``confidence``. No correction for the number of tests is needed.

    The lists must not depend on the labels, and they don't: they hold scores, so that given levels of the samples pass
    (:data:`LEVELS`), at least so many samples that none bad among them would be enough,
    ((1 − confidence)/J)^(1/n) > 1 − target_risk. Given the scores the lists are fixed, and only the labels are random:
    independent draws with P(bad | score). The share that the statement is about is the mean of P(bad | score) over the
    samples that pass; the sum of such draws has lighter tails than the binomial with the same mean (Hoeffding 1956),
    so the bound still holds (for a confidence of at least 0.6). Only the order of the scores matters.

    Args:
        scores: [N], finite. Higher is better.
        bad: [N] of bool or 0/1.
        target_risk: in (0, 1).
        confidence: in (0, 1).
        starts: first level of each walk, 1 … 20.

    Returns:
        One of ``scores``, or ``None`` if no walk passes its first test: also if there are fewer samples than
        :func:`skyrl.settings.ranges.fewest_candidates`.

    Raises:
        ValueError: for shapes, scores, labels or levels other than these.
    """
    values, labels = _checked(scores, bad, unknown=False)
    if not (0 < target_risk < 1 and 0 < confidence < 1):
        raise ValueError(f"target_risk={target_risk}, confidence={confidence}; allowed: above 0 and below 1")
    total, fewest = len(values), fewest_candidates(target_risk, confidence, len(starts))
    each = 1 - (1 - confidence) / len(starts)
    found = None
    for start in starts:
        for level in range(start, LEVELS + 1):
            count = max(fewest, math.ceil(level * total / LEVELS))
            if count > total:
                break
            tau, bad_ones, passing = _passing(values, labels, count)
            if clopper_pearson_upper(bad_ones, passing, each) > target_risk:
                break
            found = tau if found is None else min(found, tau)
    return found


def safest(scores: ArrayLike, bad: ArrayLike, confidence: float) -> float:
    """Of the thresholds that let 2/20, 3/20, … 20/20 of N ≥ 1 samples pass, the one with the lowest Clopper-Pearson
    bound on the share of bad ones; among equals the lowest. It says nothing about that share: it is a choice after
    looking.

    Args and errors: as :func:`risk_controlled`.
    """
    values, labels = _checked(scores, bad, unknown=False)
    counts = sorted({math.ceil(level * len(values) / LEVELS) for level in range(LOWEST, LEVELS + 1)})
    at = [_passing(values, labels, count) for count in counts]
    return min((clopper_pearson_upper(bad_ones, n, confidence), tau) for tau, bad_ones, n in at)[1]


def strictest(scores: ArrayLike) -> float:
    """The threshold that lets the highest tenth of N ≥ 1 scores pass, at least one."""
    values = np.sort(np.asarray(scores, dtype=np.float64))[::-1]
    return float(values[math.ceil(LOWEST * len(values) / LEVELS) - 1])


def _passing(values: np.ndarray, labels: np.ndarray, count: int) -> tuple[float, int, int]:
    """The threshold that lets the ``count`` highest pass, and how many bad ones and how many in all it lets pass:
    samples of equal score pass together."""
    tau = float(np.partition(values, len(values) - count)[len(values) - count])
    passes = values >= tau
    return tau, int(labels[passes].sum()), int(passes.sum())


class Threshold:
    """A threshold with its window of the candidates seen last, and its state.

    In each step: :meth:`calibrate`, use :attr:`value`, :meth:`observe` *all* candidates, also those that did not pass:
    a threshold that saw only what it let pass could never come down again.
    """

    def __init__(self, cfg: ThresholdConfig, key: str = "threshold") -> None:
        """
        Args:
            cfg: its settings.
            key: their name, for messages.
        """
        self.cfg, self.key = cfg, key
        self.value = -math.inf if cfg.kind is ThresholdKind.off else cfg.value
        """τ. −inf: everything passes (``off``); +inf: nothing does (``fallback=nothing``)."""
        self.controlled = False
        """Whether the last calibration of ``risk_controlled`` found a threshold."""
        self._unlabelled = 0
        self._scores: deque[float] = deque(maxlen=cfg.window)
        self._bad: deque[float] = deque(maxlen=cfg.window)

    def observe(self, scores: ArrayLike, bad: ArrayLike) -> None:
        """Append candidates; the oldest beyond ``cfg.window`` are forgotten.

        Args:
            scores: [N], finite.
            bad: [N] of bool, or of 0, 1 and ``nan`` for a candidate without known facts. ``risk_controlled`` has no use
                for the unknown ones and skips them; the others look at their scores.

        Raises:
            ValueError: for other shapes or values.
        """
        values, labels = _checked(scores, bad, unknown=True)
        if self.cfg.kind is ThresholdKind.risk_controlled:
            known = ~np.isnan(labels)
            self._unlabelled += int((~known).sum())
            values, labels = values[known], labels[known]
        self._scores.extend(values.tolist())
        self._bad.extend(labels.tolist())

    def calibrate(self, step: int) -> bool:
        """Set τ anew if ``kind`` says so, the step is due (1 + every, 1 + 2·every, …) and the window holds
        ``min_labelled`` candidates.

        Returns:
            Whether τ was calculated (it may have come out the same).

        Raises:
            DataError: if ``risk_controlled`` is due and none of the candidates seen so far had known facts: τ would
                stay at its first value for ever, in units of a reward model that nobody chose it for.
        """
        cfg = self.cfg
        due = step > 1 and (step - 1) % cfg.every == 0
        if due and cfg.kind is ThresholdKind.risk_controlled and self._unlabelled and not self._scores:
            raise DataError(
                f"{self.key}.kind=risk_controlled learns from answers whose claims about a picture can be checked, but "
                f"none of the {self._unlabelled} candidates so far has facts that a checker knows; use "
                f"{self.key}.kind=quantile, fixed or off, or give the data facts (docs/hallucination.md)"
            )
        if not due or len(self._scores) < cfg.min_labelled:
            return False
        if cfg.kind is ThresholdKind.quantile:
            self.value = float(np.quantile(self._scores, cfg.quantile))
        elif cfg.kind is ThresholdKind.risk_controlled:
            found = risk_controlled(self._scores, self._bad, cfg.target_risk, cfg.confidence)
            self.controlled = found is not None
            if found is None:
                found = self._fallback()
            self.value = found
        else:
            return False
        return True

    def _fallback(self) -> float:
        if self.cfg.fallback is ThresholdFallback.safest:
            return safest(self._scores, self._bad, self.cfg.confidence)
        return strictest(self._scores) if self.cfg.fallback is ThresholdFallback.strictest else math.inf

    def metrics(self, prefix: str = "threshold/") -> Metrics:
        """What is defined of: ``tau`` (a finite one), ``controlled`` (``risk_controlled`` only: 1.0 if the last
        calibration found a τ that keeps the target, 0.0 if the fallback or the first value holds), ``labelled``
        (candidates of the window with a label), ``acceptance`` (share of the window that passes), ``risk`` (share of
        bad ones among the labelled that pass, ``nan`` if none does) and ``risk_bound`` (its upper bound at
        ``cfg.confidence``, 1.0 if none does). The last three are of the window as it is now, which also holds what came
        after the last calibration.
        """
        values, labels = np.array(self._scores), np.array(self._bad)
        known = ~np.isnan(labels)
        metrics: Metrics = {f"{prefix}labelled": float(known.sum())}
        if math.isfinite(self.value):
            metrics[f"{prefix}tau"] = self.value
        if self.cfg.kind is ThresholdKind.risk_controlled:
            metrics[f"{prefix}controlled"] = float(self.controlled)
        if len(values):
            metrics[f"{prefix}acceptance"] = float(np.mean(values >= self.value))
        if known.any():
            passing = labels[known & (values >= self.value)]
            bad, total = int(passing.sum()), len(passing)
            metrics[f"{prefix}risk"] = bad / total if total else math.nan
            metrics[f"{prefix}risk_bound"] = clopper_pearson_upper(bad, total, self.cfg.confidence)
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """Strict JSON: ``None`` stands for τ = ±inf and for an unknown label."""
        return {
            "kind": self.cfg.kind.value,
            "value": self.value if math.isfinite(self.value) else None,
            "controlled": self.controlled,
            "scores": list(self._scores),
            "bad": [None if math.isnan(label) else int(label) for label in self._bad],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved window, cut to the newest ``cfg.window``, and the calibrated τ.

        A resumed run may have other settings: τ is taken over only if the kind is the same and is a calibrated one;
        else it starts as the settings say.

        Raises:
            ValueError: if the window is broken.
        """
        self._scores.clear()
        self._bad.clear()
        self.observe(state["scores"], [math.nan if label is None else label for label in state["bad"]])
        calibrated = self.cfg.kind in (ThresholdKind.quantile, ThresholdKind.risk_controlled)
        if calibrated and state["kind"] == self.cfg.kind.value:
            self.value = math.inf if state["value"] is None else state["value"]
            self.controlled = state.get("controlled", False)  # checkpoints of older versions do not know


def _checked(scores: ArrayLike, bad: ArrayLike, *, unknown: bool) -> tuple[np.ndarray, np.ndarray]:
    """Both as float64 [N]; ``nan`` is a label only where ``unknown`` allows it."""
    values, labels = np.asarray(scores, dtype=np.float64), np.asarray(bad, dtype=np.float64)
    if values.ndim != 1 or values.shape != labels.shape:
        raise ValueError(f"scores have shape {values.shape}, bad {labels.shape}; allowed: [N] and [N]")
    if not np.isfinite(values).all():
        raise ValueError(f"scores hold {values[~np.isfinite(values)].tolist()}; allowed: finite")
    allowed = (labels == 0) | (labels == 1) | (np.isnan(labels) & unknown)
    if not allowed.all():
        words = "0, 1 or nan" if unknown else "0 or 1"
        raise ValueError(f"bad holds {labels[~allowed].tolist()}; allowed: {words}")
    return values, labels
