"""What a crew needs to know of where its members run: how one is built, and what an executor can do with it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Generic, Protocol, TypeVar

from skyrl.records import CallRecord, MemberLost, RolloutRequest, SkyrlError

R = TypeVar("R")
HISTORY = 100_000
"""Calls that an executor remembers."""


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
