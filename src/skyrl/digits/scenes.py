"""Digit scenes: real handwritten digits, two by two in one picture, with a question about them.

scikit-learn ships 1,797 handwritten digits of 8×8 pixels (the UCI optical recognition set). They are split once, for
every seed, into *training digits* and *held-out digits*; a held-out scene shows only handwriting that no training scene
ever showed. The sums asked without a picture are split likewise (:func:`held_out_sum`). Row ``i`` of a split is a pure
function of ``(seed, split, i)``, so a scene needs no storage, any worker can draw it, and a resumed run sees the same
ones. What is in the picture is known, so every claim about it can be checked exactly (``Prompt.facts``).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from skyrl.digits.settings import PICTURE_KINDS
from skyrl.records import DataError, Prompt
from skyrl.settings import Config

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
"""Where numbers are added they are below this: a small model shall read and reason, not learn a table of sums."""
LOOK_ALIKE = {3: 2, 7: 1, 8: 9}
"""What a careless eye takes these digits for."""
CARELESS_SHARE = 0.6
"""Share of such digits that the careless teacher misreads: above one half, so that a policy taught by it prefers the
wrong digit, and well below one, so that it still knows the right one."""
SPLITS = {"train": 0, "eval": 1, "reward": 2}
"""``reward`` draws other scenes of the training digits: the reward model's own training set."""
HELD_OUT = "eval"
"""The split that shows held-out digits and asks held-out sums, and nothing else does."""


@lru_cache(maxsize=2)
def digit_pool(held_out: bool) -> list[np.ndarray]:
    """Pictures of each digit 0-9, ``[n, 8, 8]`` uint8, from the training or the held-out handwriting.

    The split is stratified and fixed: it doesn't depend on any seed, so that no setting can leak a held-out digit.
    """
    from sklearn.datasets import load_digits

    scanned, pool = load_digits(), []
    images = (scanned.images / 16.0 * 255.0).astype(np.uint8)
    for digit in range(10):
        rows = np.random.default_rng(digit).permutation(np.flatnonzero(scanned.target == digit))
        cut = int(len(rows) * HELD_OUT_SHARE)
        pool.append(images[rows[:cut] if held_out else rows[cut:]])
    return pool


def held_out_sum(numbers: Sequence[int]) -> bool:
    """True for the fifth of the sums of each length that only :data:`HELD_OUT` asks.

    A fixed rule, so that no seed can leak one. Each number below :data:`SMALL` stands equally often at each place of
    the held-out sums, so they are no harder than the others.
    """
    return sum(place * number for place, number in enumerate(numbers, start=1)) % SMALL == 0


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
    if kind == "sum":
        question, work, answer = "What is the sum of the digits?", _chain(digits), sum(digits)
    elif kind == "max":
        question, answer = "What is the largest digit?", max(digits)
        work = f"Largest is {answer}"
    elif kind == "min":
        question, answer = "What is the smallest digit?", min(digits)
        work = f"Smallest is {answer}"
    elif kind == "count":
        question, answer = f"How many digits are {target}?", digits.count(target)
        work = f"{target} comes {answer} times"
    elif kind == "row_difference":
        low, *_, high = sorted(map(sum, grid))
        question, answer = "What is the difference of the row sums?", high - low
        work = f"{', '.join(map(_chain, grid))}, {high}-{low}={answer}"
    else:
        raise DataError(f"unknown kind of question {kind!r}; allowed: {', '.join(PICTURE_KINDS)}")
    read = "/".join("".join(map(str, row)) for row in grid)
    return question, f"I see {read}. {work}.", str(answer)


class DigitScenes:
    """A random-access data set of digit scenes and a share of text-only arithmetic.

    Args:
        split: ``train``, ``eval`` (held-out handwriting and sums) or ``reward``.
        text_share: Share of rows without a picture.
        kinds: Kinds of question about a picture, some of :data:`PICTURE_KINDS`; an unknown one fails when it is asked.

    Raises:
        DataError: for an unknown split.
    """

    def __init__(
        self, split: str, size: int, text_share: float, seed: int, kinds: Sequence[str] = PICTURE_KINDS
    ) -> None:
        if split not in SPLITS:
            raise DataError(f"unknown split {split!r} of the digit scenes; allowed: {', '.join(SPLITS)}")
        self.split, self.size, self.text_share, self.seed = split, size, text_share, seed
        self.kinds = tuple(kinds)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, row: int) -> Prompt:
        return self._prompt(row)[0]

    def identity(self) -> dict[str, Any]:
        """What decides which prompt a row is, besides split and row."""
        return {"seed": self.seed, "text_share": self.text_share, "kinds": list(self.kinds)}

    def with_reasoning(self, row: int, careless: bool = False) -> tuple[Prompt, str]:
        """Row ``row`` and a faithful answer to it, or a ``careless`` one, of a teacher who takes some digits for their
        look-alikes and reasons on from there: fluent, and false about the picture.

        Raises:
            DataError: if there is no such row.
        """
        prompt, numbers = self._prompt(row)
        reasoning, answer = f"{_chain(numbers)}.", prompt.answer
        if prompt.images:
            seen = self._misread(row, prompt.facts["grid"]) if careless else prompt.facts["grid"]
            _, reasoning, answer = solve(prompt.kind, seen, numbers[0])
        return prompt, f"<think>{reasoning}</think><answer>{answer}</answer>"

    def _misread(self, row: int, grid: list[list[int]]) -> list[list[int]]:
        rng = np.random.default_rng([self.seed, SPLITS[self.split], row, 1])
        return [
            [LOOK_ALIKE[digit] if digit in LOOK_ALIKE and rng.random() < CARELESS_SHARE else digit for digit in line]
            for line in grid
        ]

    def _prompt(self, row: int) -> tuple[Prompt, list[int]]:
        """The prompt of a row; and the numbers that it adds, or with a picture the digit that a ``count`` asks for."""
        if not 0 <= row < self.size:
            raise DataError(f"row {row} of split {self.split!r} does not exist; it has {self.size} rows")
        rng, name = np.random.default_rng([self.seed, SPLITS[self.split], row]), f"{self.split}/{row}"
        if rng.random() < self.text_share:
            numbers = self._sum(rng)
            question = f"What is {'+'.join(map(str, numbers))}?{FORM}"
            return Prompt(name, question, (), str(sum(numbers)), "numeric", TEXT_KIND), numbers
        kind = self.kinds[rng.integers(len(self.kinds))]
        grid = rng.integers(0, SMALL if kind in ADDING_KINDS else 10, (GRID, GRID)).tolist()
        # Half of the count questions ask for a digit that is there, else the answer is nearly always 0.
        target = int(grid[rng.integers(GRID)][rng.integers(GRID)] if rng.random() < 0.5 else rng.integers(10))
        question, _, answer = solve(kind, grid, target)
        picture = self._draw(grid, rng)
        return Prompt(name, question + FORM, (picture,), answer, "numeric", kind, {"grid": grid}), [target]

    def _sum(self, rng: np.random.Generator) -> list[int]:
        """Numbers to add without a picture, from this split's part of them."""
        while True:
            numbers: list[int] = rng.integers(0, SMALL, int(rng.integers(2, 5))).tolist()
            if held_out_sum(numbers) == (self.split == HELD_OUT):
                return numbers

    def _draw(self, grid: list[list[int]], rng: np.random.Generator) -> np.ndarray:
        """RGB picture uint8 [32, 32, 3] of the grid, with handwriting of this split."""
        pool = digit_pool(held_out=self.split == HELD_OUT)
        rows = [np.hstack([pool[d][rng.integers(len(pool[d]))] for d in row]) for row in grid]
        scene = np.vstack(rows).repeat(2, axis=0).repeat(2, axis=1)
        return np.repeat(scene[:, :, None], 3, axis=2)


def datasets(cfg: Config) -> dict[str, DigitScenes]:
    """``data.source=digits``: ``digits.train_size`` scenes to train on, ``data.eval_size`` held-out ones."""
    digits, sizes = cfg.digits, {"train": cfg.digits.train_size, "eval": cfg.data.eval_size}
    return {
        name: DigitScenes(name, size, digits.text_share, cfg.data.seed, digits.kinds) for name, size in sizes.items()
    }
