"""The tasks: which files each reads, and what makes a question of one of their rows. A new task is one function from a
row to a :class:`Question` and one line in :data:`TASKS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from skyrl.evaluation.tasks import mathematics, pictures, programs
from skyrl.evaluation.tasks.files import Row
from skyrl.evaluation.tasks.question import Question
from skyrl.settings import AnswerPlace


@dataclass(slots=True, frozen=True)
class Task:
    """One benchmark."""

    hub: str
    """Its data set on the Hugging Face hub."""
    files: tuple[str, ...]
    """Patterns of its files' names; the first that any file matches is taken."""
    make: Callable[[Row], Question]
    place: AnswerPlace = AnswerPlace.boxed
    """Where its answers stand."""


WHOLE = AnswerPlace.whole
TASKS = {
    "aime24": Task("Maxwell-Jia/AIME_2024", ("aime_2024*.parquet", "*.parquet", "*.jsonl"), mathematics.aime),
    "math500": Task("HuggingFaceH4/MATH-500", ("test.jsonl", "*.parquet"), mathematics.math500),
    "gsm8k": Task("openai/gsm8k", ("main/test-*.parquet", "test-*.parquet", "test.jsonl*"), mathematics.gsm8k),
    "olympiadbench": Task("Hothan/OlympiadBench", ("OE_*.parquet", "OE_*.json"), mathematics.olympiadbench),
    "mmmu": Task("MMMU/MMMU", ("validation-*.parquet",), pictures.mmmu),
    "mathvista": Task("AI4Math/MathVista", ("testmini-*.parquet",), pictures.mathvista),
    "mathvision": Task("MathLLMs/MathVision", ("test-*.parquet",), pictures.mathvision),
    "pope": Task("lmms-lab/POPE", ("data/test-*.parquet", "test-*.parquet"), pictures.pope),
    "livecodebench": Task("livecodebench/code_generation_lite", ("test*.jsonl",), programs.livecodebench, WHOLE),
    "humaneval": Task("openai/openai_humaneval", ("test-*.parquet", "HumanEval.jsonl*"), programs.humaneval, WHOLE),
    "mbpp": Task(
        "google-research-datasets/mbpp", ("full/test-*.parquet", "test-*.parquet", "test.jsonl*"), programs.mbpp, WHOLE
    ),
    "ifeval": Task("google/IFEval", ("*input_data.jsonl",), programs.ifeval, WHOLE),
}  # fmt: skip
