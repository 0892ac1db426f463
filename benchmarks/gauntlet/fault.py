"""What a fault is: a small patch of the running system that raises no error by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

Switch = Callable[[], AbstractContextManager[None]]
"""Inside the context the fault is there."""
Prepared = Callable[[Path], list[str]]
"""Makes files in a folder that both the faulty and the clean run need; returns settings."""


@dataclass(frozen=True)
class Fault:
    """One fault, and what should be said of it."""

    name: str
    area: str
    story: str
    """What goes wrong, and why nothing says so by itself."""
    reports: tuple[str, ...]
    """Where users reported it: ``owner/project#number``."""
    said: str
    """Regular expression: the right name. Searched in the alarm's name, or in the error's type and message."""
    acts: int
    """The first step in which it does something: 0 is before the first step."""
    switch: Switch
    settings: tuple[str, ...] = ()
    prepared: Prepared | None = None
    resumes: bool = False
    """It acts in a run that goes on after a clean one of two steps."""
    further: bool = False
    """One of those beyond the 24."""


@contextmanager
def replaced(owner: Any, name: str, new: Callable[..., Any]) -> Iterator[None]:
    """``owner.name`` is ``new`` inside, which is given the original first: ``new(original, *arguments)``."""
    original = getattr(owner, name)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return new(original, *args, **kwargs)

    with patch.object(owner, name, wrapper):
        yield
