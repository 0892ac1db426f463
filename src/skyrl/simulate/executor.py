"""Members in this process whose time is simulated: the seam is the crews' :class:`~skyrl.crew.executor.Executor`.

Calls to a member run in the order in which they were made, and a call waits for the promises among its arguments. So
when a call is made, the time at which it will end is known already::

    start = max(now, end of the member's last call, ends of the promised arguments);  end = start + what it takes

and no queue of events is needed: a promise is a value with the time at which it is there, and only waiting moves the
clock. The loop is given that clock.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import thread_time
from typing import Any

from skyrl.crew.executor import Member, MemberSpec, call_name, cut
from skyrl.records import CallRecord, MemberLost, SkyrlError


@dataclass(slots=True)
class Took:
    """What a stand-in returns: a value, and the seconds that making it takes."""

    value: Any
    seconds: float = 0.0


@dataclass(slots=True)
class Promise:
    value: Any
    ready: float
    """Seconds on the clock."""
    about: str
    """Names of the member and of the call."""


@dataclass(slots=True)
class Span:
    """A call that took time."""

    call: str
    start: float
    end: float


@dataclass(slots=True)
class VirtualMember:
    name: str
    part: Any
    free: float = 0.0
    """End of its last call."""
    seconds: dict[str, float] = field(default_factory=dict)
    spans: list[Span] = field(default_factory=list)


class VirtualExecutor:
    """Runs every call at once, and says when its value would be there.

    Args:
        stand_ins: What stands in for a role: made of the member's spec. A role that is not here is built as it is, and
            takes no time. Its functions are found by their names; what takes time returns :class:`Took`.
        takes: Seconds of calls to roles that are built as they are, by name (``Batcher.exchange``).
        call_seconds: What making one call costs the process that makes it.
    """

    def __init__(
        self,
        stand_ins: Mapping[Any, Callable[[MemberSpec[Any]], Any]],
        takes: Mapping[str, float] | None = None,
        call_seconds: float = 0.0,
    ) -> None:
        self.stand_ins, self.takes, self.call_seconds = stand_ins, takes or {}, call_seconds
        self.now = 0.0
        self.calls = 0
        self.own: defaultdict[str, float] = defaultdict(float)
        """Processor seconds that the members' own code took, by name of the call: not the control plane's."""
        self.members: list[VirtualMember] = []
        self.history: deque[CallRecord] = deque(maxlen=0)

    def clock(self) -> float:
        return self.now

    # ------------------------------------------------------------ the executor

    def start(self, spec: MemberSpec[Any], lost: Callable[[Any, MemberLost], Any]) -> VirtualMember:
        stand_in = self.stand_ins.get(spec.role)
        member = VirtualMember(spec.name, Member(spec).build() if stand_in is None else stand_in(spec))
        self.members.append(member)
        return member

    def restart(self, member: VirtualMember) -> VirtualMember:
        raise SkyrlError("members that only take time are not lost")

    def placed(self, member: VirtualMember, seconds: float) -> bool:
        return True

    def room(self, spec: MemberSpec[Any]) -> bool:
        return True

    def stop(self, member: VirtualMember) -> None:
        """Nothing is open."""

    def call(self, member: VirtualMember, function: Callable[..., Any], pieces: int, args: Any, kwargs: Any) -> Any:
        self.calls += 1
        self.now += self.call_seconds
        start, given = max(self.now, member.free), []
        for one in args:
            if type(one) is Promise:
                start = max(start, one.ready)
                given.append(one.value)
            else:
                given.append(one)
        own, name = getattr(type(member.part), function.__name__, function), call_name(function)
        began = thread_time()
        made = own(member.part, *given, **kwargs)
        self.own[name] += thread_time() - began
        took = made if type(made) is Took else Took(made, self.takes.get(name, 0.0))
        member.free = start + took.seconds
        member.seconds[name] = took.seconds
        if took.seconds:
            member.spans.append(Span(name, start, member.free))
        about = f"{member.name} {name}"
        if pieces == 1:
            return Promise(took.value, member.free, about)
        return [Promise(piece, member.free, about) for piece in cut(took.value, pieces)]

    def seconds(self, member: VirtualMember, name: str) -> float:
        return member.seconds.get(name, 0.0)

    def poll(self, promises: Sequence[Promise], seconds: float) -> tuple[list[Promise], list[Promise]]:
        last = max((one.ready for one in promises), default=self.now)
        self.now = max(self.now, min(last, self.now + seconds))
        pending = [one for one in promises if one.ready > self.now]
        return ([one for one in promises if one.ready <= self.now], pending) if pending else (list(promises), [])

    def wait(self, promises: Sequence[Promise], timeout: float) -> None:
        _, late = self.poll(promises, timeout)
        if late:
            calls = sorted({one.about for one in late})
            raise SkyrlError(f"{', '.join(calls)} took longer than controller.timeout={timeout:g} s")

    def fetch(self, promises: Sequence[Promise], timeout: float) -> list[Any]:
        self.wait(promises, timeout)
        return [one.value for one in promises]

    def forget(self, promises: Sequence[Promise]) -> None:
        """A value needs nothing to be made from."""

    def host(self, member: VirtualMember) -> Promise:
        return Promise("127.0.0.1", self.now, f"{member.name} host")
