"""Digit scenes: real handwritten digits, two by two in one picture, with a question about them.

The embedded default data set. scikit-learn ships 1,797 handwritten digits of 8×8 pixels (the UCI optical
recognition set). They are split once into *training digits* and *held-out digits*; a held-out scene
shows only handwriting that no training scene ever showed. Row ``i`` of a split is a pure function of
``(seed, split, i)``, so a scene needs no storage, any worker can draw it, and a resumed run sees the same ones.

What is in the picture is known, so every claim about it can be checked exactly (``Prompt.facts``).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from skyrl.records import DataError, Prompt
from skyrl.settings.ranges import PICTURE_KINDS

GRID = 2
"""Digits per side of a scene."""
DIGIT_PIXELS = 16
"""Side of one digit in the picture: 8 pixels of the original, doubled."""
SCENE_PIXELS = GRID * DIGIT_PIXELS
HELD_OUT_SHARE = 0.2
FORM = " Use <think></think><answer></answer>."
"""Asks for the reasoning form that the format reward checks."""
TEXT_KIND = "text_arithmetic"
ADDING_KINDS = ("sum", "row_difference")
SMALL = 5
"""Where numbers are added they are below this: a model of a million parameters shall have to read and to reason,
not to learn a large table of sums by heart."""
LOOK_ALIKE = {3: 2, 7: 1, 8: 9}
"""What a careless eye takes these digits for."""
CARELESS_SHARE = 0.6
"""Share of such digits that the careless teacher misreads: above one half, so that a policy taught by it prefers the
wrong digit, and well below one, so that it still knows the right one."""
SPLITS = {"train": 0, "eval": 1, "reward": 2}
"""``reward`` draws other scenes of the training digits: the reward model's own training set."""


@lru_cache(maxsize=1)
def _digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return (bunch.images / 16.0 * 255.0).astype(np.uint8), bunch.target.astype(int)


@lru_cache(maxsize=4)
def digit_pool(held_out: bool) -> list[np.ndarray]:
    """Pictures of each digit 0-9, ``[n, 8, 8]`` uint8, from the training or the held-out handwriting.

    The split is stratified and fixed: it doesn't depend on any seed, so that no setting can leak a held-out digit.
    """
    images, labels = _digits()
    pool = []
    for digit in range(10):
        rows = np.random.default_rng(digit).permutation(np.flatnonzero(labels == digit))
        cut = int(len(rows) * HELD_OUT_SHARE)
        pool.append(images[rows[:cut] if held_out else rows[cut:]])
    return pool


def _chain(numbers: list[int]) -> str:
    """``[3, 1, 4]`` → ``"3+1=4, 4+4=8"``."""
    steps, total = [], numbers[0]
    for number in numbers[1:]:
        steps.append(f"{total}+{number}={total + number}")
        total += number
    return ", ".join(steps)


def solve(kind: str, grid: list[list[int]], target: int) -> tuple[str, str, str]:
    """Question, faithful reasoning and answer for a scene; ``target`` is the digit that ``count`` asks for."""
    digits = [digit for row in grid for digit in row]
    read = "I see " + "/".join("".join(str(d) for d in row) for row in grid) + ". "
    if kind == "sum":
        return "What is the sum of the digits?", f"{read}{_chain(digits)}.", str(sum(digits))
    if kind == "max":
        return "What is the largest digit?", f"{read}Largest is {max(digits)}.", str(max(digits))
    if kind == "min":
        return "What is the smallest digit?", f"{read}Smallest is {min(digits)}.", str(min(digits))
    if kind == "count":
        count = digits.count(target)
        return f"How many digits are {target}?", f"{read}{target} comes {count} times.", str(count)
    if kind == "row_difference":
        sums = [sum(row) for row in grid]
        high, low = max(sums), min(sums)
        work = ", ".join(_chain(row) for row in grid)
        return "What is the difference of the row sums?", f"{read}{work}, {high}-{low}={high - low}.", str(high - low)
    raise DataError(f"unknown kind of question {kind!r}; allowed: {', '.join(PICTURE_KINDS)}")


def _answered(reasoning: str, answer: str) -> str:
    return f"<think>{reasoning}</think><answer>{answer}</answer>"


def _numbers(question: str) -> list[int]:
    """The numbers that a text question adds."""
    return [int(digit) for digit in question.removeprefix("What is ").split("?")[0].split("+")]


class DigitScenes:
    """A random-access data set of digit scenes and a share of text-only arithmetic.

    Args:
        split: ``train``, ``eval`` (held-out handwriting) or ``reward``.
        size: Number of rows.
        text_share: Share of rows without a picture.
        seed: Seed of the scenes.
        kinds: Kinds of question about a picture; some of :data:`PICTURE_KINDS`.

    Raises:
        DataError: for an unknown split, an unknown kind, or none.
    """

    def __init__(
        self, split: str, size: int, text_share: float, seed: int, kinds: Sequence[str] = PICTURE_KINDS
    ) -> None:
        if split not in SPLITS:
            raise DataError(f"unknown split {split!r} of the digit scenes; allowed: {', '.join(SPLITS)}")
        if not kinds or not set(kinds) <= set(PICTURE_KINDS):
            raise DataError(f"kinds of question are {list(kinds)}; allowed: one or more of {', '.join(PICTURE_KINDS)}")
        self.split, self.size, self.text_share, self.seed = split, size, text_share, seed
        self.kinds = tuple(kinds)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, row: int) -> Prompt:
        return self._prompt(row)[0]

    def with_reasoning(self, row: int) -> tuple[Prompt, str]:
        """Row ``row`` and a faithful answer to it, in the form that the policy is warm-started on.

        Raises:
            DataError: if there is no such row.
        """
        prompt, target = self._prompt(row)
        if not prompt.images:
            return prompt, _answered(f"{_chain(_numbers(prompt.question))}.", prompt.answer)
        _, reasoning, answer = solve(prompt.kind, prompt.facts["grid"], target)
        return prompt, _answered(reasoning, answer)

    def with_careless_reasoning(self, row: int) -> tuple[Prompt, str]:
        """Row ``row`` and the answer of a teacher who takes some digits for their look-alikes and reasons on from
        there: demonstrations as they are often to be had, fluent, and false about the picture.

        Raises:
            DataError: if there is no such row.
        """
        prompt, target = self._prompt(row)
        if not prompt.images:
            return self.with_reasoning(row)
        rng = np.random.default_rng([self.seed, SPLITS[self.split], row, 1])
        seen = [
            [LOOK_ALIKE[digit] if digit in LOOK_ALIKE and rng.random() < CARELESS_SHARE else digit for digit in line]
            for line in prompt.facts["grid"]
        ]
        _, reasoning, answer = solve(prompt.kind, seen, target)
        return prompt, _answered(reasoning, answer)

    def _prompt(self, row: int) -> tuple[Prompt, int]:
        """The prompt of a row, and the digit that a ``count`` question asks for."""
        if not 0 <= row < self.size:
            raise DataError(f"row {row} of split {self.split!r} does not exist; it has {self.size} rows")
        rng = np.random.default_rng([self.seed, SPLITS[self.split], row])
        if rng.random() < self.text_share:
            return self._text(row, rng), 0
        kind = self.kinds[rng.integers(len(self.kinds))]
        grid = rng.integers(0, SMALL if kind in ADDING_KINDS else 10, (GRID, GRID)).tolist()
        # Half of the count questions ask for a digit that is there, else the answer is nearly always 0.
        target = int(grid[rng.integers(GRID)][rng.integers(GRID)] if rng.random() < 0.5 else rng.integers(10))
        question, _, answer = solve(kind, grid, target)
        prompt = Prompt(
            id=f"{self.split}/{row}",
            question=question + FORM,
            images=(self._draw(grid, rng),),
            answer=answer,
            verifier="numeric",
            kind=kind,
            facts={"grid": grid},
        )
        return prompt, target

    def _text(self, row: int, rng: np.random.Generator) -> Prompt:
        numbers = rng.integers(0, SMALL, int(rng.integers(2, 5))).tolist()
        question = f"What is {'+'.join(map(str, numbers))}?{FORM}"
        return Prompt(f"{self.split}/{row}", question, (), str(sum(numbers)), "numeric", TEXT_KIND)

    def _draw(self, grid: list[list[int]], rng: np.random.Generator) -> np.ndarray:
        """RGB picture uint8 [32, 32, 3] of the grid, with handwriting of this split."""
        pool = digit_pool(held_out=self.split == "eval")
        rows = [np.hstack([pool[d][rng.integers(len(pool[d]))] for d in row]) for row in grid]
        scene = np.vstack(rows).repeat(2, axis=0).repeat(2, axis=1)
        return np.repeat(scene[:, :, None], 3, axis=2)
