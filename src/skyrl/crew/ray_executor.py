"""Members as Ray actors, and the Ray session that they live in."""

from __future__ import annotations

import logging
import os
import re
import signal
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from skyrl.crew.door import enter, loopback, make_token
from skyrl.crew.executor import HISTORY, Member, MemberSpec, asked_for
from skyrl.crew.logs import keep_log
from skyrl.crew.promise import Call, Promise, Seat, lineage
from skyrl.records import CallRecord, ConfigError, MemberLost, SkyrlError
from skyrl.settings import Config

logger = logging.getLogger(__name__)
COMMON_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore",
    # Threads that spin long while they wait made a learner step up to seven times slower beside one other busy
    # process; threads that sleep at once lose time on an idle machine. So: spin for some microseconds only.
    "GOMP_SPINCOUNT": "20000",
    # Keep freed memory: activations of every step would else be mapped and zeroed by the kernel again.
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
}
LOST = (
    *(ray.exceptions.RayActorError, ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError),
    *(ray.exceptions.OutOfMemoryError, ray.exceptions.ObjectLostError),
)
"""What Ray says of calls and values that went with a process or a host. OutOfMemoryError: Ray ended the process."""
DYING_SECONDS = 5.0
"""Within which Ray knows of a process that died: another one that computed with it may fail before."""
LOOKING_SECONDS = 10.0
"""For a value that may be lost."""


class RayExecutor:
    """Runs every member in an actor of its own; a promise is a :class:`~skyrl.crew.promise.Promise`.

    Args:
        restarts: How often a call is asked again whose member died or hung.
        setting: Key of the time limit, for messages.
        prepare: Called before each member is built: its host may be a new one.
        folder: The run's, where what lost members wrote is kept; None keeps nothing.
    """

    def __init__(
        self,
        restarts: int = 0,
        setting: str = "controller.timeout",
        prepare: Callable[[], None] | None = None,
        folder: Path | None = None,
    ) -> None:
        self.restarts, self.setting, self.prepare, self.folder = restarts, setting, prepare, folder
        self.history: deque[CallRecord] = deque(maxlen=HISTORY)
        self._seats: set[Seat] = set()
        self._names: dict[str, str] = {}
        """Ray's id of an actor → the member's name."""

    def __getstate__(self) -> dict[str, Any]:
        """In another process it calls members, and replaces none."""
        return vars(self) | {"history": deque(maxlen=HISTORY), "prepare": None, "_seats": set()}

    # ------------------------------------------------------------ members

    def start(self, spec: MemberSpec[Any], lost: Callable[[Any, MemberLost], Any]) -> Seat:
        seat = Seat(spec, lost)
        self._occupy(seat)
        return seat

    def restart(self, member: Seat) -> Seat:
        self.stop(member)
        self._occupy(member)
        return member

    def _occupy(self, seat: Seat) -> None:
        spec = seat.spec
        try:
            if self.prepare is not None:
                self.prepare()
        except ConfigError as error:
            if seat.lives == 0:
                raise
            logger.warning("%s; if %s gets its place there, it will not start", error, spec.name)
        seat.lives += 1
        seat.instead, seat.methods = None, {}
        seat.actor = (
            ray.remote(Member)
            .options(
                # Ray may still know the one before by its name.
                name=spec.name if seat.lives == 1 else f"{spec.name}.{seat.lives}",
                num_cpus=spec.cpus,
                num_gpus=spec.gpus,
                scheduling_strategy=spec.strategy,
                runtime_env={"env_vars": COMMON_ENVIRONMENT | spec.env},
            )
            .remote(replace(spec, strategy=None))
        )
        self._names[seat.actor._actor_id.hex()] = spec.name
        self._seats.add(seat)
        # Built now, beside the other members. A failure shows at the first call.
        seat.first = seat.actor.there.remote(), seat.actor.call.remote(_built, 1)

    def placed(self, member: Seat, seconds: float) -> bool:
        return bool(ray.wait([member.first[0]], timeout=seconds)[0])

    def room(self, spec: MemberSpec[Any]) -> bool:
        from ray._private.state import available_resources_per_node

        free = available_resources_per_node().values()
        return any(node.get("CPU", 0) >= spec.cpus and node.get("GPU", 0) >= spec.gpus for node in free)

    def stop(self, member: Seat) -> None:
        self._seats.discard(member)
        ray.kill(member.actor)

    def host(self, member: Seat) -> Any:
        return self.call(member, _host, 1, (), {})

    def seconds(self, member: Seat, name: str) -> float:
        return member.seconds.get(name, 0.0)

    # ------------------------------------------------------------ calls

    def call(self, member: Seat, function: Callable[..., Any], pieces: int, args: Any, kwargs: Any) -> Any:
        call = Call(member, function, pieces, args, kwargs)
        made = [Promise(call, ref) for ref in call.submit()]
        call.made = [weakref.ref(promise) for promise in made]
        return made[0] if pieces == 1 else made

    def poll(self, promises: Sequence[Promise], seconds: float) -> tuple[list[Any], list[Any]]:
        refs = [promise.ref for promise in promises]
        done = set(ray.wait(refs, num_returns=len(refs), timeout=seconds, fetch_local=False)[0]) if refs else set()
        ready = [promise for promise in promises if promise.ref in done]
        return ready, [promise for promise in promises if promise.ref not in done]

    def wait(self, promises: Sequence[Promise], timeout: float) -> None:
        self._supervised(promises, timeout, lambda: None)

    def fetch(self, promises: Sequence[Promise], timeout: float) -> list[Any]:
        values: list[Any] = self._supervised(
            promises, timeout, lambda: ray.get([promise.ref for promise in promises], timeout=timeout)
        )
        return values

    def forget(self, promises: Sequence[Promise]) -> None:
        for promise in promises:
            promise.call.args = None

    def _supervised(self, promises: Sequence[Promise], timeout: float, values: Callable[[], Any]) -> Any:
        """Wait for all; what became of members that were lost is made again."""
        while True:
            calls = [call for call in lineage(promises) if not call.noted]
            try:
                # When a call started and ended says that it is done, or why it failed, and is small.
                times = ray.get([call.told for call in calls], timeout=timeout)
                found = values()
            except ray.exceptions.RayError as error:
                self._recover(promises, error, timeout)
                continue
            for call, (started, ended) in zip(calls, times, strict=True):
                call.noted = True
                call.seat.seconds[call.name] = ended - started
                about = call.seat.spec.name, call.name, call.asked, started, ended
                self.history.append(CallRecord(*about, asked_for(call.args or ())))
            return found

    # ------------------------------------------------------------ losses

    def _recover(self, promises: Sequence[Promise], error: ray.exceptions.RayError, timeout: float) -> None:
        """Replace the members that were lost, and ask again what they owed and what waited for it.

        Raises:
            SkyrlError: what a member raised, if none was lost; or whose loss can't be made good.
        """
        cause = getattr(error, "cause", None) or error  # what the member raised, or what became of its input
        calls = lineage(promises)
        if isinstance(error, ray.exceptions.GetTimeoutError):
            if not (lost := self._hanging(calls, timeout)):
                return
        elif isinstance(cause, LOST):
            lost = self._dead(calls)
        elif isinstance(cause, SkyrlError):
            raise cause from error
        elif isinstance(error, ray.exceptions.RayTaskError):
            self._raise_death_of_a_peer(error)
            raise SkyrlError(str(error)) from error  # it comes with the member's traceback
        else:
            raise SkyrlError(f"Ray: {error}") from error
        for call, loss in lost:
            if call.actor is call.seat.actor:  # not replaced meanwhile
                self._replace(call, self._with_log(call, loss), error)
        again = self._ask_again(calls, cause)
        if not again and not lost:
            raise self._death(calls[-1], cause) from error

    def _replace(self, call: Call, why: MemberLost, error: BaseException) -> None:
        if call.seat.lost is None or self.restarts == 0:
            raise why from error
        if call.tries > self.restarts:  # for each new member the same end
            raise SkyrlError(f"{why} ({self._tried(call)})") from error
        if (taker := call.seat.lost(call.seat, why)) is not call.seat:
            call.seat.instead = taker

    def _ask_again(self, calls: list[Call], cause: BaseException) -> int:
        """Make the calls again whose values are lost, and those that waited for them; how many."""
        again: set[int] = set()
        deep = isinstance(cause, ray.exceptions.ObjectLostError)
        for call in calls:
            if self._is_lost(call, deep) or any(id(one.call) in again for one in call.inputs):
                if call.args is None:
                    raise self._death(call, cause)
                if call.tries > self.restarts:
                    raise SkyrlError(f"{self._death(call, cause)} ({self._tried(call)})")
                call.submit()
                again.add(id(call))
        return len(again)

    def _hanging(self, calls: list[Call], timeout: float) -> list[tuple[Call, MemberLost]]:
        """The calls that wait for nothing but their member."""
        late, ended = list[Call](), dict[int, float]()
        for call in calls:
            if not _ready(call.told):
                late.append(call)
            elif _failure(call.told) is None:
                ended[id(call.seat)] = max(ended.get(id(call.seat), 0.0), ray.get(call.told)[1])
        roots = [call for call in late if all(_ready(one.call.told) for one in call.inputs)]
        # A member that ended another call meanwhile has not been at this one for so long.
        roots = [call for call in roots if time.time() - ended.get(id(call.seat), 0.0) >= timeout]
        names = sorted({f"{call.seat.spec.name} {call.name}" for call in roots})
        text = f"{', '.join(names)} took longer than {self.setting}={timeout:g} s"
        first = {id(call.seat): call for call in reversed(roots)}
        return [(call, MemberLost(call.seat.spec.name, call.name, text)) for call in first.values()]

    def _dead(self, calls: list[Call]) -> list[tuple[Call, MemberLost]]:
        """Of each actor that died, the first call that it did not end."""
        found: dict[int, tuple[Call, MemberLost]] = {}
        for call in calls:
            if call.actor is call.seat.actor and id(call.seat) not in found:
                cause = _failure(call.told) if _ready(call.told) else None
                # Not every error says whose it is; one of an input is not this member's.
                whole = all(_failure(one.call.told) is None for one in call.inputs)
                whose = getattr(cause, "actor_id", None) or (call.actor._actor_id.hex() if whole else "")
                if isinstance(cause, LOST) and str(whose) == call.actor._actor_id.hex():
                    found[id(call.seat)] = call, self._death(call, cause)
        return list(found.values())

    def _raise_death_of_a_peer(self, error: ray.exceptions.RayTaskError) -> None:
        """A member that computed with one that died may fail before Ray tells of the death.

        Raises:
            MemberLost: naming the one that died, if one did whose crew replaces none.
        """
        seats = [seat for seat in self._seats if seat.lost is not None]
        asked = {seat.actor.there.remote(): seat for seat in seats}  # those that live and are busy do not answer
        deadline = time.monotonic() + DYING_SECONDS
        while asked and (left := deadline - time.monotonic()) > 0:
            for ref in ray.wait(list(asked), timeout=left, fetch_local=False)[0]:
                seat = asked.pop(ref)
                if isinstance(cause := _failure(ref), LOST):
                    about = " ".join(str(cause).split()).split(" Some common causes include")[0]
                    raise MemberLost(seat.spec.name, "", f"{seat.spec.name} died: {about}") from error

    def _is_lost(self, call: Call, deep: bool) -> bool:
        """Whether a call's values will never be there; ``deep`` looks for the values themselves."""
        if not _ready(call.told):
            return call.actor is not call.seat.taker().actor
        if isinstance(_failure(call.told), LOST):
            return True
        held = [promise for one in call.made if (promise := one()) is not None]
        return deep and any(isinstance(_failure(one.ref, LOOKING_SECONDS), LOST) for one in held)

    def _with_log(self, call: Call, why: MemberLost) -> MemberLost:
        """``why``, with where that is which the lost process wrote."""
        try:
            kept = None if self.folder is None else keep_log(call.actor._actor_id.hex(), self.folder)
        except (OSError, ValueError, RuntimeError) as error:  # the run goes on without it
            logger.warning("the log of %s could not be kept: %s: %s", why.member, type(error).__name__, error)
            return why
        return why if kept is None else MemberLost(why.member, why.call, f"{why}; its log: {kept}")

    def _death(self, call: Call, error: Any) -> MemberLost:
        member = self._names.get(str(getattr(error, "actor_id", None)), call.seat.spec.name)
        within = f" in {call.name}" if member == call.seat.spec.name else ""
        # Without the part that names what might have been.
        text = " ".join(str(error).split()).split(" Some common causes include")[0]
        process = re.search(r"pid: (\d+)", text), re.search(r" ip: (\S+)", text)
        if all(process) and (reason := re.search(r"The actor is dead because (.*)", text)):
            text = f"process {process[0][1]} on {process[1][1]}: {reason[1]}"  # type: ignore[index]
        return MemberLost(member, call.name, f"{member} died{within}: {text}")

    def _tried(self, call: Call) -> str:
        return f"tried {call.tries} times; controller.restarts={self.restarts}"


def _ready(ref: Any) -> bool:
    return bool(ray.wait([ref], timeout=0, fetch_local=False)[0])


def _failure(ref: Any, timeout: float = 0.0) -> BaseException | None:
    """What a reference that is ready raises."""
    try:
        ray.get(ref, timeout=timeout)
    except ray.exceptions.GetTimeoutError:
        return None
    except ray.exceptions.RayError as error:
        cause: BaseException = getattr(error, "cause", None) or error
        return cause
    return None


def _built(member: object) -> None:
    """Does nothing but build the role object."""


def _host(member: object) -> str:
    return str(ray.util.get_node_ip_address())


@contextmanager
def ray_session(cfg: Config, namespace: str) -> Iterator[str]:
    """Join ``cluster.address`` or ``$RAY_ADDRESS``, or start a local Ray; leave or stop it at the end.

    Yields:
        The dashboard's address, or "" if there is none.

    Raises:
        SkyrlError: if Ray can't be joined or started.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Errors of promises that were let go of, because they are made again: whoever waits for a call sees its error.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = cfg.cluster.address or os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"namespace": namespace, "log_to_driver": False, "logging_level": logging.ERROR}
    if not address:
        # No port for the dashboard: Ray then takes the next free one where another run has its own.
        options |= {"num_cpus": cfg.cluster.num_cpus, "include_dashboard": cfg.cluster.dashboard}
        make_token()
    else:
        enter(address)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        with nullcontext() if address else loopback():
            context = ray.init(address=address or "local", **options)
    except Exception as error:
        # Ray's start-up time-out is a bare Exception.
        if not isinstance(error, (OSError, RuntimeError, ValueError)) and type(error) is not Exception:
            raise
        advice = "; set TMPDIR to a shorter path" if "AF_UNIX" in str(error) else ""
        how = f"joined at {address}" if address else "started here"
        raise SkyrlError(f"Ray could not be {how}: {error}{advice}") from error
    if threading.current_thread() is threading.main_thread():
        # Ray's own handler would end this process before the actors are taken down.
        for number, handler in handlers.items():
            if callable(handler):
                signal.signal(number, handler)
    try:
        yield context.dashboard_url or ""
    finally:
        ray.shutdown()
