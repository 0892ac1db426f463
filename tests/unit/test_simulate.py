"""The simulated clock against oracles worked out by hand, and the real loop on it: what is trained, and how long steps
take."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.simulate.split import Job, splits
from skyrl.crew.crew import Crew
from skyrl.crew.executor import MemberSpec
from skyrl.records import ConfigError, SkyrlError
from skyrl.simulate.cost import CostModel, EngineCost, LearnerCost, decode, learner_seconds, read_costs, rollout_seconds
from skyrl.simulate.executor import Took, VirtualExecutor
from skyrl.simulate.lengths import FOLDER, Lengths, measured, read_lengths
from skyrl.simulate.world import Plan, simulate

EVEN = EngineCost(running=[1, 64], tokens_per_second=[1.0, 64.0], max_running=64)
"""One second a decoding step, however many run."""


def always(tokens: int, prompt_tokens: int = 10) -> Lengths:
    return Lengths(about="always the same", quantiles=[tokens, tokens], prompt_tokens=prompt_tokens)


def even(train: float, engine: EngineCost = EVEN, **more: float) -> CostModel:
    return CostModel(about="by hand", engines=[engine], learner=LearnerCost(tokens_per_second=train), **more)


# ---------------------------------------------------------------- the clock


class Worker:
    """Named in crews; the stand-in below runs instead."""

    def work(self, seconds: float) -> float:
        raise AssertionError("the stand-in runs")

    def add(self, *values: float) -> float:
        raise AssertionError("the stand-in runs")


class Busy:
    def work(self, seconds: float) -> Took:
        return Took(seconds, seconds)

    def add(self, *values: float) -> Took:
        return Took(sum(values), 1.0)


def crew(executor: VirtualExecutor, members: int, timeout: float = 100.0) -> Crew[Worker]:
    return Crew(executor, [MemberSpec(f"worker-{place}", Worker) for place in range(members)], timeout)


def test_two_workers_and_three_answers_end_when_the_hand_says() -> None:
    """5, 3 and 4 s dealt in turn: the first worker is free at 5 and ends the third at 9, the second ends at 3. A third
    crew adds up what it gets, when the last is there, in 1 s."""
    executor = VirtualExecutor({Worker: lambda spec: Busy()})
    workers, adder = crew(executor, 2), crew(executor, 1)
    parts = workers.deal(Worker.work, [5.0, 3.0, 4.0])
    assert [part.ready for part in parts] == [5.0, 3.0, 9.0] and executor.now == 0.0  # nobody has waited yet
    total = adder.ask(Worker.add, *parts[:2])
    assert workers.poll(parts, 4.0) == ([parts[1]], [parts[0], parts[2]]) and executor.now == 4.0
    assert adder.fetch(total) == [8.0] and executor.now == 6.0
    later = workers.deal(Worker.work, [2.0])[0]  # behind the third answer
    workers.wait(parts)
    assert executor.now == 9.0 and workers.seconds(Worker.work) == 3.0 and later.ready == 11.0


def test_each_call_costs_the_caller_and_a_late_one_is_named() -> None:
    executor = VirtualExecutor({Worker: lambda spec: Busy()}, call_seconds=0.5)
    workers = crew(executor, 2, timeout=2.0)
    parts = workers.deal(Worker.work, [1.0, 1.0, 9.0])
    assert executor.now == 1.5 and [part.ready for part in parts] == [1.5, 2.0, 10.5]
    with pytest.raises(SkyrlError, match=r"^worker-0 Worker.work took longer than controller.timeout=2 s$"):
        workers.fetch(parts)
    assert executor.now == 3.5


# ---------------------------------------------------------------- what things take


def test_decoding_by_hand() -> None:
    """A step of one sequence takes 1 s, of two 1.5 s, of three 2 s. Answers of 2, 4 and 6 tokens: 2 steps of three, 2
    of two, 2 of one: 4, 7 and 9 s. With two places the third waits for the first: 2 · 1.5, then 2 · 1.5 more until the
    second ends, then 4 · 1."""
    three = EngineCost(running=[1, 2, 3], tokens_per_second=[1.0, 2 / 1.5, 1.5], max_running=3)
    lengths, none = np.array([2, 4, 6]), np.zeros(3)
    together = decode(lengths, none, three)
    assert together.finish.tolist() == [4.0, 7.0, 9.0]
    assert together.done(5.5).tolist() == [3.0, 3.0, 3.0]  # not clipped: the first ended with 2
    waits = decode(lengths, none, three.model_copy(update={"max_running": 2}))
    assert waits.finish.tolist() == [3.0, 6.0, 10.0]
    assert waits.done(6.0).tolist() == [4.0, 4.0, 2.0]


def test_context_slows_decoding_by_hand() -> None:
    """Steps of 1 s, and 0.1 s for each token of context in the middle of the step. Two answers of 1 and 2 tokens behind
    3 tokens each: (3.5 + 3.5) · 0.1 more, then 4.5 · 0.1."""
    slow = EVEN.model_copy(update={"context_seconds": 0.1})
    for places in (64, 2):
        own = EngineCost.model_validate(slow.model_dump() | {"max_running": places})
        assert decode(np.array([1, 2]), np.full(2, 3), own).finish == pytest.approx([1.7, 3.15])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 30)), min_size=1, max_size=12), st.integers(1, 12))
def test_both_ways_to_decode_agree_with_counting_tokens(answers: list[tuple[int, int]], places: int) -> None:
    engine = EngineCost(running=[1, 4], tokens_per_second=[2.0, 5.0], context_seconds=0.01, max_running=places)
    lengths, context = (np.array(column) for column in zip(*answers, strict=True))
    left, waiting, now = dict[int, int](), list(range(len(answers))), 0.0
    finish, held = np.zeros(len(answers)), context.astype(float)
    while left or waiting:
        while waiting and len(left) < places:
            one = waiting.pop(0)
            left[one] = int(lengths[one])
        now += engine.steps[len(left) - 1] + 0.01 * sum(held[one] + 0.5 for one in left)
        for one in list(left):
            held[one] += 1
            left[one] -= 1
            if left[one] == 0:
                finish[one] = now
                del left[one]
    assert decode(lengths, context, engine).finish == pytest.approx(finish)


def test_an_engine_beyond_its_table_and_a_learner() -> None:
    table = EngineCost(running=[1, 4], tokens_per_second=[1.0, 2.0], max_running=8)  # steps of 1 … 2 s, 1/3 s each more
    assert table.steps == pytest.approx([1, 4 / 3, 5 / 3, 2, 7 / 3, 8 / 3, 3, 10 / 3])
    assert EngineCost(running=[1], tokens_per_second=[2.0], max_running=3).steps == pytest.approx([0.5, 1.0, 1.5])
    cost = LearnerCost(tokens_per_second=10.0, attention_tokens=100.0, fixed_seconds=3.0)
    assert learner_seconds([100, 50, 50, 50], cost, 2) == pytest.approx(3 + (200 + 3 * 75) / 2 / 10)
    assert learner_seconds([100, 10], cost, 64) == pytest.approx(3 + 200 / 10)  # the longest is not cut
    assert learner_seconds([], cost, 1) == 0.0


def test_the_prompts_are_shared_as_the_loop_shares_them() -> None:
    lengths = np.array([[1, 2], [3, 4], [5, 6]])
    assert rollout_seconds(lengths, 0, EVEN, 1) == 6.0
    assert rollout_seconds(lengths[:, :1], 10, EVEN.model_copy(update={"prefill_tokens_per_second": 5.0}), 2) == 7.0


# ---------------------------------------------------------------- the loop on it


@pytest.mark.parametrize(
    ("lag", "step", "total"),
    [
        (0, 8 + 3.5 + 2, 8 * 13.5),
        (1, 8 + 2, (8 + 8 + 2) + 6 * 10 + (3.5 + 2)),  # step 1 waits for two rollouts, nothing is asked for in step 8
        (2, 8 + 2, (3 * 8 + 2) + 5 * 10 + 2 * (3.5 + 2)),
    ],
)
def test_steps_take_the_sum_at_lag_0_and_the_longer_side_with_lag(lag: int, step: float, total: float) -> None:
    """Answers of 8 tokens, 1 s each: 8 s. 4 · 2 sequences of 18 tokens at 48 a second: 3 s. Batch 0.5 s, sync 2 s, also
    before the first step. More lag gains nothing: weights wait."""
    costs = even(48.0, buffer_seconds=0.5, sync_seconds=2.0)
    found, executor, _ = simulate(Plan(4, 2, 2, 1, lag, steps=8, replay=False), costs, always(8))
    assert (found.step, found.mean_step) == pytest.approx((step, step))
    assert sum(found.laps.values()) == pytest.approx(step)
    assert executor.now == pytest.approx(2 + total)


def test_a_learner_that_takes_longer_hides_the_engines() -> None:
    costs = even(6.0, sync_seconds=1.0)  # 8 · 18 tokens: 24 s
    found, _, _ = simulate(Plan(4, 2, 2, 1, 1, steps=8, replay=False), costs, always(8))
    assert found.step == pytest.approx(24 + 1) and found.laps["time/rollout"] == pytest.approx(0)
    assert (found.rollout_busy, found.learner_busy) == pytest.approx((8 / 25, 24 / 25))


@pytest.mark.parametrize(
    ("engines", "lag", "oversample", "steps"), [(1, 0, 0.0, 4), (4, 1, 0.0, 4), (2, 1, 1.0, 3), (4, 0, 0.5, 3)]
)
def test_every_prompt_of_an_epoch_is_trained_once(engines: int, lag: int, oversample: float, steps: int) -> None:
    """The simulated data have 32 rows: four steps, or three where some of the prompts are begun and left for later."""
    lengths = read_lengths("math_long_tail").scaled(0.01, 164)
    plan = Plan(8, 4, engines, 1, lag, steps, oversample, reward_workers=3, replay=False)
    _, _, world = simulate(plan, even(1e3), lengths)
    assert [step for step, _ in world.trained] == list(range(1, steps + 1))
    assert all(len(ids) == 8 * 4 and set(Counter(ids).values()) == {4} for _, ids in world.trained)
    seen = Counter(one for _, ids in world.trained for one in set(ids))
    assert set(seen.values()) == {1} and len(seen) == 8 * steps
    assert seen.keys() <= {f"train/{row}" for row in range(32)}


@pytest.mark.parametrize(("rate", "expected"), [(1e12, [4, 5, 2]), (1.0, [4 + 20, 5 + 28, 2 + 30])])
def test_oversampling_stops_when_enough_groups_are_complete(rate: float, expected: list[float]) -> None:
    """One engine, one group wanted, two in flight: of 4 and 9 tokens the 4 ends the step; the 9 has 5 left, the 7 that
    comes is longer, and has 2 left then. Two prompts of 10 tokens, and what the begun one has, are read each time."""
    plan = Plan(1, 2, 1, 1, steps=3, oversample=1.0, replay=False)
    costs = even(1e9, EVEN.model_copy(update={"prefill_tokens_per_second": rate}))
    tokens = [[[4, 4], [9, 9], [0, 0], [0, 0]], [[7, 7]] * 4, [[50, 50]] * 4]
    assert rollouts(plan, costs, tokens) == pytest.approx(expected)


def test_a_group_that_was_left_four_times_is_waited_for() -> None:
    """Then the short one, which was complete before, costs the next step nothing."""
    plan = Plan(1, 2, 1, 1, steps=6, oversample=1.0, replay=False)
    tokens = [[[100, 100], *[[1, 1]] * 3], *[[[1, 1]] * 4] * 5]
    assert rollouts(plan, even(1e9), tokens) == pytest.approx([1, 1, 1, 1, 96, 0])


def rollouts(plan: Plan, costs: CostModel, tokens: list[list[list[int]]]) -> list[float]:
    """Seconds of the steps' rollouts, with the rows in order, and lengths by step and row."""
    from skyrl.simulate import members, world

    kept: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(members.World, "tokens_of", lambda self, step: np.array(tokens[step - 1]))
        patch.setattr(world, "_result", lambda plan, sink, *rest: kept.extend(sink.metrics))
        patch.setattr(world, "PromptStream", lambda size, seed: InOrder())
        simulate(plan, costs, always(1))
    return [metrics["time/rollout"] for metrics in kept]


class InOrder:
    """Rows one after the other."""

    def __init__(self) -> None:
        self.at = 0

    def take(self, n: int) -> tuple[int, ...]:
        self.at += n
        return tuple(row % 4 for row in range(self.at - n, self.at))

    def state_dict(self) -> dict[str, int]:
        return {"epoch": 0, "size": 0, "position": self.at}


# ---------------------------------------------------------------- the search


def test_the_best_split_is_the_one_that_simulating_all_of_them_finds() -> None:
    lengths = read_lengths("uniform").scaled(0.2, 200)
    two = EngineCost(gpus=2, running=[1, 64], tokens_per_second=[60.0, 1500.0], max_running=64)
    single = EngineCost(running=[1, 64], tokens_per_second=[40.0, 1000.0], max_running=64)
    learner = LearnerCost(tokens_per_second=400.0, min_gpus=2)
    costs = CostModel(about="", engines=[single, two], learner=learner, sync_seconds=1.0, switch_seconds=2.0)
    for gpus, prompts in ((6, 8), (9, 6)):
        job = Job(prompts, 4, colocated=True)
        found, steps = splits(gpus, job, costs, lengths, draws=24), []
        for one in found:
            plan = Plan(prompts, 4, one.engines, one.learner_gpus, one.lag, 14, colocated=one.colocated, replay=False)
            steps.append(simulate(plan, costs, lengths, one.engine)[0].mean_step)
        assert steps[0] <= 1.02 * min(steps)
        assert [one.step for one in found] == pytest.approx(steps, rel=0.12)  # other draws
        # By hand: every number of engines that divides the prompts and leaves the learner its two.
        kinds = {(s.engine.gpus, s.engines, s.learner_gpus, s.lag, s.colocated) for s in found}
        fits = [(g, n) for g in (1, 2) for n in range(1, 10) if prompts % n == 0 and gpus - g * n >= 2]
        shared = {(1, gpus, gpus, 0, True)} if prompts % gpus == 0 else set()
        assert kinds == {(g, n, gpus - g * n, lag, False) for g, n in fits for lag in (0, 1)} | shared


def test_a_split_that_no_gpu_is_left_for_is_refused() -> None:
    costs = read_costs("h100_7b")
    with pytest.raises(ConfigError, match=r"--gpus 4 with --prompts 8: no split; engines take 1, 2 GPUs, .* needs 4"):
        splits(4, Job(8, 2), costs, always(5))


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.json")))
def test_the_distributions_draw_what_they_say(name: str) -> None:
    lengths = read_lengths(name)
    drawn = lengths.draw(np.random.default_rng(0), 4000, 8)
    assert drawn.mean() == pytest.approx(lengths.mean, rel=0.05)
    assert lengths.quantiles[0] - 1 <= drawn.min() and drawn.max() <= lengths.quantiles[-1] + 1
    again = measured(drawn, "drawn", lengths.prompt_tokens)
    assert again.prompt_share == pytest.approx(lengths.prompt_share, abs=0.1)  # ties
    assert again.mean == pytest.approx(lengths.mean, rel=0.05)


def test_wrong_files_are_refused_with_their_names(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"--lengths nothing: no such file; allowed: a JSON file, or one of .*uniform"
    ):
        read_lengths("nothing")
    path = tmp_path / "own.json"
    path.write_text('{"about": "", "quantiles": [5, 3]}')
    with pytest.raises(ConfigError, match=r"own\.json: .*quantiles must ascend"):
        read_lengths(str(path))
    path = tmp_path / "own.yaml"
    path.write_text("about: x\nengines: [{running: [2], tokens_per_second: [1]}]\nlearner: {tokens_per_second: 0}\n")
    with pytest.raises(ConfigError, match=r"(?s)own\.yaml: .*running must ascend from 1.*tokens_per_second"):
        read_costs(str(path))
