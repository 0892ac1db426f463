"""``python -m skyrl.watch RUN``: what a run is doing, from the files of its folder: alarms, what each member does and
waits for, the queue, the sample buffer, and what to change. docs/monitoring.md describes it. The run may still be going
on; nothing of it is started, loaded or changed."""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from skyrl.checkpoint import SETTINGS, in_use
from skyrl.cli import run_command
from skyrl.monitoring.advice import advice
from skyrl.monitoring.console import duration, number, percent
from skyrl.monitoring.events import ALARM, OVER, read_events
from skyrl.monitoring.lanes import Lane, Lanes, read_lanes
from skyrl.monitoring.records import read_json, read_metrics
from skyrl.monitoring.report import told_alarms
from skyrl.monitoring.timeline import FOLDER
from skyrl.records import DataError, Event
from skyrl.schema import value_at

BAR = 20
SHOWN_EVENTS = 5
STALLED = (5, 60.0)
"""A run is told to stand still if it wrote no number for so many times a step's length, or so many seconds if that is
more, and for as long as an evaluation takes."""


@dataclass(slots=True)
class Seen:
    """What the folder of a run holds."""

    run_dir: Path
    settings: dict[str, Any]
    history: list[dict[str, Any]] = field(default_factory=list)
    """Records of ``metrics.jsonl``."""
    events: list[Event] = field(default_factory=list)
    lanes: Lanes | None = None
    going_on: bool = False
    """A living process holds the folder."""
    ended: bool = False
    """There is a summary that no step came after."""
    written: float | None = None
    """When a number was written last."""

    @property
    def age(self) -> float | None:
        """Seconds since then."""
        return None if self.written is None else max(0.0, time.time() - self.written)

    @property
    def step(self) -> int:
        return max((record["step"] for record in self.history), default=0)

    def latest(self, name: str) -> float | None:
        """The newest value of a metric."""
        found = (record[name] for record in reversed(self.history) if record.get(name) is not None)
        return next(found, None)


def main() -> None:
    """Entry point; exit codes as :func:`skyrl.cli.run_command` says."""
    parser = argparse.ArgumentParser(
        prog="python -m skyrl.watch",
        description="Show what a run is doing, until it ends. In a terminal the view renews itself; elsewhere a block "
        "of plain lines is printed for each new step (docs/monitoring.md).",
    )
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--once", action="store_true", help="print it once")
    parser.add_argument("--every", type=float, default=2.0, help="seconds between two looks (default: 2)")
    given = parser.parse_args()
    if not given.every >= 0.1:
        parser.error(f"--every {given.every}: must be 0.1 or more")
    run_command(lambda: watch(given.run, Console(), given.once, given.every), "")


def watch(run_dir: Path, console: Console, once: bool = False, every: float = 2.0) -> None:
    """Show the run until it ends.

    Args:
        once: Show it as it is now, and return.
        every: Seconds between two looks at its files.

    Raises:
        DataError: if the folder is no run's, or has a broken file.
    """
    seen = read_run(run_dir)
    if console.is_terminal and seen.going_on and not once:
        with Live(Group(*lines(seen)), console=console, auto_refresh=False) as live:
            while seen.going_on:
                time.sleep(every)
                seen = read_run(run_dir, seen)
                live.update(Group(*lines(seen)), refresh=True)
        return
    while True:
        for line in lines(seen):
            console.print(line, soft_wrap=True, highlight=False)
        if once or not seen.going_on:
            return
        seen = _next(seen, every)
        console.print()


def _next(before: Seen, every: float) -> Seen:
    """Look until there is a new step or event, or the run has ended."""
    while True:
        time.sleep(every)
        seen = read_run(before.run_dir, before)
        if not seen.going_on or (seen.step, len(seen.events)) != (before.step, len(before.events)):
            return seen


def read_run(run_dir: Path, before: Seen | None = None) -> Seen:
    """Read what the folder holds.

    Args:
        before: What was seen last; its numbers are taken where none came since.

    Raises:
        DataError: if it is no run's, or a file is broken.
    """
    if not (run_dir / SETTINGS).is_file():
        raise DataError(f"{run_dir} has no {SETTINGS}; allowed is the folder of a run, such as outputs/digits/<time>")
    settings, metrics, summary = read_json(run_dir / SETTINGS), run_dir / "metrics.jsonl", run_dir / "summary.json"
    if value_at(settings, "controller.steps") is None:
        raise DataError(f"{run_dir / SETTINGS} holds no settings of a run")
    seen = Seen(run_dir, settings, events=read_events(run_dir), lanes=read_lanes(run_dir / FOLDER))
    seen.going_on = in_use(run_dir)
    if metrics.is_file():
        seen.written = metrics.stat().st_mtime
        same = before is not None and before.written == seen.written
        seen.history = before.history if before is not None and same else read_metrics(metrics)
        seen.ended = summary.is_file() and summary.stat().st_mtime >= seen.written
    return seen


# ---------------------------------------------------------------- the view


def lines(seen: Seen) -> list[Text]:
    """The whole view, a line each, the most urgent first."""
    found = [Text(_head(seen), "bold")]
    found += [Text(line, "bold red") for line in _alarms(seen)]
    if seen.lanes is not None:
        found += _members(seen.lanes)
    found += [Text(line) for line in (_queue(seen), _buffer(seen), _learning(seen)) if line]
    found += [Text(line) for line in _events(seen.events)]
    advised = advice(seen.history, seen.settings, seen.lanes)
    found += [Text("advice", "bold")] * bool(advised) + [Text(f"  {n}. {text}") for n, text in enumerate(advised, 1)]
    return found


def _head(seen: Seen) -> str:
    steps, step_time = seen.settings["controller"]["steps"], _step_time(seen)
    parts = [f"{seen.settings.get('name', '')} {seen.run_dir}", f"step {seen.step}/{steps}"]
    if seen.going_on:
        left = None if step_time is None else (steps - seen.step) * step_time
        parts += ["going on", f"about {duration(left)} of training left"]
    else:
        last = seen.events[-1] if seen.events else None
        if seen.ended:
            parts.append("ended")
        elif last is not None and last.kind == "stopped":
            parts.append(f"{last.text}; resume=auto goes on")
        else:
            parts.append("ended without a summary: interrupted, failed, or on another host")
    if seen.age is not None:
        parts.append(f"last number {duration(seen.age)} ago")
    return " | ".join(parts)


def _step_time(seen: Seen) -> float | None:
    times = sorted(one["time/step"] for one in seen.history[-20:] if one.get("time/step") is not None)
    return times[len(times) // 2] if times else None


def _alarms(seen: Seen) -> Iterator[str]:
    usual, age, evaluation = _step_time(seen), seen.age, seen.latest("eval/seconds") or 0.0
    patience = max(STALLED[0] * (usual or 0.0), STALLED[1]) + evaluation
    if seen.going_on and usual is not None and age is not None and age > patience:
        yield f"ALARM  no number for {duration(age)}; a step takes {duration(usual)}"
    for alarm in told_alarms(seen.events):
        if alarm["on"]:
            yield f"ALARM  {alarm['name']}, since step {alarm['first_step']}: {_plain(alarm['message'])}"


def _members(lanes: Lanes) -> Iterator[Text]:
    steps = f"step {lanes.last}" if lanes.first == lanes.last else f"steps {lanes.first} to {lanes.last}"
    laps = ", ".join(f"{name} {seconds:.2f}" for name, seconds in lanes.laps.items())
    yield Text(f"members, {steps}, {lanes.seconds:.2f} s a step (seconds that the loop waited for: {laps})", "bold")
    width = max(len(lane.name) for lane in lanes.members) if lanes.members else 0
    for lane in lanes.members:
        share = min(1.0, lane.busy / lanes.seconds) if lanes.seconds else 0.0
        full = round(share * BAR)
        bar = "█" * full + "·" * (BAR - full)
        yield Text(f"  {lane.name:<{width}} {bar} {100 * share:3.0f} % busy: {_doing(lane)}")


def _doing(lane: Lane) -> str:
    def told(seconds: Mapping[str, float]) -> str:
        largest = sorted(seconds.items(), key=lambda one: -one[1])[:3]
        return ", ".join(f"{_plain(name)} {value:.2f}" for name, value in largest if value >= 0.005)

    waits = told(lane.waits)
    return (told(lane.calls) or lane.last) + (f" | waits in {waits}" if waits else "")


def _queue(seen: Seen) -> str:
    lag, oversample = (value_at(seen.settings, key) for key in ("controller.lag", "rollout.oversample"))
    parts = [f"queue: controller.lag={lag}"]
    mean, most = seen.latest("batch/lag_mean"), seen.latest("batch/lag_max")
    if mean is not None and most is not None:
        parts.append(f"fresh answers {mean:.2g} versions old in the mean, {most:.0f} at most")
    if oversample:
        parts.append(f"{percent(seen.latest('rollout/carried'))} of the groups carried from an earlier step")
    if seen.lanes is not None and seen.lanes.members:
        slowest = max(seen.lanes.members, key=lambda lane: lane.queued)
        parts.append(f"longest wait of a call {slowest.queued:.2f} s, for {slowest.name}")
    return " | ".join(parts) if seen.history else ""


def _buffer(seen: Seen) -> str:
    size = seen.latest("buffer/size")
    if size is None or not value_at(seen.settings, "buffer.enabled"):
        return ""
    mean, oldest = seen.latest("buffer/age_mean"), seen.latest("buffer/age_max")
    limit, capacity = (value_at(seen.settings, key) for key in ("buffer.max_age", "buffer.capacity"))
    ages = "" if mean is None or oldest is None else f" | ages mean {mean:.1f}, oldest {oldest:.0f} of {limit} versions"
    fresh, whole = seen.latest("buffer/effective_share_fresh"), seen.latest("buffer/effective_share")
    return (
        f"SSB: {number(size)} of {number(capacity)} samples | replayed {number(seen.latest('buffer/replayed'))} of "
        f"{number(seen.latest('batch/items'))}{ages} | effective {percent(fresh)} → {percent(whole)}"
    )


def _learning(seen: Seen) -> str:
    shown = (
        ("reward", "reward/total", number), ("accuracy", "reward/accuracy", percent),
        ("evaluation", "eval/accuracy", percent), ("hallucination", "eval/hallucination", percent),
        ("answer tokens", "response/length_mean", number), ("sync gap", "sync/logprob_gap", number),
        ("samples/s", "throughput/samples_per_second", number),
    )  # fmt: skip
    parts = [f"{label} {show(seen.latest(name))}" for label, name, show in shown if seen.latest(name) is not None]
    return f"learning: {' | '.join(parts)}" if parts else ""


def _events(events: list[Event]) -> Iterator[str]:
    """What happened to members and checkpoints, the newest first."""
    others = [event for event in events if event.kind not in (ALARM, OVER)]
    if not others:
        return
    counts = Counter(event.kind for event in others)
    yield "events: " + ", ".join(f"{count} {kind}" for kind, count in counts.items())
    for event in reversed(others[-SHOWN_EVENTS:]):
        when = time.strftime("%H:%M:%S", time.localtime(event.time))
        yield f"  {when} step {event.step} {event.kind} {_plain(event.member)}: {_plain(event.text)}"


def _plain(text: Any) -> str:
    """Text from elsewhere in one line, without what would act on a terminal."""
    return "".join(char if char.isprintable() else " " for char in str(text))


if __name__ == "__main__":
    main()
