"""Line charts as inline SVG: axes with units, a legend, labelled last values and a text on hovering.

Own code instead of a plotting library keeps the report small, and lets its style sheet colour the charts for
light and dark pages: a line has only a class, ``s0`` … ``s5``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TypeVar

WIDTH, HEIGHT = 480, 226
LEFT, RIGHT, TOP, BOTTOM = 48, 68, 12, 36
COLOURS = 6
_MAX_POINTS = 1000
_MAX_HOVERS = 150
_LABEL_HEIGHT = 14.0

T = TypeVar("T")
Points = list[tuple[float, float]]


@dataclass(slots=True, frozen=True)
class Series:
    """One line of a chart."""

    name: str
    points: Points
    """(step, value), in order of steps; steps without a value are left out."""
    smooth: bool = True
    """Draw the running mean in bold over the faint raw line; otherwise the raw line with a dot per point."""


def running_mean(points: Points, window: int) -> Points:
    """Mean of the last ``window`` values up to each point; it never looks ahead."""
    smoothed = []
    for i, (x, _) in enumerate(points):
        part = points[max(0, i + 1 - window) : i + 1]
        smoothed.append((x, sum(y for _, y in part) / len(part)))
    return smoothed


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About ``count`` round numbers (1, 2 or 5 times a power of ten apart) that enclose [low, high]."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def format_value(value: float, unit: str) -> str:
    """A value with its unit; shares are shown as percent."""
    if unit == "share":
        return f"{100 * value:.1f}%"
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return text if unit == "-" else f"{text} {unit}"


def _tick_text(value: float, unit: str) -> str:
    """A tick without unit, which the axis already names; percent is so common that it keeps its sign."""
    return f"{100 * value:.3g}%" if unit == "share" else f"{value:.4g}"


def _thin(points: list[T], limit: int) -> list[T]:
    """At most ``limit`` of the points, the last one always among them."""
    stride = -(-len(points) // limit)
    return points if stride <= 1 else points[::-1][::stride][::-1]


class _Frame:
    """Maps steps and values to places in the picture."""

    def __init__(self, series: Sequence[Series], from_zero: bool) -> None:
        xs = [x for line in series for x, _ in line.points]
        ys = [y for line in series for _, y in line.points]
        self.x_low, self.x_high = min(xs), max(max(xs), min(xs) + 1)
        low, high = min(ys), max(ys)
        self.ticks = nice_ticks(min(low, 0.0) if from_zero else low, max(high, 0.0) if from_zero else high)

    def x(self, step: float) -> float:
        return LEFT + (step - self.x_low) / (self.x_high - self.x_low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self.ticks[0], self.ticks[-1]
        return TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def path(self, points: Points) -> str:
        return " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)


def _axes(frame: _Frame, unit: str) -> str:
    """Grid lines, ticks and the names of the axes."""
    parts = []
    for tick in frame.ticks:
        y = frame.y(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_tick_text(tick, unit)}</text>'
        )
    base = HEIGHT - BOTTOM
    for tick in nice_ticks(frame.x_low, frame.x_high, 5):
        if frame.x_low <= tick <= frame.x_high and tick == int(tick):
            x = frame.x(tick)
            parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{base}" y2="{base + 4}"/>')
            parts.append(f'<text class="tick" x="{x:.1f}" y="{base + 16}" text-anchor="middle">{tick:g}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="tick" x="{middle:.0f}" y="{HEIGHT - 4}" text-anchor="middle">step</text>')
    return "".join(parts)


def _line(frame: _Frame, series: Series, colour: int, window: int) -> str:
    """One line: raw and smoothed, or raw with dots."""
    raw = _thin(series.points, _MAX_POINTS)
    if series.smooth and len(series.points) > 1:
        bold = _thin(running_mean(series.points, window), _MAX_POINTS)
        return (
            f'<polyline class="raw s{colour}" points="{frame.path(raw)}"/>'
            f'<polyline class="line s{colour}" points="{frame.path(bold)}"/>'
        )
    dots = "".join(f'<circle class="dot s{colour}" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="3"/>' for x, y in raw)
    return f'<polyline class="line s{colour}" points="{frame.path(raw)}"/>{dots}'


def _last(series: Series, window: int) -> tuple[float, float]:
    """Where the bold line of a series ends."""
    return (running_mean(series.points[-window:], window) if series.smooth else series.points)[-1]


def _end_labels(frame: _Frame, series: Sequence[tuple[int, Series]], unit: str, window: int) -> str:
    """The last value of each line beside its end, pushed apart so that none covers another."""
    ends = sorted((frame.y(_last(line, window)[1]), colour, line) for colour, line in series)
    places: list[float] = []
    for y, _, _ in ends:
        places.append(max(y, places[-1] + _LABEL_HEIGHT) if places else y)
    lowest = float(HEIGHT - BOTTOM)
    for i in reversed(range(len(places))):
        places[i] = min(places[i], lowest)
        lowest = places[i] - _LABEL_HEIGHT
    parts = []
    for place, (y, colour, line) in zip(places, ends, strict=True):
        x, value = _last(line, window)
        text = format_value(value, unit if unit == "share" else "-")
        parts.append(f'<circle class="dot s{colour}" cx="{frame.x(x):.1f}" cy="{y:.1f}" r="3.5"/>')
        parts.append(
            f'<rect class="swatch s{colour}" x="{WIDTH - RIGHT + 8}" y="{place - 4:.1f}" width="3" height="9"/>'
        )
        parts.append(f'<text class="last" x="{WIDTH - RIGHT + 14}" y="{place + 4:.1f}">{text}</text>')
    return "".join(parts)


def _hovers(frame: _Frame, series: Sequence[tuple[int, Series]], unit: str) -> str:
    """An invisible band per step; hovering shows a line, and the browser the values of that step."""
    steps = _thin(sorted({x for _, line in series for x, _ in line.points}), _MAX_HOVERS)
    values = [(line.name, dict(line.points)) for _, line in series]
    parts = []
    for i, step in enumerate(steps):
        left = LEFT if i == 0 else (frame.x(steps[i - 1]) + frame.x(step)) / 2
        right = WIDTH - RIGHT if i == len(steps) - 1 else (frame.x(step) + frame.x(steps[i + 1])) / 2
        text = "\n".join(
            [f"step {step:g}", *(f"{name}: {format_value(v[step], unit)}" for name, v in values if step in v)]
        )
        x = f"{frame.x(step):.1f}"
        parts.append(
            f'<g class="hover"><line x1="{x}" x2="{x}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
            f'<rect x="{left:.1f}" y="{TOP}" width="{max(right - left, 0.5):.1f}" height="{HEIGHT - TOP - BOTTOM}">'
            f"<title>{escape(text)}</title></rect></g>"
        )
    return "".join(parts)


def line_chart(title: str, series: Sequence[Series], *, unit: str, window: int = 1, from_zero: bool = True) -> str:
    """A chart as one HTML ``<figure>``; an empty text if no series has a point.

    Args:
        title: heading of the figure.
        series: the lines, in the order of the legend and of the colours (a colour stays with its series even
            if an earlier one has no points).
        unit: as in the table of metrics; ``share`` is drawn as percent.
        window: steps of the running mean of smooth series.
        from_zero: let the value axis include 0, as amounts should.
    """
    shown = [(i % COLOURS, line) for i, line in enumerate(series) if line.points]
    if not shown:
        return ""
    frame = _Frame([line for _, line in shown], from_zero)
    legend = "".join(
        f'<li><svg viewBox="0 0 18 8" aria-hidden="true"><polyline class="line s{colour}" points="1,4 17,4"/></svg>'
        f"{escape(line.name)}</li>"
        for colour, line in shown
    )
    label = escape(f"{title}, by step: {', '.join(line.name for _, line in shown)}", quote=True)
    heading = {"share": "%", "-": ""}.get(unit, unit)
    note = f' <span class="unit">{escape(heading)}</span>' if heading else ""
    return (
        f'<figure class="chart"><figcaption>{escape(title)}{note}</figcaption><ul class="legend">{legend}</ul>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{_axes(frame, unit)}'
        f"{''.join(_line(frame, line, colour, window) for colour, line in shown)}"
        f"{_end_labels(frame, shown, unit, window)}{_hovers(frame, shown, unit)}</svg></figure>"
    )
