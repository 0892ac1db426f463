"""The charts of the report: matplotlib draws them as SVG that stands inside the page."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from skyrl.monitoring.console import PHASES

History = Sequence[Mapping[str, Any]]
"""The records of a run, as :func:`skyrl.monitoring.records.read_metrics` gives them."""


@dataclass(slots=True, frozen=True)
class Chart:
    """What one chart shows: the text of the legend → the metric."""

    title: str
    unit: str
    """As in the table of metrics; ``share`` is drawn as percent."""
    lines: Mapping[str, str]
    from_zero: bool = True
    """The value axis includes 0, as amounts should."""


@dataclass(slots=True, frozen=True)
class Line:
    """A metric that was measured at least once."""

    label: str
    colour: int
    values: np.ndarray
    """[steps], NaN where nothing was measured."""
    bold: np.ndarray
    """[steps]: their running mean; of an evaluation, which is rare, the values themselves."""

    @property
    def last(self) -> float:
        return float(self.bold[~np.isnan(self.bold)][-1])


_EVALUATED, _SAMPLED = "evaluation (greedy)", "training (sampled)"
_LOSS = Chart("Loss", "-", {"total": "loss/total", "GRPO": "loss/grpo", "MPO": "loss/mpo"}, from_zero=False)
_MPO = {"preference (DPO)": "loss/preference", "quality (BCO)": "loss/quality", "generation (NLL)": "loss/generation"}
_SHARES = {"with SSB": "buffer/effective_share", "without SSB (fresh)": "buffer/effective_share_fresh"}
_CHARTS = (
    Chart("Accuracy", "share", {_EVALUATED: "eval/accuracy", _SAMPLED: "reward/accuracy"}),
    Chart("Hallucination rate", "share", {_EVALUATED: "eval/hallucination", _SAMPLED: "hallucination/rate"}),
    Chart("Reward", "-", {part: f"reward/{part}" for part in ("total", "rule", "format")}),
    Chart("Reward model, raw score", "-", {_EVALUATED: "eval/reward_model", _SAMPLED: "reward/model"}, from_zero=False),
    Chart("Effective share of the rollout batch", "share", _SHARES),
    Chart("Time per phase", "s", {phase: f"time/{phase}" for phase in PHASES}),
    _LOSS,
    Chart("MPO terms, before their weights", "nats", _MPO, from_zero=False),
)
# The style sheet colours the charts, for light and dark pages: these stand for its variables --s0 … --s5 and for text.
_COLOURS, _INK = [f"#0000a{i}" for i in range(6)], "#0000af"
_STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 10,
    "path.simplify_threshold": 0.5,
    "figure.figsize": (6, 2.8),
    "figure.constrained_layout.use": True,
    **dict.fromkeys(("figure.facecolor", "axes.facecolor"), "none"),
    "axes.formatter.useoffset": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.alpha": 0.2,
    **{f"axes.spines.{side}": False for side in ("left", "right", "top")},
    **dict.fromkeys(("xtick.major.size", "ytick.major.size"), 0),
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "grid.color", "xtick.color", "ytick.color"), _INK),
}


def smoothing_window(history: History) -> int:
    """Steps of the running mean: a tenth of the run, at most 25."""
    return max(1, min(25, len(history) // 10))


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the last ``window`` values up to each one, without the NaN among them; NaN where the value is."""
    padded = np.pad(values, (window - 1, 0), constant_values=np.nan)
    mean, known = np.full(len(values), np.nan), ~np.isnan(values)
    mean[known] = np.nanmean(np.lib.stride_tricks.sliding_window_view(padded, window)[known], axis=1)
    return mean


def charts_with_data(history: History) -> list[tuple[Chart, list[Line], str]]:
    """Each chart that has data, with its lines and as SVG. Terms of one's own are among the losses."""
    drawn = {name for chart in _CHARTS for name in chart.lines.values()}
    own = sorted({name for record in history for name in record if name.startswith("loss/")} - drawn)
    losses = replace(_LOSS, lines={**_LOSS.lines, **{name: name for name in own}})
    steps = np.array([record["step"] for record in history])
    found = [(chart, _lines(chart, history)) for chart in (losses if c is _LOSS else c for c in _CHARTS)]
    return [(chart, lines, _svg(chart, steps, lines)) for chart, lines in found if lines]


def _lines(chart: Chart, history: History) -> list[Line]:
    """A line keeps its colour, whether or not those before it have data."""
    lines, window = [], smoothing_window(history)
    for place, (label, name) in enumerate(chart.lines.items()):
        values = np.array([record.get(name) for record in history], dtype=float)
        if not np.isnan(values).all():
            bold = values if name.startswith("eval/") else running_mean(values, window)
            lines.append(Line(label, place % len(_COLOURS), values, bold))
    return lines


def _svg(chart: Chart, steps: np.ndarray, lines: Sequence[Line]) -> str:
    """The axes and lines; the page has title, unit and legend beside them."""
    import matplotlib  # slow, and nothing else here needs it
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": chart.title}):  # the same ids each time, in no two charts
        figure = Figure()
        axes = figure.subplots()
        for line in lines:
            colour, known = _COLOURS[line.colour], ~np.isnan(line.bold)
            if line.bold is line.values:
                axes.plot(steps[known], line.bold[known], "o-", color=colour, linewidth=2, markersize=5, zorder=3)
                continue
            axes.plot(steps, line.values, color=colour, linewidth=1, alpha=0.35)
            axes.plot(steps, line.bold, color=colour, linewidth=2)
            before, after = np.append(False, known[:-1]), np.append(known[1:], False)
            alone = known & ~before & ~after  # no line can show a step without neighbours
            axes.plot(steps[alone], line.bold[alone], ".", color=colour)
        if chart.from_zero:
            low, high = axes.get_ylim()
            axes.set_ylim(min(low, 0.0), max(high, 0.0))
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if chart.unit == "share":
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = file.getvalue()
    # Inside a page an SVG needs no namespaces and no head, and the names of its groups would stand there many times.
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"|(?<=<g) id="[^"]*"', "", svg[svg.index("<svg") :])
    return re.sub("#0000a([0-5])", r"var(--s\1)", svg).replace(_INK, "currentColor")
