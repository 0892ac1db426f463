"""Strikes: a member or the driver sends itself a signal at a :class:`~tests.faults.points.Point`, once.

The driver *arms* a strike by writing ``FOLDER/armed/NNN.json`` after a step. The process that comes to the point first
moves the file to ``FOLDER/struck``, so no other one and no replacement strikes again, notes the time, and ends.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from skyrl.crew.executor import MemberSpec
from skyrl.crew.ray_executor import RayExecutor
from tests.faults.points import POINTS, Point

PAUSE = 3.0
"""Seconds after which a ``PAUSE``, a SIGSTOP, is followed by a SIGCONT."""


@dataclass(frozen=True)
class Strike:
    """One planned strike."""

    number: int
    """Its place in the plan."""
    point: str
    member: str
    """``rollout-0``; "driver"."""
    how: str = "KILL"
    """``KILL``, ``STOP`` or ``PAUSE``."""
    step: int = 0
    """It is armed after this step, or a later one: not before the one in front of it has struck."""
    along: bool = False
    """It is armed together with the one in front of it: a replacement, say, is struck while it is built."""

    @property
    def file(self) -> str:
        return f"{self.number:03d}.json"


@dataclass(frozen=True)
class Folder:
    """What driver, members and the harness share: strikes, and process ids of the members."""

    path: Path

    def make(self) -> None:
        for name in ("armed", "struck", "pids"):
            (self.path / name).mkdir(parents=True, exist_ok=True)

    def arm(self, strike: Strike) -> None:
        part = self.path / f".{strike.file}"
        part.write_text(json.dumps(asdict(strike)))
        part.replace(self.path / "armed" / strike.file)

    def armed(self) -> list[Strike]:
        return [Strike(**json.loads(file.read_text())) for file in sorted((self.path / "armed").glob("*.json"))]

    def disarm(self) -> None:
        """Give up what is armed: nobody comes there."""
        for file in (self.path / "armed").glob("*.json"):
            file.rename(self.path / "struck" / file.name)

    def is_done(self, strike: Strike) -> bool:
        """It has struck, or was given up."""
        return (self.path / "struck" / strike.file).exists()

    def take(self, strike: Strike) -> bool:
        """Claim an armed strike; True for one process only."""
        try:
            os.rename(self.path / "armed" / strike.file, self.path / "struck" / strike.file)
        except FileNotFoundError:
            return False
        (self.path / "struck" / f"{strike.file}.time").write_text(f"{time.time():.3f}")
        return True

    def time(self, strike: Strike) -> float | None:
        """When it struck, seconds since the epoch; None if it did not."""
        note = self.path / "struck" / f"{strike.file}.time"
        return float(note.read_text()) if note.exists() else None

    def pid(self, member: str) -> int:
        return int((self.path / "pids" / member).read_text())


def send(how: str, pid: int) -> None:
    """Do to a process what a strike says."""
    if how == "PAUSE":
        subprocess.Popen(["sh", "-c", f"sleep {PAUSE}; kill -CONT {pid}"], start_new_session=True)
    os.kill(pid, signal.SIGKILL if how == "KILL" else signal.SIGSTOP)


class Watch:
    """Counts this process's calls of the points and strikes where one is armed."""

    def __init__(self, folder: Folder, member: str) -> None:
        self.folder, self.member = folder, member
        self.counts: Counter[int] = Counter()

    def passed(self, point: Point, args: Any, kwargs: Any) -> None:
        if not os.listdir(self.folder.path / "armed"):
            return
        for strike in self.folder.armed():
            if (strike.point, strike.member) != (point.name, self.member) or not point.when(*args, **kwargs):
                continue
            self.counts[strike.number] += 1
            if self.counts[strike.number] >= point.number and self.folder.take(strike):
                send(strike.how, os.getpid())

    def install(self, points: list[Point]) -> None:
        """Put a watch round the functions of these points."""
        for target in sorted({point.target for point in points if point.target and exists(point)}):
            holder, _, name = target.rpartition("." if "." in target.partition(":")[2] else ":")
            setattr(resolve_name(holder), name, self._watched(resolve_name(target), target, points))

    def _watched(self, function: Callable[..., Any], target: str, points: list[Point]) -> Callable[..., Any]:
        before = [point for point in points if point.target == target and not point.after]
        after = [point for point in points if point.target == target and point.after]

        @functools.wraps(function)
        def watched(*args: Any, **kwargs: Any) -> Any:
            for point in before:
                self.passed(point, args, kwargs)
            made = function(*args, **kwargs)
            for point in after:
                self.passed(point, args, kwargs)
            return made

        return watched


def points_of(role: str, kinds: frozenset[str]) -> list[Point]:
    """The points of a role in a run of these kinds (:attr:`Point.needs`)."""
    return [point for point in POINTS if point.role == role and (not point.needs or point.needs in kinds)]


@dataclass(frozen=True)
class Mortal:
    """Stands for a role: builds it in the member's process, with a watch round its points."""

    role: Callable[..., Any]
    folder: Folder
    member: str
    kinds: frozenset[str]

    def __call__(self, *args: Any) -> Any:
        (self.folder.path / "pids" / self.member).write_text(str(os.getpid()))
        Watch(self.folder, self.member).install(points_of(role_of(self.member), self.kinds))
        return self.role(*args)


def role_of(member: str) -> str:
    """``rollout`` for ``rollout-0``; the sample buffer's member has a name of its own."""
    return "buffer" if member == "sample-buffer" else member.partition("-")[0]


def make_mortal(folder: Folder, kinds: frozenset[str]) -> None:
    """Let every member that this process starts be one that can be struck."""
    start = RayExecutor.start

    def started(self: RayExecutor, spec: MemberSpec[Any], *rest: Any) -> Any:
        return start(self, replace(spec, role=Mortal(spec.role, folder, spec.name, kinds)), *rest)

    RayExecutor.start = started  # type: ignore[assignment, method-assign]


def exists(point: Point) -> bool:
    """Whether the function of a point is there. A test asks it of all."""
    try:
        return not point.target or callable(resolve_name(point.target))
    except (AttributeError, ImportError):
        return False
