"""A file that grows line by line, on a disk that may be full."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from contextlib import suppress
from itertools import takewhile
from pathlib import Path

from skyrl.monitoring.records import unwritable

logger = logging.getLogger(__name__)


class LineFile:
    """Appends whole lines, each on its way to the disk when :meth:`write` returns, so that a killed process loses none.

    A line that can't be written, because the disk is full, say, waits in memory and is tried again with the next one:
    a run of days does not end for it. The file never holds half a line that another one follows.
    """

    def __init__(self, path: Path) -> None:
        """Go on behind the last whole line of ``path``; half a one, left by a killed process, is cut off.

        Raises:
            SkyrlError: if it can't be opened.
        """
        self.path, self._waiting = path, list[bytes]()
        try:
            self._file = path.open("a+b", buffering=0)
            self._file.seek(0)
            self._size = self._file.read().rfind(b"\n") + 1
            self._file.truncate(self._size)
        except OSError as error:
            raise unwritable(path, error) from error

    def write(self, line: str) -> None:
        """Append a line, given without its end. Says so, once, if it has to wait."""
        self._waiting.append(line.encode() + b"\n")
        try:
            self._write()
        except OSError as error:
            if len(self._waiting) == 1:
                logger.warning("%s; what comes is kept in memory and tried again", unwritable(self.path, error))

    def cut(self, keep: Callable[[str], bool]) -> None:
        """Let go of the first line that ``keep`` does not want, and of all behind it. Needs no room on the disk."""
        self._waiting = list(takewhile(lambda line: keep(line.decode()), self._waiting))
        self._file.seek(0)
        lines = self._file.read().splitlines(keepends=True)
        kept = sum(len(line) for line in takewhile(lambda line: keep(line.decode()), lines))
        if kept < self._size:
            self._waiting = []
            self._file.truncate(kept)
            self._size = kept

    def close(self) -> None:
        """Write what waits, and close.

        Raises:
            SkyrlError: if that can't be written: those lines are lost. Where another error is on its way, which must
                not be hidden, that is said in the log.
        """
        cause = sys.exception()
        try:
            self._write()
        except OSError as error:
            lost = unwritable(self.path, error, f"{len(self._waiting)} lines are lost")
            if cause is None:
                raise lost from error
            logger.error(lost)
        finally:
            self._file.close()

    def _write(self) -> None:
        while self._waiting:
            left = memoryview(self._waiting[0])
            try:
                while left:
                    left = left[self._file.write(left) :]
            except OSError:
                with suppress(OSError):  # the part that was written
                    self._file.truncate(self._size)
                raise
            self._size += len(self._waiting.pop(0))
