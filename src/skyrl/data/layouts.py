"""What the columns of a row mean, by layout: skyrl's own, verl's and EasyR1's, TRL's, ms-swift's.

Each layout is a function from a row to :class:`Cells`; pictures stay as the row holds them. What is wrong is a
:class:`CellError`, which names the column.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from skyrl.data.values import CellError, check_unicode, parsed, short, tagged, truth_text
from skyrl.records import Check, DataError, Turn
from skyrl.settings import Layout

MARK = "<image>"
"""Where the next picture stands, in texts."""
ROLES = ("system", "user", "assistant")
PICTURE_COLUMNS = ("images", "image")
TRUTHS = {
    Layout.skyrl: ("answer",),
    Layout.verl: ("reward_model", "ground_truth", "answer"),
    Layout.trl: ("ground_truth", "solution", "answer"),
    Layout.swift: ("solution", "answer"),
}
"""Columns of the truth; the first that is there counts."""
UNSEEN: list[Any] = ["not read yet"]
"""Stands for the pictures of a row where they are not looked at."""
Row = Mapping[str, Any]


@dataclass(slots=True)
class Cells:
    """A row, read."""

    turns: tuple[Turn, ...]
    """The conversation, pictures in their places."""
    pictures: list[Any]
    answer: str | None
    """None where the row has no truth."""
    verifier: str | None
    """None where it names none."""
    checks: tuple[Check, ...] = ()
    kind: str = "default"
    facts: Any = None
    used: set[str] = field(default_factory=set)
    """Columns that are in the fields above; the others are further columns of the row."""


def detected(names: Collection[str]) -> Layout:
    """The layout of these columns; :class:`DataError` if they are none's."""
    columns = set(names)
    if "question" in columns:
        return Layout.skyrl
    if ("prompt" in columns and columns & {"reward_model", "data_source"}) or {"problem", "answer"} <= columns:
        return Layout.verl
    if "prompt" in columns:
        return Layout.trl
    if "messages" in columns:
        return Layout.skyrl if columns & {"verifier", "answer"} else Layout.swift
    raise DataError(
        f"got the columns {', '.join(names)}, which are no layout's; allowed: question (skyrl), prompt with "
        "reward_model or data_source, or problem with answer (verl, EasyR1), prompt (TRL), messages (ms-swift)"
    )


def read_cells(row: Row, layout: Layout) -> Cells:
    """A row by its layout (not ``auto``).

    Raises:
        CellError: naming the column that is wrong.
    """
    return READERS[layout](row)


def _skyrl(row: Row) -> Cells:
    column = "question" if row.get("question") is not None else "messages"
    turns, pictures, used = _conversation(row, column, "question, a text, or messages")
    verifier = row.get("verifier")
    checks = () if verifier is None else _checks(verifier)
    if verifier is not None and not checks and not (isinstance(verifier, str) and verifier.strip()):
        raise CellError("verifier", f"got {short(verifier)}; allowed: a name, or a list of checks")
    answer = checks[0].truth if checks and row.get("answer") is None else _truth(row, Layout.skyrl)
    name = checks[0].verifier if checks else verifier
    kind = row.get("kind")
    if kind is not None and not isinstance(kind, str):
        raise CellError("kind", f"got {short(kind)}; allowed: a text")
    used |= {"id", "question", "messages", "answer", "verifier", "kind", "facts", "extra"}
    return Cells(turns, pictures, answer, name, checks, kind or "default", row.get("facts"), used)


def _verl(row: Row) -> Cells:
    column = "prompt" if row.get("prompt") is not None else "problem"
    turns, pictures, used = _conversation(row, column, "prompt, messages or a text")
    kind = row.get("data_source")
    kind = kind.replace("/", "-") if isinstance(kind, str) and kind.strip() else "default"
    return Cells(turns, pictures, _truth(row, Layout.verl), _named(row), (), kind, None, used | {"id", "verifier"})


def _trl(row: Row) -> Cells:
    turns, pictures, used = _conversation(row, "prompt", "prompt, messages or a text")
    used = used - {"prompt"} | {"id", "verifier"}  # its reward functions get the prompt as it is written here
    return Cells(turns, pictures, _truth(row, Layout.trl), _named(row), used=used)


def _swift(row: Row) -> Cells:
    value, said = row.get("messages"), None
    if isinstance(value, list) and value and isinstance(value[-1], Mapping) and value[-1].get("role") == "assistant":
        said = value[-1].get("content")
        row = dict(row) | {"messages": value[:-1]}
    turns, pictures, used = _conversation(row, "messages", "a list of messages")
    answer = _truth(row, Layout.swift)
    if answer is None and isinstance(said, str):
        answer = tagged(said)
    return Cells(turns, pictures, answer, _named(row), used=used | {"id", "verifier"})


READERS: dict[Layout, Callable[[Row], Cells]] = {
    Layout.skyrl: _skyrl,
    Layout.verl: _verl,
    Layout.trl: _trl,
    Layout.swift: _swift,
}


# ---------------------------------------------------------------- conversations


def _conversation(row: Row, column: str, allowed: str) -> tuple[tuple[Turn, ...], list[Any], set[str]]:
    """Turns with pictures in their places, the pictures, and the columns that they stand in."""
    value = row.get(column)
    if column != "question" and isinstance(value, str) and value.lstrip().startswith("[{"):
        said = parsed(value, None)
        value = said if isinstance(said, list) and all("role" in one for one in said) else value
    own: list[Any] = []
    if isinstance(value, str):
        turns = [Turn("user", (value,))]
    elif isinstance(value, list) and value:
        turns = [_turn(message, column, own) for message in value]
    else:
        raise CellError(column, f"got {short(value)}; allowed: {allowed}")
    _check_roles(turns, column)
    for part in (part for turn in turns for part in turn.parts if part is not None):
        check_unicode(part, column)
    if not any(isinstance(part, str) and part.strip() for part in turns[-1].parts):
        raise CellError(column, f"got {short(value)}; allowed: a text that isn't empty")
    pictures = own or _pictures(row)
    count = None if pictures is UNSEEN else len(pictures)
    return _placed(turns, count, column), pictures, {column, *PICTURE_COLUMNS}


def _turn(message: Any, column: str, own: list[Any]) -> Turn:
    """One message; pictures that stand in it are appended to ``own``."""
    if not isinstance(message, Mapping) or message.get("role") not in ROLES:
        raise CellError(column, f"got {short(message)}; allowed: {{role, content}}, role one of {', '.join(ROLES)}")
    content, parts = message.get("content"), list[str | None]()
    for part in [content] if isinstance(content, str) else content if isinstance(content, list) else [None]:
        said = part if isinstance(part, Mapping) else {}
        if isinstance(part, str):
            parts.append(part)
        elif said.get("type") == "text" and isinstance(said.get("text"), str):
            parts.append(said["text"])
        elif said.get("type") in ("image", "image_url"):
            found = said.get("image") if said.get("image") is not None else said.get("image_url")
            own += [] if found is None else [found["url"] if isinstance(found, Mapping) and "url" in found else found]
            parts.append(None)
        else:
            allowed = "a text, or a list of {type: text, text} and {type: image}"
            raise CellError(column, f"got the content {short(part)}; allowed: {allowed}")
    return Turn(message["role"], tuple(parts))


def _check_roles(turns: list[Turn], column: str) -> None:
    roles = [turn.role for turn in turns]
    if roles[-1] != "user":
        raise CellError(column, f"the last turn is the {roles[-1]}'s; allowed: the user's, which the policy answers")
    if "system" in roles[1:]:
        raise CellError(column, f"got the roles {', '.join(roles)}; allowed: system as the first only")


def _placed(turns: list[Turn], pictures: int | None, column: str) -> tuple[Turn, ...]:
    """The turns with a place for each picture (None: their number is not known yet): those of parts, else those of the
    marks, else before the first user's text."""
    places = sum(part is None for turn in turns for part in turn.parts)
    marks = sum(part.count(MARK) for turn in turns for part in turn.parts if part)
    pictures = (places or marks) if pictures is None else pictures
    if places and (places != pictures or marks):
        more = f" and {marks} mark(s) {MARK}" if marks else ""
        raise CellError(column, f"got {places} picture part(s){more} for {pictures} picture(s); allowed: as many parts")
    if marks and marks != pictures:
        mend = "; remove the mark, or give the picture" if not pictures else ""
        raise CellError(column, f"got {marks} mark(s) {MARK} for {pictures} picture(s); allowed: one for each{mend}")
    found, first = list[Turn](), next(turn for turn in turns if turn.role == "user")
    for turn in turns:
        parts = list[str | None]([None] * pictures) if turn is first and not (marks or places) else []
        for part in turn.parts:
            pieces = part.split(MARK) if part else [part]
            parts += [one for piece in pieces for one in (None, piece)][1:] if part else pieces
        found.append(Turn(turn.role, tuple(part for part in parts if part != "")))
    return tuple(found)


def _pictures(row: Row) -> list[Any]:
    for name in PICTURE_COLUMNS:
        if (value := row.get(name)) is UNSEEN:
            return UNSEEN
        if value is not None:
            found = value if isinstance(value, list) else [value]
            if None in found:
                raise CellError(name, "got null among the pictures; allowed: a picture, or a null instead of the list")
            return found
    return []


# ---------------------------------------------------------------- truths


def _truth(row: Row, layout: Layout) -> str | None:
    for name in TRUTHS[layout]:
        value = row.get(name)
        if name == "reward_model" and value is not None:
            value = parsed(value, value) if isinstance(value, str) else value
            value = value.get("ground_truth") if isinstance(value, Mapping) else None
        if value is not None:
            text = truth_text(value, name)
            return text if layout is Layout.skyrl else tagged(text)
    return None


def _named(row: Row) -> str | None:
    name = row.get("verifier")
    if name is not None and not (isinstance(name, str) and name.strip()):
        raise CellError("verifier", f"got {short(name)}; allowed: a name")
    return name


def _checks(value: Any) -> tuple[Check, ...]:
    """Several checks of a row, from a list or its JSON text; () where the value names one verifier."""
    if isinstance(value, str):
        value = parsed(value, None) if value.lstrip().startswith("[") else None
        if value is None:
            return ()
    if not isinstance(value, list) or not value:
        raise CellError("verifier", f"got {short(value)}; allowed: a name, or a list of {{verifier, truth, weight}}")
    found = []
    for said in value:
        one: dict[str, Any] = dict(said) if isinstance(said, Mapping) else {}
        name, given = one.get("verifier"), one.get("weight")
        weight: float = 1.0 if given is None else given if isinstance(given, (int, float)) else 0.0
        if not (isinstance(name, str) and name.strip() and 0 < weight < math.inf) or one.get("truth") is None:
            allowed = "{verifier, truth, weight}, weight above 0"
            raise CellError("verifier", f"got the check {short(said)}; allowed: {allowed}")
        found.append(Check(name, truth_text(one["truth"], "verifier"), float(weight)))
    return tuple(found)
