"""Who asks the rules, at each log of a run, and remembers what they said."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from skyrl.monitoring.alarms import answers, data, learner, rewards, sync
from skyrl.monitoring.alarms.facts import Facts, History
from skyrl.monitoring.alarms.rules import RULES
from skyrl.records import Metrics
from skyrl.settings import Alarm, Config

MODULES = (answers, rewards, data, learner, sync)
"""They bring the rules."""
CALM = 3
"""An alarm is over when its rules have found nothing so many times in a row."""


@dataclass(slots=True)
class Raised:
    """An alarm that a run has raised."""

    alarm: Alarm
    first: int
    """Step at which it was seen first."""
    last: int
    """The newest one at which it was seen."""
    text: str
    """What was said at the first."""
    steps: int = 0
    """How many it was seen at."""
    on: bool = True
    """It is not over."""


@dataclass(slots=True, frozen=True)
class Change:
    """An alarm begins, comes back, or is over."""

    raised: Raised
    text: str


class Watch:
    """Judges one run's numbers as they come.

    Args:
        cfg: Whose limits the numbers are held against.
    """

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg
        self.raised: dict[Alarm, Raised] = {}
        self.now: dict[Alarm, str] = {}
        """What the last log showed."""
        self._history = History()
        self._said: dict[int, str] = {}
        """Rule → what it said last, if anything was wrong."""
        self._calm: dict[Alarm, int] = {}

    @classmethod
    def over(cls, cfg: Config, history: Iterable[Mapping[str, Any]]) -> Watch:
        """One that has seen the records of :func:`skyrl.monitoring.records.read_metrics`."""
        watch = cls(cfg)
        for record in history:
            known = {name: value for name, value in record.items() if name != "step" and value is not None}
            watch.log(record["step"], known)
        return watch

    def log(self, step: int, metrics: Metrics) -> list[Change]:
        """Judge what was measured at ``step``, as far as it is finite; what that changes."""
        metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}
        facts = Facts(self.cfg, step, metrics, self._history)
        judged: dict[Alarm, bool] = {}
        self.now = {}
        for place, rule in enumerate(RULES):
            verdict = rule.judge(facts) if all(name in metrics for name in rule.needs) else None
            if verdict is None:
                continue
            self._said.pop(place, None)
            if verdict:
                self._said[place] = verdict
                self.now.setdefault(rule.alarm, verdict)
            judged[rule.alarm] = judged.get(rule.alarm, False) or bool(verdict)
        self._history.add(step, metrics)
        return [change for alarm, wrong in judged.items() if (change := self._change(alarm, wrong, step)) is not None]

    def rewind(self, step: int) -> None:
        """The run goes on behind ``step`` once more."""
        self._history.rewind(step)

    def _change(self, alarm: Alarm, wrong: bool, step: int) -> Change | None:
        known = self.raised.get(alarm)
        if wrong:
            self._calm[alarm] = 0
            text = self.now[alarm]
            if known is None:
                known = self.raised[alarm] = Raised(alarm, step, step, text, steps=1)
                return Change(known, text)
            known.steps += step != known.last
            known.last, back, known.on = step, not known.on, True
            return Change(known, text) if back else None
        if known is None or not known.on or any(RULES[place].alarm is alarm for place in self._said):
            return None
        self._calm[alarm] += 1
        if self._calm[alarm] < CALM:
            return None
        known.on = False
        return Change(known, f"over: last seen at step {known.last}")
