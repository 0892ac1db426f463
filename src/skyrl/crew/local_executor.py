"""Everything in this process: runs without Ray, for tests and the ablation grid."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from skyrl.crew.executor import HISTORY, Member, MemberSpec, asked_for, call_name
from skyrl.records import CallRecord, MemberLost


class LocalExecutor:
    """A call runs at once, and a promise is the value itself.

    ``MemberSpec.env`` must be set by the caller before torch is imported; resources are not looked at.
    """

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
