"""A hundred strikes: which runs are struck, where and how."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from tests.faults.child import Plan
from tests.faults.points import BY_NAME, Point
from tests.faults.striking import Strike, points_of

SECOND = {
    "rollout/building": "rollout/idle",
    "reward/building": "reward/idle",
    "buffer/building": "buffer/idle",
    "buffer/recovered": "buffer/idle",
    "learner/joining": "learner/idle",
    "learner/loading": "learner/idle",
    "driver/restoring": "driver/logged",
}
"""Points that only a replacement comes to → the strike before, which makes one necessary."""
FIRST = ("reward/evaluating", "reward/evaluated")
"""Points that only the first member of a crew comes to."""
STOPPED = ("rollout/sampling", "rollout/left", "reward/scored", "buffer/asked", "learner/backward", "rollout/idle")
"""Where a member is also stopped (SIGSTOP): that is noticed after ``controller.timeout``."""
PAUSED = ("driver/idle", "learner/asked", "rollout/probed")
"""Where one is stopped for some seconds only: nobody may be replaced."""
ENDS = ("learner/exporting", "learner/exported", "driver/reporting")
"""Points at the end of a run."""


def strikes(plan: Iterable[tuple[str, str, str]]) -> list[Strike]:
    """Of (point, member, how), in order."""
    return [Strike(number, *one) for number, one in enumerate(plan)]


def every_point(points: list[Point], plan: Plan, others: bool = True) -> list[Strike]:
    """A SIGKILL at each of the points, the members of a role in turn.

    Args:
        others: Also strike replacements while they are built, stop and pause members.
    """
    there = [point.name for point in points]
    chosen = [Strike(0, name, "") for name in there if name not in SECOND and name not in ENDS]
    if others:
        for name in filter(there.__contains__, SECOND):
            chosen += [Strike(0, SECOND[name], ""), Strike(0, name, "", along=True)]
        chosen += [Strike(0, name, "", "STOP") for name in STOPPED if name in there]
        chosen += [Strike(0, name, "", "PAUSE") for name in PAUSED if name in there]
    ends = [name for name in ENDS if name in there]  # together: no step comes behind the first of them
    chosen += [Strike(0, name, "", step=plan.steps - 1, along=place > 0) for place, name in enumerate(ends)]
    counts = {"rollout": plan.rollouts, "reward": plan.rewards, "learner": plan.ranks}
    found: list[Strike] = []
    for number, one in enumerate(chosen):
        role = one.point.partition("/")[0]
        place = 0 if one.point in FIRST else number % counts.get(role, 1)
        member = {"buffer": "sample-buffer"}.get(role, f"{role}-{place}" if role in counts else role)
        found.append(replace(one, number=number, member=found[-1].member if one.along else member))
    return found


def _plan(
    policy: str, steps: int, roles: Iterable[str], others: bool = True, only: Iterable[str] = (), **settings: Any
) -> Plan:
    """Strikes at the points of the roles, or at the named ones."""
    plan = Plan(policy, steps, **settings)
    points = [point for role in roles for point in points_of(role, plan.kinds)] + [BY_NAME[name] for name in only]
    return replace(plan, strikes=every_point(points, plan, others))


def nightly(policy: str) -> dict[str, Plan]:
    """Name → plan of each run."""
    members = ("rollout", "reward", "buffer", "learner")
    carried = ("rollout/going_on", "rollout/stopping", "rollout/left", "buffer/saved", "learner/backward")
    real = ("rollout/engine", "rollout/loaded", "buffer/kept", "learner/backward", "learner/saved", "learner/saving")
    return {
        "lag0": _plan(policy, 180, members),
        "lag1": _plan(policy, 110, members, others=False, lag=1),
        "oversample": _plan(policy, 20, (), only=carried, oversample=0.5),
        "lag1_oversample": _plan(policy, 20, (), only=carried, lag=1, oversample=0.5),
        "driver": _plan(policy, 60, ("driver", "gcs", "raylet"), lag=1),
        "host": _plan(policy, 8, ("host",), lag=1, hosts=2),
        "real": _plan(policy, 20, (), False, real, real=True, ranks=2, rollouts=1, rewards=1, timeout=300.0),
    }
