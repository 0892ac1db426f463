"""What an evaluation came to: ``results.json``, ``answers.parquet``, ``report.html`` and a table on the console."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from skyrl.data.datasets import PromptDataset
from skyrl.evaluation.answers import Answer, AnswerStore, write_answers
from skyrl.evaluation.numbers import Estimate, estimate, majority, pass_at_k, pass_sizes
from skyrl.monitoring.console import percent
from skyrl.monitoring.gallery import picture_base64
from skyrl.monitoring.pages import render
from skyrl.monitoring.records import write_json, write_text_atomically

Groups = Sequence[Sequence[Answer]]
"""The answers to each question of a task."""


def task_numbers(groups: Groups) -> dict[str, Any]:
    """The numbers of one task. Answers that could not be scored count in none of them, but in ``errors``; a question
    without a scored answer neither.

    Returns:
        ``questions``, ``answers``, ``errors``, ``no_answer`` (nothing was found in them), ``truncated``,
        ``tokens_mean``; if anything was scored also ``avg``, ``pass@k`` for several k, ``maj`` where answers can be
        compared, ``kinds`` (``avg`` of each) and ``hallucination`` where claims can be checked, with their intervals.
    """
    answers = [answer for group in groups for answer in group]
    scored = [found for group in groups if (found := [a for a in group if a.right is not None])]
    k = max((len(group) for group in groups), default=0)
    numbers: dict[str, Any] = {
        "questions": len(groups),
        "samples": k,
        "answers": len(answers),
        "errors": sum(answer.error is not None for answer in answers),
        "no_answer": sum(answer.answer is None and answer.error is None for answer in answers),
        "truncated": sum(answer.truncated for answer in answers),
        "tokens_mean": sum(answer.tokens for answer in answers) / max(1, len(answers)),
    }
    if not scored:
        return numbers
    numbers["avg"] = estimate([_share(group) for group in scored])
    if k > 1:
        for size in pass_sizes(k):
            able = [group for group in scored if len(group) >= size]
            if able:
                values = [pass_at_k(len(group), sum(bool(a.right) for a in group), size) for group in able]
                numbers[f"pass@{size}"] = estimate(values)
        if any(answer.vote is not None for answer in answers):
            numbers["maj"] = estimate(
                [majority([a.vote for a in group], [bool(a.right) for a in group]) for group in scored]
            )
    by_kind: defaultdict[str, list[float]] = defaultdict(list)
    for group in scored:
        by_kind[group[0].kind].append(_share(group))
    if len(by_kind) > 1:
        numbers["kinds"] = {kind: estimate(values) for kind, values in sorted(by_kind.items())}
    checked = [[a.false_claims > 0 for a in group if a.false_claims is not None] for group in groups]
    if shares := [sum(found) / len(found) for found in checked if found]:
        numbers["hallucination"] = estimate(shares)
    return numbers


def _share(group: Iterable[Answer]) -> float:
    rights = [bool(answer.right) for answer in group]
    return sum(rights) / len(rights)


def write_outcome(
    store: AnswerStore,
    tasks: Mapping[str, PromptDataset],
    ids: Mapping[str, Sequence[str]],
    shown: int,
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """Write the three files into the store's folder.

    Args:
        ids: The questions of each task that were asked, the first of its rows.
        shown: Most answers of a task in the report.
        about: What else ``results.json`` says: the policy, versions, settings.

    Returns:
        The content of ``results.json``.
    """
    groups = {name: store.groups(name, ids[name]) for name in tasks}
    numbers = {name: task_numbers(found) for name, found in groups.items()}
    for name, found in numbers.items():
        found["left_out"] = len(set(ids[name]) & store.left_out.get(name, frozenset()))
    results = {"tasks": {name: _plain(found) for name, found in numbers.items()}, **about}
    write_answers(store.folder / "answers.parquet", [group for found in groups.values() for group in found])
    page = render(
        "answers.jinja",
        script="answers.js",
        heading=f"Evaluation of {about['policy']}",
        tables=[(name, cells(found)) for name, found in numbers.items()],
        columns=COLUMNS,
        tasks=[(name, _entries(tasks[name], ids[name], groups[name], shown)) for name in tasks],
        hidden=sum(max(0, numbers[name]["answers"] - shown) for name in tasks),
    )
    write_text_atomically(store.folder / "report.html", page)
    write_json(store.folder / "results.json", results)
    return results


def _plain(numbers: Mapping[str, Any]) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        if isinstance(value, Estimate):
            return dataclasses.asdict(value)
        return {name: plain(one) for name, one in value.items()} if isinstance(value, dict) else value

    return {name: plain(value) for name, value in numbers.items()}


def _entries(prompts: PromptDataset, ids: Sequence[str], groups: Groups, shown: int) -> list[dict[str, Any]]:
    """The questions that the report shows, with their answers; pictures are read again from the task's files."""
    entries, left, rows = [], shown, {name: row for row, name in enumerate(ids)}
    for group in groups:
        if left <= 0:
            break
        first = group[0]
        entries.append(
            {
                "id": first.id,
                "kind": first.kind,
                "question": first.question,
                "truth": first.truth,
                "verifier": first.verifier,
                "picture": picture_base64(prompts[rows[first.id]].images),
                "answers": group[:left],
            }
        )
        left -= len(group)
    return entries


COLUMNS = ("avg", "pass", "maj")


def cells(numbers: Mapping[str, Any]) -> list[str]:
    """The numbers of a task as the tables show them: questions, answers to each, and :data:`COLUMNS`."""
    k = numbers["samples"]
    shown = [numbers.get(name) for name in ("avg", f"pass@{k}", "maj")]
    return [str(numbers["questions"]), str(k), *(_with_interval(one) for one in shown)]


def _with_interval(found: Estimate | None) -> str:
    if found is None:
        return "–"
    return percent(found.value) + ("" if found.low is None else f" ({percent(found.low)} … {percent(found.high)})")


def print_outcome(results: Mapping[str, Any], folder: Path, console: Console) -> None:
    """The table of all tasks, what was odd, and where the files are."""
    table = Table(title="Evaluation, 95 % intervals", title_justify="left", box=None, padding=(0, 2), pad_edge=False)
    for name in ("task", "questions", "k", "avg@k", "pass@k", "maj@k"):
        table.add_column(name, justify="left" if name == "task" else "right", no_wrap=name == "task")
    for name, plain in results["tasks"].items():
        found = {
            key: Estimate(**one) if isinstance(one, dict) and "value" in one else one for key, one in plain.items()
        }
        table.add_row(Text(name), *cells(found))
    console.print(table)
    for name, found in results["tasks"].items():
        odd = {"could not be scored": "errors", "had no answer in them": "no_answer", "were cut off": "truncated"}
        said = ", ".join(f"{found[key]} {words}" for words, key in odd.items() if found[key])
        if said:
            console.print(Text(f"{name}: of {found['answers']} answers {said}"))
        if found["no_answer"] == found["answers"]:
            mend = "evaluate.place (reward.answer.at for training) says where it stands; the report shows what was said"
            console.print(Text(f"{name}: not one answer was found: {mend}"))
        if found["left_out"]:
            console.print(Text(f"{name}: {found['left_out']} questions were too long and are in no number"))
    # A path that is wrapped can't be copied.
    console.print(f"report: {folder / 'report.html'}", soft_wrap=True, markup=False, highlight=False)
