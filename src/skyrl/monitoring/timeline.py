"""Who waited for whom: each call of each member, and the laps of the loop, as trace files for https://ui.perfetto.dev
and ``chrome://tracing`` (Chrome's JSON array format).

``timeline/steps_000001.json`` has the steps from 1 on, the next file begins :data:`STEPS_PER_FILE` later, and the
newest :data:`FILES` stay. One lane a member: a slice is a call, with the step that it worked for and the version of the
weights that it used; what lies between two calls is a slice that names the lap of the loop in which the member waited.
Two lanes of the driver: its steps and their laps. Arrows go from the sampling of a step's answers to the train step
that used them. The clocks of several hosts are taken as they are, but no call starts before it was asked.

A file is a whole JSON array after each step. A process that is killed while it writes leaves one without its end, which
viewers accept, and so does :func:`read_timeline`.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from skyrl.monitoring.laps import Laps
from skyrl.records import CallRecord
from skyrl.redaction import redact

logger = logging.getLogger(__name__)
FOLDER = "timeline"
STEPS_PER_FILE, FILES = 50, 4
SHORTEST_WAIT = 1e-3
"""Seconds; what lies closer together is shown without a gap."""
CALL, WAIT, LAP, STEP, FLOW = "call", "wait", "lap", "step", "answers"
"""Categories of slices and arrows."""
DRIVER, STEPS, LAPS = "driver", "steps", "laps"
ROLES = (DRIVER, "rollout", "reward", "sample-buffer", "learner")
"""In the order of the lanes."""
SAMPLING = ("Sampler.generate", "Sampler.generate_enough")
TRAINING = "LearnerStep.train_step"
NEW_WEIGHTS = ("Sampler.update", "Sampler.load_weights", "Sampler.finish_transfer")
SYNC = "time/sync"
OPEN, CLOSE, BETWEEN = b"[\n", b"\n]\n", b",\n"

Event = dict[str, Any]
"""One event as the format has it."""


class Timeline:
    """Writes the files of one run.

    Args:
        folder: ``timeline`` in the run's folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file: Path | None = None
        self._first = 0
        """Step with which the file begins."""
        self._step = 0
        """The last one written."""
        self._size = 0
        """Bytes of the file without its end."""
        self._last: CallRecord | None = None
        """Of the history, as far as it is written."""
        self._spans: deque[tuple[str, float, float]] = deque(maxlen=256)
        """The laps lately, seconds since the epoch."""
        self._lanes: dict[str, tuple[int, int]] = {}
        """Member → process and thread, as viewers group them, of those that the file introduces."""
        self._ended: dict[str, float] = {}
        """Member → end of its last slice."""
        self._behind: dict[str, float] = {}
        """Member → seconds by which its host's clock is behind the driver's, as far as that shows."""
        self._holds: dict[str, int] = {}
        """Rollout member → version of its weights."""
        self._sampled: dict[int, list[Event]] = {}
        """Step → where arrows to its train step begin."""
        self._arrows = 0

    def add(self, step: int, version: int, laps: Laps, history: deque[CallRecord]) -> None:
        """Write a step that has just ended. Never raises for the disk's sake: the run is worth more than its timeline.

        Args:
            step: Its number.
            version: Policy version behind its weight sync.
            laps: What the loop waited for in it.
            history: Calls that have ended, in any order; those written before are passed over.
        """
        if self._file is None or step >= self._first + STEPS_PER_FILE or step <= self._step:
            self._begin(step)
        self._step = step
        began = time.time() - laps.total()
        spans = [(name, began + start, began + end) for name, start, end in laps.spans]
        self._spans.extend(spans)
        sync = min((start for name, start, _ in spans if name == SYNC), default=began)
        events = [*self._driver(step, version, began, began + laps.total(), spans)]
        for record in sorted(self._new(history), key=lambda record: record.started):
            events += self._call(record, step, version, sync)
        self._sampled = {of: starts for of, starts in self._sampled.items() if of > step}
        self._append(events)

    def _new(self, history: deque[CallRecord]) -> list[CallRecord]:
        found: list[CallRecord] = []
        for record in reversed(history):
            if record is self._last:
                break
            found.append(record)
        self._last = history[-1] if history else None
        return found

    # ------------------------------------------------------------ slices

    def _driver(
        self, step: int, version: int, began: float, ended: float, spans: Sequence[tuple[str, float, float]]
    ) -> Iterator[Event]:
        yield from self._introduced(STEPS)
        yield self._slice(STEPS, STEP, f"step {step}", began, ended, {"step": step, "version": version - 1})
        yield from self._introduced(LAPS)
        for name, start, end in spans:
            yield self._slice(LAPS, LAP, name.removeprefix("time/"), start, end, {"step": step})

    def _call(self, record: CallRecord, step: int, version: int, sync: float) -> Iterator[Event]:
        """A call, the wait before it, and the arrow that ends at it."""
        member = record.member
        yield from self._introduced(member)
        # No call starts before it was asked: a clock that says so is behind.
        behind = self._behind[member] = max(self._behind.get(member, 0.0), record.asked - record.started)
        started, ended = record.started + behind, record.ended + behind
        if started > self._ended.get(member, 0.0) - SHORTEST_WAIT:  # else it is told late, as a wait
            started = max(started, self._ended.get(member, 0.0))
            yield from self._waits(member, started)
            self._ended[member] = ended = max(ended, started)
        if record.call in NEW_WEIGHTS:  # those of a member that was built anew are older than those of the sync
            self._holds[member] = version if started >= sync else version - 1
        uses = self._holds.get(member, version - 1)
        about: Event = {"step": step if record.step is None else record.step, "version": uses}
        about["waited"] = round(max(0.0, started - record.asked), 6)
        yield self._slice(member, CALL, record.call, started, ended, about)
        end = {"ph": "f", "bp": "e", "cat": FLOW, "ts": _micro(started), **self._place(member)}
        if record.call in SAMPLING:
            start = {**end, "ph": "s", "name": f"answers of step {about['step']}"}
            del start["bp"]
            self._sampled.setdefault(about["step"], []).append(start)
        elif record.call == TRAINING:
            for start in self._sampled.get(about["step"], []) if member.endswith("-0") else []:
                self._arrows += 1
                yield start | {"id": self._arrows}
                yield end | {"id": self._arrows, "name": start["name"]}

    def _waits(self, member: str, until: float) -> Iterator[Event]:
        """What the member waited for since its last call: the laps that went on meanwhile."""
        at = self._ended.get(member, until)
        for name, start, end in [*self._spans, ("", until, until)]:
            start, end = max(start, at), min(end, until)
            if start < end or not name:
                if start - at > SHORTEST_WAIT:
                    yield self._slice(member, WAIT, "waits: between steps", at, start, {})
                if end - start > SHORTEST_WAIT:
                    yield self._slice(member, WAIT, f"waits: {name.removeprefix('time/')}", start, end, {})
                at = max(at, end)

    def _slice(self, lane: str, category: str, name: str, start: float, end: float, about: Event) -> Event:
        times = {"ts": _micro(start), "dur": _micro(end) - _micro(start)}
        grey = {"cname": "grey"} if category == WAIT else {}
        return {"ph": "X", "cat": category, "name": name, **self._place(lane), **times, **grey, "args": about}

    # ------------------------------------------------------------ lanes

    def _place(self, lane: str) -> Event:
        process, thread = self._lanes[lane]
        return {"pid": process, "tid": thread}

    def _introduced(self, lane: str) -> Iterator[Event]:
        """Names of a lane and its group, once a file."""
        if lane in self._lanes:
            return
        role = DRIVER if lane in (STEPS, LAPS) else re.sub(r"-\d+$", "", lane)
        others = {re.sub(r"-\d+$", "", name): process for name, (process, _) in self._lanes.items()}
        known = ROLES.index(role) + 1 if role in ROLES else others.get(role, len(ROLES) + 1 + len(self._lanes))
        number = re.search(r"\d+$", lane)
        self._lanes[lane] = known, (2 if lane == LAPS else 1 if number is None else int(number[0]) + 1)
        at = self._place(lane)
        yield {"ph": "M", "name": "process_name", **at, "args": {"name": role}}
        yield {"ph": "M", "name": "process_sort_index", **at, "args": {"sort_index": known}}
        yield {"ph": "M", "name": "thread_name", **at, "args": {"name": lane}}

    # ------------------------------------------------------------ files

    def _begin(self, step: int) -> None:
        """Start a file. Those that begin with this step or a later one go, which is done again; so do the oldest."""
        self._file, self._first = self.folder / f"steps_{step:06d}.json", step
        self._lanes.clear()
        files = timeline_files(self.folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            later, before = [f for n, f in files if n >= step], [f for n, f in files if n < step]
            for file in (*later, *before[: 1 - FILES]):
                file.unlink()
            self._file.write_bytes(OPEN + CLOSE)
            self._size = len(OPEN)
        except OSError as error:
            logger.warning("no timeline is written: %s", error)

    def _append(self, events: Sequence[Event]) -> None:
        text = redact(BETWEEN.decode().join(json.dumps(event, ensure_ascii=False) for event in events))
        assert self._file is not None
        try:
            with self._file.open("r+b") as file:
                file.truncate(self._size)  # the end, or what a full disk left of the step before
                file.seek(self._size)
                file.write((BETWEEN if self._size > len(OPEN) else b"") + text.encode() + CLOSE)
                self._size = file.tell() - len(CLOSE)
        except FileNotFoundError:
            return  # it was told when the file could not be made
        except OSError as error:
            logger.warning("the timeline lacks a step: %s", error)


def _micro(seconds: float) -> int:
    return round(seconds * 1e6)


def timeline_files(folder: Path) -> list[tuple[int, Path]]:
    """First step and path of each file, in order."""
    found = [(re.fullmatch(r"steps_(\d+)\.json", path.name), path) for path in folder.glob("steps_*.json")]
    return sorted((int(match[1]), path) for match, path in found if match is not None)


def read_timeline(file: Path) -> list[Event]:
    """The events of a file, also of one that is being written or lacks its end; an event that is cut off is left
    out."""
    events: list[Event] = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        text = line.strip().rstrip(",")
        if text not in ("", "[", "]"):
            try:
                events.append(json.loads(text))
            except ValueError:
                continue
    return events
