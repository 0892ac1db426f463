"""The answers of ``python -m skyrl.evaluate``: judged where the verifiers are, and kept so that an evaluation that was
stopped asks only what is missing."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from skyrl.monitoring.records import read_json, write_json
from skyrl.records import ConfigError, DataError, Sample, SampleGroup
from skyrl.rewards.answers import AnswerForm
from skyrl.rewards.rewarder import Rewarder
from skyrl.rewards.runner import Call
from skyrl.settings import AnswerPlace

LONGEST_TRUTH = 2000
"""Characters that are kept of a truth: hidden tests of programs can be megabytes."""
SETTINGS, ANSWERS = "settings.json", "answers.jsonl"
COMPARES = {name: name for name in ("math", "numeric", "choice", "exact")} | {
    "task_option": "choice",
    "task_any_of": "math",
    "task_rounded": "numeric",
    "task_numbers": "exact",
    "task_yes_no": "exact",
}
"""Verifier of a question → the one that says whether two answers to it are the same. There is no vote on programs and
texts of free form."""


@dataclass(slots=True, frozen=True)
class Answer:
    """One answer to one question; the fields are the columns of ``answers.parquet``."""

    task: str
    id: str
    """The question's, unique within the task."""
    kind: str
    sample: int
    """Place among the answers to the question, 0 … k-1."""
    question: str
    truth: str
    verifier: str
    text: str
    """All that the policy wrote."""
    answer: str | None
    """What was found in it and compared; None if nothing was found."""
    right: bool | None
    """None if it could not be scored; ``error`` says why."""
    score: float | None
    """The verifiers' weighted mean, 0 … 1."""
    rules: str
    """JSON: each verifier's score by its name."""
    vote: int | None
    """Answers to one question that say the same have the same number; None if it does not vote."""
    error: str | None
    truncated: bool
    tokens: int
    claims: int | None
    false_claims: int | None
    """Of its claims about the picture; None where they can't be checked."""


Chunk = Sequence[Sequence[Answer]]
"""All answers to each of some neighbouring questions of a task."""


def judged(rewarder: Rewarder, groups: list[SampleGroup], task: str, place: AnswerPlace | None) -> list[list[Answer]]:
    """Score some groups of a task as training does, but for where the answer stands; a list for each group.

    Args:
        place: Where it stands; None means where the settings say, as in training.
    """
    own = rewarder.form
    if place is not None:
        where = own.cfg.model_copy(update={"at": place})
        rewarder.form = rewarder.checks.form = AnswerForm(where, own.prefix, own.timeout)
    try:
        return [_answers(rewarder, group, task) for group in rewarder.score(groups)]
    finally:
        rewarder.form = rewarder.checks.form = own


def _answers(rewarder: Rewarder, group: SampleGroup, task: str) -> list[Answer]:
    prompt, checks = group.prompt, group.prompt.all_checks
    votes = _votes(rewarder, checks[0].verifier, [sample.answer for sample in group.samples])

    def one(sample: Sample, vote: int | None) -> Answer:
        reward, known = sample.reward, group.checkable
        return Answer(
            task=task,
            id=prompt.id,
            kind=prompt.kind,
            sample=sample.index,
            question=prompt.question,
            truth="\n".join(check.truth[:LONGEST_TRUTH] for check in checks),
            verifier=", ".join(check.verifier for check in checks),
            text=sample.text,
            answer=sample.answer,
            right=None if reward is None else reward.right,
            score=None if reward is None else reward.rule,
            rules=json.dumps({} if reward is None else dict(reward.rules)),
            vote=vote,
            error=sample.error,
            truncated=sample.truncated,
            tokens=len(sample.token_ids),
            claims=sample.claims if known else None,
            false_claims=sample.false_claims if known else None,
        )

    return [one(*each) for each in zip(group.samples, votes, strict=True)]


def _votes(rewarder: Rewarder, verifier: str, found: Sequence[str | None]) -> list[int | None]:
    """For each answer the number of what it says: the place of the first answer that is the same text (case and blanks
    ignored), or that the question's verifier calls equal."""
    votes: list[int | None] = []
    seen: dict[str, tuple[int, str]] = {}
    for place, answer in enumerate(found):
        if answer is None or verifier not in COMPARES:
            votes.append(None)
            continue
        plain = " ".join(answer.casefold().split())
        if plain not in seen:
            same = (vote for vote, text in seen.values() if _equal(rewarder, COMPARES[verifier], answer, text))
            seen[plain] = next(same, place), answer
        votes.append(seen[plain][0])
    return votes


def _equal(rewarder: Rewarder, verifier: str, one: str, other: str) -> bool:
    """Whether the verifier calls an answer equal to another; not if it can't read the other as a truth."""
    return rewarder.checks.pool.run([Call(verifier, {"answer": one, "truth": other})])[0][0].score == 1.0


class AnswerStore:
    """The answers in a folder: ``answers.jsonl``, one line a chunk, so that a chunk is there as a whole or not at all.

    Args:
        folder: Made if it isn't there.
        identity: What decides the answers, as dotted keys and values.

    Raises:
        ConfigError: if the folder holds answers of another identity; it names every difference.
        DataError: if a line but the last is broken.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder, self._found = folder, dict[tuple[str, str], list[Answer]]()
        self.left_out: dict[str, frozenset[str]] = {}
        """Task → ids of questions that are never asked: too long, with ``data.overlong=drop``."""
        folder.mkdir(parents=True, exist_ok=True)
        identity = json.loads(json.dumps(identity))
        if (folder / SETTINGS).is_file():
            _refuse_other(folder, read_json(folder / SETTINGS), identity)
        elif (folder / ANSWERS).is_file():
            raise DataError(f"{folder} has {ANSWERS}, but no {SETTINGS} that says how they came about; remove it")
        self._read()
        write_json(folder / SETTINGS, identity)

    def _read(self) -> None:
        path, whole = self.folder / ANSWERS, 0
        lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
        for number, line in enumerate(lines):
            try:
                if not line.endswith(b"\n"):
                    raise ValueError("it has no end")
                content = json.loads(line)
                if isinstance(content, dict):
                    self.left_out[content["task"]] = frozenset(content["left_out"])
                else:
                    self._keep([[Answer(**answer) for answer in group] for group in content])
            except (ValueError, TypeError, KeyError) as error:
                if number < len(lines) - 1:
                    raise DataError(f"{path}, line {number + 1}: {error}; allowed: what an evaluation wrote") from error
                break  # the process was killed while it wrote this
            whole += len(line)
        if lines:
            os.truncate(path, whole)

    def _keep(self, chunk: Chunk) -> None:
        for group in chunk:
            self._found[group[0].task, group[0].id] = list(group)

    def __contains__(self, question: tuple[str, str]) -> bool:
        """Whether the question of this task and id was answered, or is left out."""
        task, name = question
        return question in self._found or name in self.left_out.get(task, ())

    def add(self, chunk: Chunk) -> None:
        """Keep a chunk, on the disk when this returns."""
        self._append([[dataclasses.asdict(answer) for answer in group] for group in chunk])
        self._keep(chunk)

    def leave_out(self, task: str, ids: Iterable[str]) -> None:
        """Note that some questions of a task are never asked."""
        self.left_out[task] = self.left_out.get(task, frozenset()) | frozenset(ids)
        self._append({"task": task, "left_out": sorted(self.left_out[task])})

    def _append(self, content: Any) -> None:
        line = json.dumps(content) + "\n"
        with (self.folder / ANSWERS).open("ab") as stream:
            stream.write(line.encode())
            stream.flush()
            os.fsync(stream.fileno())

    def groups(self, task: str, ids: Sequence[str]) -> list[list[Answer]]:
        """The answers to each of these questions of a task, but for those that are left out."""
        return [self._found[task, name] for name in ids if name not in self.left_out.get(task, ())]


def _refuse_other(folder: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Tasks may come and go; what decides an answer may not change."""
    same = {key for key in (*old, *new) if old.get(key) == new.get(key)}
    others = [key for key in dict.fromkeys((*old, *new)) if key not in same and not _of_other_task(key, old, new)]
    if others:
        said = "\n".join(f"{key}={new.get(key)}: the answers in {folder} have {old.get(key)}" for key in others)
        raise ConfigError(f"{said}\nset evaluate.output to another folder, or remove this one")


def _of_other_task(key: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    return key.startswith("task.") and (key not in old or key not in new)


def write_answers(path: Path, groups: Sequence[Sequence[Answer]]) -> None:
    """``answers.parquet``: one row an answer."""
    rows = [dataclasses.asdict(answer) for group in groups for answer in group]
    kinds = {"int": pa.int64(), "bool": pa.bool_(), "float": pa.float64(), "str": pa.string()}
    fields = [(field.name, kinds[str(field.type).removesuffix(" | None")]) for field in dataclasses.fields(Answer)]
    part = path.with_suffix(".part")
    pq.write_table(pa.Table.from_pylist(rows, pa.schema(fields)), part, compression="zstd")
    part.replace(path)
