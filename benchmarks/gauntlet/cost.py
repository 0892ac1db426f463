"""What noticing costs: the seconds of everything that only looks, as a share of the steps of the default run; and steps
with and without it, in turns."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from itertools import pairwise
from typing import Any

from benchmarks.gauntlet.fault import replaced
from benchmarks.gauntlet.run import SETTINGS, attempt

STEPS = 48
FIRST = 8
"""Steps that are left out: caches fill, the learning rate warms up."""
PROOF = "the sync's proof"
SIZE = ("rollout.prompts_per_step=64", f"controller.steps={STEPS}")


def cost() -> dict[str, Any]:
    """``share`` of a step that noticing takes, ``without_proof`` the same without the probe of each weight sync, and
    ``text`` with the figures."""
    from skyrl.learner import step as learner
    from skyrl.learner.motion import Motion
    from skyrl.loop import Loop
    from skyrl.monitoring.events import AlarmSink
    from skyrl.rewards import metrics
    from skyrl.rollout.sampler import Sampler
    from skyrl.sync.syncer import FLOOR, Gap, Syncer

    passed = Gap(0.0, 0.0), Gap(FLOOR, FLOOR)
    looks: list[tuple[Any, str, str, Callable[[], Any]]] = [
        (Motion, "look", "weights looked at", lambda: None),
        (Motion, "since", "weights looked at", dict),
        (learner, "check_weights", "the loss compared with its parts", lambda: None),
        (Sampler, "_ended", "ends of answers", lambda: None),
        (metrics, "group_metrics", "groups looked at", dict),
        (AlarmSink, "log", "alarms", lambda: None),
        (Sampler, "probe", PROOF, list),
        (Syncer, "_compared", PROOF, lambda: passed),
    ]
    spent: defaultdict[str, float] = defaultdict(float)
    begun: list[float] = []

    def on() -> bool:
        return len(begun) % 2 == 1

    def step(original: Any, loop: Any) -> Any:
        begun.append(time.perf_counter())
        return original(loop)

    def timed(name: str, instead: Callable[[], Any]) -> Callable[..., Any]:
        def call(original: Any, *args: Any, **kwargs: Any) -> Any:
            if begun and not on():
                return instead()
            started = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                if len(begun) > FIRST:
                    spent[name] += time.perf_counter() - started

        return call

    with ExitStack() as stack:
        stack.enter_context(replaced(Loop, "_train_step", step))
        for owner, name, what, instead in looks:
            stack.enter_context(replaced(owner, name, timed(what, instead)))
        outcome = attempt(SIZE, base=SETTINGS)
    if outcome.error:
        raise SystemExit(outcome.error)
    seconds = [after - before for before, after in pairwise(begun)]
    kept = list(enumerate(seconds, 1))[FIRST:]
    with_it = [duration for number, duration in kept if number % 2 == 1]
    without = [duration for number, duration in kept if number % 2 == 0]
    total, looking = sum(with_it), sum(spent.values())
    medians = statistics.median(with_it), statistics.median(without)
    parts = ", ".join(f"{name} {1000 * value / len(with_it):.1f}" for name, value in sorted(spent.items()))
    return {
        "share": looking / total,
        "without_proof": (looking - spent[PROOF]) / total,
        "text": f"of {total / len(with_it):.2f} s, in ms: {parts}. In turns, {len(with_it)} steps with and "
        f"{len(without)} without all of it took {medians[0]:.3f} and {medians[1]:.3f} s (medians)",
    }
