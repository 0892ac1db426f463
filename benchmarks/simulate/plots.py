"""The chart of docs/results/simulation.md."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BLUE, RED, GREY = "#1f6fb4", "#d1495b", "#9a9a9a"


def draw(results: dict[str, Any], path: Path) -> None:
    """Published and simulated ratios; the splits of the GPUs; the control plane. A part that is missing is left out."""
    panels = [(name, one) for name, one in PANELS.items() if name in results]
    figure, axes = plt.subplots(1, len(panels), figsize=(5.4 * len(panels), 4.2), squeeze=False)
    for axis, (name, panel) in zip(axes[0], panels, strict=True):
        panel(axis, results[name]["result"])
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _published(axis: plt.Axes, rows: list[dict[str, Any]]) -> None:
    places = range(len(rows))
    names = [f"{row['case']}\n{row['schedule']}" for row in rows]
    axis.barh(
        [place - 0.2 for place in places], [row["published"] for row in rows], 0.38, color=GREY, label="published"
    )
    axis.barh([place + 0.2 for place in places], [row["ours"] for row in rows], 0.38, color=BLUE, label="simulated")
    axis.set_yticks(list(places), names, fontsize=6)
    axis.invert_yaxis()
    axis.set_xlabel("times as fast as the synchronous run", fontsize=9)
    axis.set_title("Published ratios (in brackets: worked out)", fontsize=10, loc="left")
    axis.legend(fontsize=8, frameon=False)


def _split(axis: plt.Axes, found: dict[str, Any]) -> None:
    for colour, lag in ((RED, 0), (BLUE, 1)):
        for style, gpus in (("o-", 1), ("s--", 2)):
            rows = [
                row for row in found["rows"] if row["lag"] == lag and row["gpus_each"] == gpus and not row["colocated"]
            ]
            rows.sort(key=lambda row: row["engines"])
            if rows:
                taken = [row["engines"] * gpus for row in rows]
                label = f"lag {lag}, engines of {gpus} GPU{'s' * (gpus > 1)}"
                axis.plot(taken, [row["step"] for row in rows], style, color=colour, label=label, markersize=4)
    shared = [row["step"] for row in found["rows"] if row["colocated"]]
    if shared:
        axis.axhline(shared[0], color=GREY, label="all GPUs in turns")
    axis.set_xlabel(f"GPUs that sample, of {found['gpus']}", fontsize=9)
    axis.set_ylabel("seconds of a step", fontsize=9)
    axis.set_yscale("log")
    axis.set_title("How to split the GPUs", fontsize=10, loc="left")
    axis.legend(fontsize=7, frameon=False)


def _control(axis: plt.Axes, rows: list[dict[str, Any]]) -> None:
    short = [row for row in rows if row["answer_tokens"] == rows[0]["answer_tokens"]]
    workers = [row["workers"] for row in short]
    both = [row["control_ms"] + row["buffer_ms"] for row in short]
    axis.plot(workers, [row["control_ms"] for row in short], "o-", color=BLUE, label="loop, crews, sync, stream")
    axis.plot(workers, both, "s-", color=RED, label="with the buffer")
    axis.axhline(50, color=GREY, linestyle="--", linewidth=1)
    axis.set_xlabel("rollout workers (8 answers each)", fontsize=9)
    axis.set_ylabel("ms of processor time a step", fontsize=9)
    axis.set_title("The control plane itself", fontsize=10, loc="left")
    axis.legend(fontsize=8, frameon=False)


PANELS: dict[str, Callable[[Any, Any], None]] = {"published": _published, "split": _split, "control": _control}
