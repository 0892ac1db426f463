"""The prompts of a task: its rows, asked in the form that fits the place where the answer stands."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from skyrl.data.datasets import PromptDataset
from skyrl.data.pictures import decode_picture, picture_outline
from skyrl.evaluation.tasks.files import TaskFile, files_in, from_hub
from skyrl.evaluation.tasks.question import PLACE, Question
from skyrl.evaluation.tasks.table import TASKS
from skyrl.records import ConfigError, DataError, Prompt, Turn
from skyrl.settings import AnswerPlace, Config

TRAINING = "training"
"""Name of the task that is the run's own evaluation prompts."""


class TaskPrompts:
    """Random access to the prompts of one task. Every row is checked when it is opened, but for its pictures, which are
    decoded when it is asked for.

    Args:
        name: One of :data:`TASKS`; the id of each prompt begins with it.
        files: Its files.
        place: Where answers stand, and how questions ask for it; None means the task's own place.
        limit: Use the first ``limit`` rows only.

    Raises:
        DataError: naming file, row and column, for what its declaration can't read, an id that comes twice, or no rows.
    """

    def __init__(self, name: str, files: Sequence[Path], place: AnswerPlace | None, limit: int | None) -> None:
        self.name, self.task, self._arguments = name, TASKS[name], (name, files, place, limit)
        own = self.task.place
        self.place = own if place is None or own is AnswerPlace.whole else place
        self.files = [TaskFile(path) for path in files]
        self._rows = [(file, row) for file in self.files for row in range(len(file))][:limit]
        self._ids: list[str] = []
        self._verifiers: set[str] = set()
        if not self._rows:
            raise DataError(f"task {name}: {', '.join(map(str, files))} have 0 rows; allowed: 1 or more")
        first: dict[str, str] = {}
        for file, row in self._rows:  # a question is made again when it is asked for: hidden tests can be gigabytes
            question, where = self._question(file, row), f"{file.path}, row {row}"
            if first.setdefault(question.id, where) != where:
                raise DataError(
                    f"{where}: id {question.id!r} is also that of {first[question.id]}; allowed: unique ids"
                )
            self._ids.append(f"{name}/{question.id}")
            self._verifiers.add(question.verifier)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> Prompt:
        """Prompt ``row`` with its pictures; :class:`DataError` if one can't be decoded."""
        return self._asked(row, decode_picture)

    def outline(self, row: int) -> Prompt:
        """The prompt with black pictures of the right sizes, by which its length is measured."""
        return self._asked(row, picture_outline)

    def _asked(self, row: int, decode: Callable[[bytes, str], np.ndarray]) -> Prompt:
        file, place = self._rows[row]
        question = self._question(file, place)
        found = {
            number: decode(stored, f"{file.path}, row {place}, column {column!r}")
            for number, column in question.pictures.items()
            if (stored := file.picture(place, column)) is not None
        }
        kind = question.kind.replace("/", "-")  # becomes part of names
        prompt = Prompt(self._ids[row], "", (), question.truth, question.verifier, kind)
        asked = "\n\n".join(filter(None, (question.text, question.asks, INSTRUCTIONS[self.place])))
        return arranged(prompt, asked, found)

    def ids(self) -> list[str]:
        """The ids of all prompts, in order."""
        return list(self._ids)

    def verifiers(self) -> list[str]:
        """The different verifiers that the prompts name."""
        return sorted(self._verifiers)

    @property
    def digest(self) -> str:
        """Of all that its files hold."""
        return hashlib.sha256("/".join(file.digest for file in self.files).encode()).hexdigest()[:16]

    def _question(self, file: TaskFile, place: int) -> Question:
        row = file.row(place)
        try:
            return self.task.make(row)
        except DataError as error:
            raise DataError(
                f"task {self.name}: {error}" if row.where in str(error) else f"{row.where}: {error}"
            ) from error


INSTRUCTIONS = {
    AnswerPlace.tags: "First reason in <think>…</think>, then give the final answer alone in <answer>…</answer>.",
    AnswerPlace.boxed: "Reason step by step, and put the final answer alone in \\boxed{}.",
    AnswerPlace.hashes: "Reason step by step, and give the final answer alone on a last line, behind ####.",
    AnswerPlace.last_number: "Reason step by step, and end with the final answer, a number.",
    AnswerPlace.regex: "",
    AnswerPlace.whole: "",
}
"""Place of the answer → what the question says of it."""


def arranged(prompt: Prompt, text: str, pictures: dict[int, np.ndarray]) -> Prompt:
    """The prompt with its text, whose marks are replaced by the pictures: the first mark of a picture by itself, later
    ones by words. A picture without a mark comes before the text; a mark without a picture becomes words too."""
    parts: list[str | None] = []
    order: list[int] = []
    pieces = PLACE.split(text)
    for place, piece in enumerate(pieces):
        if place % 2 == 0:
            parts.append(piece)
        elif (number := int(piece)) in pictures and number not in order:
            order.append(number)
            parts.append(None)
        else:
            parts.append(f"image {piece}")
    plain = PLACE.sub(r"image \1", text)
    first = [number for number in pictures if number not in order]
    images = tuple(pictures[number] for number in (*first, *order))
    turns: tuple[Turn, ...] = ()
    if order:
        joined: list[str | None] = [None] * len(first)
        for part in parts:  # neighbouring texts are one
            if part is not None and joined and joined[-1] is not None:
                joined[-1] += part
            elif part != "":
                joined.append(part)
        turns = (Turn("user", tuple(joined)),)
    return replace(prompt, question=plain, images=images, turns=turns)


def located(cfg: Config) -> Config:
    """The settings with a place on this machine for each task, downloaded if need be, so that every member opens the
    same files.

    Raises:
        ConfigError: for a task that is unknown, comes twice, or none at all.
        DataError: for files that are not there.
    """
    own = cfg.evaluate
    if not own.tasks:
        raise ConfigError(f"evaluate.tasks=[]: nothing to ask; allowed: {TRAINING}, {', '.join(TASKS)}")
    places = [item.partition(":")[::2] for item in own.tasks]
    names = [name for name, _ in places]
    for item, name in zip(own.tasks, names, strict=True):
        if name not in TASKS and item != TRAINING:
            raise ConfigError(f"evaluate.tasks: there is no task {name!r}; allowed: {TRAINING}, {', '.join(TASKS)}")
        if names.count(name) > 1:
            raise ConfigError(f"evaluate.tasks: {name} stands in it {names.count(name)} times")
    found = [name if name == TRAINING else f"{name}:{_place(name, where, own.data_dir)}" for name, where in places]
    return cfg.model_copy(update={"evaluate": own.model_copy(update={"tasks": found})})


def _place(name: str, where: str, data_dir: str | None) -> Path:
    if where and Path(where).exists():
        return Path(where).absolute()
    if not where and data_dir is not None:
        return (Path(data_dir) / name).absolute()
    if where and where.count("/") != 1:
        raise DataError(
            f"evaluate.tasks={name}:{where}: no such file or folder, and no data set's name such as owner/name"
        )
    return from_hub(where or TASKS[name].hub, TASKS[name].files)


def open_tasks(cfg: Config) -> dict[str, PromptDataset]:
    """The prompts of each task of :func:`located` settings, in order."""
    own, made = cfg.evaluate, dict[str, PromptDataset]()
    for item in own.tasks:
        name, _, where = item.partition(":")
        if name == TRAINING:
            from skyrl.data.datasets import build_datasets

            made[name] = build_datasets(cfg)["eval"]
        else:
            made[name] = TaskPrompts(name, files_in(Path(where), TASKS[name].files), own.place, own.limit)
    return made
