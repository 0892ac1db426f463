"""Runs verifiers so that none of them can hang or crash the run."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from skyrl.records import DataError, SkyrlError
from skyrl.rewards.verifier_child import START_LIMIT, checked_score, describe, send
from skyrl.rewards.verifiers import verifier_reference
from skyrl.rewards.verifiers.choice import choice_verifier
from skyrl.rewards.verifiers.exact import exact_verifier
from skyrl.rewards.verifiers.numeric import numeric_verifier

_BOOT = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]); "
    "from skyrl.rewards.verifier_child import main; main(int(sys.argv[2]), float(sys.argv[3]))"
)
"""The child gets this process's import path: users' verifiers are found where they are found here."""


class Verdict(NamedTuple):
    """What came of one verification: a score in [0, 1], or an error that says why there is none."""

    score: float | None
    error: str | None


class _Child(NamedTuple):
    process: subprocess.Popen[bytes]
    pipe: Connection


class VerifierRunner:
    """Verifies answers, one at a time. Not thread-safe: use one runner per thread.

    ``exact``, ``numeric`` and ``choice`` run right here: they are linear in the text and take microseconds. The others
    run in a child process that is killed when their time is up, because neither a thread nor a signal handler can
    interrupt a regular expression or sympy. It lives from one answer to the next and is started again after a kill or a
    crash. It is a fresh interpreter: a fork isn't safe in a process with threads, and ``multiprocessing`` would import
    the main script again.

    Args:
        timeout: Seconds for one verification. Starting the child and importing a verifier have their own limit.
        numeric_tolerance: Tolerance of the ``numeric`` verifier.
        own: Name → ``package.module:function`` of verifiers that aren't built in.
    """

    def __init__(self, timeout: float, numeric_tolerance: float = 1e-6, own: Mapping[str, str] | None = None) -> None:
        self.timeout, self.own = timeout, own
        self._in_process: dict[str, Callable[[str, str], float]] = {
            "exact": exact_verifier,
            "choice": choice_verifier,
            "numeric": partial(numeric_verifier, tolerance=numeric_tolerance),
        }
        self._child: _Child | None = None

    def verify(self, name: str, answer: str, truth: str) -> Verdict:
        """Verify one answer. One whose verifier raises, hangs, crashes or returns no number in [0, 1] gets an error.

        Args:
            name: A built-in verifier, one of ``own``, or ``package.module:function``.
            answer: Content of the answer tags.
            truth: ``Prompt.answer``.

        Raises:
            DataError: for an unknown name.
            SkyrlError: if the child process can't be started.
        """
        if name in self._in_process:
            try:
                return Verdict(checked_score(self._in_process[name](answer, truth)), None)
            except SkyrlError as error:  # all that these verifiers raise on purpose; anything else is a bug of theirs
                problem = describe(error)
        else:
            reply = self._ask(verifier_reference(name, self.own), answer, truth)
            if "score" in reply:
                return Verdict(reply["score"], None)
            problem = reply["error"]
        return Verdict(None, f"verifier {name!r}: {problem}; answer {_short(answer)}, truth {_short(truth)}")

    def check(self, name: str) -> None:
        """Import a verifier where it will run; :class:`DataError` if it is unknown, or can't be imported there in time,
        :class:`SkyrlError` if the child process can't be started."""
        reply = {} if name in self._in_process else self._ask(verifier_reference(name, self.own))
        if "error" in reply:
            raise DataError(f"verifier {name!r}: {reply['error']}")

    def close(self) -> None:
        """End the child process; a later :meth:`verify` would start another."""
        if self._child is not None:
            self._child.pipe.close()
            # The whole session: a verifier may have started processes of its own.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._child.process.pid, signal.SIGKILL)
            self._child.process.wait()
            self._child = None

    def _ask(self, reference: str, answer: str | None = None, truth: str | None = None) -> dict[str, Any]:
        """Have the child verify, ``{"score": …}`` or ``{"error": …}``; without an answer only import,
        ``{"loaded": true}`` or ``{"error": …}``."""
        if self._child is not None and self._child.pipe.poll(0):
            self.close()  # an idle child says nothing: it died since the last answer, which is no sample's fault
        fresh = self._child is None
        child = self._child or self._start()
        reply: dict[str, Any] = {}
        try:
            send(child.pipe, reference=reference, answer=answer, truth=truth)
            reply = self._receive(child, START_LIMIT, f"could not be imported within {START_LIMIT:g} s")
            if "loaded" in reply and answer is not None:
                reply = self._receive(child, self.timeout, f"killed after {self.timeout:g} s")
        except (EOFError, OSError):
            end = _end_of(child)
            self.close()
            if not fresh and not reply:  # it died since the last answer, and its pipe did not show it at once
                return self._ask(reference, answer, truth)
            return {"error": f"its process {end}"}
        return reply

    def _receive(self, child: _Child, seconds: float, too_late: str) -> dict[str, Any]:
        if not child.pipe.poll(seconds):
            self.close()
            return {"error": too_late}
        return json.loads(child.pipe.recv_bytes())

    def _start(self) -> _Child:
        ours, theirs = Pipe()
        path = json.dumps([str(folder) for folder in sys.path])
        command = [sys.executable, "-c", _BOOT, path, str(theirs.fileno()), str(self.timeout)]
        # stdout goes to stderr: a verifier that prints must not mix with the run's own output.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=2, pass_fds=[theirs.fileno()], start_new_session=True
        )
        theirs.close()
        self._child = child = _Child(process, ours)
        try:
            if ours.poll(START_LIMIT) and ours.recv_bytes():
                return child
            end = f"gave no sign of life for {START_LIMIT:g} s"
        except (EOFError, OSError):
            end = _end_of(child)
        self.close()
        raise SkyrlError(f"the verifier process did not start: it {end}; its own error message is on stderr")


def _end_of(child: _Child) -> str:
    """How a child ended that closed its pipe."""
    try:
        status = child.process.wait(timeout=1.0)
    except subprocess.TimeoutExpired:
        return "closed its pipe"
    return f"was ended by signal {-status}" if status < 0 else f"ended with exit status {status}"


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:80]}…")
