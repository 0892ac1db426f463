"""AIME, MATH-500, GSM8K and OlympiadBench."""

from __future__ import annotations

import json

from skyrl.evaluation.tasks.files import Row
from skyrl.evaluation.tasks.question import Question
from skyrl.records import DataError


def aime(row: Row) -> Question:
    """``Problem``, ``Answer`` (0 … 999) and ``ID``, also in small letters; math-ai's file has ``solution`` alone."""
    answer = row.text("Answer", "answer", "solution").strip().removeprefix("\\boxed{").removesuffix("}")
    if not answer.isdigit() or int(answer) > 999:
        raise DataError(f"{row.where}, column 'Answer': got {answer!r}; allowed: a whole number from 0 to 999")
    return Question(row.text("ID", "id"), row.text("Problem", "problem"), "math", str(int(answer)))


def math500(row: Row) -> Question:
    """``problem``, ``answer``, ``unique_id``, ``subject``."""
    return Question(row.text("unique_id"), row.text("problem"), "math", row.text("answer"), row.text("subject"))


def gsm8k(row: Row) -> Question:
    """``question``, and ``answer`` whose truth follows ``####``. Rows have no names, so their numbers serve."""
    _, mark, truth = row.text("answer").rpartition("####")
    if not mark or not truth.strip():
        raise DataError(f"{row.where}, column 'answer': nothing follows ####")
    return Question(row.where.rpartition(" ")[2], row.text("question"), "math", truth.strip().replace(",", ""))


def olympiadbench(row: Row) -> Question:
    """``question``, ``context``, ``final_answer`` (the first counts, as in the official judge), ``error`` (how far a
    number may be off), ``is_multiple_answer``, ``image_1`` …; open questions, whose files' names begin with ``OE``."""
    answers = row.get("final_answer")
    if not isinstance(answers, list) or not answers or not str(answers[0]).strip():
        raise DataError(f"{row.where}, column 'final_answer': got {answers!r}; allowed: a list of texts")
    truth, error = str(answers[0]), str(row.get("error") or "").strip()
    verifier = "math"
    if error:
        parts = {part.strip() for part in error.split(",") if part.strip()}
        if len(parts) != 1:
            raise DataError(f"{row.where}, column 'error': got {error!r}; allowed: one number for all parts")
        numbers = {
            "numbers": truth.replace("$", ""),
            "error": parts.pop(),
            "ordered": not row.get("is_multiple_answer"),
        }
        verifier, truth = "task_numbers", json.dumps(numbers)
    text = "\n\n".join(part for part in (row.get("context"), row.text("question")) if part)
    unit = f"Give the number alone; its unit is {row.get('unit')}." if row.get("unit") else ""
    columns = {number: f"image_{number}" for number in range(1, 10)}
    return Question(f"{row.file}/{row.text('id')}", text, verifier, truth, row.file, columns, unit)
