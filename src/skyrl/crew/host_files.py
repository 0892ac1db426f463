"""Files on their way from host to host: what is at a path, and bytes of it. Most of this runs on other hosts."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import skyrl

PIECE = 64 * 2**20
"""Bytes that travel in one call."""
READ_TO_COMPARE = 64 * 2**10
"""Bytes at both ends of a file by which two of one size are compared …"""
MOST_COMPARED = 1000
"""… in a folder of at most so many files; in a larger one only names and sizes are."""
Listing = dict[str, tuple[int, str]]
"""Name of a file within its folder ("" for a path that is a file) → its size and a digest of its ends."""


class Part(NamedTuple):
    """Bytes of one file."""

    name: str
    offset: int
    data: bytes
    whole: int
    """Size of the whole file."""


# ---------------------------------------------------------------- run on the other hosts


def outlook(mark: Path | None) -> tuple[str, bool, str]:
    """Which skyrl this host has, whether it sees the run's folder, and why it can't write there."""
    if mark is None or mark.exists():
        return source(), True, ""
    try:
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
        mark.unlink()
    except OSError as error:
        return source(), False, str(error)
    return source(), False, ""


def state(path: Path, compared: bool = True) -> tuple[Listing, int]:
    """What is at a path, and the bytes that are free there."""
    above = next(folder for folder in (path, *path.parents) if folder.is_dir())
    return listing(path, compared), shutil.disk_usage(above).free


def write(path: Path, parts: Sequence[Part]) -> str:
    """Write bytes to files at or below a path; a file has its name once it is whole. Returns what went wrong."""
    try:
        for part in parts:
            file = path / part.name if part.name else path
            file.parent.mkdir(parents=True, exist_ok=True)
            unfinished = file.with_name(f".{file.name}.copying")
            with open(unfinished, "r+b" if part.offset else "wb") as writer:
                writer.seek(part.offset)
                writer.write(part.data)
            if part.offset + len(part.data) >= part.whole:
                unfinished.rename(file)
    except OSError as error:
        return str(error)
    return ""


def read(file: Path, offset: int) -> bytes:
    with open(file, "rb") as reader:
        reader.seek(offset)
        return reader.read(PIECE)


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


# ---------------------------------------------------------------- files


def parts(path: Path, names: Sequence[str]) -> Iterator[list[Part]]:
    """The files of these names, as lists of about :data:`PIECE` bytes."""
    together, size = list[Part](), 0
    for name in names:
        file = path / name if name else path
        whole = file.stat().st_size
        for offset in range(0, max(whole, 1), PIECE):
            together.append(Part(name, offset, read(file, offset), whole))
            size += len(together[-1].data)
            if size >= PIECE:
                yield together
                together, size = [], 0
    if together:
        yield together


def listing(path: Path, compared: bool = True) -> Listing:
    if path.is_file():
        return {"": _looks(path, compared)}
    found = [Path(folder, name) for folder, _, names in os.walk(path, followlinks=True) for name in names]
    compared = compared and len(found) <= MOST_COMPARED
    return {str(file.relative_to(path)): _looks(file, compared) for file in sorted(found) if file.is_file()}


def _looks(file: Path, compared: bool) -> tuple[int, str]:
    size = file.stat().st_size
    if not compared:
        return size, ""
    digest = hashlib.blake2b(digest_size=16)
    with open(file, "rb") as reader:
        digest.update(reader.read(READ_TO_COMPARE))
        reader.seek(max(0, size - READ_TO_COMPARE))
        digest.update(reader.read())
    return size, digest.hexdigest()


def source() -> str:
    """A digest of this host's skyrl."""
    digest, root = hashlib.blake2b(digest_size=16), Path(skyrl.__file__).parent
    for file in sorted(root.rglob("*.py")):
        digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
