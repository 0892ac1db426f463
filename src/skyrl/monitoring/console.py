"""The live view of a run: a table in a terminal, one plain line per step in a log file."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

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


class ConsoleSink:
    """Shows the run on the console.

    In a terminal it is a table that renews itself, with a progress bar; otherwise each step is one line, so that
    a log stays readable.
    """

    def __init__(self, steps: int, console: Console | None = None) -> None:
        """Prepare the view; nothing is printed before the first ``log``.

        Args:
            steps: length of the whole run, for the progress bar and the estimate of the remaining time.
        """
        self._steps = steps
        self._console = console or Console()
        self._live: Live | None = None
        self._first: Metrics = {}
        self._latest: Metrics = {}
        self._step = 0
        self._clock: tuple[int, float] | None = None

    def log(self, step: int, metrics: Metrics) -> None:
        """Show ``metrics`` as the newest values."""
        if self._clock is None:
            self._clock = (step, time.monotonic())
        self._step = step
        self._latest.update(metrics)
        for name, value in metrics.items():
            self._first.setdefault(name, value)
        if not self._console.is_terminal:
            # Lines must not be cut or wrapped at a width that a file does not have.
            self._console.print(Text(self._line(metrics)), soft_wrap=True)
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

    def _seconds_left(self) -> float | None:
        """Estimate from the wall time of the steps so far, evaluations and checkpoints included."""
        left = self._steps - self._step
        if self._clock is None or left < 0:
            return None
        first_step, started = self._clock
        if self._step > first_step:
            return left * (time.monotonic() - started) / (self._step - first_step)
        step_time = self._latest.get("time/step")
        return None if step_time is None else left * step_time

    def _line(self, metrics: Metrics) -> str:
        """One step as one line; only what this step measured."""

        def part(label: str, name: str, show: Show) -> str:
            return f"{label} {show(metrics[name])}" if name in metrics else ""

        inner = [part(label, f"reward/{label}", number) for label in ("rule", "format", "model")]
        reward = part("reward", "reward/total", number)
        fresh = part("effective", "buffer/effective_share_fresh", percent)
        filled = part("→", "buffer/effective_share", percent)
        parts = [
            f"step {self._step}/{self._steps}",
            part("evaluation: accuracy", "eval/accuracy", percent),
            part("hallucination", "eval/hallucination", percent),
            f"{reward} ({', '.join(filter(None, inner))})" if reward else "",
            part("accuracy", "reward/accuracy", percent),
            part("hallucination", "hallucination/rate", percent),
            " ".join(filter(None, (fresh, filled))),
            part("SSB", "buffer/size", number),
            part("samples/s", "throughput/samples_per_second", number),
        ]
        if "time/step" in metrics:
            parts.append(f"{duration(metrics['time/step'])} ({self._phases(metrics)})")
            parts.append(f"left {duration(self._seconds_left())}")
        return " | ".join(filter(None, parts))

    @staticmethod
    def _phases(metrics: Metrics) -> str:
        """The phases' wall times of one step."""
        shown = [(phase, metrics.get(f"time/{phase}")) for phase in PHASES]
        return ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in shown if seconds is not None)

    def _table(self) -> RenderableType:
        """The whole live view."""
        table = Table(box=None, pad_edge=False, padding=(0, 2))
        table.add_column("")
        table.add_column("first", justify="right", style="dim")
        table.add_column("now", justify="right", style="bold")
        for label, name, show in _ROWS:
            if name in self._latest:
                table.add_row(label, show(self._first[name]), show(self._latest[name]))
        phases = Text(f"seconds: {self._phases(self._latest)}; step {duration(self._latest.get('time/step'))}", "dim")
        progress = Table.grid(padding=(0, 2))
        progress.add_row(
            f"step {self._step}/{self._steps}",
            ProgressBar(total=max(self._steps, 1), completed=self._step, width=40),
            f"about {duration(self._seconds_left())} left",
        )
        parts = [table, phases, progress] if "time/step" in self._latest else [table, progress]
        return Panel(Group(*parts), title="skyrl", title_align="left", expand=False)
