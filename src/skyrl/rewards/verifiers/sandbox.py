"""Runs a Python program that nobody trusts, in an interpreter of its own that has locked itself in.

What holds (:mod:`skyrl.rewards.verifiers.lock` sets it up; the kernel enforces it, whatever the program does):

- no network, no new processes, no signals to others: a list of allowed system calls (seccomp), which has no socket;
- files: the interpreter's standard library and shared libraries can be read, a temporary folder that is deleted
  afterwards can be written, nothing else can be opened (Landlock);
- memory, CPU seconds, size of a file, open files: resource limits that can't be raised; a wall-clock limit: killed;
- an empty environment, no standard input but the test's, bounded output, no capabilities (also for root).

A machine that can't do all of this is a :class:`SandboxError`: there is no weaker sandbox.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from skyrl.records import SkyrlError

MEMORY_LIMIT = 1 << 30
"""Bytes of address space."""
FILE_LIMIT = 1 << 20
"""Bytes of one file that it writes."""
OUTPUT_LIMIT = 4 << 20
"""Bytes that it may print, or give back from one call."""
START_LIMIT = 60.0
"""Seconds that the interpreter may take to start on a busy machine."""
_JAIL = str(Path(__file__).with_name("jail.py"))
_SYSTEM = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/share/zoneinfo", "/etc/localtime")


class SandboxError(SkyrlError):
    """The sandbox can't be built here; says nothing about the program."""


class ProgramFault(Exception):
    """The program crashed, hung, said too much or broke the protocol: it is wrong."""


class Clock:
    """Wall-clock seconds shared by the programs of one answer. ``spent`` counts what they themselves took; starting
    their interpreters is not their fault."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.end, self.spent = seconds, time.monotonic() + seconds, 0.0

    def left(self) -> float:
        return self.end - time.monotonic()

    def out(self) -> Exception:
        """What it means that the time is up."""
        if self.spent >= self.seconds / 2:
            return ProgramFault("killed: its time was up")
        return SandboxError(
            f"{self.seconds:.3g} s went by, {self.spent:.2g} s of them in the program: this machine is too busy, or "
            "there are too many test cases; raise reward.verifier_timeout"
        )


class Program:
    """One locked-in interpreter; use it as a context manager.

    Args:
        mode: ``script``, ``calls`` or ``tests``, see :mod:`skyrl.rewards.verifiers.jail`.
        clock: Of the answer.
        stdin: What a script reads.
        start: Further fields of the first message: source, setup, tests.
    """

    def __init__(self, mode: str, clock: Clock, stdin: str = "", **start: Any) -> None:
        self.clock, self._buffer, self._since = clock, b"", 0.0
        self.folder = tempfile.mkdtemp(prefix="skyrl-program-")
        inward, self._to = os.pipe()
        self._from, outward = os.pipe()
        # The seed of hashes is fixed so that a program prints a set in the same order each time.
        environment = {"PYTHONHASHSEED": "0"}
        if "LD_LIBRARY_PATH" in os.environ:  # where the interpreter's own library may be
            environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
        with tempfile.TemporaryFile() as given:
            given.write(stdin.encode("utf-8", "surrogatepass"))
            given.seek(0)
            self.process = subprocess.Popen(
                [sys.executable, "-s", "-S", "-P", "-B", "-X", "utf8", _JAIL, str(inward), str(outward)],
                stdin=given if stdin else subprocess.DEVNULL,
                stdout=subprocess.PIPE if mode == "script" else subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(inward, outward),
                env=environment,
                cwd="/",
            )
        os.close(inward)
        os.close(outward)
        try:
            self._begin(mode, start)
        except BaseException:
            self.close()
            raise

    def _begin(self, mode: str, start: dict[str, Any]) -> None:
        own = {str(Path(prefix) / "lib") for prefix in (sys.base_prefix, sys.base_exec_prefix)}
        limits = {"memory": MEMORY_LIMIT, "file_size": FILE_LIMIT, "seconds": self.clock.seconds, "mode": mode}
        limits |= {"parent": os.getpid()}
        try:
            self.send(limits | {"readable": [*_SYSTEM, *sorted(own)], "folder": self.folder})
            before = time.monotonic()
            first = json.loads(self._line(min(START_LIMIT, max(self.clock.left(), 0.0))))
        except (ProgramFault, OSError, ValueError) as error:
            if self.clock.left() <= 0:
                raise self.clock.out() from None
            waited = f"{time.monotonic() - before:.1f} s"
            raise SandboxError(f"the sandbox's interpreter did not start within {waited}: {error}") from None
        if "refused" in first:
            raise SandboxError(f"programs can't be run safely here, so none is run: {first['refused']}")
        self._since = time.monotonic()
        self.send(start)

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill it and delete its folder; a second time does nothing."""
        if self.process.returncode is not None and self.process.stdout is None:
            return
        if self._since:
            self.clock.spent += time.monotonic() - self._since
            self._since = 0.0
        self.process.kill()
        self.process.wait()
        for fd in (self._to, self._from):
            with contextlib.suppress(OSError):
                os.close(fd)
        if self.process.stdout is not None:
            self.process.stdout.close()
        self._delete_folder()

    def _delete_folder(self) -> None:
        try:
            os.rmdir(self.folder)
        except OSError:  # it holds files; of very many the deletion goes on by itself
            remover = subprocess.Popen(["rm", "-rf", self.folder], env={}, start_new_session=True)
            with contextlib.suppress(subprocess.TimeoutExpired):
                remover.wait(1.0)

    def send(self, message: dict[str, Any] | bytes) -> None:
        """One line to it; one that has ended is a :class:`ProgramFault`, one that does not read a matter of time."""
        data = memoryview(message if isinstance(message, bytes) else json.dumps(message).encode() + b"\n")
        os.set_blocking(self._to, False)
        while data:
            if not select.select([], [self._to], [], max(self.clock.left(), 0.0))[1]:
                self._stop()
            try:
                data = data[os.write(self._to, data[: 1 << 15]) :]
            except BlockingIOError:
                continue
            except BrokenPipeError:
                raise ProgramFault("it ended") from None

    def receive(self) -> bytes:
        """Its next line, without the line break."""
        return self._line(None)

    def _line(self, seconds: float | None) -> bytes:
        limit = time.monotonic() + seconds if seconds is not None else self.clock.end
        while b"\n" not in self._buffer:
            piece = self._read(self._from, limit, len(self._buffer))
            if not piece:
                raise ProgramFault("it ended")
            self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def output(self) -> str:
        """All that a script prints, until it has ended with exit status 0; :class:`ProgramFault` for another one."""
        assert self.process.stdout is not None
        pieces, size = [], 0
        while piece := self._read(self.process.stdout.fileno(), self.clock.end, size):
            pieces.append(piece)
            size += len(piece)
        try:
            status = self.process.wait(max(self.clock.left(), 0.0))
        except subprocess.TimeoutExpired:
            self._stop()
        if status != 0:
            raise ProgramFault(f"exit status {status}")
        return b"".join(pieces).decode("utf-8", "replace")

    def _read(self, fd: int, end: float, already: int) -> bytes:
        if already > OUTPUT_LIMIT:
            raise ProgramFault(f"it gave more than {OUTPUT_LIMIT} bytes")
        if not select.select([fd], [], [], max(end - time.monotonic(), 0.0))[0]:
            self._stop()
        return os.read(fd, 1 << 16)

    def _stop(self) -> None:
        self.close()
        raise self.clock.out()
