"""What a row of a benchmark becomes, before pictures are decoded and the place of the answer is asked for."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from skyrl.evaluation.tasks.graders import LETTERS
from skyrl.records import DataError

PLACE = re.compile(r"<image[ _]?(\d+)>")
"""How the benchmarks mark the place of a picture in a text."""


@dataclass(slots=True, frozen=True)
class Question:
    """One question of a task."""

    id: str
    """Unique within the task."""
    text: str
    """What is asked; ``<image 1>`` marks the place of the first picture."""
    verifier: str
    truth: str
    """What that verifier compares with."""
    kind: str = "default"
    pictures: Mapping[int, str] = field(default_factory=dict)
    """Number of a picture in the text → column that holds it. Those that the text does not mention come first."""
    asks: str = ""
    """What the answer shall be, such as the letter of an option."""


def option_question(truth: str, options: Sequence[str], **rest: Any) -> Question:
    """A question with options, whose ``truth`` is a letter; ``text`` gets the list of them."""
    if len(options) > len(LETTERS) or truth not in LETTERS[: len(options)]:
        raise DataError(f"got the truth {truth!r} and {len(options)} options; allowed: the letter of one of at most 10")
    listed = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
    text = f"{rest.pop('text')}\n\n{listed}"
    wanted = json.dumps({"letter": truth, "options": list(options)}, ensure_ascii=False)
    return Question(
        text=text, verifier="task_option", truth=wanted, asks="Answer with the letter of one option.", **rest
    )
