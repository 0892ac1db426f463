"""Numbers out of rows: means over seeds with 95 % intervals, paired differences, rollouts needed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy import stats

from benchmarks.ablations.grid import Row

CONFIDENCE = 0.95
Figure = Callable[[Row], float]
"""One number of one run; nan if the run has none."""


@dataclass(frozen=True, slots=True)
class Interval:
    """Mean over seeds and half the width of its 95 % interval (Student's t); nan where there are too few."""

    mean: float
    half: float
    count: int

    @property
    def sign(self) -> int:
        """1 or -1 if the interval lies on one side of 0, else 0."""
        if not (self.count > 1 and abs(self.mean) > self.half):
            return 0
        return 1 if self.mean > 0 else -1


def interval(values: Iterable[float]) -> Interval:
    """Of independent values; those that are nan are left out."""
    kept = np.array([value for value in values if math.isfinite(value)])
    if not kept.size:
        return Interval(math.nan, math.nan, 0)
    if kept.size == 1:
        return Interval(float(kept[0]), math.nan, 1)
    half = stats.t.ppf(0.5 + CONFIDENCE / 2, kept.size - 1) * kept.std(ddof=1) / math.sqrt(kept.size)
    return Interval(float(kept.mean()), float(half), int(kept.size))


def of(rows: Sequence[Row], method: str, figure: Figure) -> Interval:
    """A figure of one method over its seeds."""
    return interval(figure(row) for row in rows if row["method"] == method)


def difference(rows: Sequence[Row], one: str, other: str, figure: Figure, minus: Figure | None = None) -> Interval:
    """Mean of figure(one) - figure(other), seed by seed, over the seeds that both methods have: the same seed asks the
    same prompts in the same order, so what they share cancels.

    Args:
        minus: the figure of ``other``, if it is another one.
    """
    first = {row["seed"]: row for row in rows if row["method"] == one}
    second = {row["seed"]: row for row in rows if row["method"] == other}
    seeds = sorted(first.keys() & second.keys())
    return interval(figure(first[seed]) - (minus or figure)(second[seed]) for seed in seeds)


def final(name: str) -> Figure:
    """A metric of the last evaluation."""
    return lambda row: row["evaluations"][-1].get(name, math.nan)


def at_step(name: str, step: int) -> Figure:
    """A metric of the evaluation after ``step``."""
    return lambda row: next(
        (point.get(name, math.nan) for point in row["evaluations"] if point["step"] == step), math.nan
    )


def best(name: str) -> Figure:
    """The largest value of a metric over all evaluations."""
    return lambda row: max(point.get(name, -math.inf) for point in row["evaluations"])


def drop_from_best(name: str) -> Figure:
    """How far the last evaluation is below the best one."""
    return lambda row: best(name)(row) - final(name)(row)


def over_steps(name: str, part: slice = slice(None)) -> Figure:
    """Mean of a training metric over some steps."""

    def mean(row: Row) -> float:
        values = [step[name] for step in row["steps"][part] if name in step]
        return float(np.mean(values)) if values else math.nan

    return mean


def rollouts_to(accuracy: float, per_step: int) -> Figure:
    """Answers sampled until the evaluated accuracy first reaches ``accuracy``, interpolated linearly between
    evaluations; nan if it never does."""

    def needed(row: Row) -> float:
        points = [(point["step"], point["eval/accuracy"]) for point in row["evaluations"]]
        if points[0][1] >= accuracy:
            return 0.0
        for (before, low), (after, high) in pairwise(points):
            if high >= accuracy:
                return per_step * (before + (after - before) * (accuracy - low) / (high - low))
        return math.nan

    return needed
