"""Where the time of a step goes."""

from __future__ import annotations

from collections.abc import Callable

from skyrl.records import Metrics


class Laps:
    """What the loop waited for, one thing after the other: the laps of a step add up to its time."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.seconds: Metrics = {}
        self.spans: list[tuple[str, float, float]] = []
        """Each lap as it was: its name, and when it began and ended, seconds since the first began."""
        self.started = self.last = clock()

    def end(self, name: str) -> float:
        """The seconds since the last lap count as ``name``'s, beside what it has already."""
        now = self.clock()
        lap = now - self.last
        self.spans.append((name, self.last - self.started, now - self.started))
        self.seconds[name] = self.seconds.get(name, 0.0) + lap
        self.last = now
        return lap

    def total(self) -> float:
        return self.last - self.started
