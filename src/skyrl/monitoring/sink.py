"""What takes in a run's numbers and events."""

from __future__ import annotations

from skyrl.records import Event, Metrics


class MetricSink:
    """Where numbers go. Whoever inherits it writes what it cares for."""

    def log(self, step: int, metrics: Metrics) -> None:
        """What was measured at ``step``: of a step itself, or of an evaluation after it."""

    def event(self, event: Event) -> None:
        """Something happened."""

    def rewind(self, step: int) -> None:
        """The run went back: the steps after ``step`` will be done again. A sink that keeps them lets go of them."""

    def close(self) -> None:
        """Nothing more comes."""
