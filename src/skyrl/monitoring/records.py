"""Reading and writing the files of a run folder: metrics.jsonl and small JSON files."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from skyrl.records import DataError


def jsonable(value: Any) -> Any:
    """``value`` as plain JSON data: settings become dictionaries, enums their values, infinity and NaN ``None``.

    JSON has no NaN or infinity, and many readers refuse the ones that Python writes.
    """
    if isinstance(value, BaseModel):
        return jsonable(dict(value))
    if isinstance(value, Enum):
        return jsonable(value.value)
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [jsonable(item) for item in value]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "__float__"):  # float and the numpy scalars
        number = float(value)
        return number if math.isfinite(number) else None
    raise DataError(f"can't write a {type(value).__name__} as JSON; allowed are numbers, text, lists and mappings")


def write_text_atomically(path: Path, text: str) -> None:
    """Write ``path`` so that a reader or a crash never meets half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    write_text_atomically(path, json.dumps(jsonable(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


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

    Lines of one step are merged. A broken last line (the process was killed while writing it) is left out; a
    broken line elsewhere is an error.

    Raises:
        DataError: naming the line that is not a JSON object with a whole-number ``step``.
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
