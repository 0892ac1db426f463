"""Runs verifiers so that none of them can hang or crash the run."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from skyrl.records import DataError, SkyrlError
from skyrl.rewards.verifier_child import START_LIMIT, checked_score, describe
from skyrl.rewards.verifiers import verifier_reference
from skyrl.rewards.verifiers.choice import choice_verifier
from skyrl.rewards.verifiers.exact import exact_verifier
from skyrl.rewards.verifiers.numeric import numeric_verifier

_BOOT = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]); "
    "from skyrl.rewards.verifier_child import main; main(int(sys.argv[2]), float(sys.argv[3]))"
)
"""The child gets this process's import path: users' verifiers are found where they are found here."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of one verification: a score or an error, never both."""

    score: float | None
    """In [0, 1]."""
    error: str | None
    """Why there is no score."""


class VerifierRunner:
    """Verifies answers, one at a time. Not thread-safe: use one runner per thread.

    ``exact``, ``numeric`` and ``choice`` run right here: they are skyrl's own, linear in the text, and take
    microseconds, so nothing in them can hang. ``math`` and users' verifiers run in a child process that is killed
    when their time is up, because neither a thread nor a signal handler can interrupt a regular expression or sympy.
    The child lives from one answer to the next and is started again after a kill or a crash. It is a fresh
    interpreter: a fork isn't safe in a process with threads, and ``multiprocessing`` would import the main script
    again, and with it whatever that imports.

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
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None

    def verify(self, name: str, answer: str, truth: str) -> Verdict:
        """Verify one answer.

        A verifier that raises, hangs, crashes or returns anything but a number in [0, 1] gives an error.

        Args:
            name: A built-in verifier, one of ``own``, or ``package.module:function``.
            answer: Content of the answer tags.
            truth: ``Prompt.answer``.

        Raises:
            DataError: for an unknown name.
            SkyrlError: if the child process can't be started.
        """
        reference = verifier_reference(name, self.own)
        if name in self._in_process:
            reply = self._call(self._in_process[name], answer, truth)
        else:
            reply = self._ask(reference, answer, truth)
        if "score" in reply:
            return Verdict(reply["score"], None)
        return Verdict(None, f"verifier {name!r}: {reply['error']}; answer {_short(answer)}, truth {_short(truth)}")

    def check(self, name: str) -> None:
        """Import a verifier where it will run.

        Raises:
            DataError: if it is unknown, or can't be imported there in time.
            SkyrlError: if the child process can't be started.
        """
        reference = verifier_reference(name, self.own)
        if name not in self._in_process:
            reply = self._ask(reference)
            if "error" in reply:
                raise DataError(f"verifier {name!r}: {reply['error']}")

    def close(self) -> None:
        """End the child process; a later :meth:`verify` would start another."""
        if self._pipe is not None:
            self._pipe.close()
        if self._process is not None:
            # The whole session: a verifier may have started processes of its own.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._process = self._pipe = None

    @staticmethod
    def _call(verifier: Callable[[str, str], float], answer: str, truth: str) -> dict[str, Any]:
        try:
            return {"score": checked_score(verifier(answer, truth))}
        except SkyrlError as error:  # all that these verifiers raise on purpose; anything else is a bug of theirs
            return {"error": describe(error)}

    def _ask(self, reference: str, answer: str | None = None, truth: str | None = None) -> dict[str, Any]:
        """Have the child verify, ``{"score": …}`` or ``{"error": …}``; without an answer only import,
        ``{"loaded": true}`` or ``{"error": …}``."""
        before = self._process
        pipe = self._child()
        in_use_before = before is not None and self._process is before
        reply: dict[str, Any] = {}
        try:
            pipe.send_bytes(json.dumps({"reference": reference, "answer": answer, "truth": truth}).encode())
            reply = self._receive(pipe, START_LIMIT, f"could not be imported within {START_LIMIT:g} s")
            if "loaded" in reply and answer is not None:
                reply = self._receive(pipe, self.timeout, f"killed after {self.timeout:g} s")
        except (EOFError, OSError):
            end = self._end_of_process()
            if in_use_before and not reply:  # it died since the last answer, and its pipe did not show it at once
                return self._ask(reference, answer, truth)
            return {"error": f"its process {end}"}
        return reply

    def _receive(self, pipe: Connection, seconds: float, too_late: str) -> dict[str, Any]:
        if not pipe.poll(seconds):
            self.close()
            return {"error": too_late}
        return json.loads(pipe.recv_bytes())

    def _child(self) -> Connection:
        """The pipe to a live child."""
        if self._pipe is not None and self._pipe.poll(0):
            self.close()  # an idle child says nothing: it died since the last answer, which is no sample's fault
        if self._pipe is None:
            ours, theirs = Pipe()
            path = json.dumps([str(folder) for folder in sys.path])
            command = [sys.executable, "-c", _BOOT, path, str(theirs.fileno()), str(self.timeout)]
            # stdout goes to stderr: a verifier that prints must not mix with the run's own output.
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=2, pass_fds=[theirs.fileno()], start_new_session=True
            )
            theirs.close()
            self._pipe = ours
            self._await_start(ours)
        return self._pipe

    def _await_start(self, pipe: Connection) -> None:
        try:
            if pipe.poll(START_LIMIT) and pipe.recv_bytes():
                return
            end = f"gave no sign of life for {START_LIMIT:g} s"
        except (EOFError, OSError):
            end = self._end_of_process()
        self.close()
        raise SkyrlError(f"the verifier process did not start: it {end}; its own error message is on stderr")

    def _end_of_process(self) -> str:
        """Reap a child that closed its pipe, and say how it ended."""
        if self._process is None:
            return "ended"
        try:
            status = self._process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            status = None
        self.close()
        if status is None:
            return "closed its pipe"
        return f"was ended by signal {-status}" if status < 0 else f"ended with exit status {status}"


def _short(text: str, limit: int = 80) -> str:
    return repr(text if len(text) <= limit else f"{text[:limit]}…")
