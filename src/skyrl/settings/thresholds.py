"""Settings of a threshold on the reward model's scores: the filter of preference pairs and the gate."""

from __future__ import annotations

import math
from collections.abc import Iterator
from enum import Enum

from skyrl.schema import Count, OpenShare, Problem, Settings

RISK_STARTS = (2, 12)
"""Where the walks of a risk-controlled threshold begin, in twentieths: ``batch/thresholds.py`` says why."""
MIN_CONFIDENCE = 1 - len(RISK_STARTS) / 4
"""Smallest confidence of a risk-controlled threshold: each walk may err with 1/4 at most (``batch/thresholds.py``)."""
MAX_TARGET = 0.5
"""Largest target; the same proof needs it."""


class ThresholdKind(Enum):
    off = "off"
    """Everything passes."""
    fixed = "fixed"
    """τ is ``value``."""
    quantile = "quantile"
    """τ is that quantile of the scores seen lately."""
    risk_controlled = "risk_controlled"
    """The smallest τ at which the share of hallucinating answers among those that pass is, with the stated confidence,
    at most ``target_risk``."""


class ThresholdFallback(Enum):
    safest = "safest"
    """What lies above the threshold whose upper bound on the risk is lowest: it is not under control, but nothing is
    known to be better."""
    strictest = "strictest"
    """The tenth of the candidates with the highest scores."""
    nothing = "nothing"
    """Nothing. If the policy learns from nothing else, its risk never changes either."""


class ThresholdConfig(Settings):
    kind: ThresholdKind = ThresholdKind.fixed
    """How the threshold τ on a score or margin is set."""
    value: float = 0.0
    """τ of ``fixed``; the others start from it until they have seen enough. Raw reward-model units."""
    quantile: OpenShare = 0.5
    """Of the window's scores (``quantile``)."""
    target_risk: OpenShare = 0.1
    """Largest share of hallucinating answers among those that pass (``risk_controlled``, which needs 0.5 or less)."""
    confidence: OpenShare = 0.9
    """Probability with which the bound on that share holds (``risk_controlled``, which needs 0.5 or more)."""
    fallback: ThresholdFallback = ThresholdFallback.safest
    """What passes while no τ keeps the risk under ``target_risk`` (``risk_controlled``)."""
    every: Count = 5
    """Steps between recalibrations."""
    window: Count = 512
    """Newest candidates that a calibration looks at (``risk_controlled``: newest with known facts)."""
    min_labelled: Count = 32
    """Candidates below which nothing is calibrated."""

    def problems(self, key: str) -> Iterator[Problem]:
        """What does not fit together; ``key`` is where these settings stand."""
        if self.kind in (ThresholdKind.quantile, ThresholdKind.risk_controlled) and self.window < self.min_labelled:
            few = f"it could never hold enough candidates to calibrate; must be {self.min_labelled} or more"
            yield f"{key}.window {key}.min_labelled", few
        if self.kind is not ThresholdKind.risk_controlled:
            return
        if self.confidence < MIN_CONFIDENCE:
            yield f"{key}.confidence {key}.kind", f"must be {MIN_CONFIDENCE} or more, or its bound does not hold"
        if self.target_risk > MAX_TARGET:
            yield f"{key}.target_risk {key}.kind", f"must be {MAX_TARGET} or less, or its bound does not hold"
        # With fewer, even a spotless sample can't show that the risk is under its target.
        need = fewest_candidates(self.target_risk, self.confidence)
        if self.min_labelled < need:
            keys = f"{key}.min_labelled {key}.target_risk {key}.confidence"
            yield keys, f"such a risk can't be shown with so few labelled candidates; must be {need} or more"


def fewest_candidates(target_risk: float, confidence: float, walks: int = len(RISK_STARTS)) -> int:
    """Candidates without which no risk-controlled threshold can be found, even if none of them is bad: the first n with
    ((1 − confidence)/walks)^(1/n) > 1 − target_risk. Strictly above, so that no rounding of the bound ends a walk."""
    return math.floor(math.log((1 - confidence) / walks) / math.log1p(-target_risk) + 1e-9) + 1
