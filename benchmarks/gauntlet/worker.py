"""What a process of the gauntlet does. Heavy libraries are imported here only when their environment is set."""

from __future__ import annotations

import os
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

Row = dict[str, Any]
_kept = ExitStack()
"""Of this process, until it ends."""


def begin() -> None:
    """Make this process one that runs faults, one after the other, and prints into a log."""
    log = os.open(Path(tempfile.gettempdir(), f"gauntlet-{os.getpid()}.log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    from benchmarks.gauntlet.run import one_engine, prepare

    prepare()
    _kept.enter_context(one_engine())


def one(job: str | int) -> Row:
    """Run a fault by its name, or a clean run by its number."""
    from benchmarks.gauntlet.clean import settings_of
    from benchmarks.gauntlet.faults import BY_NAME
    from benchmarks.gauntlet.run import attempt

    if isinstance(job, str):
        outcome = attempt((), BY_NAME[job])
        row: Row = {"kind": "fault", "fault": job}
    else:
        settings = settings_of(job)
        outcome = attempt(settings)
        row = {"kind": "clean", "run": job, "settings": settings}
    return row | {"said": outcome.said(), "steps": outcome.steps, "seconds": outcome.seconds}


def measure() -> Row:
    """What noticing costs."""
    from benchmarks.gauntlet.cost import cost

    return {"kind": "cost", **cost()}
