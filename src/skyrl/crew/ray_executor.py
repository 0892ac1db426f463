"""Members as Ray actors, and the Ray session that they live in."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray

from skyrl.crew.crew import Member, MemberSpec, call_name
from skyrl.records import SkyrlError
from skyrl.settings import Config

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
REMEMBERED_CALLS = 4096


class RayExecutor:
    """Runs every member in an actor of its own; a promise is a Ray ``ObjectRef``.

    Args:
        setting: Key of the time limit, for messages.
    """

    def __init__(self, setting: str = "controller.timeout") -> None:
        self.setting = setting
        self._names: dict[str, str] = {}
        """Ray's id of an actor → the member's name."""
        self._starts: list[Any] = []
        self._calls: OrderedDict[str, tuple[str, str]] = OrderedDict()
        """Ray's id of a promise that nobody has fetched yet → names of the member and of the call, in order."""

    def start(self, spec: MemberSpec[Any]) -> Any:
        actor = (
            ray.remote(Member)
            .options(
                name=spec.name,
                num_cpus=spec.cpus,
                num_gpus=spec.gpus,
                max_restarts=spec.restarts,
                max_task_retries=spec.restarts,
                scheduling_strategy=spec.strategy,
                runtime_env={"env_vars": COMMON_ENVIRONMENT | spec.env},
            )
            .remote(spec.role, spec.args)
        )
        self._names[actor._actor_id.hex()] = spec.name
        # Built now, beside the other members. A failure shows at the first call; Ray would also print it if nobody held
        # this promise.
        self._starts.append(actor.call.remote(_built, 1))
        return actor

    def stop(self, member: Any) -> None:
        ray.kill(member)

    def call(self, member: Any, function: Callable[..., Any], pieces: int, args: Any, kwargs: Any) -> Any:
        # Options take time of their own.
        method = member.call if pieces == 1 else member.call.options(num_returns=pieces)
        made = method.remote(function, pieces, *args, **kwargs)
        about = (self._names.get(member._actor_id.hex(), "a member"), call_name(function))
        for promise in [made] if pieces == 1 else made:
            self._calls[promise.hex()] = about
        while len(self._calls) > REMEMBERED_CALLS:
            self._calls.popitem(last=False)
        return made

    def seconds(self, member: Any, name: str) -> Any:
        return member.seconds.remote(name)

    def poll(self, promises: Sequence[Any], seconds: float) -> tuple[list[Any], list[Any]]:
        if not promises:
            return [], []
        done, pending = ray.wait(list(promises), num_returns=len(promises), timeout=seconds, fetch_local=False)
        return done, pending

    def fetch(self, promises: Sequence[Any], timeout: float, waited: float = 0.0) -> list[Any]:
        try:
            values: list[Any] = ray.get(list(promises), timeout=timeout)
        except ray.exceptions.GetTimeoutError as error:
            _, late = self.poll(promises, 0.0)
            calls = sorted({" ".join(self._calls.get(promise.hex(), ("", "a call"))) for promise in late})
            raise SkyrlError(f"{', '.join(calls)} took longer than {self.setting}={timeout + waited:g} s") from error
        except (ray.exceptions.RayTaskError, ray.exceptions.RayActorError) as error:
            cause = getattr(error, "cause", None) or error  # what the member raised, or what became of its input
            if isinstance(cause, ray.exceptions.RayActorError):
                raise SkyrlError(self._death(cause)) from error
            # Anything but our own errors comes with the member's traceback.
            raise (cause if isinstance(cause, SkyrlError) else SkyrlError(str(error))) from error
        except ray.exceptions.RayError as error:
            raise SkyrlError(f"Ray: {error}") from error
        for promise in promises:
            self._calls.pop(promise.hex(), None)
        return values

    def host(self, member: Any) -> str:
        return str(ray.get(member.call.remote(_host, 1)))

    def _death(self, error: Any) -> str:
        """Which member died in which call."""
        name = self._names.get(str(getattr(error, "actor_id", None)), "a member")
        within = next(
            (f" in {call}" for key, (member, call) in self._calls.items() if member == name and _died(key)), ""
        )
        return f"{name} died{within}: {' '.join(str(error).split())}"


def _died(key: str) -> bool:
    """Whether the call with this promise ended with its actor's death. A promise that nobody holds any more is not
    there to ask, and was answered."""
    try:
        ray.get(ray.ObjectRef(bytes.fromhex(key)), timeout=0)
    except ray.exceptions.RayActorError:
        return True
    except ray.exceptions.RayError:
        return False
    return False


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
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = cfg.cluster.address or os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"namespace": namespace, "log_to_driver": False, "logging_level": logging.ERROR}
    if not address:
        # No port for the dashboard: Ray then takes the next free one where another run has its own.
        options |= {"num_cpus": cfg.cluster.num_cpus, "include_dashboard": cfg.cluster.dashboard}
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
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
