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
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from time import perf_counter
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, TypeVar

from skyrl.records import SkyrlError

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
    restarts: int = 0
    """How often Ray itself may start a dead one again; only for a role without state."""
    strategy: Any = "DEFAULT"
    """Ray's scheduling strategy."""


class Member(Generic[R]):
    """One role object and the functions run on it. Ray makes an actor of this class, the only actor class there is."""

    def __init__(self, role: Callable[..., R], args: tuple[Any, ...]) -> None:
        self._role, self._args = role, args
        self._part: R | None = None
        self._seconds: dict[str, float] = {}

    def build(self) -> R:
        """The role object, made at the first call. What its constructor raises, every later call raises too: as the
        error of a call it keeps its type and message on the way out of a Ray actor."""
        if self._part is None:
            self._part = self._role(*self._args)
        return self._part

    def call(self, function: Callable[..., Any], pieces: int, *args: Any, **kwargs: Any) -> Any:
        """Run ``function`` on the role object; a result of several ``pieces`` is a tuple of so many."""
        part, started = self.build(), perf_counter()
        result = function(part, *args, **kwargs)
        self._seconds[call_name(function)] = perf_counter() - started
        return result if pieces == 1 else cut(result, pieces)

    def seconds(self, name: str) -> float:
        """Wall time of the last call of that name; 0 if there was none."""
        return self._seconds.get(name, 0.0)


class Executor(Protocol):
    """Where members run: ``RayExecutor`` or ``LocalExecutor``. ``member`` is what ``start`` returned."""

    def start(self, spec: MemberSpec[Any]) -> Any: ...

    def stop(self, member: Any) -> None: ...

    def call(self, member: Any, function: Callable[..., Any], pieces: int, args: Any, kwargs: Any) -> Any:
        """A promise, or a list of promises if ``pieces`` is above 1. Returns at once."""
        ...

    def seconds(self, member: Any, name: str) -> Any:
        """A promise of :meth:`Member.seconds`."""
        ...

    def poll(self, promises: Sequence[Any], seconds: float) -> tuple[list[Any], list[Any]]:
        """Those that are ready within so many seconds, and the others. Moves no value."""
        ...

    def fetch(self, promises: Sequence[Any], timeout: float, waited: float = 0.0) -> list[Any]:
        """Their values. ``waited``: seconds that went by already, for the message.

        Raises:
            SkyrlError: what a member raised; or which member died, or did not answer in time, in which call.
        """
        ...

    def host(self, member: Any) -> str:
        """Address under which other members reach it."""
        ...


class Crew(Generic[R]):
    """The members of one role.

    Args:
        executor: Where they run.
        specs: How each is built. They start side by side; what the constructor raises shows at the first call that is
            waited for.
        timeout: Seconds after which a call that is waited for is an error (``controller.timeout``).
    """

    def __init__(self, executor: Executor, specs: Sequence[MemberSpec[R]], timeout: float) -> None:
        self.executor, self.specs, self.timeout = executor, list(specs), timeout
        self.members: list[Any] = []
        try:
            for spec in self.specs:
                self.members.append(executor.start(spec))
        except BaseException:
            self.stop()
            raise

    def __len__(self) -> int:
        return len(self.members)

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

    def fetch(self, promises: Sequence[T]) -> list[T]:
        """The values of promises, in their order. Errors as :meth:`each`."""
        return self.executor.fetch(promises, self.timeout)

    def wait(self, promises: Sequence[Any]) -> None:
        """Block until all are ready, without moving their values here. A call that failed raises where its value is
        needed, or here if it has no value any more because a member died.

        Raises:
            SkyrlError: after ``timeout`` seconds; it names the calls that did not end.
        """
        _, pending = self.executor.poll(promises, self.timeout)
        if pending:
            self.executor.fetch(pending, 0.0, waited=self.timeout)

    def poll(self, promises: Sequence[T], seconds: float) -> tuple[list[T], list[T]]:
        """Promises that are ready within so many seconds, and the others."""
        return self.executor.poll(promises, seconds)

    def seconds(self, function: Callable[..., Any]) -> float:
        """Wall time of the last call of ``function``, of the member that took longest. Waits for calls before it."""
        name = call_name(function)
        values: list[float] = self.fetch([self.executor.seconds(member, name) for member in self.members])
        return max(values)

    # ------------------------------------------------------------ members

    def hosts(self) -> list[str]:
        """Address of each member."""
        return [self.executor.host(member) for member in self.members]

    def rebuild(self, place: int) -> None:
        """Stop a member, which may be dead already, and build it anew from its spec. It has lost all state."""
        self.executor.stop(self.members[place])
        self.members[place] = self.executor.start(self.specs[place])

    def stop(self) -> None:
        """End all members at once."""
        for member in self.members:
            self.executor.stop(member)
        self.members = []


def call_name(function: Callable[..., Any]) -> str:
    """``Sampler.generate``: how errors and timings name a call."""
    return getattr(function, "__qualname__", repr(function))


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

    def start(self, spec: MemberSpec[Any]) -> Member[Any]:
        member = Member(spec.role, spec.args)
        member.build()
        return member

    def stop(self, member: Member[Any]) -> None:
        close = getattr(member.build(), "close", None)
        if close is not None:
            close()

    def call(self, member: Member[Any], function: Callable[..., Any], pieces: int, args: Any, kwargs: Any) -> Any:
        made = member.call(function, pieces, *args, **kwargs)
        return made if pieces == 1 else list(made)

    def seconds(self, member: Member[Any], name: str) -> float:
        return member.seconds(name)

    def poll(self, promises: Sequence[Any], seconds: float) -> tuple[list[Any], list[Any]]:
        return list(promises), []

    def fetch(self, promises: Sequence[Any], timeout: float, waited: float = 0.0) -> list[Any]:
        return list(promises)

    def host(self, member: Member[Any]) -> str:
        return "127.0.0.1"
