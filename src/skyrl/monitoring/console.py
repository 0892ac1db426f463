"""The live view of a run: a table in a terminal, one plain line per step in a log file."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from skyrl.monitoring.sink import MetricSink
from skyrl.records import Metrics

PHASES = ("rollout", "reward", "buffer", "learner", "sync")


def percent(value: float | None) -> str:
    """A share as text; a dash when there is none."""
    return "–" if value is None else f"{100 * value:.1f}%"


def number(value: float | None) -> str:
    """A plain number with about three digits; a dash when there is none."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def duration(seconds: float | None) -> str:
    """Seconds as ``48 s``, ``3 min 10 s`` or ``2 h 05 min``."""
    if seconds is None:
        return "–"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s" if seconds >= 10 else f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


Show = Callable[[float | None], str]
_ROWS: tuple[tuple[str, str, Show], ...] = (
    ("reward, total", "reward/total", number),
    ("  rule", "reward/rule", percent),
    ("  format", "reward/format", percent),
    ("  reward model (raw)", "reward/model", number),
    ("accuracy, sampled answers", "reward/accuracy", percent),
    ("accuracy, evaluation", "eval/accuracy", percent),
    ("hallucination, sampled answers", "hallucination/rate", percent),
    ("hallucination, evaluation", "eval/hallucination", percent),
    ("effective share, fresh", "buffer/effective_share_fresh", percent),
    ("effective share, with SSB", "buffer/effective_share", percent),
    ("SSB size (samples)", "buffer/size", number),
    ("samples per second", "throughput/samples_per_second", number),
    ("tokens per second", "throughput/tokens_per_second", number),
)


class ConsoleSink(MetricSink):
    """Shows the run on the console: in a terminal a table that renews itself, with a progress bar; otherwise one line
    for each step, so that a log stays readable."""

    def __init__(self, steps: int, console: Console | None = None) -> None:
        """``steps`` is the length of the whole run. Nothing is printed before the first ``log``."""
        self._steps, self._console = steps, console or Console()
        self._live: Live | None = None
        self._first: Metrics = {}
        self._latest: Metrics = {}
        self._step, self._begun = 0, (0, 0.0)

    def log(self, step: int, metrics: Metrics) -> None:
        """Show ``metrics`` as the newest values."""
        if not self._latest:
            self._begun = (step, time.monotonic())
        self._step = step
        self._latest |= metrics
        self._first = metrics | self._first
        if not self._console.is_terminal:
            # Lines must not be cut or wrapped at a width that a file does not have.
            if " | " in (line := self._line(metrics)):  # else nothing of it is shown
                self._console.print(Text(line), soft_wrap=True)
            return
        if self._live is None:
            self._live = Live(console=self._console, refresh_per_second=4)
            self._live.start()
        self._live.update(self._table(), refresh=True)

    def close(self) -> None:
        """Leave the last table on the screen."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _left(self) -> str:
        """Estimate of the remaining time from that of the steps so far, evaluations and checkpoints included."""
        left, done = self._steps - self._step, self._step - self._begun[0]
        step_time = (time.monotonic() - self._begun[1]) / done if done > 0 else self._latest.get("time/step")
        return duration(None if step_time is None or left < 0 else left * step_time)

    def _line(self, metrics: Metrics) -> str:
        """One step as one line; only what this step measured."""

        def part(label: str, name: str, show: Show) -> str:
            return f"{label} {show(metrics[name])}" if name in metrics else ""

        inner = [part(label, f"reward/{label}", number) for label in ("rule", "format", "model")]
        reward = part("reward", "reward/total", number)
        fresh = part("effective", "buffer/effective_share_fresh", percent)
        parts = [
            f"step {self._step}/{self._steps}",
            part("evaluation: accuracy", "eval/accuracy", percent),
            part("hallucination", "eval/hallucination", percent),
            f"{reward} ({', '.join(filter(None, inner))})" if reward else "",
            part("accuracy", "reward/accuracy", percent),
            part("hallucination", "hallucination/rate", percent),
            " ".join(filter(None, (fresh, part("→", "buffer/effective_share", percent)))),
            part("SSB", "buffer/size", number),
            part("samples/s", "throughput/samples_per_second", number),
        ]
        if "time/step" in metrics:
            parts += [f"{duration(metrics['time/step'])} ({_phases(metrics)})", f"left {self._left()}"]
        return " | ".join(filter(None, parts))

    def _table(self) -> RenderableType:
        """The whole live view."""
        now = self._latest
        columns = ("", Column("first", justify="right", style="dim"), Column("now", justify="right", style="bold"))
        table = Table(*columns, box=None, pad_edge=False, padding=(0, 2))
        for label, name, show in _ROWS:
            if name in now:
                table.add_row(label, show(self._first[name]), show(now[name]))
        progress = Table.grid(padding=(0, 2))
        bar = ProgressBar(total=max(self._steps, 1), completed=self._step, width=40)
        progress.add_row(f"step {self._step}/{self._steps}", bar, f"about {self._left()} left")
        parts: list[RenderableType] = [table, progress]
        if "time/step" in now:
            parts.insert(1, Text(f"seconds: {_phases(now)}; step {duration(now['time/step'])}", "dim"))
        return Panel(Group(*parts), title="skyrl", title_align="left", expand=False)


def _phases(metrics: Metrics) -> str:
    """The wall times of one step's phases."""
    return ", ".join(f"{phase} {metrics[f'time/{phase}']:.1f}" for phase in PHASES if f"time/{phase}" in metrics)
