"""What would make a run faster or let it learn from more, from its own figures: each with the setting to change, what
it rests on, and the limit of what it can give. Faults are the alarms' business, not this module's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from skyrl.monitoring.lanes import Lanes
from skyrl.schema import value_at

LAST_STEPS = 10
"""Steps whose medians it rests on, at most."""
MUCH = 0.25
"""Share of a step from which on something is worth a change."""
FEW_EFFECTIVE = 0.3
UNEVEN = 0.6
"""Sampling of the quickest rollout member, as a share of the slowest one's, below which long answers hold up a step."""

Rule = Callable[["Figures"], Iterator[str]]


class Figures:
    """What the rules look at.

    Args:
        history: Records of :func:`skyrl.monitoring.records.read_metrics`.
        settings: ``config.json``.
        lanes: The members in the last steps, if there is a timeline.
    """

    def __init__(self, history: Sequence[Mapping[str, Any]], settings: dict[str, Any], lanes: Lanes | None) -> None:
        self.history, self.settings, self.lanes = history, settings, lanes
        self.steps = [record for record in history if record.get("time/step") is not None][-LAST_STEPS:]

    def __call__(self, name: str) -> float | None:
        """The median of a metric over the last steps; None if it was not measured."""
        values = [record[name] for record in self.steps if record.get(name) is not None]
        return median(values) if values else None

    def seconds(self, *laps: str) -> float:
        """Of these laps together, in a step."""
        return sum(self(f"time/{lap}") or 0.0 for lap in laps)

    def set_to(self, key: str) -> Any:
        """A setting's value; None where the run had none."""
        return value_at(self.settings, key)


def advice(history: Sequence[Mapping[str, Any]], settings: dict[str, Any], lanes: Lanes | None) -> list[str]:
    """Sentences, what gives most first; none before the first step."""
    figures = Figures(history, settings, lanes)
    if not figures.steps:
        return []
    return [sentence for rule in RULES for sentence in rule(figures)]


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %"


def _overlap(it: Figures) -> Iterator[str]:
    step, before, learner = it.seconds("step"), it.seconds("rollout", "reward", "blind"), it.seconds("learner")
    if it.set_to("controller.lag") != 0 or min(before, learner) < step * MUCH / 2 or before < step * MUCH:
        return
    limit = max(before, learner + it.seconds("buffer")) + it.seconds("sync")
    yield (
        f"learners wait {_share(before, step)} of a step for answers and their scores: controller.lag=1 samples the "
        f"next step's meanwhile. The limit is the longer of both and the sync, {limit:.1f} s a step instead of "
        f"{step:.1f}; members that share cores come less near to it, and nearer with one rollout and one "
        "reward member than with more"
    )


def _rollouts(it: Figures) -> Iterator[str]:
    step, rollout, members = it.seconds("step"), it.seconds("rollout"), it.set_to("rollout.num_workers")
    prompts = it.set_to("rollout.prompts_per_step")
    if rollout < step * MUCH or not members or not prompts:
        return
    yield from _long_answers(it)
    more = next((n for n in range(members + 1, prompts + 1) if prompts % n == 0), None)
    if more is not None:
        saved = rollout * (1 - members / more)
        yield (
            f"the loop waits {_share(rollout, step)} of a step for {members} rollout member(s): "
            f"rollout.num_workers={more}, each with cores or GPUs of its own, saves up to {saved:.1f} s of it. The "
            f"limit of any number is {step - rollout:.1f} s a step instead of {step:.1f}"
        )


def _long_answers(it: Figures) -> Iterator[str]:
    if it.lanes is None or it.set_to("rollout.oversample") != 0:
        return
    times = [lane.calls.get("generate", 0.0) for lane in it.lanes.members if lane.name.startswith("rollout")]
    if len(times) > 1 and 0 < min(times) < UNEVEN * max(times):
        yield (
            f"the quickest rollout member samples {min(times):.1f} s a step, the slowest {max(times):.1f}: a few long "
            "answers hold up the step. rollout.oversample=0.5 ends it without them and goes on with them in the next; "
            f"the limit is what the others take, {max(times) - min(times):.1f} s less"
        )


def _rewards(it: Figures) -> Iterator[str]:
    step, reward, members = it.seconds("step"), it.seconds("reward"), it.set_to("reward.num_workers")
    if reward >= step * MUCH and members:
        yield (
            f"the loop waits {_share(reward, step)} of a step for {members} reward member(s): "
            f"reward.num_workers={members + 1} saves up to {reward / (members + 1):.1f} s, reward.verifier_processes "
            f"more if verifiers are slow. The limit is {step - reward:.1f} s a step instead of {step:.1f}"
        )


def _learners(it: Figures) -> Iterator[str]:
    step, learner, ranks = it.seconds("step"), it.seconds("learner"), it.set_to("learner.num_workers")
    if learner < step / 2 or not ranks:
        return
    limit = step - learner
    if it.set_to("controller.lag") and it.lanes is not None:  # the members beside it take their time all the same
        limit = max([limit, *(lane.busy for lane in it.lanes.members if not lane.name.startswith("learner"))])
    yield (
        f"the learner takes {_share(learner, step)} of a step: learner.num_workers={ranks + 1}, each with cores or a "
        f"GPU of its own, saves up to {learner / (ranks + 1):.1f} s. The limit is {limit:.1f} s a step, not "
        f"{step:.1f}"
    )
    if it("learner/shared_rows") == 0:
        yield "learner/shared_rows is 0: each prompt runs once for each of its answers; the run's log says why"


def _sync(it: Figures) -> Iterator[str]:
    step, sync = it.seconds("step"), it.seconds("sync")
    if sync >= step * MUCH:
        sent = it("sync/megabytes")
        what = f" ({sent:.0f} MB a rollout member)" if sent else ""
        yield (
            f"the weight sync takes {_share(sync, step)} of a step{what}: more rollout.prompts_per_step make it rarer, "
            "learner.lora or learner.trainable make it smaller"
        )


def _evaluations(it: Figures) -> Iterator[str]:
    every, step = it.set_to("evaluation.every"), it.seconds("step")
    took = [record["eval/seconds"] for record in it.history[1:] if record.get("eval/seconds") is not None]
    if every and took and median(took) >= MUCH * (median(took) + every * step):
        share = _share(median(took), median(took) + every * step)
        yield (
            f"evaluations take {share} of the time ({median(took):.1f} s every {every} steps): "
            f"evaluation.every={2 * every}, or a smaller data.eval_size"
        )


def _effective(it: Figures) -> Iterator[str]:
    fresh, whole = it("buffer/effective_share_fresh"), it("buffer/effective_share")
    if fresh is None or whole is None or fresh >= FEW_EFFECTIVE:
        return
    yield (
        f"{_share(fresh, 1)} of the fresh answers teach something ({_share(whole, 1)} with the buffer): "
        "python -m skyrl.filter_prompts leaves out prompts that are always right or always wrong, a larger "
        "rollout.samples_per_prompt ties fewer groups"
    )


def _replay(it: Figures) -> Iterator[str]:
    fresh, whole, mix = it("buffer/effective_share_fresh"), it("buffer/effective_share"), it.set_to("buffer.mix")
    on, filled = it.set_to("buffer.enabled"), it.set_to("buffer.fill_target")
    if not on or filled is not None or fresh is None or whole is None or mix is None or len(it.steps) < LAST_STEPS:
        return
    wanted = min(1.0, fresh + mix)
    if whole < wanted - 0.05:
        oldest, allowed = it("buffer/age_max"), it.set_to("buffer.max_age")
        ages = f"; the oldest replayed sample is {oldest:.0f} versions old" if oldest is not None else ""
        yield (
            f"the sample buffer fills the batch to {_share(whole, 1)}, buffer.mix={mix:g} allows {_share(wanted, 1)}: "
            f"samples go after buffer.max_age={allowed} versions{ages}. A larger max_age keeps more, and older ones"
        )


def _lag(it: Figures) -> Iterator[str]:
    lag = it.set_to("controller.lag") or 0
    if lag > 1:
        yield f"controller.lag={lag} is as fast as 1, and its answers are older: controller.lag=1"


RULES: tuple[Rule, ...] = (*(_overlap, _rollouts, _rewards, _learners, _sync, _evaluations, _effective, _replay, _lag),)
