"""Runs verifiers so that none of them can hang or crash the run, read its secrets from the environment, or leave files
where it runs.

Process pools of libraries do less here: pebble, the best of them, kills a task that is late, but not the processes that
the task has started, gives an import no limit of its own, unpickles what a worker sends (whoever can write there runs
code in the parent), and starts workers with the parent's environment.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from queue import LifoQueue
from typing import Any, NamedTuple

from skyrl.records import DataError, SkyrlError
from skyrl.rewards.conventions import Takes, checked_score
from skyrl.rewards.verifier_child import START_LIMIT, describe, encoded
from skyrl.rewards.verifiers import verifier_reference
from skyrl.rewards.verifiers.choice import choice_verifier
from skyrl.rewards.verifiers.exact import exact_verifier
from skyrl.rewards.verifiers.numeric import numeric_verifier
from skyrl.settings import RewardConfig

_BOOT = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]); "
    "from skyrl.rewards.verifier_child import main; main(int(sys.argv[2]), float(sys.argv[3]))"
)
"""The child gets this process's import path: users' verifiers are found where they are found here."""
HANDED_DOWN = (
    *("PATH", "LANG", "LANGUAGE", "LC_ALL", "LC_CTYPE", "TZ", "LD_LIBRARY_PATH"),
    *("PYTHONHOME", "PYTHONHASHSEED", "PYTHONUTF8", "PYTHONDONTWRITEBYTECODE"),
)
"""Environment variables that a verifier process gets, if they are set. ``HOME`` and ``TMPDIR`` are its own folder."""
TRUTH_WORDS = ("answer", "solution_str", "predict", "truth", "ground_truth")
"""Arguments that an error shows. (TRL's ``answer`` is a column of truths.)"""


class Verdict(NamedTuple):
    """What came of one verification: a score, or an error that says why there is none. Neither: a TRL function had
    nothing to say."""

    score: float | None
    error: str | None


class Call(NamedTuple):
    """One call of a verifier."""

    name: str
    arguments: dict[str, Any]
    """``answer`` and ``truth``, or as ``skyrl.rewards.conventions`` makes them for other systems' functions."""
    answers: int = 1
    """How many verdicts come of it: one, but for a function that judges a group."""


class _Child(NamedTuple):
    process: subprocess.Popen[bytes]
    pipe: Connection
    folder: str


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
        environment: Variables of this process that the child gets besides :data:`HANDED_DOWN`.
    """

    def __init__(
        self,
        timeout: float,
        numeric_tolerance: float = 1e-6,
        own: Mapping[str, str] | None = None,
        environment: Sequence[str] = (),
    ) -> None:
        self.timeout, self.own, self.environment = timeout, own, environment
        self._in_process: dict[str, Callable[[str, str], float]] = {
            "exact": exact_verifier,
            "choice": choice_verifier,
            "numeric": partial(numeric_verifier, tolerance=numeric_tolerance),
        }
        self._child: _Child | None = None

    def verify(self, name: str, answer: str, truth: str) -> Verdict:
        """Verify one answer by a verifier that takes ``(answer, truth)``; errors as :meth:`call`."""
        return self.call(Call(name, {"answer": answer, "truth": truth}))[0]

    def call(self, call: Call) -> list[Verdict]:
        """Call a verifier, one of the built-in ones or of ``own``. If it raises, hangs, crashes or returns what it may
        not return, the verdicts are errors.

        Raises:
            DataError: for an unknown name.
            SkyrlError: if the child process can't be started.
        """
        name, given = call.name, call.arguments
        reply: dict[str, Any]
        if self.runs_here(name):
            try:
                return [Verdict(checked_score(self._in_process[name](given["answer"], given["truth"])), None)]
            except SkyrlError as error:  # all that these verifiers raise on purpose; anything else is a bug of theirs
                reply = {"error": describe(error)}
        else:
            reply = self._ask(verifier_reference(name, self.own), given)
        if len(reply.get("scores", ())) == call.answers:
            return [Verdict(score, None) for score in reply["scores"]]
        words = TRUTH_WORDS[-1:] if "completions" in given else TRUTH_WORDS
        texts = "".join(f"; {word} {_short(given[word])}" for word in words if word in given)
        problem = reply.get("error", f"its process gave {len(reply.get('scores', ()))} scores")
        return [Verdict(None, f"verifier {name!r}: {problem}{texts}")] * call.answers

    def runs_here(self, name: str) -> bool:
        """Whether a verifier needs no process."""
        return name in self._in_process

    def takes(self, name: str) -> Takes:
        """Import a verifier where it will run, and see how it is called; :class:`DataError` if it is unknown, follows
        no convention, or can't be imported there in time, :class:`SkyrlError` if the child process can't be started."""
        reply = {"takes": "answer"} if self.runs_here(name) else self._ask(verifier_reference(name, self.own), None)
        if "error" in reply:
            raise DataError(f"verifier {name!r}: {reply['error']}")
        return Takes(reply["takes"])

    def close(self) -> None:
        """End the child process; a later :meth:`verify` would start another."""
        if self._child is not None:
            self._child.pipe.close()
            # The whole session: a verifier may have started processes of its own.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._child.process.pid, signal.SIGKILL)
            self._child.process.wait()
            shutil.rmtree(self._child.folder, ignore_errors=True)
            self._child = None

    def _ask(self, reference: str, arguments: dict[str, Any] | None) -> dict[str, Any]:
        """Have the child verify, ``{"scores": …}`` or ``{"error": …}``; without arguments only import,
        ``{"takes": …}`` or ``{"error": …}``."""
        if self._child is not None and self._child.pipe.poll(0):
            self.close()  # an idle child says nothing: it died since the last answer, which is no sample's fault
        try:
            message = encoded(reference=reference, arguments=arguments)
        except (TypeError, ValueError) as error:
            return {"error": f"a column of the row can't be handed to it as JSON: {error}"}
        fresh = self._child is None
        child = self._child or self._start()
        reply: dict[str, Any] = {}
        try:
            child.pipe.send_bytes(message)
            reply = self._receive(child, START_LIMIT, f"could not be imported within {START_LIMIT:g} s")
            if "takes" in reply and arguments is not None:
                reply = self._receive(child, self.timeout, f"killed after {self.timeout:g} s")
        except (EOFError, OSError):
            end = _end_of(child)
            self.close()
            if not fresh and not reply:  # it died since the last answer, and its pipe did not show it at once
                return self._ask(reference, arguments)
            return {"error": f"its process {end}"}
        return reply

    def _receive(self, child: _Child, seconds: float, too_late: str) -> dict[str, Any]:
        if not child.pipe.poll(seconds):
            self.close()
            return {"error": too_late}
        try:
            return json.loads(child.pipe.recv_bytes())
        except ValueError:
            self.close()
            return {"error": "its process sent what is no message"}

    def _start(self) -> _Child:
        ours, theirs = Pipe()
        path = json.dumps([str(Path(folder).absolute()) for folder in sys.path])  # "" is this process's working folder
        folder = tempfile.mkdtemp(prefix="skyrl-verifier-")
        environment = {k: os.environ[k] for k in HANDED_DOWN if k in os.environ} | {"HOME": folder, "TMPDIR": folder}
        environment |= {k: os.environ[k] for k in self.environment if k in os.environ}
        command = [sys.executable, "-c", _BOOT, path, str(theirs.fileno()), str(self.timeout)]
        # stdout goes to stderr: a verifier that prints must not mix with the run's own output.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=2, pass_fds=[theirs.fileno()], start_new_session=True,
            cwd=folder, env=environment,
        )  # fmt: skip
        theirs.close()
        self._child = child = _Child(process, ours, folder)
        try:
            if ours.poll(START_LIMIT) and ours.recv_bytes():
                return child
            end = f"gave no sign of life for {START_LIMIT:g} s"
        except (EOFError, OSError):
            end = _end_of(child)
        self.close()
        raise SkyrlError(f"the verifier process did not start: it {end}; its own error message is on stderr")


class VerifierPool:
    """Up to ``reward.verifier_processes`` runners side by side, so that answers that hang do not wait for each other.

    A process is started when there is a call that no idle one can take.
    """

    def __init__(self, cfg: RewardConfig) -> None:
        self._idle: LifoQueue[VerifierRunner] = LifoQueue()
        self._runners = [
            VerifierRunner(cfg.verifier_timeout, cfg.numeric_tolerance, cfg.verifiers, cfg.verifier_environment)
            for _ in range(cfg.verifier_processes)
        ]
        for runner in reversed(self._runners):  # the first one is taken first
            self._idle.put(runner)
        self._takes: dict[str, Takes] = {}

    def takes(self, name: str) -> Takes:
        """As :meth:`VerifierRunner.takes`, which is asked once for each name."""
        if name not in self._takes:
            self._takes[name] = self._runners[0].takes(name)
        return self._takes[name]

    def run(self, calls: Sequence[Call]) -> list[list[Verdict]]:
        """The verdicts of each call, in order; errors as :meth:`VerifierRunner.call`."""
        here = self._runners[0]
        found = [here.call(call) if here.runs_here(call.name) else None for call in calls]
        others = [place for place, verdicts in enumerate(found) if verdicts is None]
        if others:
            with ThreadPoolExecutor(min(len(others), len(self._runners))) as threads:
                for place, verdicts in zip(others, threads.map(self._call, [calls[i] for i in others]), strict=True):
                    found[place] = verdicts
        return [verdicts for verdicts in found if verdicts is not None]

    def close(self) -> None:
        """End all processes; a later call would start others."""
        for runner in self._runners:
            runner.close()

    def _call(self, call: Call) -> list[Verdict]:
        runner = self._idle.get()
        try:
            return runner.call(call)
        finally:
            self._idle.put(runner)


def _end_of(child: _Child) -> str:
    """How a child ended that closed its pipe."""
    try:
        status = child.process.wait(timeout=1.0)
    except subprocess.TimeoutExpired:
        return "closed its pipe"
    return f"was ended by signal {-status}" if status < 0 else f"ended with exit status {status}"


def _short(value: Any) -> str:
    """A text, or what else a truth may be, for an error."""
    text = value if isinstance(value, str) else repr(value)
    text = text if len(text) <= 80 else f"{text[:80]}…"
    return repr(text) if isinstance(value, str) else text
