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
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

from skyrl.crew.executor import Executor, MemberSpec, call_name
from skyrl.records import MemberLost, SkyrlError

logger = logging.getLogger(__name__)

R = TypeVar("R")
A = TypeVar("A")
B = TypeVar("B")
T = TypeVar("T")
P = ParamSpec("P")
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
