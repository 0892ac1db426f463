"""Crews: typed calls on the members of a role, in this process. tests/integration/test_crew_ray.py does it with Ray."""

from __future__ import annotations

import time
from typing import Any

import pytest

from skyrl.crew.crew import Crew
from skyrl.crew.executor import MemberSpec, cut
from skyrl.crew.local_executor import LocalExecutor
from skyrl.records import CallRecord, MemberLost, RolloutRequest, SkyrlError


class Counter:
    """A role: counts what it is given."""

    def __init__(self, name: str, start: int = 0) -> None:
        if start < 0:
            raise SkyrlError(f"start is {start}")
        self.name, self.total = name, start
        self.closed = False

    def add(self, amount: int, times: int = 1) -> int:
        self.total += amount * times
        return self.total

    def spell(self, count: int) -> list[str]:
        return [f"{self.name}{i}" for i in range(count)]

    def halves(self) -> tuple[str, int]:
        return self.name, self.total

    def close(self) -> None:
        self.closed = True


def doubled(counter: Counter, extra: int) -> int:
    """A function that is no method: its first argument is the member."""
    return 2 * counter.total + extra


def crew(*starts: int) -> Crew[Counter]:
    specs = [MemberSpec(f"counter-{i}", Counter, ("abc"[i], start)) for i, start in enumerate(starts)]
    return Crew(LocalExecutor(), specs, timeout=10.0)


def test_each_calls_all_members_and_one_the_first() -> None:
    made = crew(1, 10)
    assert made.each(Counter.add, 2) == [3, 12]
    assert made.each(Counter.add, 1, times=3) == [6, 15]
    assert made.one(Counter.add, 1) == 7
    assert made.each(doubled, 1) == [15, 31]


def test_deal_gives_one_input_to_each_member_in_turn() -> None:
    made = crew(0, 0)
    assert made.fetch(made.deal(Counter.add, [1, 2, 3], 10)) == [10, 20, 40]
    assert [counter.part.total for counter in map(_member, made.members)] == [40, 20]


def _member(member: object) -> object:
    return type("seen", (), {"part": member.build()})  # type: ignore[attr-defined]


def test_a_dealt_list_is_cut_into_lists_of_neighbours() -> None:
    made = crew(0)
    assert made.deal(Counter.spell, [5], pieces=2) == [["a0", "a1"], ["a2", "a3", "a4"]]
    assert cut([1], 3) == ([], [], [1])
    with pytest.raises(SkyrlError, match="a dict can't be cut into 2 pieces"):
        cut({}, 2)


def test_a_pair_comes_as_two_promises() -> None:
    assert crew(4).pair(Counter.halves) == ("a", 4)


def test_a_rebuilt_member_starts_from_its_spec_and_the_others_stay() -> None:
    made = crew(1, 10)
    made.each(Counter.add, 5)
    old = made.members[1].build()
    made.rebuild(1)
    assert old.closed
    assert made.each(Counter.add, 0) == [6, 10]


def test_what_a_constructor_raises_is_raised_and_the_members_before_it_are_ended() -> None:
    ended: list[str] = []

    class Noted(Counter):
        def close(self) -> None:
            ended.append(self.name)

    specs = [MemberSpec("counter-0", Noted, ("a", 0)), MemberSpec("counter-1", Noted, ("b", -1))]
    with pytest.raises(SkyrlError, match="start is -1"):
        Crew(LocalExecutor(), specs, timeout=10.0)
    assert ended == ["a"]


def lose(made: Crew[Counter], place: int, placed: bool = True) -> Any:
    """What takes over the work of a member that died, as an executor asks the crew for it."""
    made.executor.placed = lambda member, seconds: placed  # type: ignore[method-assign]
    return made._replace(made.members[place], MemberLost(f"counter-{place}", "Counter.add", f"counter-{place} died"))


def test_a_lost_member_is_built_anew_prepared_revived_and_told_of() -> None:
    made, told = crew(1, 10), []
    made.tell = lambda *event: told.append(event)
    made.prepare(Counter.add, 5)
    made.revive = lambda place: made.fetch([made.at(place, Counter.add, 100)])
    assert lose(made, 1) is made.members[1]
    assert made.each(Counter.add, 0) == [6, 10 + 5 + 100]
    text = "counter-1 died; it was built anew, its unfinished work is asked again"
    assert told == [("replaced", "counter-1", text)]


def test_a_crew_that_may_not_replace_passes_the_loss_on() -> None:
    made = crew(1)
    with pytest.raises(MemberLost, match=r"^counter-0 died$"):
        lose(made, 0)


def test_others_do_the_work_of_a_member_that_no_node_has_room_for_until_one_has() -> None:
    made, told = crew(1, 10, 100), []
    made.tell = lambda kind, member, text: told.append((kind, member))
    made.revive = lambda place: None
    second, third = made.members[1:]
    assert lose(made, 1, placed=False) is third
    assert (made.members[1], len(made), list(made.away)) == (third, 2, ["counter-1"])
    made.executor.room = lambda spec: False  # type: ignore[method-assign]
    made.tend()
    assert len(made) == 2
    made.executor.room, made.executor.placed = (lambda spec: True), (lambda *_: True)  # type: ignore[method-assign]
    made.tend()
    assert made.each(Counter.add, 0) == [1, 10, 100] and not made.away and made.members[1] is not second
    assert told == [("left", "counter-1"), ("joined", "counter-1")]


def test_without_any_member_left_the_loss_is_passed_on() -> None:
    made = crew(1)
    made.revive = lambda place: None
    with pytest.raises(SkyrlError, match="counter-0 died; no node has room for a new one"):
        lose(made, 0, placed=False)


def test_the_history_has_each_call_with_the_step_that_it_was_asked_for() -> None:
    made = crew(0)
    before = time.time()
    made.fetch(made.deal(asked, [RolloutRequest("train", (), 7, 1, False, 0)]))
    made.each(Counter.add, 1)
    first, second = made.executor.history
    assert (first.member, first.call, first.step) == ("counter-0", "asked", 7)
    assert (second.call, second.step) == ("Counter.add", None)
    assert before <= first.asked <= first.started <= first.ended <= second.asked


def asked(counter: Counter, request: RolloutRequest) -> int:
    return request.step


def test_the_seconds_of_a_call_are_those_of_the_slowest_member() -> None:
    made = crew(0, 0)
    made.each(Counter.add, 1)
    made.executor.history.clear()
    for place, seconds in enumerate((0.5, 2.0)):
        made.executor.history.append(CallRecord(f"counter-{place}", "Counter.add", 1.0, 1.0, 1.0 + seconds))
    assert made.seconds(Counter.add) == 2.0
    assert made.seconds(Counter.spell) == 0.0
