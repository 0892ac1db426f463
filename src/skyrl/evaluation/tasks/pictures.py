"""MMMU, MathVista, MathVision and POPE."""

from __future__ import annotations

import ast
import json
from typing import Any

from skyrl.evaluation.tasks.files import Row
from skyrl.evaluation.tasks.graders import LETTERS
from skyrl.evaluation.tasks.question import Question, option_question
from skyrl.records import DataError


def mmmu(row: Row) -> Question:
    """``id``, ``question``, ``options`` (a Python list as a text), ``answer``, ``question_type``, ``image_1`` …
    ``image_7``."""
    name = row.text("id")
    rest: dict[str, Any] = {
        "id": name,
        "text": row.text("question"),
        "kind": name.partition("_")[2].rpartition("_")[0] or "default",
        "pictures": {number: f"image_{number}" for number in range(1, 8)},
    }
    answer = row.text("answer").strip()
    if row.text("question_type") == "multiple-choice":
        return option_question(answer, _listed(row, "options"), **rest)
    truths = _listed(row, "answer") if answer.startswith("[") else [answer]
    return Question(verifier="task_any_of", truth=json.dumps({"truths": truths}), **rest)


def mathvista(row: Row) -> Question:
    """``pid``, ``question``, ``choices``, ``unit``, ``precision``, ``answer``, ``question_type``, ``answer_type``,
    ``decoded_image``, ``metadata``."""
    answer, answer_type = row.text("answer").strip(), row.text("answer_type")
    unit = f" (Unit: {row.get('unit')})" if row.get("unit") else ""
    rest: dict[str, Any] = {
        "id": row.text("pid"),
        "text": row.text("question") + unit,
        "kind": str((row.get("metadata") or {}).get("task", "default")),
        "pictures": {1: "decoded_image"},
    }
    if row.text("question_type") == "multi_choice":
        options = [str(choice) for choice in row.get("choices") or []]
        if options.count(answer) != 1:
            raise DataError(f"{row.where}, column 'answer': got {answer!r}; allowed: one of the choices {options}")
        return option_question(LETTERS[options.index(answer)], options, **rest)
    if answer_type == "list":
        truth = json.dumps({"numbers": answer, "error": None, "ordered": True})
        return Question(verifier="task_numbers", truth=truth, asks="Answer with a list such as [1, 2, 3].", **rest)
    if answer_type == "text":
        return Question(verifier="exact", truth=answer, **rest)
    if answer_type not in ("integer", "float"):
        raise DataError(f"{row.where}, column 'answer_type': got {answer_type!r}; allowed: text, integer, float, list")
    digits = 0 if answer_type == "integer" else int(row.get("precision") or 0)
    asks = "Answer with a whole number." if digits == 0 else f"Answer with a number of {digits} digits after the point."
    # A whole number is not rounded to: 12.4 is not 12.
    truth = json.dumps({"number": answer, "digits": digits or None})
    return Question(verifier="task_rounded", truth=truth, asks=asks, **rest)


def mathvision(row: Row) -> Question:
    """``id``, ``question`` with ``<image1>``, ``options``, ``answer`` (a letter if there are options), ``subject``,
    ``decoded_image``."""
    options = [str(option) for option in row.get("options") or []]
    rest: dict[str, Any] = {
        "id": row.text("id"),
        "text": row.text("question"),
        "kind": str(row.get("subject") or "default"),
        "pictures": {1: "decoded_image"},
    }
    answer = row.text("answer").strip()
    if options:
        return option_question(answer, options, **rest)
    return Question(verifier="math", truth=answer, **rest)


def pope(row: Row) -> Question:
    """``question_id``, ``question``, ``answer`` (yes or no), ``category``, ``image``."""
    category = row.text("category")
    return Question(
        id=f"{category}/{row.text('question_id')}",
        text=row.text("question"),
        verifier="task_yes_no",
        truth=row.text("answer"),
        kind=category,
        pictures={1: "image"},
        asks="Answer with yes or no.",
    )


def _listed(row: Row, column: str) -> list[str]:
    """A column that holds a list, or the Python text of one."""
    value = row.get(column)
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
            raise DataError(f"{row.where}, column {column!r}: got {value[:80]!r}; allowed: a list ({error})") from error
    if not isinstance(value, list) or not value:
        raise DataError(f"{row.where}, column {column!r}: got {value!r}; allowed: a list")
    return [str(one) for one in value]
