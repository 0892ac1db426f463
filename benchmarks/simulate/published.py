"""Ratios that others published, from the simulated loop. Each case is fitted to its synchronous side only, and predicts
the other side.

What is fitted, and what is assumed, stands with each case and in docs/results/simulation.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import numpy as np

from benchmarks.simulate.split import Job, expected
from skyrl.simulate.cost import CostModel, EngineCost, LearnerCost
from skyrl.simulate.lengths import Lengths, read_lengths
from skyrl.simulate.world import Plan, Result, simulate

STEPS = 12


@dataclass(slots=True)
class Row:
    """One published ratio."""

    case: str
    published: float
    ours: float
    """Of the schedule that the case names."""
    schedule: str
    before: float
    """Seconds of the simulated slow side: of a step, or with ``per tokens`` of a million tokens."""
    after: float
    """The same of the fast side."""
    details: dict[str, float]
    assumed: str

    @property
    def error(self) -> float:
        return self.ours / self.published - 1


def _fit(wanted: float, of: Callable[[float], float], low: float, high: float) -> float:
    """The argument at which a growing function has a value; by bisection, in the logarithm."""
    for _ in range(18):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if of(middle) < wanted else (low, middle)
    return (low * high) ** 0.5


# ------------------------------------------------------------------ verl


@dataclass(slots=True, frozen=True)
class _Verl:
    name: str
    published: float
    generate: float
    train: float
    rest: float
    most_tokens: int


VERL = (
    _Verl("verl one-step-off, FSDP2", 749 / 520, 247, 88 + 286, 749 - 247 - 88 - 286, 20_480),
    _Verl("verl one-step-off, Megatron", 699 / 566, 162, 119 + 344, 699 - 162 - 119 - 344, 8_192),
)
H20_7B = EngineCost(running=[1, 64, 256, 1024], tokens_per_second=[140, 6300, 13000, 16500], context_seconds=1.8e-8,
                    max_running=1024)  # fmt: skip


def verl(case: _Verl) -> Row:
    """7B, 32 H20: colocated, one after the other, against 8 GPUs that sample beside 24 that train."""

    def costs(train: float = 1.0) -> CostModel:
        learner = LearnerCost(tokens_per_second=train)
        return CostModel(about="", engines=[H20_7B], learner=learner, buffer_seconds=0.0)

    shape = read_lengths("math_long_tail")
    plan = Plan(512, 16, 32, 32, steps=6, replay=False, ranks=1)
    job = Job(plan.prompts, plan.samples)
    factor = _fit(
        case.generate,
        lambda by: expected(job, costs(), shape.scaled(by, case.most_tokens), H20_7B, 32, 32)[0],
        0.02,
        20,
    )
    lengths = shape.scaled(factor, case.most_tokens)
    once = simulate(plan, costs(), lengths)[0]
    fitted = costs(once.laps["time/learner"] / case.train)
    fitted.buffer_seconds = case.rest / 2  # scoring and batch; the other half loads weights and unloads
    fitted.switch_seconds = case.rest / 2
    before = simulate(replace(plan, colocated=True, steps=STEPS), fitted, lengths)[0]
    after = simulate(replace(plan, engines=8, learner_gpus=24, lag=1, steps=STEPS), fitted, lengths)[0]
    return Row(
        case.name, case.published, before.step / after.step, "lag 1", before.step, after.step,
        {"answer_tokens": lengths.mean, "sampling": after.rollout_busy * after.step, **_laps(after)},
        "512 prompts x 16 answers; rates of a 7B model on an H20 from its bandwidth and arithmetic; the lengths' scale "
        "is fitted to the synchronous generation time, the learner to the synchronous training time; both scale with "
        "GPUs; half of what is left of the synchronous step is loading and unloading, which the split saves",
    )  # fmt: skip


def _laps(result: Result) -> dict[str, float]:
    return {name.removeprefix("time/"): value for name, value in result.laps.items()}


# ------------------------------------------------------------------ AReaL


@dataclass(slots=True, frozen=True)
class _Areal:
    name: str
    published: float
    step: float
    """Seconds of the synchronous step: hours by 1,000 steps."""
    gpus: int
    engine: EngineCost
    train_rate: float
    """Tokens a second of one training GPU."""


H800_1B5 = EngineCost(running=[1, 64, 256], tokens_per_second=[250, 11000, 24000], context_seconds=1.1e-8,
                      prefill_tokens_per_second=80_000, max_running=256)  # fmt: skip
H800_7B = EngineCost(running=[1, 64, 256], tokens_per_second=[140, 7000, 17000], context_seconds=2.1e-8,
                     prefill_tokens_per_second=20_000, max_running=256)  # fmt: skip
AREAL = (
    _Areal("AReaL 1.5B, 128 H800", 41.0 / 14.8, 41.0 * 3.6, 128, H800_1B5, 25_000),
    _Areal("AReaL 7B, 192 H800", 57.7 / 25.4, 57.7 * 3.6, 192, H800_7B, 6_000),
)
AREAL_MOST = 27_648


def areal(case: _Areal) -> list[Row]:
    """Synchronous on all GPUs, against three quarters that sample: waiting for each batch (lag 1), and with rollouts
    that end early and go on in the next step, which is as near as the loop comes to a stream."""
    learner = LearnerCost(tokens_per_second=case.train_rate, attention_tokens=30_000)
    costs = CostModel(about="", engines=[case.engine], learner=learner, sync_seconds=2.0, switch_seconds=10.0)
    shape = read_lengths("math_long_tail")
    plan = Plan(512, 16, case.gpus, case.gpus, steps=6, replay=False, colocated=True)
    plan.engines = _divisor(plan.prompts, case.gpus)
    job, rest = Job(plan.prompts, plan.samples), costs.sync_seconds + costs.switch_seconds
    factor = _fit(
        case.step - rest,
        lambda by: sum(expected(job, costs, shape.scaled(by, AREAL_MOST), case.engine, plan.engines, case.gpus)),
        0.1,
        20,
    )
    lengths = shape.scaled(factor, AREAL_MOST)
    before = simulate(replace(plan, steps=STEPS), costs, lengths)[0]
    split = replace(plan, engines=_divisor(plan.prompts, case.gpus * 3 // 4), learner_gpus=case.gpus // 4, steps=STEPS)
    split.lag, split.colocated = 1, False
    found = []
    assumed = (
        "512 prompts x 16 answers of up to 27,648 tokens; rates of the model on an H800 from its bandwidth and "
        "arithmetic; only the lengths' scale is fitted, to the synchronous step"
    )
    for schedule, share in (("lag 1", 0.0), ("lag 1, oversample=1", 1.0)):
        after = simulate(replace(split, oversample=share, steps=STEPS * (2 if share else 1)), costs, lengths)[0]
        details = {"rollout_busy": after.rollout_busy, "learner_busy": after.learner_busy, **_laps(after)}
        found.append(
            Row(
                case.name, case.published, before.step / after.step, schedule, before.step, after.step,
                {"answer_tokens": lengths.mean, **details}, assumed,
            )
        )  # fmt: skip
        if share:  # no engine waits for another, and none is asked for more than its part of the mean
            busy = after.rollout_busy * after.step
            found.append(_worked_out(found[-1], "mean engine instead of the slowest", max(busy, _learner(after)) + 2.0))
    tokens = plan.prompts * plan.samples * lengths.mean
    stream = max(tokens / (case.gpus * 3 // 4 * full_rate(case.engine, lengths)), _learner(after))
    found.append(_worked_out(found[0], "a stream: engines always full", stream))
    return found


def _learner(result: Result) -> float:
    return result.laps["time/learner"] + result.laps["time/buffer"]


def _worked_out(row: Row, schedule: str, step: float) -> Row:
    """What the loop does not do, and would take so long."""
    details = {"answer_tokens": row.details["answer_tokens"]}
    return replace(row, schedule=f"({schedule})", after=step, ours=row.before / step, details=details)


def full_rate(engine: EngineCost, lengths: Lengths) -> float:
    """Tokens a second of an engine that is always full: of the sequences that run at a time, long ones are more, and
    each is in the middle on average."""
    drawn = lengths.draw(np.random.default_rng(0), 2000, 8).astype(np.float64)
    context = lengths.prompt_tokens + float((drawn**2).mean() / drawn.mean()) / 2
    n = engine.max_running
    return n / (float(engine.steps[-1]) + engine.context_seconds * n * context)


def _divisor(prompts: int, most: int) -> int:
    """The largest number of engines up to ``most`` that shares the prompts evenly."""
    return next(n for n in range(most, 0, -1) if prompts % n == 0)


# ------------------------------------------------------------------ APRIL


APRIL_PUBLISHED = {"DAPO-Math-17k": 1.17, "DeepScaleR": 1.21, "DeepMath-103K": 1.35, "mean of the paper": 1.225}
H100_4B = EngineCost(gpus=2, running=[1, 16, 64, 256], tokens_per_second=[210, 2900, 9600, 24000],
                     context_seconds=2.7e-8, prefill_tokens_per_second=60_000, max_running=512)  # fmt: skip


def april() -> list[Row]:
    """4B on 8 GPUs, 32 prompts x 8 answers of up to 16,384 tokens, 64 in flight: tokens a second of the rollout."""
    costs = CostModel(about="", engines=[H100_4B], learner=LearnerCost(tokens_per_second=1e9))
    lengths = read_lengths("math_long_tail")
    rates = {}
    for scale in (1.0, 2.0, 3.0):
        own = lengths.scaled(scale, 16_384)
        for share in (0.0, 1.0):
            plan = Plan(32, 8, 4, 8, steps=96, replay=False, oversample=share)
            rates[scale, share] = simulate(plan, costs, own)[0].tokens_per_second
    found = []
    for scale in (1.0, 2.0, 3.0):
        own = lengths.scaled(scale, 16_384)
        slow, fast = rates[scale, 0.0], rates[scale, 1.0]
        found.append(
            Row(
                f"APRIL 4B, answers of {own.mean:,.0f} tokens", APRIL_PUBLISHED["mean of the paper"], fast / slow,
                "lag 0, oversample=1", 1e6 / slow, 1e6 / fast, {"answer_tokens": own.mean},
                "32 prompts x 8 answers, 4 engines of 2 GPUs, 64 prompts in flight; each engine stops at its own share "
                "of the groups, where APRIL stops all at the 32nd; nothing is fitted",
            )
        )  # fmt: skip
    return found


def rows() -> list[Row]:
    """All cases."""
    return [*map(verl, VERL), *(row for case in AREAL for row in areal(case)), *april()]


def as_json(found: list[Row]) -> list[dict[str, object]]:
    return [asdict(row) | {"error": row.error} for row in found]
