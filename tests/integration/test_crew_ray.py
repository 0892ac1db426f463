"""Crews over Ray: values stay away from the driver, errors keep their type, a death names the member and the call."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from skyrl.crew.crew import Crew, MemberSpec
from skyrl.crew.ray_executor import RayExecutor, ray_session
from skyrl.records import DataError, SkyrlError
from skyrl.settings import Config

pytestmark = pytest.mark.integration
EXECUTOR = RayExecutor()
"""One for all crews, as in a run: an error may show in another crew than the one that failed."""


class Worker:
    def __init__(self, name: str, broken: bool = False) -> None:
        if broken:
            raise DataError(f"{name} has no data")
        self.name, self.seen = name, 0

    def make(self, count: int) -> list[int]:
        self.seen += 1
        return list(range(count))

    def total(self, numbers: list[int]) -> int:
        return sum(numbers)

    def fail(self) -> None:
        raise DataError(f"{self.name}: row 3 is broken")

    def die(self) -> None:
        os._exit(7)

    def die_once(self, note: Path) -> int:
        """End the process, unless one before has done so and left a note."""
        if not note.exists():
            note.touch()
            os._exit(7)
        return self.seen

    def sleep(self, seconds: float) -> float:
        time.sleep(seconds)
        return seconds

    def count(self) -> int:
        return self.seen


@pytest.fixture(scope="module", autouse=True)
def session() -> Iterator[None]:
    cfg = Config(name="crew")
    cfg.cluster.dashboard = False
    with ray_session(cfg, "test-crew"):
        yield


def crew(names: list[str], broken: bool = False) -> Crew[Worker]:
    specs = [MemberSpec(name, Worker, (name, broken), cpus=0.1) for name in names]
    return Crew(EXECUTOR, specs, timeout=60.0)


def test_promises_go_from_crew_to_crew_without_passing_here() -> None:
    makers, adders = crew(["maker-0", "maker-1"]), crew(["adder-0"])
    made = makers.deal(Worker.make, [4, 6], pieces=2)
    assert all(isinstance(promise, ray.ObjectRef) for promise in made) and len(made) == 4
    sums = adders.deal(Worker.total, made)
    adders.wait(sums)
    assert adders.fetch(sums) == [0 + 1, 2 + 3, 0 + 1 + 2, 3 + 4 + 5]
    assert makers.seconds(Worker.make) > 0
    for each in (makers, adders):
        each.stop()


def test_an_error_keeps_its_type_and_message_also_that_of_a_constructor() -> None:
    made = crew(["failing-0"])
    with pytest.raises(DataError, match=r"^failing-0: row 3 is broken$"):
        made.one(Worker.fail)
    made.stop()
    broken = crew(["broken-0"], broken=True)
    with pytest.raises(DataError, match=r"^broken-0 has no data$"):
        broken.one(Worker.count)
    broken.stop()


def test_a_death_names_the_member_and_the_call_and_the_member_can_be_built_anew() -> None:
    made, other = crew(["mortal-0", "mortal-1"]), crew(["other-0"])
    assert made.each(Worker.make, 2) == [[0, 1], [0, 1]]
    held = made.ask(Worker.sleep, 0.01)  # an earlier call whose promise is still held must not be blamed
    made.wait(held)
    dead = made.executor.call(made.members[1], Worker.die, 1, (), {})
    with pytest.raises(SkyrlError, match=r"^mortal-1 died in Worker\.die: "):
        other.one(Worker.total, dead)  # it shows where the value is needed, in another crew
    made.rebuild(1)
    assert made.each(Worker.count) == [1, 0]
    for each in (made, other):
        each.stop()


def test_a_member_that_may_be_restarted_answers_the_call_that_it_died_in(tmp_path: Path) -> None:
    made = Crew(EXECUTOR, [MemberSpec("stateless-0", Worker, ("stateless-0",), cpus=0.1, restarts=1)], 60.0)
    made.one(Worker.make, 2)
    assert made.one(Worker.die_once, tmp_path / "note") == 0  # by a new process, which has made nothing yet
    with pytest.raises(SkyrlError, match=r"^stateless-0 died in Worker\.die: "):
        made.one(Worker.die)  # once only
    made.stop()


def test_a_call_that_does_not_end_names_itself() -> None:
    made = crew(["slow-0"])
    made.one(Worker.count)
    made.timeout = 1.0  # now that it is up
    with pytest.raises(SkyrlError, match=r"^slow-0 Worker\.sleep took longer than controller\.timeout=1 s$"):
        made.one(Worker.sleep, 30.0)
    with pytest.raises(SkyrlError, match=r"^slow-0 Worker\.sleep took longer than controller\.timeout=1 s$"):
        made.wait(made.ask(Worker.sleep, 30.0))
    made.stop()
