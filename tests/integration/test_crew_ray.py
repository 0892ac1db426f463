"""Crews over Ray: values stay away from the driver, errors keep their type, a death names the member and the call."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from skyrl.crew.crew import Crew
from skyrl.crew.executor import MemberSpec
from skyrl.crew.promise import Promise
from skyrl.crew.ray_executor import RayExecutor, ray_session
from skyrl.records import DataError, MemberLost, SkyrlError
from skyrl.settings import Config

pytestmark = pytest.mark.integration
EXECUTOR = RayExecutor(restarts=2)
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

    def stop_once(self, note: Path) -> int:
        """Stand still, unless one before has done so and left a note."""
        if not note.exists():
            note.touch()
            os.kill(os.getpid(), signal.SIGSTOP)
        return self.seen

    def die_late(self, note: Path) -> None:
        note.touch()
        time.sleep(0.3)
        os._exit(7)

    def fail_before(self, note: Path) -> None:
        """What a collective call does whose other side is gone."""
        while not note.exists():
            time.sleep(0.01)
        raise RuntimeError("connection closed by peer")

    def make_once(self, note: Path, count: int) -> list[int]:
        """As :meth:`make`, but the first dies of it."""
        self.die_once(note)
        return self.make(count)

    def plus(self, number: int, more: int) -> int:
        return number + more

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
    assert all(isinstance(promise, Promise) for promise in made) and len(made) == 4
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
    dead = made.at(1, Worker.die)
    with pytest.raises(SkyrlError, match=r"^mortal-1 died in Worker\.die: "):
        other.one(Worker.total, dead)  # it shows where the value is needed, in another crew
    made.rebuild(1)
    assert made.each(Worker.count) == [1, 0]
    for each in (made, other):
        each.stop()


def replaceable(made: Crew[Worker]) -> tuple[Crew[Worker], list[tuple[str, str, str]]]:
    """A crew that replaces what it loses, and what it tells."""
    told: list[tuple[str, str, str]] = []
    made.tell = lambda *event: told.append(event)
    made.revive = lambda place: made.fetch([made.at(place, Worker.make, 7)])  # type: ignore[assignment,return-value]
    return made, told


def test_a_dead_members_call_is_answered_by_a_new_one_which_was_revived_before(tmp_path: Path) -> None:
    made, told = replaceable(crew(["phoenix-0", "phoenix-1"]))
    made.each(Worker.make, 2)
    note = tmp_path / "note"
    assert made.fetch(made.deal(Worker.die_once, [tmp_path / "none", note], first=0)[1:]) == [1]
    assert [(kind, member) for kind, member, _ in told] == [("replaced", "phoenix-1")]
    assert told[0][2].startswith("phoenix-1 died in Worker.die_once: ")
    made.stop()


def test_what_waited_for_a_lost_value_is_asked_again_in_other_crews_too(tmp_path: Path) -> None:
    makers, told = replaceable(crew(["maker-a"]))
    adders = crew(["adder-a"])  # may not be replaced, and need not be
    behind = makers.ask(Worker.make_once, tmp_path / "note", 4)
    queued = makers.ask(Worker.make, 3)  # was never begun
    sums = adders.deal(Worker.total, [*behind, *queued])
    again = adders.deal(Worker.plus, sums, 100)
    assert adders.fetch(again) == [106, 103]
    assert adders.fetch(sums) == [6, 3]  # the same promises, made good
    assert len(told) == 1
    assert [one.call for one in EXECUTOR.history if one.member == "adder-a"].count("Worker.total") == 2
    for each in (makers, adders):
        each.stop()


def test_a_call_that_kills_each_member_is_given_up(tmp_path: Path) -> None:
    made, told = replaceable(crew(["poisoned-0"]))
    with pytest.raises(SkyrlError, match=r"^poisoned-0 died in Worker\.die: .*tried 3 times; controller\.restarts=2"):
        made.one(Worker.die)
    assert len(told) == EXECUTOR.restarts
    made.stop()


def test_a_member_that_stands_still_is_replaced(tmp_path: Path) -> None:
    made, told = replaceable(crew(["stopped-0"]))
    made.one(Worker.make, 2)
    made.timeout = 3.0
    assert made.one(Worker.stop_once, tmp_path / "note") == 1
    assert told[0][2].startswith("stopped-0 Worker.stop_once took longer than controller.timeout=3 s")
    made.stop()


def test_a_member_that_fails_because_another_died_is_not_the_one_to_blame(tmp_path: Path) -> None:
    made = crew(["paired-0", "paired-1"])
    made.each(Worker.count)
    calls = [made.at(0, Worker.fail_before, tmp_path / "note"), made.at(1, Worker.die_late, tmp_path / "note")]
    with pytest.raises(MemberLost, match=r"^paired-1 died"):
        made.fetch(calls[:1])
    made.stop()


def test_what_waits_behind_a_long_call_does_not_hang(tmp_path: Path) -> None:
    made, told = replaceable(crew(["queued-0"]))
    made.one(Worker.count)
    made.timeout = 2.0
    assert made.fetch([made.at(0, Worker.sleep, seconds) for seconds in (1.5, 1.5, 1.5)]) == [1.5] * 3
    assert told == []
    made.stop()


def test_what_was_let_go_of_is_not_made_again(tmp_path: Path) -> None:
    made, _ = replaceable(crew(["lost-0"]))
    first = made.ask(Worker.make_once, tmp_path / "note", 3)
    made.forget(first)
    with pytest.raises(MemberLost, match=r"^lost-0 died in Worker\.make_once"):
        made.fetch(first)
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


def test_a_ray_of_this_process_alone_listens_on_the_loopback_address_only() -> None:
    made = crew(["listening-0"])
    made.one(Worker.count)
    processes = psutil.Process().children(recursive=True)
    addresses = {
        (one.name(), socket.laddr.ip)
        for one in processes
        for socket in one.net_connections("inet")
        if socket.status == psutil.CONN_LISTEN
    }
    assert {"gcs_server", "raylet"} <= {name for name, _ in addresses}
    assert {ip.removeprefix("::ffff:") for _, ip in addresses} == {"127.0.0.1"}, addresses
    made.stop()
