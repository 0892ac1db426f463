"""A crew: the n members of one role, and the only way to call them.

A *role* is the class that does the work (``Sampler``, ``Rewarder``, ``Batcher``, ``LearnerStep``); it is the only
definition of what the role can do. A crew is told which of the class's own functions to run::

    fresh  = rollouts.deal(Sampler.generate, requests)        # one request to each member in turn; returns at once
    scored = rewards.deal(Rewarder.score, fresh)              # starts as each input is ready; the groups stay away
    rewards.wait(scored)
    metrics = learners.each(LearnerStep.train_step, batch)[0] # on all members; waits for the values

Any importable function whose first argument is the member will do, so ``learners.each(picture_drop, groups)`` needs no
method of that name.

**Promised values.** ``ask``, ``deal`` and ``pair`` return promises, which are typed as the values that they will
become: a type checker then follows the groups from the sampler to the learner. A promise may be handed to another call,
waited for and fetched; nothing else. So a driver moves references and never holds a tensor or a picture.

Calls to one member run in the order in which they were made: weights wait for the answers asked before them.

**Supervision.** Whoever waits notices that a member died, or did not answer in time. A crew that may replace its
members (:attr:`Crew.revive`) then builds the member anew, gives it what it had, and makes its unfinished calls again
with the same arguments: a promise stays the same promise. Where no node has room for the member, the others do its work
until one has (:meth:`Crew.tend`). A crew that may not raises :class:`~skyrl.records.MemberLost`.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, TypeVar

from skyrl.records import CallRecord, MemberLost, RolloutRequest, SkyrlError

logger = logging.getLogger(__name__)

R = TypeVar("R")
A = TypeVar("A")
B = TypeVar("B")
T = TypeVar("T")
P = ParamSpec("P")


@dataclass(slots=True, frozen=True)
class MemberSpec(Generic[R]):
    """How one member is built: enough to build it again."""

    name: str
    """Names it in errors and in the Ray dashboard."""
    role: Callable[..., R]
    args: tuple[Any, ...] = ()
    cpus: float = 0.0
    """Ray CPUs that it reserves."""
    gpus: float = 0.0
    env: dict[str, str] = field(default_factory=dict)
    """Environment variables that must be set before its libraries are imported."""
    strategy: Any = "DEFAULT"
    """Ray's scheduling strategy."""


class Member(Generic[R]):
    """One role object and the functions run on it. Ray makes an actor of this class, the only actor class there is."""

    def __init__(self, spec: MemberSpec[R]) -> None:
        self.spec = spec
        self._part: R | None = None

    def there(self) -> None:
        """It has a process."""

    def build(self) -> R:
        """The role object, made at the first call. What its constructor raises, every later call raises too: as the
        error of a call it keeps its type and message on the way out of a Ray actor."""
        if self._part is None:
            self._part = self.spec.role(*self.spec.args)
        return self._part

    def call(self, function: Callable[..., Any], pieces: int, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Run ``function`` on the role object. Returns the result's so many ``pieces`` and, last, when the call started
        and ended."""
        part, started = self.build(), time.time()
        result = function(part, *args, **kwargs)
        parts = (result,) if pieces == 1 else cut(result, pieces)
        return *parts, (started, time.time())


class Executor(Protocol):
    """Where members run: ``RayExecutor`` or ``LocalExecutor``. ``member`` is what ``start`` returned."""

    history: deque[CallRecord]
    """Of the calls that were waited for, in the order in which that was noticed."""

    def start(self, spec: MemberSpec[Any], lost: Callable[[Any, MemberLost], Any]) -> Any:
        """Build a member.

        Args:
            lost: Called with a member that died or hung; returns the one that takes over its work, or raises.
        """
        ...

    def restart(self, member: Any) -> Any:
        """End a member, which may be dead already, and build it anew. It has lost all state."""
        ...

    def placed(self, member: Any, seconds: float) -> bool:
        """Whether a member that was just built got a place to run within so many seconds."""
        ...

    def room(self, spec: MemberSpec[Any]) -> bool:
        """Whether there is a place for one more member."""
        ...

    def stop(self, member: Any) -> None: ...

    def call(self, member: Any, function: Callable[..., Any], pieces: int, args: Any, kwargs: Any) -> Any:
        """A promise, or a list of promises if ``pieces`` is above 1. Returns at once."""
        ...

    def seconds(self, member: Any, name: str) -> float:
        """Wall time of the last call of that name that was waited for; 0 if there was none."""
        ...

    def poll(self, promises: Sequence[Any], seconds: float) -> tuple[list[Any], list[Any]]:
        """Those that are ready within so many seconds, and the others. Moves no value."""
        ...

    def wait(self, promises: Sequence[Any], timeout: float) -> None:
        """Block until all are ready. Moves no value. Errors as :meth:`fetch`."""
        ...

    def fetch(self, promises: Sequence[Any], timeout: float) -> list[Any]:
        """Their values.

        Raises:
            SkyrlError: what a member raised; or which member died, or did not answer in time, in which call.
        """
        ...

    def forget(self, promises: Sequence[Any]) -> None:
        """Let go of what these promises, all ready, were made from. What is lost of them then stays lost."""
        ...

    def host(self, member: Any) -> Any:
        """A promise of the address under which other members reach it."""
        ...


HISTORY = 100_000
"""Calls that an executor remembers."""
PLACING_SECONDS = 60.0
"""After which a member that no node has taken in counts as away."""


class Crew(Generic[R]):
    """The members of one role.

    Args:
        executor: Where they run.
        specs: How each is built. They start side by side; what the constructor raises shows at the first call that is
            waited for.
        timeout: Seconds after which a call that is waited for has hung (``controller.timeout``).
    """

    def __init__(self, executor: Executor, specs: Sequence[MemberSpec[R]], timeout: float) -> None:
        self.executor, self.specs, self.timeout = executor, list(specs), timeout
        self.members: list[Any] = []
        self.away: dict[str, Any] = {}
        """Members that no node has room for, by name."""
        self.revive: Callable[[int], None] | None = None
        """Gives a member that was built anew what it must have before it works; None: no member may be replaced."""
        self.tell: Callable[[str, str, str], None] = lambda kind, member, text: logger.warning(text)
        """Called with the kind of an :class:`~skyrl.records.Event`, the member and a text."""
        self._prepared: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = []
        try:
            for spec in self.specs:
                self.members.append(executor.start(spec, self._replace))
        except BaseException:
            self.stop()
            raise

    def __len__(self) -> int:
        return len(self.members)

    def __getstate__(self) -> dict[str, Any]:
        """A crew in another process can call its members, but replaces none."""
        return vars(self) | {"revive": None, "tell": None, "_prepared": []}

    # ------------------------------------------------------------ calls that return promises, at once

    def ask(self, function: Callable[Concatenate[R, P], T], *args: P.args, **kwargs: P.kwargs) -> list[T]:
        """Call every member; promises in the order of the members."""
        return [self.executor.call(member, function, 1, args, kwargs) for member in self.members]

    def deal(
        self,
        function: Callable[Concatenate[R, A, ...], T],
        inputs: Iterable[A],
        *rest: Any,
        pieces: int = 1,
        first: int = 0,
    ) -> list[T]:
        """One input to each member in turn; promises in the order of the inputs.

        Args:
            inputs: Values or promises; a call starts when its input is ready.
            rest: Further arguments, the same for all.
            pieces: Cut each result, a list, into so many lists of neighbours with a promise each, so that a larger
                crew can share them.
            first: The member that gets the first input.
        """
        found: list[Any] = []
        for place, one in enumerate(inputs, first):
            made = self.executor.call(self.members[place % len(self)], function, pieces, (one, *rest), {})
            found += [made] if pieces == 1 else made
        return found

    def pair(
        self, function: Callable[Concatenate[R, P], tuple[A, B]], *args: P.args, **kwargs: P.kwargs
    ) -> tuple[A, B]:
        """Call the first member; a promise for each half of what it returns."""
        first, second = self.executor.call(self.members[0], function, 2, args, kwargs)
        return first, second

    # ------------------------------------------------------------ calls that wait

    def each(self, function: Callable[Concatenate[R, P], T], *args: P.args, **kwargs: P.kwargs) -> list[T]:
        """Call every member; the values in the order of the members.

        Raises:
            SkyrlError: as :meth:`Executor.fetch`.
        """
        return self.fetch(self.ask(function, *args, **kwargs))

    def one(self, function: Callable[Concatenate[R, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call the first member; its value. Errors as :meth:`each`."""
        value: T = self.fetch([self.executor.call(self.members[0], function, 1, args, kwargs)])[0]
        return value

    def prepare(self, function: Callable[Concatenate[R, P], T], *args: P.args, **kwargs: P.kwargs) -> None:
        """Call every member, now and again whenever it is built anew."""
        self.each(function, *args, **kwargs)
        self._prepared.append((function, args, kwargs))  # not before: a member that is built anew now is called above

    def at(self, place: int, function: Callable[Concatenate[R, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call the member number ``place``; a promise. Returns at once."""
        made: T = self.executor.call(self.members[place], function, 1, args, kwargs)
        return made

    def fetch(self, promises: Sequence[T]) -> list[T]:
        """The values of promises, in their order. Errors as :meth:`each`."""
        return self.executor.fetch(promises, self.timeout)

    def wait(self, promises: Sequence[Any]) -> None:
        """Block until all are ready, without moving their values here.

        Raises:
            SkyrlError: what a call raised; after ``timeout`` seconds the names of the calls that did not end.
        """
        self.executor.wait(promises, self.timeout)

    def poll(self, promises: Sequence[T], seconds: float) -> tuple[list[T], list[T]]:
        """Promises that are ready within so many seconds, and the others."""
        return self.executor.poll(promises, seconds)

    def forget(self, promises: Sequence[Any]) -> None:
        """Let go of what these promises, all ready, were made from. What is lost of them then stays lost."""
        self.executor.forget(promises)

    def seconds(self, function: Callable[..., Any]) -> float:
        """Wall time of the last call of ``function`` that was waited for, of the member that took longest."""
        return max(self.executor.seconds(member, call_name(function)) for member in self.members)

    # ------------------------------------------------------------ members

    def hosts(self) -> list[str]:
        """Address of each member. Errors as :meth:`each`."""
        return self.fetch([self.executor.host(member) for member in self.members])

    def host(self) -> str:
        """Address of the first member. Errors as :meth:`each`."""
        first: str = self.fetch([self.executor.host(self.members[0])])[0]
        return first

    def find_place(self) -> None:
        """Wait until every member has a process.

        Raises:
            SkyrlError: naming a member that no node has had room for.
        """
        for spec, member in zip(self.specs, self.members, strict=True):
            if not self.executor.placed(member, PLACING_SECONDS):
                raise SkyrlError(
                    f"no node has had room for {spec.name} for {PLACING_SECONDS:g} s: another run may have come first; "
                    "wait until it has ended, or join more nodes"
                )

    def rebuild(self, place: int) -> None:
        """Stop a member, which may be dead already, and build it anew from its spec. It has lost all state."""
        self.members[place] = self.executor.restart(self.members[place])

    def _replace(self, member: Any, why: MemberLost) -> Any:
        """Build a lost member anew; returns it, or another one that does its work until a node has room for it.

        Raises:
            MemberLost: ``why``, if members of this crew may not be replaced.
            SkyrlError: if none is left.
        """
        if self.revive is None:
            raise why
        place = self.members.index(member)
        self.rebuild(place)
        member = self.members[place]
        if not self.executor.placed(member, PLACING_SECONDS):
            self.executor.stop(member)
            self.away[why.member] = self.members.pop(place)
            if not self.members:
                raise SkyrlError(f"{why}; no node has room for a new one, and it was the last of its crew") from why
            self.tell("left", why.member, f"{why}; no node has room for it, {len(self)} others do its work")
            return self.members[place % len(self)]
        self._begin(place)
        if member not in self.members:  # it was lost again meanwhile, and found no place
            return self.members[place % len(self)]
        self.tell("replaced", why.member, f"{why}; it was built anew, its unfinished work is asked again")
        return member

    def _begin(self, place: int) -> None:
        for function, args, kwargs in self._prepared:
            self.fetch([self.at(place, function, *args, **kwargs)])
        assert self.revive is not None
        self.revive(place)

    def tend(self) -> None:
        """Take members back in for which a node has room again."""
        for name, member in list(self.away.items()):
            place = [spec.name for spec in self.specs if spec.name not in self.away or spec.name == name].index(name)
            if not self.executor.room(self.specs[0]):
                return
            member = self.executor.restart(member)
            if not self.executor.placed(member, PLACING_SECONDS):
                self.executor.stop(member)
                return
            del self.away[name]
            self.members.insert(place, member)
            self._begin(place)
            if member not in self.members:
                return
            self.tell("joined", name, f"{name} is back: a node has room for it again")

    def stop(self) -> None:
        """End all members at once."""
        for member in self.members:
            self.executor.stop(member)
        self.members = []


def call_name(function: Callable[..., Any]) -> str:
    """``Sampler.generate``: how errors and timings name a call."""
    return getattr(function, "__qualname__", repr(function))


def asked_for(args: Iterable[Any]) -> int | None:
    """The step of the rollout request among a call's arguments."""
    return next((one.step for one in args if type(one) is RolloutRequest), None)


def cut(result: Any, pieces: int) -> tuple[Any, ...]:
    """A tuple of ``pieces`` as it is; a list as so many lists of neighbours, some of them empty if it is short."""
    if isinstance(result, tuple) and len(result) == pieces:
        return result
    if not isinstance(result, list):
        raise SkyrlError(f"a {type(result).__name__} can't be cut into {pieces} pieces; allowed: a list")
    bounds = [len(result) * place // pieces for place in range(pieces + 1)]
    return tuple(result[a:b] for a, b in pairwise(bounds))


class LocalExecutor:
    """Everything in this process, for tests and the ablation grid: a call runs at once, a promise is the value itself.
    ``MemberSpec.env`` must be set by the caller before torch is imported; resources are not looked at."""

    def __init__(self) -> None:
        self.history: deque[CallRecord] = deque(maxlen=HISTORY)

    def start(self, spec: MemberSpec[Any], lost: Callable[[Any, MemberLost], Any]) -> Member[Any]:
        member = Member(spec)
        member.build()
        return member

    def restart(self, member: Member[Any]) -> Member[Any]:
        self.stop(member)
        return self.start(member.spec, _never_lost)

    def placed(self, member: Member[Any], seconds: float) -> bool:
        return True

    def room(self, spec: MemberSpec[Any]) -> bool:
        return True

    def stop(self, member: Member[Any]) -> None:
        close = getattr(member.build(), "close", None)
        if close is not None:
            close()

    def call(self, member: Member[Any], function: Callable[..., Any], pieces: int, args: Any, kwargs: Any) -> Any:
        asked = time.time()
        *made, (started, ended) = member.call(function, pieces, *args, **kwargs)
        self.history.append(CallRecord(member.spec.name, call_name(function), asked, started, ended, asked_for(args)))
        return made[0] if pieces == 1 else made

    def seconds(self, member: Member[Any], name: str) -> float:
        of_it = (one for one in reversed(self.history) if (one.member, one.call) == (member.spec.name, name))
        return next((one.ended - one.started for one in of_it), 0.0)

    def poll(self, promises: Sequence[Any], seconds: float) -> tuple[list[Any], list[Any]]:
        return list(promises), []

    def wait(self, promises: Sequence[Any], timeout: float) -> None:
        """All are values already."""

    def fetch(self, promises: Sequence[Any], timeout: float) -> list[Any]:
        return list(promises)

    def forget(self, promises: Sequence[Any]) -> None:
        """A value needs nothing to be made from."""

    def host(self, member: Member[Any]) -> str:
        return "127.0.0.1"


def _never_lost(member: Any, why: MemberLost) -> Any:
    raise why
