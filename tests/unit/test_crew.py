"""Crews: typed calls on the members of a role, in this process. tests/integration/test_crew_ray.py does it with Ray."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from skyrl.crew.crew import Crew, LocalExecutor, MemberSpec, cut
from skyrl.records import SkyrlError


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


def test_waiting_ends_with_the_calls_that_are_late() -> None:
    class Late(LocalExecutor):
        """Nothing is ready in time but "done"."""

        def poll(self, promises: Sequence[Any], seconds: float) -> tuple[list[Any], list[Any]]:
            assert seconds == 10.0
            return [one for one in promises if one == "done"], [one for one in promises if one != "done"]

        def fetch(self, promises: Sequence[Any], timeout: float, waited: float = 0.0) -> list[Any]:
            raise SkyrlError(f"{promises} took {timeout + waited:g} s")

    made = Crew(Late(), [MemberSpec("counter-0", Counter, ("a",))], timeout=10.0)
    made.wait(["done", "done"])
    with pytest.raises(SkyrlError, match=r"\['late'\] took 10 s"):
        made.wait(["done", "late"])


def test_the_seconds_of_a_call_are_those_of_the_slowest_member() -> None:
    made = crew(0, 0)
    made.each(Counter.add, 1)
    for member, seconds in zip(made.members, (0.5, 2.0), strict=True):
        member._seconds["Counter.add"] = seconds
    assert made.seconds(Counter.add) == 2.0
    assert made.seconds(Counter.spell) == 0.0
