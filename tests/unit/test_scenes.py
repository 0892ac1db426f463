"""The digit scenes: no leak from training to evaluation, right answers, faithful reasoning."""

from __future__ import annotations

import re
from collections import Counter
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skyrl.digits.scenes import (
    CARELESS_SHARE,
    DIGIT_PIXELS,
    GRID,
    LOOK_ALIKE,
    SCENE_PIXELS,
    SMALL,
    TEXT_KIND,
    DigitScenes,
    digit_pool,
    held_out_sum,
    solve,
)
from skyrl.digits.settings import PICTURE_KINDS
from skyrl.records import DataError, Prompt
from skyrl.rewards.answers import AnswerForm
from skyrl.rewards.claims import check_claims
from skyrl.rewards.verifiers import get_verifier
from skyrl.settings import AnswerConfig

ROWS = 400
SPLITS = ("train", "eval", "reward")


def handwriting(held_out: bool) -> set[bytes]:
    return {picture.tobytes() for digit in digit_pool(held_out) for picture in digit}


def tiles(picture: np.ndarray) -> list[bytes]:
    """The four digits of a scene as the 8×8 pictures they were made from."""
    small = picture[::2, ::2, 0]
    side = DIGIT_PIXELS // 2
    return [small[r : r + side, c : c + side].tobytes() for r in (0, side) for c in (0, side)]


def truth(prompt: Prompt) -> int:
    """The answer, computed from the question and the facts by other means than ``solve``."""
    numbers = [int(n) for n in re.findall(r"\d+", prompt.question.split("?")[0])]
    if not prompt.images:
        return sum(numbers)
    grid = np.array(prompt.facts["grid"])
    return int(
        {
            "sum": grid.sum(),
            "max": grid.max(),
            "min": grid.min(),
            "count": (grid == (numbers or [-1])[0]).sum(),
            "row_difference": np.ptp(grid.sum(axis=1)),
        }[prompt.kind]
    )


def test_held_out_digits_are_in_no_training_scene() -> None:
    training, held_out = handwriting(False), handwriting(True)
    assert not training & held_out
    assert len(held_out) == pytest.approx(0.2 * 1797, abs=10) and len(training) > 1400
    for split in SPLITS:
        own = held_out if split == "eval" else training
        for row in range(60):
            assert all(tile in own for tile in tiles(DigitScenes(split, 60, 0.0, 0)[row].images[0])), (split, row)


SUMS = [numbers for length in (2, 3, 4) for numbers in product(range(SMALL), repeat=length)]


def test_a_fifth_of_the_sums_of_each_length_is_held_out_and_every_number_at_every_place_in_it() -> None:
    held_out = {numbers for numbers in SUMS if held_out_sum(numbers)}
    assert Counter(map(len, held_out)) == {2: 5, 3: 25, 4: 125}  # of 25, 125 and 625
    assert {sums for sums in held_out if len(sums) == 2} == {(0, 0), (1, 2), (2, 4), (3, 1), (4, 3)}
    for length in (2, 3, 4):
        for place in range(length):
            counts = Counter(numbers[place] for numbers in held_out if len(numbers) == length)
            assert counts == dict.fromkeys(range(SMALL), 5 ** (length - 2))


def questions(split: str, size: int, text_share: float, seed: int) -> set[str]:
    scenes = DigitScenes(split, size, text_share, seed)
    return {prompt.question for prompt in map(scenes.__getitem__, range(size)) if not prompt.images}


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 2**32), st.sampled_from(["train", "reward"]))
def test_no_question_of_the_evaluation_is_one_of_training_for_any_seed(one: int, other: int, split: str) -> None:
    asked, trained = questions("eval", 150, 1.0, one), questions(split, 600, 1.0, other)
    assert len(asked) > 40 and len(trained) > 150
    assert not asked & trained


def test_every_question_is_asked_by_the_side_that_it_belongs_to() -> None:
    written = {f"What is {'+'.join(map(str, numbers))}?": held_out_sum(numbers) for numbers in SUMS}
    for split in SPLITS:
        own = {question for question, held_out in written.items() if held_out == (split == "eval")}
        assert {question.split(" Use")[0] for question in questions(split, 20_000, 1.0, 0)} == own


@pytest.mark.parametrize("split", SPLITS)
def test_pictures_show_the_facts(split: str) -> None:
    labelled = {p.tobytes(): digit for digit, ps in enumerate(digit_pool(split == "eval")) for p in ps}
    for row in range(60):
        prompt = DigitScenes(split, 60, 0.0, 1)[row]
        assert prompt.images[0].shape == (SCENE_PIXELS, SCENE_PIXELS, 3) and prompt.images[0].dtype == np.uint8
        shown = np.array([labelled[tile] for tile in tiles(prompt.images[0])]).reshape(GRID, GRID)
        assert shown.tolist() == prompt.facts["grid"]


@pytest.mark.parametrize("split", SPLITS)
def test_answers_are_right_and_reasoning_is_faithful(split: str) -> None:
    scenes, form = DigitScenes(split, ROWS, 0.15, 2), AnswerForm(AnswerConfig())
    for row in range(ROWS):
        prompt, text = scenes.with_reasoning(row)
        assert int(prompt.answer) == truth(prompt), prompt
        assert form.find(text) == prompt.answer and form.kept(text, prompt.answer) == 1.0
        assert get_verifier(prompt.verifier)(prompt.answer, prompt.answer) == 1.0
        assert get_verifier(prompt.verifier)(str(truth(prompt) + 1), prompt.answer) == 0.0
        claims = check_claims(text, prompt.facts)
        assert len(claims) == (GRID * GRID if prompt.images else 0) and all(claim.true for claim in claims)
        for left, result in re.findall(r"([\d+-]+)=(\d+)", text):
            a, sign, b = re.fullmatch(r"(\d+)([+-])(\d+)", left).groups()  # type: ignore[union-attr]
            assert (int(a) + int(b) if sign == "+" else int(a) - int(b)) == int(result), text


def test_every_kind_appears_in_its_share() -> None:
    scenes = DigitScenes("train", 2000, 0.15, 0)
    kinds = Counter(scenes[row].kind for row in range(2000))
    assert set(kinds) == {*PICTURE_KINDS, TEXT_KIND}
    assert kinds[TEXT_KIND] / 2000 == pytest.approx(0.15, abs=0.03)
    for kind in PICTURE_KINDS:
        assert kinds[kind] / 2000 == pytest.approx(0.17, abs=0.03)
    assert all(DigitScenes("train", 50, 1.0, 0)[row].images == () for row in range(50))
    assert all(DigitScenes("train", 50, 0.0, 0)[row].images for row in range(50))


def test_a_row_depends_on_seed_split_and_number_only() -> None:
    def look(prompt: Prompt) -> tuple[object, ...]:
        return prompt.question, prompt.answer, prompt.facts, [picture.tobytes() for picture in prompt.images]

    scenes = DigitScenes("train", 100, 0.15, 0)
    backwards = [look(scenes[row]) for row in reversed(range(100))][::-1]
    assert backwards == [look(DigitScenes("train", 5000, 0.15, 0)[row]) for row in range(100)]
    for other in (DigitScenes("train", 100, 0.15, 1), DigitScenes("eval", 100, 0.15, 0)):
        assert sum(look(other[row]) == backwards[row] for row in range(100)) < 10
    assert [scenes[row].id for row in (0, 99)] == ["train/0", "train/99"]


def test_what_does_not_exist() -> None:
    with pytest.raises(DataError, match="unknown split 'test' of the digit scenes; allowed"):
        DigitScenes("test", 5, 0.1, 0)
    for row in (-1, 5):
        with pytest.raises(DataError, match=f"row {row} of split 'train' does not exist; it has 5 rows"):
            DigitScenes("train", 5, 0.1, 0)[row]
    with pytest.raises(DataError, match="unknown kind of question 'mean'"):
        solve("mean", [[1, 2], [3, 4]], 1)


def test_the_careless_teacher_misreads_its_share_of_look_alikes_and_reasons_on_from_them() -> None:
    scenes = DigitScenes("train", 2000, 0.2, seed=0)
    misread = looked_at = 0
    for row in range(1000):
        prompt, careless = scenes.with_reasoning(row, careless=True)
        assert prompt.id == scenes[row].id
        if not prompt.images:
            assert careless == scenes.with_reasoning(row)[1]
            continue
        truth = [digit for line in prompt.facts["grid"] for digit in line]
        seen = [int(digit) for digit in careless.split("I see ")[1][:5].replace("/", "")]
        for real, claimed in zip(truth, seen, strict=True):
            looked_at += real in LOOK_ALIKE
            misread += real != claimed
            assert claimed in (real, LOOK_ALIKE.get(real))
        if prompt.kind == "sum":  # the answer follows from what was claimed, not from the picture
            assert careless.endswith(f"<answer>{sum(seen)}</answer>")
    assert looked_at > 500
    assert abs(misread / looked_at - CARELESS_SHARE) < 0.06


def test_a_careless_answer_is_a_pure_function_of_the_row() -> None:
    one, other = DigitScenes("train", 50, 0.2, seed=3), DigitScenes("train", 50, 0.2, seed=3)
    assert [one.with_reasoning(i, careless=True)[1] for i in range(50)] == [
        other.with_reasoning(i, careless=True)[1] for i in reversed(range(50))
    ][::-1]


def test_kinds_restrict_the_questions() -> None:
    scenes = DigitScenes("train", 60, 0.2, 0, ("max", "count"))
    assert {scenes[row].kind for row in range(60)} == {"max", "count", "text_arithmetic"}
    with pytest.raises(DataError, match="unknown kind of question 'product'; allowed: sum, max"):
        DigitScenes("train", 10, 0.0, 0, ["product"])[0]
