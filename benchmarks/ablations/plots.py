"""Curves over training: mean over seeds with the range of the seeds behind it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from benchmarks.ablations.grid import Row

COLOURS = ("#1f6fb4", "#d1495b", "#2a9d5c", "#e08e0b", "#7a4fb0", "#4d4d4d", "#17a2a2", "#b0578d")


def evaluation_curves(
    path: Path, rows: Sequence[Row], methods: Sequence[str], names: Sequence[tuple[str, str]]
) -> None:
    """One panel a metric of the evaluations, one line a method.

    Args:
        names: (metric, title of its panel).
    """
    _panels(path, rows, methods, names, "evaluations", smooth=1)


def step_curves(path: Path, rows: Sequence[Row], methods: Sequence[str], names: Sequence[tuple[str, str]]) -> None:
    """The same of the training steps, as a mean over five steps."""
    _panels(path, rows, methods, names, "steps", smooth=5)


def _panels(
    path: Path, rows: Sequence[Row], methods: Sequence[str], names: Sequence[tuple[str, str]], kind: str, smooth: int
) -> None:
    figure, axes = plt.subplots(1, len(names), figsize=(4.6 * len(names), 3.4), squeeze=False)
    for axis, (name, title) in zip(axes[0], names, strict=True):
        for colour, method in zip(COLOURS, methods, strict=False):
            own = [row[kind] for row in rows if row["method"] == method]
            if own:
                _line(axis, own, name, method, colour, smooth)
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_xlabel("step")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.tight_layout()
    if handles:  # nothing is drawn where no run has the metric; beside the panels it hides no line
        figure.legend(handles, labels, fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def _line(axis: plt.Axes, runs: list[list[dict[str, float]]], name: str, label: str, colour: str, smooth: int) -> None:
    length = min(len(run) for run in runs)
    steps = np.array([point["step"] for point in runs[0][:length]])
    table = np.array([[point.get(name, np.nan) for point in run[:length]] for run in runs])
    if np.isnan(table).all():
        return
    if smooth > 1 and length >= smooth:
        windows = np.lib.stride_tricks.sliding_window_view(table, smooth, axis=1)
        table, steps = windows.mean(-1), steps[smooth - 1 :]
    axis.plot(steps, table.mean(0), color=colour, label=label, linewidth=1.8)
    if len(table) > 1:
        axis.fill_between(steps, table.min(0), table.max(0), color=colour, alpha=0.15, linewidth=0)
