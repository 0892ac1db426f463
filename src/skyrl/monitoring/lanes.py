"""What each member did in the last steps, from the timeline."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from skyrl.monitoring.timeline import CALL, LAP, LAPS, STEP, STEPS, WAIT, Event, read_timeline, timeline_files

LAST_STEPS = 5
"""Steps that the figures of a lane are of, at most."""


@dataclass(slots=True)
class Lane:
    """One member in these steps. Seconds are a step's, in the mean."""

    name: str
    calls: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Function → seconds in it."""
    waits: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Lap of the loop → seconds that the member waited in it."""
    queued: float = 0.0
    """Longest time that a call to it waited for the one before, or for its input."""
    last: str = ""
    """The call that it ended last."""

    @property
    def busy(self) -> float:
        """Seconds in calls."""
        return sum(self.calls.values())


@dataclass(slots=True, frozen=True)
class Lanes:
    """All members in the last steps."""

    first: int
    last: int
    """The steps."""
    seconds: float
    """Of one step, in the mean."""
    laps: dict[str, float]
    """What the loop waited for in one step, in the mean."""
    members: list[Lane]
    """In the order of the roles: rollout, reward, sample buffer, learner."""


def read_lanes(folder: Path) -> Lanes | None:
    """The last steps of a run's ``timeline`` folder; None if there is none yet."""
    events: list[Event] = []
    for _, file in timeline_files(folder)[-2:]:
        try:
            events += read_timeline(file)
        except FileNotFoundError:  # a run that goes on removes the oldest
            continue
    return lanes_of(events)


def lanes_of(events: Sequence[Event]) -> Lanes | None:
    """The last :data:`LAST_STEPS` steps of these events; None if they have no step."""
    names = {(one["pid"], one["tid"]): one["args"]["name"] for one in events if one["name"] == "thread_name"}
    slices = [one for one in events if one["ph"] == "X"]
    steps = sorted((one for one in slices if one["cat"] == STEP), key=lambda one: one["ts"])[-LAST_STEPS:]
    if not steps:
        return None
    windows = [(one["ts"], one["ts"] + one["dur"]) for one in steps]
    order = sorted((place, name) for place, name in names.items() if name not in (STEPS, LAPS))
    found = {name: Lane(name) for _, name in order}
    laps: dict[str, float] = defaultdict(float)
    for one in sorted(slices, key=lambda one: one["ts"]):
        seconds = _within(one, windows) / len(steps) / 1e6
        if one["cat"] == LAP:
            laps[one["name"]] += seconds
        elif one["cat"] in (CALL, WAIT) and seconds > 0:
            _add(found[names[one["pid"], one["tid"]]], one, seconds)
    total = sum(end - start for start, end in windows) / len(steps) / 1e6
    numbers = [one["args"]["step"] for one in steps]
    members = [lane for lane in found.values() if lane.calls]
    return Lanes(numbers[0], numbers[-1], total, dict(laps), members)


def _add(lane: Lane, one: Event, seconds: float) -> None:
    if one["cat"] == WAIT:
        lane.waits[one["name"].removeprefix("waits: ")] += seconds
        return
    lane.last = one["name"].rpartition(".")[2]
    lane.calls[lane.last] += seconds
    lane.queued = max(lane.queued, one["args"]["waited"])


def _within(one: Event, windows: Iterable[tuple[int, int]]) -> int:
    """Microseconds of a slice that lie in the windows."""
    end = one["ts"] + one["dur"]
    return sum(max(0, min(end, until) - max(one["ts"], since)) for since, until in windows)
