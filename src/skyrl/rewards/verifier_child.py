"""What runs inside the verifier process: one verification after the other, until the pipe closes or it is killed.

Messages are JSON, so that nothing which comes back can run code in the parent::

    child  → {"ready": true}                                        once
    parent → {"reference": …, "answer": …, "truth": …}              without an answer (null) it is only imported
    child  → {"loaded": true}                                       the verifier is imported, the clock starts
    child  → {"score": 1.0}  or  {"error": "ValueError: …"}
"""

from __future__ import annotations

import json
import resource
import signal
from multiprocessing.connection import Connection
from numbers import Real
from typing import Any

from skyrl.records import DataError
from skyrl.rewards.verifiers import load_verifier

MEMORY_LIMIT = 4 << 30
"""Bytes of private memory. ``2^{10^{12}}`` would otherwise fill the machine before its time is up."""
START_LIMIT = 120.0
"""Seconds that the process may take to start, and to import a verifier the first time (sympy on a cold disk)."""
BACKSTOP = 5.0
"""Seconds after which a verification that the parent should long have killed ends this process by itself."""


def checked_score(score: Any) -> float:
    """The score as a float; :class:`DataError` if it isn't a number in [0, 1]."""
    if isinstance(score, Real) and 0.0 <= float(score) <= 1.0:
        return float(score)
    got = float(score) if isinstance(score, Real) else f"{str(score)[:80]!r} ({type(score).__name__})"
    raise DataError(f"the verifier returned {got}; allowed: a number in [0, 1]")


def describe(error: Exception) -> str:
    """Type and message of an error, on one line and shortened; it may hold a whole answer."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def send(pipe: Connection, **message: Any) -> None:
    """Put one message into the pipe."""
    pipe.send_bytes(json.dumps(message).encode())


def main(fd: int, limit: float) -> None:
    """Serve verifications over the pipe ``fd``; each may take ``limit`` seconds once its verifier is imported."""
    _, allowed = resource.getrlimit(resource.RLIMIT_DATA)
    memory = MEMORY_LIMIT if allowed == resource.RLIM_INFINITY else min(MEMORY_LIMIT, allowed)
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pipe = Connection(fd)
    send(pipe, ready=True)
    while True:
        try:
            request = json.loads(pipe.recv_bytes())
        except (EOFError, ConnectionResetError):  # the parent is gone or has closed its end
            return
        try:
            _die_after(START_LIMIT + BACKSTOP)
            verifier = load_verifier(request["reference"])
            _die_after(limit + BACKSTOP)
            send(pipe, loaded=True)
            if request["answer"] is not None:
                send(pipe, score=checked_score(verifier(request["answer"], request["truth"])))
        except Exception as error:  # noqa: BLE001 - whatever a verifier raises is reported as its sample's error
            send(pipe, error=describe(error))
        _die_after(0)


def _die_after(seconds: float) -> None:
    """Let the kernel end this process after ``seconds`` (0: never), even if Python code can't run any more: the parent,
    which does the killing, may be killed itself while a verifier hangs."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)
