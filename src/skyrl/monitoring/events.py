"""What happened in a run, beside its numbers: ``events.jsonl``, one JSON object a line."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from skyrl.monitoring.alarms.watch import Raised, Watch
from skyrl.monitoring.lines import LineFile
from skyrl.monitoring.sink import MetricSink
from skyrl.records import DataError, Event, Metrics, SkyrlError
from skyrl.redaction import redact
from skyrl.settings import Config

EVENTS = "events.jsonl"
ALARM, OVER = "alarm", "alarm over"
"""Kinds of events about alarms; their ``member`` is the alarm's name."""


class EventSink(MetricSink):
    """Appends each event to a :class:`LineFile`. A resumed run goes on with the file: what happened has happened."""

    def __init__(self, path: Path) -> None:
        self._file = LineFile(path)

    def event(self, event: Event) -> None:
        """Write one line."""
        self._file.write(redact(json.dumps(asdict(event), ensure_ascii=False, allow_nan=False)))

    def close(self) -> None:
        """Close the file; SkyrlError if it lacks lines."""
        self._file.close()


def read_events(run_dir: Path) -> list[Event]:
    """The events of a run, in order; none if it has no such file. A broken last line (the process was killed while
    writing it) is left out.

    Raises:
        DataError: naming another line that is no event.
    """
    path = run_dir / EVENTS
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    events: list[Event] = []
    for number, line in enumerate(lines, start=1):
        try:
            events.append(Event(**json.loads(line)))
        except (ValueError, TypeError) as error:
            if number < len(lines):
                raise DataError(f"{path}, line {number} is no event: {error}") from error
    return events


class AlarmSink(MetricSink):
    """Judges what is logged, tells what is wrong, and ends the run if ``monitoring.stop_on`` says so. It must be the
    last sink: the numbers that it judges are then written.

    Args:
        cfg: The limits, and the alarms to stop on.
        tell: Takes each event about an alarm.
        console: Gets one line when an alarm begins, comes back or is over.
        history: Of a resumed run: its records up to where it goes on.
    """

    def __init__(
        self, cfg: Config, tell: Callable[[Event], None], console: Console, history: Iterable[Mapping[str, Any]] = ()
    ) -> None:
        self.cfg, self.tell, self.console = cfg, tell, console
        self.watch = Watch.over(cfg, history)

    def log(self, step: int, metrics: Metrics) -> None:
        """Judge the numbers.

        Raises:
            SkyrlError: if they show an alarm of ``monitoring.stop_on``.
        """
        for change in self.watch.log(step, metrics):
            name, on = change.raised.alarm.value, change.raised.on
            self.tell(Event(time.time(), step, ALARM if on else OVER, name, change.text))
            # A wrapped line can't be searched for.
            line = f"step {step}: {ALARM if on else OVER}: {name}: {change.text}"
            self.console.print(Text(line, "bold red" if on else "dim"), soft_wrap=True)
        for alarm, text in self.watch.now.items():
            if alarm in self.cfg.monitoring.stop_on:
                raise SkyrlError(f"step {step}: stopped by monitoring.stop_on: {alarm.value}: {text}")

    def rewind(self, step: int) -> None:
        """Forget the later steps."""
        self.watch.rewind(step)


def alarms_of(cfg: Config, history: Iterable[Mapping[str, Any]], events: Iterable[Event] = ()) -> list[Raised]:
    """The alarms that the records of a run show, in the order in which they came, in the words of its ``events`` where
    they were told: a resumed run may have other settings since."""
    told = {(event.member, event.step): event.text for event in events if event.kind == ALARM}
    found = list(Watch.over(cfg, history).raised.values())
    for one in found:
        one.text = told.get((one.alarm.value, one.first), one.text)
    return found
