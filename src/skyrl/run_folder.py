"""The folder of a run: found or made, claimed by one process, and held while that process lives."""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from skyrl.checkpoint import LOCK, SETTINGS
from skyrl.records import SkyrlError

BY_TIME = re.compile(r"\d{4}-\d{2}-\d{2}_\d{2}-\d{2}-\d{2}")
"""Name of a folder that nobody chose: the time at which the run was started."""


def new_folder(run_dir: Path) -> Path:
    """Make the folder of a fresh run. One that is named by the time gets a number if another run has it already.

    Raises:
        SkyrlError: if it holds a run, or can't be made.
    """
    try:
        if not BY_TIME.fullmatch(run_dir.name):
            run_dir.mkdir(parents=True, exist_ok=True)
            if (run_dir / SETTINGS).exists():
                raise SkyrlError(f"run_dir={run_dir} holds a run already ({SETTINGS}); set another one, or resume=auto")
            return run_dir
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        candidate, number = run_dir, 1
        while True:
            try:
                candidate.mkdir()
                return candidate
            except FileExistsError:
                number += 1
                candidate = run_dir.with_name(f"{run_dir.name}-{number}")
    except OSError as error:
        raise SkyrlError(f"run_dir={run_dir} can't be made: {error}; set another one") from error


@contextmanager
def held(run_dir: Path) -> Iterator[None]:
    """Hold the folder against other processes; the lock goes with this process, however it ends.

    Raises:
        SkyrlError: if a living process holds it (on file systems that know locks), or nothing can be written there.
    """
    try:
        handle = os.open(run_dir / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise SkyrlError(f"run_dir={run_dir} can't be written to: {error}; set another one") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SkyrlError(f"run_dir={run_dir} is in use by a run that is still going on") from error
        yield
    finally:
        os.close(handle)
