"""What the sample buffer's member keeps on disk, so that one that is built anew goes on where the lost one was.

A folder with a *base*, the whole state after some step, and a *log*, one record for each later step::

    base_000040.safetensors   the state after step 40: a link to the checkpoint's own file, or a copy that was made
    log_000040                what steps 41, 42, … changed

A record is on the disk before its step is acknowledged, and holds what the step added: samples, what the thresholds
saw, the random generator's state. What a step dropped follows from that. A picture stands once in base and log
together. A new base begins with each saved state, and whenever the log is twice as large as its base (but not below
``SMALL``), so the folder holds at most three times the state, and a step more.
"""

from __future__ import annotations

import os
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from safetensors.numpy import load, save

from skyrl.batch.thresholds import Candidate, SavedThreshold
from skyrl.records import Begun, SampleGroup
from skyrl.replay import saved
from skyrl.replay.ssb import SavedBuffer

FOLDER = "buffer"
BASE, LOG = "base_{:06d}.safetensors", "log_{:06d}"
SMALL = 64 * 2**20
"""Bytes that a log may always have."""
HEAD = struct.Struct("<QI")
"""Before each record: its length, and the CRC-32 of length and content."""


@dataclass(slots=True)
class State:
    """Everything that later batches depend on."""

    buffer: SavedBuffer
    margin: SavedThreshold
    gate: SavedThreshold
    pairs: dict[str, Any] | None
    """Position in the offline pairs; ``None`` for a run without any."""
    told: bool
    """Whether the run was told of answers that could not be scored."""
    pending: list[tuple[int, int, list[SampleGroup]]]
    """Step, place and scored groups of each part that was asked for ahead."""
    begun: list[tuple[int, list[Begun]]]
    """Step, and the groups that it left."""


@dataclass(slots=True)
class Exchanged:
    """What one step changed in a :class:`State`."""

    step: int
    version: int
    groups: list[SampleGroup] | None
    """Given to the buffer, with those of their samples alone that are effective; ``None`` where it was not asked."""
    random: dict[str, Any] | None
    """Its random generator's state afterwards."""
    margin: list[Candidate] | None
    """What the threshold saw; ``None`` where it was not asked."""
    gate: list[Candidate] | None
    """Likewise; ``None`` in offline steps alone."""
    pairs: dict[str, Any] | None
    told: bool


class Journal:
    """The folder of base and log. Nothing is appended before :meth:`begin` or :meth:`recover`.

    On a full disk the run goes on without it: :meth:`news` says so, and :attr:`is_due` lets a new base begin as soon as
    there is room. A member that is lost meanwhile can't be brought back.

    Args:
        run_dir: The run's folder; the journal is a folder in it, of one living buffer member. "" for none at all.
    """

    def __init__(self, run_dir: str) -> None:
        self.off, self.folder = not run_dir, Path(run_dir) / FOLDER
        self._log: BinaryIO | None = None
        self._known: set[str] = set()
        self._room = self._size = 0
        self._works = True
        """False after something could not be written, until something can."""
        self._news: list[str] = []

    @property
    def is_due(self) -> bool:
        """Whether a new base should begin before the next record."""
        return not self.off and (self._log is None or self._size > self._room)

    def begin(self, step: int, base: Path | Callable[[Path], None]) -> None:
        """Start from the state after ``step``; all that was in the folder is forgotten as soon as that is on the disk.

        Args:
            base: The file of the state, or what writes one to a path.
        """
        self.close()
        target, new = self.folder / BASE.format(step), self.folder / ".new"
        if self.off:
            return
        with self._writing(f"the state after step {step}"):
            self.folder.mkdir(parents=True, exist_ok=True)
            new.unlink(missing_ok=True)
            if callable(base):
                base(new)
            else:
                _link_or_copy(base, new)
            # A log of this name would be another life's.
            (self.folder / LOG.format(step)).unlink(missing_ok=True)
            new.replace(target)
            self._open(step, 0, saved.picture_names(target))

    def append(self, record: Exchanged) -> None:
        """Write a record; it is on the disk afterwards, unless there is news."""
        if self._log is None:
            return
        tensors = saved.pack(record, self._known)
        content = save(tensors)
        with self._writing(f"step {record.step}"):
            try:
                for part in (_head(content), content):
                    _write_all(self._log, part)
                os.fsync(self._log.fileno())
            except OSError:
                with suppress(OSError):  # half a record would be forgotten, but takes room
                    self._log.truncate(self._size)
                raise
        self._size += HEAD.size + len(content)
        self._known |= {name for name in tensors if name.startswith(saved.PICTURE)}

    def news(self) -> tuple[str, ...]:
        """What the user should read of it, once."""
        told, self._news = tuple(self._news), []
        return told

    def recover(self, step: int) -> tuple[State, list[Exchanged]] | None:
        """The newest base up to ``step``, and the records from there to ``step``; later ones are forgotten. None if
        the folder does not reach that step.

        Raises:
            DataError: if the base is damaged. (Of a record that is, and of those behind it, nothing is known; the last
                one is, if its writer was killed.)
        """
        self.close()
        if self.off:
            return None
        bases = {int(path.stem.removeprefix("base_")): path for path in self.folder.glob("base_*.safetensors")}
        for first in sorted((number for number in bases if number <= step), reverse=True):
            state, pictures = saved.read(bases[first], State)
            records, end, log = list[Exchanged](), 0, self.folder / LOG.format(first)
            for content, behind in _records(log):
                with saved.damage(f"{log}, at byte {end}"):
                    tensors = load(content)
                    new = {name: tensor.copy() for name, tensor in tensors.items() if name.startswith(saved.PICTURE)}
                    record = saved.unpack(Exchanged, tensors, pictures | new)
                if record.step > step:
                    break
                pictures |= new
                end = behind
                # A buffer that was taken for dead may have written once more, beside the one that took its place.
                if record.step > (records[-1].step if records else first):
                    records.append(record)
            if (records[-1].step if records else first) == step:
                with self._writing(f"the state after step {step}"):
                    self._open(first, end, set(pictures))
                return state, records
        return None

    def close(self) -> None:
        """End writing."""
        if self._log is not None:
            self._log.close()
        self._log = None

    def _open(self, first: int, end: int, pictures: set[str]) -> None:
        """Go on behind ``end`` of the log that begins with base ``first``, and remove all other files."""
        base, log = self.folder / BASE.format(first), self.folder / LOG.format(first)
        file = log.open("ab", buffering=0)
        try:
            file.truncate(end)
            os.fsync(file.fileno())
            saved.synced(self.folder)
            for path in self.folder.iterdir():
                if path not in (base, log):
                    path.unlink()
        except OSError:
            file.close()
            raise
        self._log, self._size, self._known = file, end, pictures
        self._room = max(SMALL, 2 * base.stat().st_size)

    @contextmanager
    def _writing(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.close()
            if self._works:
                free = shutil.disk_usage(self.folder).free if self.folder.exists() else 0
                self._news.append(
                    f"the sample buffer can't write {what} to {self.folder}: {error} ({free / 1e9:.1f} GB are free "
                    "there). The run goes on; until there is room again, the loss of the buffer's member would end it, "
                    "and it could be resumed from its newest checkpoint"
                )
            self._works = False
        else:
            self._works = True


def _head(content: bytes) -> bytes:
    return HEAD.pack(len(content), zlib.crc32(content, zlib.crc32(len(content).to_bytes(8, "little"))))


def _records(log: Path) -> Iterator[tuple[bytes, int]]:
    """Each whole record, and where it ends."""
    if not log.is_file():
        return
    with log.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        while len(head := file.read(HEAD.size)) == HEAD.size:
            length, _ = HEAD.unpack(head)
            if length > size - file.tell() or _head(content := file.read(length)) != head:
                return
            yield content, file.tell()


def _write_all(file: BinaryIO, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[file.write(view) :]


def _link_or_copy(source: Path, target: Path) -> None:
    """A second name for the file: what is written appears under a new name, so its content stays. A copy where the
    file system has no such names, or the file is somebody else's."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        saved.synced(target)
