"""What runs inside the verifier process: one verification after the other, until the pipe closes or it is killed.

Messages are JSON, so that nothing which comes back can run code in the parent::

    child  → {"ready": true}                          once
    parent → {"reference": …, "arguments": {…}}       without arguments (null) it is only imported
    child  → {"takes": "answer"}                      the verifier is imported, the clock starts
    child  → {"scores": [1.0]}  or  {"error": "ValueError: …"}
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
from multiprocessing.connection import Connection
from typing import Any

from skyrl.rewards.conventions import Takes, convention, scores
from skyrl.rewards.verifiers import load_verifier

MEMORY_LIMIT = 4 << 30
"""Bytes of private memory. ``2^{10^{12}}`` would otherwise fill the machine before its time is up."""
START_LIMIT = 120.0
"""Seconds that the process may take to start, and to import a verifier the first time (sympy on a cold disk)."""
OWN_LIMIT = 0.8
"""Share of the time that a verifier with a parameter ``seconds`` may spend on what it waits for, so that it can still
say what came of it."""
BACKSTOP = 5.0
"""Seconds after which a verification that the parent should long have killed ends this process by itself."""


def describe(error: Exception) -> str:
    """Type and message of an error, on one line and shortened; it may hold a whole answer."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def encoded(**message: Any) -> bytes:
    """One message."""
    return json.dumps(message).encode()


def main(fd: int, limit: float) -> None:
    """Serve verifications over the pipe ``fd``; each may take ``limit`` seconds once its verifier is imported. The
    working folder is the process's own: it goes with it."""
    _, allowed = resource.getrlimit(resource.RLIMIT_DATA)
    memory = MEMORY_LIMIT if allowed == resource.RLIM_INFINITY else min(MEMORY_LIMIT, allowed)
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pipe, folder = Connection(fd), os.getcwd()
    pipe.send_bytes(encoded(ready=True))
    while True:
        try:
            request = json.loads(pipe.recv_bytes())
        except (EOFError, ConnectionResetError):  # the parent is gone or has closed its end
            return shutil.rmtree(folder, ignore_errors=True)
        try:
            _die_after(START_LIMIT + BACKSTOP)
            verifier = load_verifier(request["reference"])
            takes = convention(verifier, request["reference"])
            _die_after(limit + BACKSTOP)
            pipe.send_bytes(encoded(takes=takes.value))
            if (given := request["arguments"]) is not None:
                if takes in (Takes.answer, Takes.text):
                    given |= {"seconds": OWN_LIMIT * limit}
                pipe.send_bytes(encoded(scores=scores(verifier, takes, given)))
        except Exception as error:  # noqa: BLE001 - whatever a verifier raises is reported as its sample's error
            pipe.send_bytes(encoded(error=describe(error)))
        _die_after(0)


def _die_after(seconds: float) -> None:
    """Let the kernel end this process after ``seconds`` (0: never), even if Python code can't run any more: the parent,
    which does the killing, may be killed itself while a verifier hangs."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)
