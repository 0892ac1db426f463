"""How often a risk-controlled threshold is too low, and how often it finds nothing: a simulation with a known truth.

``python benchmarks/risk_control.py`` draws calibration windows whose risk P(bad | score) is known, runs the search of
``skyrl.batch.thresholds.risk_controlled`` with the default target and confidence, and prints for each case the
share of windows

* with a threshold whose true risk is above the target (allowed: 1 - confidence),
* without any threshold,

and the mean share of candidates that pass, once with the search's two starts and once with the first alone. In the last
cases the candidates come in groups of eight that share a picture, and a share of the groups err or are right as one.
``--json`` prints one line instead of the table.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np

from skyrl.batch.thresholds import risk_controlled
from skyrl.settings import ThresholdConfig
from skyrl.settings.ranges import RISK_STARTS

Risk = Callable[[np.ndarray], np.ndarray]
GROUP = 8


@dataclass(frozen=True)
class Case:
    """A window: scores are uniform in 0 … 1."""

    name: str
    risk: Risk
    """P(bad | score)."""
    size: int
    tied: float | None = None
    """Share of groups of eight with one label for all; None draws every label by itself."""


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
)


def draw(case: Case, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Scores and labels of one window."""
    scores = rng.random(case.size)
    if case.tied is None:
        return scores, rng.random(case.size) < case.risk(scores)
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
        for case in CASES
    }
    if arguments.json:
        print(json.dumps({"settings": {k: str(v) for k, v in asdict(ThresholdConfig()).items()}, "cases": found}))
        return
    print(f"{'':<38}{'two starts':^27}{'the first start alone':^27}")
    print(f"{'':<38}" + 2 * f"{'too low':>9}{'nothing':>9}{'passes':>9}")
    for name, by in found.items():
        cells = "".join(f"{by[n][k]:>9.3f}" for n in ("two", "one") for k in ("too_low", "nothing", "passes"))
        print(f"{name:<38}{cells}")


if __name__ == "__main__":
    main()
