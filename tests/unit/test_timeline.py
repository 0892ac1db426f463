"""The trace files: lanes by hand-made records, and what a killed or resumed run leaves."""

from __future__ import annotations

import json
import time
from collections import deque
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from skyrl.learner.step import LearnerStep
from skyrl.monitoring import timeline
from skyrl.monitoring.laps import Laps
from skyrl.monitoring.timeline import Timeline, read_timeline, timeline_files
from skyrl.records import CallRecord
from skyrl.rollout.sampler import Sampler

NOW = 1_000.0
"""The driver's clock when step 1 begins."""


def laps(**seconds: float) -> Laps:
    """``rollout=2.0, learner=1.0``: laps of these lengths; one that ends in an underscore is of the name before it."""
    times = iter([0.0, *seconds.values()])
    clock = {"now": 0.0}

    def tick() -> float:
        clock["now"] += next(times)
        return clock["now"]

    made = Laps(tick)
    for name in seconds:
        made.end(f"time/{name.rstrip('_')}")
    return made


def at(*calls: tuple[str, str, float, float], step: int | None = None) -> list[CallRecord]:
    """Calls asked at the beginning, from … to, seconds of :data:`NOW`."""
    return [CallRecord(member, call, NOW, NOW + a, NOW + b, step) for member, call, a, b in calls]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    now = {"now": NOW}
    monkeypatch.setattr(time, "time", lambda: now["now"])
    return now


def slices(events: list[dict[str, Any]], lane: str) -> list[tuple[str, float, float]]:
    """Name, start and end of the slices of a lane, seconds of :data:`NOW`."""
    names = {(one["pid"], one["tid"]): one["args"]["name"] for one in events if one["name"] == "thread_name"}
    mine = [one for one in events if one["ph"] == "X" and names[one["pid"], one["tid"]] == lane]
    return [(one["name"], one["ts"] / 1e6 - NOW, (one["ts"] + one["dur"]) / 1e6 - NOW) for one in mine]


ONE_STEP = (
    *(("rollout-0", "Sampler.generate", 0.0, 2.0), ("rollout-1", "Sampler.generate", 0.0, 1.5)),
    *(("reward-0", "Rewarder.score", 2.0, 2.5), ("learner-0", "LearnerStep.train_step", 2.5, 5.0)),
    *(("rollout-0", "Sampler.load_weights", 5.0, 5.5), ("rollout-1", "Sampler.load_weights", 5.0, 5.5)),
)


def write_one(folder: Path, clock: dict[str, float]) -> list[dict[str, Any]]:
    clock["now"] = NOW + 6.0
    made = Timeline(folder)
    made.add(1, 1, laps(rollout=2.0, reward=0.5, learner=2.5, sync=1.0), deque(at(*ONE_STEP, step=1)))
    (file,) = folder.iterdir()
    return json.loads(file.read_text())


def test_lanes_say_who_worked_and_who_waited_for_what(tmp_path: Path, clock: dict[str, float]) -> None:
    events = write_one(tmp_path, clock)
    assert slices(events, "steps") == [("step 1", 0.0, 6.0)]
    assert slices(events, "laps") == [
        ("rollout", 0.0, 2.0), ("reward", 2.0, 2.5), ("learner", 2.5, 5.0), ("sync", 5.0, 6.0)
    ]  # fmt: skip
    assert slices(events, "rollout-1") == [
        *(("Sampler.generate", 0.0, 1.5), ("waits: rollout", 1.5, 2.0), ("waits: reward", 2.0, 2.5)),
        *(("waits: learner", 2.5, 5.0), ("Sampler.load_weights", 5.0, 5.5)),
    ]
    assert slices(events, "reward-0") == [("Rewarder.score", 2.0, 2.5)]
    groups = [one["args"]["name"] for one in events if one["name"] == "process_name"]
    assert set(groups) == {"driver", "rollout", "reward", "learner"}


def test_no_two_slices_of_a_member_overlap_and_each_event_is_whole(tmp_path: Path, clock: dict[str, float]) -> None:
    events = write_one(tmp_path, clock)
    assert len(events) > 20
    for event in events:
        assert {"ph", "pid", "tid", "name"} <= event.keys() and event["ph"] in "MXsf"
        assert event["ph"] == "M" or (isinstance(event["ts"], int) and event.get("dur", 0) >= 0)
    for lane in ("rollout-0", "rollout-1", "reward-0", "learner-0", "laps"):
        times = sorted((start, end) for _, start, end in slices(events, lane))
        assert all(end <= start for (_, end), (start, _) in pairwise(times)), lane


def test_arrows_go_from_the_answers_of_a_step_to_its_training(tmp_path: Path, clock: dict[str, float]) -> None:
    """Lag 1: step 2 was sampled beside the training of step 1, and with the weights before it."""
    made, history = Timeline(tmp_path), deque(at(("rollout-0", "Sampler.generate", 0.0, 1.0), step=1))
    history += at(("learner-0", "LearnerStep.train_step", 1.0, 3.0), step=1)
    history += at(("rollout-0", "Sampler.generate", 1.0, 2.0), step=2)
    history += at(("rollout-0", "Sampler.load_weights", 3.0, 3.5))
    clock["now"] = NOW + 4.0
    made.add(1, 1, laps(rollout=1.0, learner=2.0, rollout_=0.0, sync=1.0), history)
    history += at(("rollout-0", "Sampler.generate", 4.0, 5.0), step=3)
    history += at(("learner-0", "LearnerStep.train_step", 4.0, 6.0), step=2)
    clock["now"] = NOW + 7.0
    made.add(2, 2, laps(rollout=0.0, learner=2.0, rollout_=0.0, sync=1.0), history)
    events = json.loads((tmp_path / "steps_000001.json").read_text())
    calls = [one for one in events if one.get("cat") == "call"]
    sampling = {one["args"]["step"]: one["args"]["version"] for one in calls if one["name"] == "Sampler.generate"}
    assert sampling == {1: 0, 2: 0, 3: 1}
    training = {one["args"]["step"]: one["args"]["version"] for one in calls if "train_step" in one["name"]}
    assert training == {1: 0, 2: 1}  # so the answers of step 2 are a version old
    starts = {one["id"]: (one["name"], one["ts"] / 1e6 - NOW) for one in events if one["ph"] == "s"}
    ends = {one["id"]: one["ts"] / 1e6 - NOW for one in events if one["ph"] == "f"}
    assert [(*starts[key], ends[key]) for key in starts] == [("answers of step 1", 0, 1), ("answers of step 2", 1, 4)]
    names = [name for name, *_ in slices(events, "rollout-0")]  # no call is written twice
    assert names == [*2 * ["Sampler.generate"], "waits: learner", "Sampler.load_weights", "waits: sync", names[0]]


def test_a_clock_that_is_behind_is_moved_and_a_call_that_is_told_late_keeps_its_time(
    tmp_path: Path, clock: dict[str, float]
) -> None:
    made, history = Timeline(tmp_path), deque(at(("reward-0", "Rewarder.score", 3.0, 4.0)))
    history.append(CallRecord("rollout-0", "Sampler.generate", NOW, NOW - 5.0, NOW - 3.0, 1))
    clock["now"] = NOW + 4.0
    made.add(1, 1, laps(rollout=4.0), history)
    history += at(("reward-0", "Rewarder.score", 1.0, 2.0), ("reward-0", "Rewarder.score", 6.0, 7.0))
    history.append(CallRecord("rollout-0", "Sampler.probe", NOW, NOW - 3.0, NOW - 2.0))
    clock["now"] = NOW + 8.0
    made.add(2, 2, laps(rollout=4.0), history)
    events = json.loads((tmp_path / "steps_000001.json").read_text())
    assert slices(events, "rollout-0") == [("Sampler.generate", 0.0, 2.0), ("Sampler.probe", 2.0, 3.0)]
    assert [one for one in slices(events, "reward-0") if one[0] == "Rewarder.score"] == [
        *(("Rewarder.score", 3.0, 4.0), ("Rewarder.score", 1.0, 2.0), ("Rewarder.score", 6.0, 7.0))
    ]


def test_the_calls_that_it_knows_by_name_are_there() -> None:
    for name in (*timeline.SAMPLING, *timeline.NEW_WEIGHTS, timeline.TRAINING):
        role, _, function = name.partition(".")
        assert callable(getattr({"Sampler": Sampler, "LearnerStep": LearnerStep}[role], function))


def test_what_lies_between_two_steps_is_no_lap(tmp_path: Path, clock: dict[str, float]) -> None:
    made, history = Timeline(tmp_path), deque(at(("learner-0", "LearnerStep.train_step", 0.0, 1.0)))
    clock["now"] = NOW + 1.0
    made.add(1, 1, laps(learner=1.0), history)
    history += at(("learner-0", "LearnerStep.train_step", 6.0, 7.0))
    clock["now"] = NOW + 7.0
    made.add(2, 2, laps(rollout=2.0, learner=1.0), history)
    events = json.loads((tmp_path / "steps_000001.json").read_text())
    assert slices(events, "learner-0")[1:3] == [("waits: between steps", 1.0, 4.0), ("waits: rollout", 4.0, 6.0)]


def test_files_are_bounded_and_a_resumed_run_takes_the_place_of_its_steps(
    tmp_path: Path, clock: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timeline, "STEPS_PER_FILE", 2)
    made = Timeline(tmp_path)
    for step in range(1, 13):
        made.add(step, step, laps(rollout=1.0), deque())
    assert [number for number, _ in timeline_files(tmp_path)] == [5, 7, 9, 11]
    made.add(8, 8, laps(rollout=1.0), deque())  # the run went back in this process
    assert [number for number, _ in timeline_files(tmp_path)] == [5, 7, 8]
    again = Timeline(tmp_path)
    again.add(8, 8, laps(rollout=1.0), deque())
    assert [number for number, _ in timeline_files(tmp_path)] == [5, 7, 8]
    events = [one["name"] for _, file in timeline_files(tmp_path) for one in read_timeline(file) if one["ph"] == "X"]
    assert [name for name in events if name.startswith("step")] == ["step 5", "step 6", "step 7", "step 8", "step 8"]


def test_a_file_that_was_cut_off_is_readable(tmp_path: Path, clock: dict[str, float]) -> None:
    whole = write_one(tmp_path, clock)
    (file,) = tmp_path.iterdir()
    assert read_timeline(file) == whole
    file.write_bytes(file.read_bytes()[:-40])  # killed in the middle of a write
    assert read_timeline(file) == whole[:-1]


def test_a_full_disk_is_told_once_and_the_next_step_is_whole_again(
    tmp_path: Path, clock: dict[str, float], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = Timeline(tmp_path)
    made.add(1, 1, laps(rollout=1.0), deque())
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes() + 1000 * b"half of")  # what a write left behind that found no room
    made.add(2, 2, laps(rollout=1.0), deque())
    assert [one["name"] for one in json.loads(file.read_text()) if one["name"].startswith("step ")] == [
        "step 1",
        "step 2",
    ]
    blocked = tmp_path / "file"
    blocked.touch()
    other = Timeline(blocked / "timeline")
    other.add(1, 1, laps(rollout=1.0), deque())
    other.add(2, 2, laps(rollout=1.0), deque())
    assert caplog.text.count("no timeline is written") == 1
