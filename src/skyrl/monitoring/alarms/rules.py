"""When a run raises an alarm, from the numbers that it logs: one small function each, in the modules beside this one.

A rule looks at one ``log`` of one step, and at what was logged before. It says what is wrong at the first step that
shows it. What a healthy run could show by chance is no alarm: a rule asks for so many answers, or so small a chance,
that in a hundred healthy runs nothing is said.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from skyrl.monitoring.alarms.facts import EVAL, TRAIN, Facts, Side
from skyrl.settings import Alarm

ENOUGH = 16
"""Answers without which nothing is said of all of them."""
FAILED = 4
"""Answers that may fail without an alarm."""
PRIOR = 10.0
"""Weight of what is expected beforehand, in groups or answers, against what the run has shown."""
Verdict = str | None
"""What is wrong, with the figures and what helps; "" if nothing is; None if these numbers are too few to tell."""
Judge = Callable[[Facts], Verdict]
JudgeOfAnswers = Callable[[Facts, Side], Verdict]


@dataclass(slots=True, frozen=True)
class Rule:
    """Judges each log that has all the metrics that it ``needs``."""

    alarm: Alarm
    needs: tuple[str, ...]
    judge: Judge


RULES: list[Rule] = []
"""Several may raise one alarm: it is on as long as one of them says so."""


def rule(alarm: Alarm, *needs: str) -> Callable[[Judge], Judge]:
    """Make a rule of the function below."""

    def add(judge: Judge) -> Judge:
        RULES.append(Rule(alarm, needs, judge))
        return judge

    return add


def rule_of_answers(
    alarm: Alarm, *needs: str, sides: Sequence[Side] = (TRAIN, EVAL)
) -> Callable[[JudgeOfAnswers], JudgeOfAnswers]:
    """Make two rules of the function below: for the answers of a step, and for those of an evaluation. ``needs`` has
    the short names of their metrics."""

    def add(judge: JudgeOfAnswers) -> JudgeOfAnswers:
        for side in sides:
            RULES.append(Rule(alarm, tuple(side[name] for name in (*needs, "scored")), partial(_judge, judge, side)))
        return judge

    return add


def _judge(judge: JudgeOfAnswers, side: Side, facts: Facts) -> Verdict:
    return judge(facts, side)
