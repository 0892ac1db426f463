"""Settings of ``python -m skyrl.evaluate``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, NonNegativeInt

from skyrl.schema import Count, Problem, Settings
from skyrl.settings.reward import AnswerPlace

if TYPE_CHECKING:
    from skyrl.settings.run import Config


class EvaluateConfig(Settings):
    """``python -m skyrl.evaluate``: benchmarks of the field; docs/evaluation.md describes each."""

    tasks: list[str] = Field(default_factory=list)
    """What is asked: names of tasks, each alone or as ``name:where`` (a file, a folder, or a data set of the Hugging
    Face hub); ``training`` is the evaluation prompts of these settings' own data."""
    data_dir: str | None = None
    """Folder with a subfolder for each task, named like it, that holds the files of the official distribution. null
    takes them from the Hugging Face hub."""
    samples: Count = 1
    """Answers to each question."""
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    """0 takes the likeliest token each time; several answers to a question need 0.01 or more."""
    limit: Count | None = None
    """First questions of each task that are asked; null means all."""
    place: AnswerPlace | None = None
    """Where the answers stand, and how the questions ask for it; null means the task's own place, mostly ``boxed``.
    Tasks that read the whole text, and ``training``, stay as they are."""
    output: str | None = None
    """Folder of the results, where an evaluation that was stopped goes on; null means ``evaluation`` beside the run
    folders of this ``name``."""
    report_answers: NonNegativeInt = 2000
    """Most answers of each task that ``report.html`` shows; ``answers.parquet`` has all."""


def evaluate_problems(cfg: Config) -> Iterator[Problem]:
    """What does not fit together here, and which folder is missing."""
    own = cfg.evaluate
    if own.samples > 1 and own.temperature == 0:
        yield "evaluate.samples evaluate.temperature", "at temperature 0 all answers to a question are the same one"
    if 0 < own.temperature < 0.01:
        yield "evaluate.temperature", "must be 0, or 0.01 or more"
    if own.place is AnswerPlace.regex and cfg.reward.answer.pattern is None:
        yield "evaluate.place reward.answer.pattern", "there is no pattern; set reward.answer.at=regex too, with one"
    if own.data_dir is not None and not Path(own.data_dir).is_dir():
        yield "evaluate.data_dir", "must be null or a folder; no such folder exists"
