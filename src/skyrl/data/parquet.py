"""Prompts to a Parquet file of skyrl's own layout, as :class:`~skyrl.data.files.FilePrompts` reads it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from skyrl.data.parquet_table import PICTURES, Column, write_rows
from skyrl.data.pictures import encode_png
from skyrl.records import DataError, Prompt, Turn

COLUMNS = {
    "id": Column(),
    "question": Column(may_be_null=True),
    "messages": Column(may_be_null=True),
    "answer": Column(may_be_null=True),
    "verifier": Column(may_be_null=True),
    "kind": Column(may_be_null=True),
    "facts": Column(may_be_null=True),
    "images": Column(PICTURES, may_be_null=True),
    "extra": Column(may_be_null=True),
}
"""The fields of a :class:`Prompt`; ``messages``, as JSON, instead of ``question`` where it has turns, ``verifier`` as
JSON where it has several checks."""


def write_parquet(path: str | Path, prompts: Iterable[Prompt]) -> None:
    """Write prompts, pictures as PNG files inside; nothing is lost. The file appears when it is complete. Only 64
    prompts are held in memory at a time.

    Raises:
        DataError: for a picture that isn't uint8 [height, width, 3], or facts or further columns that JSON can't hold.
    """
    write_rows(path, COLUMNS, map(_as_row, prompts))


def _as_row(prompt: Prompt) -> dict[str, Any]:
    return {
        "id": prompt.id,
        "question": None if prompt.turns else prompt.question,
        "messages": json.dumps([_message(turn) for turn in prompt.turns]) if prompt.turns else None,
        "answer": prompt.answer or None,
        "verifier": json.dumps([asdict(check) for check in prompt.checks]) if prompt.checks else prompt.verifier,
        "kind": prompt.kind,
        "facts": _json(prompt, "facts"),
        "images": [encode_png(picture, f"prompt {prompt.id!r}") for picture in prompt.images],
        "extra": _json(prompt, "extra") if prompt.extra else None,
    }


def _message(turn: Turn) -> dict[str, Any]:
    parts = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in turn.parts]
    return {"role": turn.role, "content": parts}


def _json(prompt: Prompt, name: str) -> str:
    try:
        return json.dumps(dict(getattr(prompt, name)), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise DataError(f"prompt {prompt.id!r}: {name} can't be written as JSON: {error}") from error
