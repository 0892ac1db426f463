"""How often a risk-controlled threshold is too low, and how often it finds nothing: a simulation with a known truth.

``python benchmarks/risk_control.py`` draws calibration windows whose risk P(bad | score) is known, runs the search of
``skyrl.batch.thresholds.risk_controlled`` with the default target and confidence, and prints for each case the
share of windows

* with a threshold whose true risk is above the target (allowed: 1 - confidence),
* without any threshold,

and the mean share of candidates that pass, once with the search's two starts and once with the first alone. Then, with
the fallback ``safest``, the share of windows in which an upper bound of the risk above τ is too low (allowed: 1 -
confidence): the plain bound, as if τ had been fixed beforehand, and the one that is logged as ``threshold/risk_bound``.
In some cases the candidates come in groups of eight that share a picture, and a share of the groups err or are right as
one. In others the risk of all 32 candidates of a step, or of eight steps in a row, is half of what it is on average, or
half more, by chance. In the last the risk has risen through the window to what it is now.
``--json`` prints one line instead of the table.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from skyrl.batch.thresholds import Candidate, Threshold, clopper_pearson_upper, risk_controlled
from skyrl.settings import RISK_STARTS, ThresholdConfig, ThresholdKind

Risk = Callable[[np.ndarray], np.ndarray]
GROUP, STEP = 8, 32


@dataclass(frozen=True)
class Case:
    """A window: scores are uniform in 0 … 1."""

    name: str
    risk: Risk
    """P(bad | score)."""
    size: int
    tied: float | None = None
    """Share of groups of eight with one label for all; None draws every label by itself."""
    swing: float = 0.0
    """Share by which the risk of a whole step is higher or lower."""
    lasting: int = 1
    """Steps in a row that share their swing."""
    rise: float = 0.0
    """Share by which the risk was lower when the window began."""


def steep(scores: np.ndarray) -> np.ndarray:
    return 0.4 * (1 - scores)  # the best half passes at a mean risk of 0.1


def mild(scores: np.ndarray) -> np.ndarray:
    return 0.03 + 0.08 * (1 - scores)  # all pass at 0.07


def useless(scores: np.ndarray) -> np.ndarray:
    return np.full(len(scores), 0.101)  # none passes


CASES = (
    *(Case(f"only the best are safe, {size}", steep, size) for size in (150, 512)),
    *(Case(f"all are safe, {size}", mild, size) for size in (150, 512)),
    *(Case(f"none is safe, {size}", useless, size) for size in (150, 512)),
    *(Case(f"none is safe, 512, groups, {tied:.0%} tied", useless, 512, tied) for tied in (0.0, 0.5, 1.0)),
    Case("none is safe, 512, steps differ", useless, 512, swing=0.5),
    Case("none is safe, 512, eights of steps do", useless, 512, swing=0.5, lasting=8),
    *(Case(f"none is safe, 512, risk was {rise:.0%} lower", useless, 512, rise=rise) for rise in (0.25, 0.5)),
)


def draw(case: Case, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Scores and labels of one window."""
    scores = rng.random(case.size)
    if case.tied is None:
        labels, length = rng.random(case.size), STEP * case.lasting
        swing = case.swing * np.repeat(rng.choice([-1, 1], -(-case.size // length)), length)[: case.size]
        return scores, labels < case.risk(scores) * (1 + swing - case.rise * np.linspace(1, 0, case.size))
    groups = case.size // GROUP
    own, shared = rng.random((groups, GROUP)), rng.random((groups, 1))
    tied = rng.random((groups, 1)) < case.tied
    return scores, np.where(tied, shared, own).ravel() < case.risk(scores)


def measure(case: Case, windows: int, starts: tuple[int, ...], seed: int) -> dict[str, float]:
    """Over so many windows: ``too_low``, ``nothing``, ``passes``."""
    cfg, rng = ThresholdConfig(), np.random.default_rng(seed)
    fine = np.linspace(0, 1, 10_001)
    risks = case.risk(fine)
    too_low, passes = [], []
    for _ in range(windows):
        scores, bad = draw(case, rng)
        tau = risk_controlled(scores, bad, cfg.target_risk, cfg.confidence, starts)
        too_low.append(tau is not None and float(risks[fine >= tau].mean()) > cfg.target_risk)
        passes.append(0.0 if tau is None else float((scores >= tau).mean()))
    nothing = float(np.mean([share == 0 for share in passes]))
    return {"too_low": float(np.mean(too_low)), "nothing": nothing, "passes": float(np.mean(passes))}


def bounds(case: Case, windows: int, seed: int) -> dict[str, float]:
    """Over so many windows: how often the ``plain`` bound and the one that is ``logged`` are below the risk."""
    cfg, rng = ThresholdConfig(kind=ThresholdKind.risk_controlled, every=1), np.random.default_rng(seed)
    fine = np.linspace(0, 1, 10_001)
    risks = case.risk(fine)
    plain, logged = 0, 0
    for _ in range(windows):
        scores, bad = draw(case, rng)
        threshold = Threshold(cfg)
        threshold.observe([Candidate(*one) for one in zip(scores.tolist(), bad.tolist(), strict=True)])
        threshold.calibrate(2)
        risk, passing = float(risks[fine >= threshold.value].mean()), bad[scores >= threshold.value]
        plain += clopper_pearson_upper(int(passing.sum()), len(passing), cfg.confidence) < risk
        logged += threshold.metrics()["threshold/risk_bound"] < risk
    return {"plain": plain / windows, "logged": logged / windows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=2000, help="windows a case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of the table")
    arguments = parser.parse_args()
    found = {
        case.name: {
            name: measure(case, arguments.windows, starts, arguments.seed)
            for name, starts in (("two", RISK_STARTS), ("one", RISK_STARTS[:1]))
        }
        | {"bounds": bounds(case, arguments.windows, arguments.seed)}
        for case in CASES
    }
    if arguments.json:
        print(json.dumps({"settings": ThresholdConfig().model_dump(mode="json"), "cases": found}))
        return
    print(f"{'':<38}{'two starts':^27}{'the first start alone':^27}{'bound too low':^18}")
    print(f"{'':<38}" + 2 * f"{'too low':>9}{'nothing':>9}{'passes':>9}" + f"{'plain':>9}{'logged':>9}")
    for name, by in found.items():
        cells = "".join(f"{by[n][k]:>9.3f}" for n in ("two", "one") for k in ("too_low", "nothing", "passes"))
        print(f"{name:<38}{cells}" + "".join(f"{by['bounds'][k]:>9.3f}" for k in ("plain", "logged")))


if __name__ == "__main__":
    main()
