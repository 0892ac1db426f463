"""The harness itself, without Ray: a strike hits once, at its point, in its member; the comparison sees differences."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.faults import striking
from tests.faults.child import Order, Plan
from tests.faults.plans import nightly
from tests.faults.points import POINTS, Point
from tests.faults.runs import Struck, _struck, compare
from tests.faults.striking import Folder, Strike, Watch, exists, points_of
from tests.faults.table import bad, table


class Worker:
    def work(self, amount: int) -> int:
        return amount + 1


HERE = f"{__name__}:Worker.work"


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    made = Folder(tmp_path)
    made.make()
    return made


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Signals that would have been sent."""
    found: list[str] = []
    monkeypatch.setattr(striking, "send", lambda how, pid: found.append(how))
    monkeypatch.setattr(Worker, "work", Worker.work)  # put back afterwards
    return found


def test_every_point_is_a_function_that_exists() -> None:
    assert [point.name for point in POINTS if not exists(point)] == []
    assert len({point.name for point in POINTS}) == len(POINTS) >= 40


def test_a_strike_hits_the_nth_call_that_counts_and_only_once(folder: Folder, sent: list[str]) -> None:
    point = Point("rollout/here", HERE, number=2, when=lambda _, amount: amount > 10)
    Watch(folder, "rollout-1").install([point])
    worker = Worker()
    assert worker.work(20) == 21  # nothing is armed yet
    folder.arm(Strike(0, "rollout/here", "rollout-1"))
    for amount, hits in ((20, 0), (1, 0), (20, 1), (20, 1), (20, 1)):
        assert worker.work(amount) == amount + 1 and len(sent) == hits
    assert folder.armed() == [] and folder.time(Strike(0, "rollout/here", "rollout-1")) is not None


def test_only_the_named_member_is_struck_and_one_of_two_processes(folder: Folder, sent: list[str]) -> None:
    point, strike = Point("rollout/here", HERE, after=True), Strike(0, "rollout/here", "rollout-1", "STOP")
    folder.arm(strike)
    Watch(folder, "rollout-0").install([point])
    Worker().work(1)
    assert sent == []
    Watch(folder, "rollout-1").install([point])
    Worker().work(1)
    assert sent == ["STOP"] and not folder.take(strike)


def test_strikes_are_armed_one_after_the_other_and_second_ones_along(folder: Folder, sent: list[str]) -> None:
    strikes = [
        Strike(0, "rollout/asked", "rollout-0"),
        Strike(1, "reward/asked", "reward-0", step=4),
        Strike(2, "reward/building", "reward-0", along=True),
    ]
    order = Order(Plan("policy", 9, strikes=strikes), folder)

    def armed_after(step: int) -> list[int]:
        order.logged(step, {"time/step": 1.0})
        return [strike.number for strike in folder.armed()]

    assert armed_after(1) == [0] and armed_after(2) == [0]
    folder.take(strikes[0])
    assert armed_after(3) == [] and armed_after(4) == [1, 2]
    folder.take(strikes[1])
    assert armed_after(5) == [2]
    assert armed_after(16) == [2] and armed_after(17) == []  # nobody came there
    assert folder.is_done(strikes[2]) and folder.time(strikes[2]) is None


def test_the_nightly_plan_has_over_a_hundred_strikes_and_every_point() -> None:
    plans = nightly("policy")
    strikes = [(plan, strike) for plan in plans.values() for strike in plan.strikes]
    assert len(strikes) > 100
    assert {point.name for point in POINTS} == {strike.point for _, strike in strikes}
    assert {strike.member for _, strike in strikes if strike.point.startswith("reward/evaluat")} == {"reward-0"}
    for name, plan in plans.items():
        there = {point.name for point in POINTS if point in points_of(point.role, plan.kinds)}
        assert {strike.point for strike in plan.strikes} <= there, name
        members = {f"rollout-{i}" for i in range(plan.rollouts)} | {f"reward-{i}" for i in range(plan.rewards)}
        members |= {f"learner-{i}" for i in range(plan.ranks)} | {"sample-buffer", "driver", "gcs", "raylet", "host"}
        assert {strike.member for strike in plan.strikes} <= members
        assert [strike.number for strike in plan.strikes] == list(range(len(plan.strikes)))


def test_seconds_count_until_a_step_that_had_not_been_done(folder: Folder) -> None:
    strike = Strike(0, "learner/asked", "learner-0")
    folder.arm(strike)
    folder.take(strike)
    at = folder.time(strike)
    assert at is not None
    lines = [(-3, 5), (-1, 6), (4, 5), (6, 6), (9, 7), (11, 8)]  # it went back by a step
    (folder.path / "progress.jsonl").write_text(
        "".join(json.dumps({"time": at + after, "step": step, "kind": "step"}) + "\n" for after, step in lines)
    )
    assert _struck(folder, folder.path, strike, {}, at + 99).seconds == pytest.approx(9.0)
    assert not _struck(folder, folder.path, strike, {strike.file: "it died"}, at + 99).survived
    assert _struck(folder, folder.path, replace(strike, number=1), {}, at).error == "it never came to this point"


def run_folder(path: Path, values: dict[int, float], prompts: dict[int, list[str]], weights: bytes = b"w") -> Path:
    (path / "run" / "samples").mkdir(parents=True)
    (path / "run" / "policy").mkdir()
    Plan("policy", len(values)).write(path)
    (path / "run" / "policy" / "model.safetensors").write_bytes(weights)
    lines = [json.dumps({"step": step, "reward/rule": value, "time/step": 1.0}) for step, value in values.items()]
    (path / "run" / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    for step, ids in prompts.items():
        rows: list[dict[str, Any]] = [{"step": step, "id": one, "origin": "fresh"} for one in ids]
        rows.append({"step": step, "id": "old", "origin": "replayed"})
        pq.write_table(pa.Table.from_pylist(rows), path / "run" / "samples" / f"step_{step:06d}.parquet")
    return path


def test_the_comparison_sees_a_value_a_lost_sample_and_a_prompt_trained_twice(tmp_path: Path) -> None:
    alone = run_folder(tmp_path / "alone", {1: 0.5, 2: 0.25}, {1: ["a", "a", "b"], 2: ["c"]})
    same = run_folder(tmp_path / "same", {1: 0.5, 2: 0.25}, {1: ["a", "a", "b"], 2: ["c"]})
    survived = [Struck("reward/asked", "reward-0", "KILL", True, 2.0)]
    outcome = compare("lag0", alone, same, survived)
    assert not bad(outcome) and outcome.policy_equal
    other = run_folder(tmp_path / "other", {1: 0.5, 2: 0.75}, {1: ["a", "b"], 2: ["a"]}, b"v")
    outcome = compare("lag0", alone, other, survived)
    assert outcome.differing == ["step 2 reward/rule: 0.25, 0.75"] and not outcome.policy_equal
    assert outcome.lost == ["step 1: a", "step 2: c"] and outcome.twice == ["a: 2 steps"] and bad(outcome)
    text = table([outcome])
    assert "| lag0 | 1 | 1 | 2 | 1 | 1 | differs |" in text and "| reward | KILL | 1 | 1 | 2.0 | 2.0 |" in text


def test_with_a_lag_and_oversampling_every_prompt_must_be_accounted_for(tmp_path: Path) -> None:
    alone = run_folder(tmp_path / "alone", {1: 0.5, 2: 0.25}, {1: ["a", "b"], 2: ["c"]})
    other = run_folder(tmp_path / "other", {1: 0.5, 2: 0.25}, {1: ["a", "c"], 2: ["d"]})
    Plan("policy", 2, lag=1, oversample=0.5).write(other)
    checkpoint = other / "run" / "checkpoints" / "step_000002"
    checkpoint.mkdir(parents=True)
    for position, lost in ((4, 0), (5, 1)):  # three were trained on, one is begun
        state = {"stream": {"position": position}, "left": 1}
        (checkpoint / "state.json").write_text(json.dumps(state))
        assert len(compare("lag1", alone, other, []).lost) == lost
