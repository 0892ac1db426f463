"""What a rule of :mod:`skyrl.monitoring.alarms.rules` may look at: a run's settings and what it has measured so far."""

from __future__ import annotations

from dataclasses import dataclass, field

from skyrl.records import Metrics
from skyrl.settings import Config

KEPT_STEPS = 200
"""Steps whose numbers rules may look back at."""
FIRST = 5
"""Values of each metric that are kept from the start of the run."""


@dataclass(slots=True)
class History:
    """The numbers of a run's last steps, and the first few of each metric."""

    records: list[tuple[int, Metrics]] = field(default_factory=list)
    """In order. A step has one for each time that something was measured at it."""
    first: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    known: Metrics = field(default_factory=dict)
    """Of the data, which is measured once."""

    def add(self, step: int, metrics: Metrics) -> None:
        self.records.append((step, metrics))
        while self.records[0][0] < step - KEPT_STEPS:
            del self.records[0]
        for name, value in metrics.items():
            if len(begun := self.first.setdefault(name, [])) < FIRST:
                begun.append((step, value))
        self.known |= {name: value for name, value in metrics.items() if name.startswith("data/")}

    def rewind(self, step: int) -> None:
        """Forget the steps after ``step``."""
        self.records = [record for record in self.records if record[0] <= step]
        self.first = {name: [one for one in begun if one[0] <= step] for name, begun in self.first.items()}


@dataclass(slots=True, frozen=True)
class Side:
    """Where answers were measured: in a step, or in an evaluation."""

    answers: str
    """As a message calls them."""
    prefix: str
    names: dict[str, str]
    """Metrics that are not called ``prefix`` and their short name."""

    def __getitem__(self, short: str) -> str:
        return self.names.get(short, f"{self.prefix}{short}")


TRAIN = Side(
    "answers of the step",
    "reward/",
    {name: f"response/{name}" for name in ("truncated_share", "length_mean", "repetition", "answer_share")},
)
EVAL = Side(
    "answers of the evaluation",
    "eval/",
    {"model_std": "eval/reward_model_std", "model_largest": "eval/reward_model_largest"},
)


@dataclass(slots=True, frozen=True)
class Facts:
    """What was just measured at a step, and what before."""

    cfg: Config
    step: int
    now: Metrics
    history: History

    def __getitem__(self, name: str) -> float:
        return self.now[name]

    def get(self, name: str, default: float = 0.0) -> float:
        return self.now.get(name, default)

    def before(self, name: str) -> list[float]:
        """Its values at the last steps before this one, the newest last."""
        return [metrics[name] for step, metrics in self.history.records if step < self.step and name in metrics]

    def last(self, name: str, default: float = 0.0) -> float:
        """The newest value, this step's included."""
        found = (metrics[name] for _, metrics in reversed(self.history.records) if name in metrics)
        return self.now[name] if name in self.now else next(found, self.history.known.get(name, default))

    def first(self, name: str) -> list[float]:
        """The first :data:`FIRST` values of the run, as far as they are before this step."""
        return [value for step, value in self.history.first.get(name, ()) if step < self.step]

    def answers(self, side: Side) -> int:
        """How many there are, with those that could not be scored."""
        return int(self[side["scored"]] + self.get(side["errors"]))

    def weight(self, term: str) -> float:
        """Of a term of the loss, by the settings, at this step."""
        return self.cfg.algorithm.weights(self.step).get(term, 0.0) if self.step else 0.0
