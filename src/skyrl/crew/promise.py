"""What RayExecutor hands out: places in a crew, calls, and promises that remember the call that makes them.

A promise can be made again from its call as long as somebody holds it. The call holds the promises among its arguments,
and so on: a dead member's unfinished work, and what waited for it, is found by walking back from what is wanted.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from skyrl.crew.executor import MemberSpec, call_name
from skyrl.records import MemberLost


@dataclass(slots=True, eq=False)
class Seat:
    """A place in a crew, and the actor that holds it now."""

    spec: MemberSpec[Any]
    lost: Callable[[Seat, MemberLost], Seat] | None
    """Called when the actor died or hung; returns the seat that takes over. None in another process than the crew's."""
    actor: Any = None
    lives: int = 0
    """Actors that held it so far."""
    first: tuple[Any, ...] = ()
    """Ray's references to the actor's first answers: that it runs, and that the role object was built. Ray prints a
    failure that nobody holds."""
    methods: dict[int, Any] = field(default_factory=dict)
    """Results of a call → the actor's method with so many; making one takes time."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Name of a call → wall time of the last one that was waited for."""
    instead: Seat | None = None
    """Does its work while no node has room for it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Seat, (self.spec, None, self.actor, self.lives)

    def taker(self) -> Seat:
        """Who does its work: itself, or who stands in."""
        return self if self.instead is None else self.instead.taker()


@dataclass(slots=True, eq=False)
class Call:
    """One call of a function on a member."""

    seat: Seat
    function: Callable[..., Any]
    pieces: int
    args: tuple[Any, ...] | None
    """None: let go of, so that it can't be made again."""
    kwargs: dict[str, Any]
    asked: float = 0.0
    """Seconds since the epoch."""
    actor: Any = None
    """Whom it was asked."""
    told: Any = None
    """Ray's reference to when it started and ended: small, and an error where the call's values are one."""
    made: list[weakref.ref[Promise]] = field(default_factory=list)
    tries: int = 0
    noted: bool = False
    """It is in the history."""

    @property
    def name(self) -> str:
        return call_name(self.function)

    @property
    def inputs(self) -> Iterator[Promise]:
        """The promises among its arguments."""
        return (one for one in (*(self.args or ()), *self.kwargs.values()) if type(one) is Promise)

    def submit(self) -> list[Any]:
        """Ask the actor; Ray's references to its pieces. Promises made before now stand for these."""
        self.seat = self.seat.taker()
        if (method := self.seat.methods.get(self.pieces)) is None:
            method = self.seat.actor.call.options(num_returns=self.pieces + 1)
            self.seat.methods[self.pieces] = method
        args, kwargs = map(plain, self.args or ()), {name: plain(value) for name, value in self.kwargs.items()}
        self.asked, self.actor, self.noted = time.time(), self.seat.actor, False
        self.tries += 1
        refs: list[Any]
        *refs, self.told = method.remote(self.function, self.pieces, *args, **kwargs)
        for held, ref in zip(self.made, refs, strict=False):
            if (promise := held()) is not None:
                promise.ref = ref
        return refs


@dataclass(slots=True, eq=False, weakref_slot=True)
class Promise:
    """A value that a member makes."""

    call: Call
    ref: Any
    """Ray's reference to it."""


def plain(value: Any) -> Any:
    """What Ray is given for an argument."""
    return value.ref if type(value) is Promise else value


def lineage(promises: Iterable[Promise]) -> list[Call]:
    """The calls that make these promises, each once and behind those that it needs."""
    found: dict[int, Call] = {}

    def visit(call: Call) -> None:
        if id(call) not in found:
            for one in call.inputs:
                visit(one.call)
            found[id(call)] = call

    for promise in promises:
        visit(promise.call)
    return list(found.values())
