"""Reading and writing the files of a run folder: metrics.jsonl and small JSON files."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from pydantic_core import PydanticSerializationError, to_json

from skyrl.records import DataError, SkyrlError
from skyrl.redaction import redact, redacted


def jsonable(value: Any) -> Any:
    """``value`` as plain JSON data: settings become dictionaries, enums their values, infinity and NaN, which JSON has
    not, ``None``.

    Raises:
        DataError: naming the type that can't be written.
    """
    try:
        return json.loads(to_json(value, inf_nan_mode="null", fallback=float))  # float: the numpy scalars
    except PydanticSerializationError as error:
        raise DataError(f"can't write this as JSON; allowed are numbers, text, lists and mappings: {error}") from error


def unwritable(path: Path, error: OSError, but: str = "") -> SkyrlError:
    """The error that says that ``path`` could not be written, why, and how much is free there."""
    folder = next(folder for folder in path.absolute().parents if folder.is_dir())
    free = f"{shutil.disk_usage(folder).free / 1e9:.1f} GB are free there"
    return SkyrlError(f"{path} can't be written: {error.strerror or error} ({free}){but and f'; {but}'}")


def write_text_atomically(path: Path, text: str) -> None:
    """Write ``path`` so that a reader or a crash never meets half a file. Secrets are left out.

    Raises:
        SkyrlError: if it can't be written; what was there before is still there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(redact(text))
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)  # it would keep the disk full
            raise
    except OSError as error:
        raise unwritable(path, error) from error


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically. Secrets are left out, also texts under a name that says so."""
    text = json.dumps(redacted(jsonable(value)), indent=2, ensure_ascii=False, allow_nan=False)
    write_text_atomically(path, text + "\n")


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        DataError: if it is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON: {error}") from error


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, one per step in order of steps, each ``{"step": k, name: value, …}``.

    Lines of one step are merged. A broken last line (the process was killed while writing it) is left out.

    Raises:
        DataError: naming another line that is not a JSON object with a whole-number ``step``.
    """
    merged: dict[int, dict[str, Any]] = {}
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise DataError(f"{path}, line {number} is not valid JSON: {error}") from error
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            raise DataError(f"{path}, line {number}: got {line[:80]!r}, allowed is an object with a whole 'step'")
        merged.setdefault(record["step"], {}).update(record)
    return [merged[step] for step in sorted(merged)]
