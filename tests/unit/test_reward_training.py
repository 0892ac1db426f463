"""Pairs by faithfulness, and the Bradley-Terry training on them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import encoder, random_model

from skyrl.digits import training
from skyrl.digits.scenes import DigitScenes
from skyrl.digits.training import build_pairs, reasoning_errors, train_reward_model
from skyrl.records import Prompt, SkyrlError
from skyrl.rewards.reward_model import RewardModel

FAITHFUL = "<think>I see 31/41. Largest is 4.</think><answer>4</answer>"


@pytest.mark.parametrize(
    ("faithful", "text", "errors"),
    [
        (FAITHFUL, FAITHFUL, 0),
        ("I see 31/41. 3+1=4", "I see 31/47. 3+1=5", 2),
        ("I see 31/41", "I see 13/14", 4),  # every place is wrong
        ("I see 31/41", "I see 31/4", 1),  # one digit is missing
        ("I see 31/41", "I see 31/411", 1),  # one too many
        ("3+1=4, 4+4=8", "3+1=4", 1),  # one step is missing
        ("3+1=4", "3+1=4, 4+4=8", 1),  # one too many
        ("3+1=4, 4+4=8", "3+1=5, 5+4=9", 2),
        ("3+1=4, 4+4=8", "3+1=4,4+4=8", 0),  # blanks say nothing
        (FAITHFUL, "<think>I see 71/41. Largest is 7.</think><answer>7</answer>", 3),
        (FAITHFUL, "<think>I see 31/41. Largest is 4.</think><answer>1</answer>", 1),
        (FAITHFUL, "<think>I see 31/41", 5),  # cut off: largest, /think, answer, 4, /answer
        (FAITHFUL, "", 7),
    ],
)
def test_reasoning_errors_by_hand(faithful: str, text: str, errors: int) -> None:
    assert reasoning_errors(faithful, text) == errors


class Letters:
    """Scenes whose faithful answer has six statements."""

    def with_reasoning(self, row: int) -> tuple[Prompt, str]:
        return Prompt(f"reward/{row}", "?", (), "1", "numeric"), "a,b,c,d,e,f"


def letters(wrong: int, mark: str = "x") -> str:
    """An answer with that many wrong statements."""
    return ",".join([mark] * wrong + list("abcdef")[wrong:])


def pairs_of(monkeypatch: pytest.MonkeyPatch, counts: list[list[int]], seed: int = 5) -> tuple[list[Any], list[Any]]:
    """Pairs built from answers with these numbers of errors (one list of four a prompt), and the sampler's calls."""
    calls: list[Any] = []
    answers = iter([letters(wrong) for own in counts for wrong in own])

    def sampler(
        _policy: Any, _encoder: Any, prompts: list[Prompt], temperature: float, new_tokens: int, seed: int
    ) -> list[str]:
        calls.append(([p.id for p in prompts], temperature, seed))
        return [next(answers) for _ in prompts]

    monkeypatch.setattr(training, "sample_answers", sampler)
    scenes: Any = Letters()
    return build_pairs(None, encoder(), scenes, len(counts), seed), calls


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([5, 0, 2, 1], [(0, 5), (0, 1), (1, 5)]),  # best and worst, best two, second and worst
        ([0, 0, 0, 1], [(0, 1), (0, 1)]),  # equally good answers are no pair
        ([0, 0, 0, 0], []),
        ([3, 1, 1, 3], []),  # both are wrong, and by about the same
        ([4, 1, 2, 2], [(1, 4)]),  # both wrong, but clearly not equally
        ([6, 6, 3, 3], [(3, 6), (3, 6)]),
        ([2, 2, 2, 2], []),
    ],
)
def test_pairs_are_answers_of_clearly_different_faithfulness(
    monkeypatch: pytest.MonkeyPatch, counts: list[int], expected: list[tuple[int, int]]
) -> None:
    pairs, _ = pairs_of(monkeypatch, [counts])
    assert [(p.id, better, worse) for p, better, worse in pairs] == [
        ("reward/0", letters(few), letters(many)) for few, many in expected
    ]


def test_every_prompt_gets_its_own_answers_and_every_call_a_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = [[0, 0, 0, 0]] * 159 + [[0, 0, 0, 4], [1, 1, 1, 5]]
    pairs, calls = pairs_of(monkeypatch, counts, seed=5)
    assert [(p.id, better, worse) for p, better, worse in pairs] == [
        *[("reward/159", letters(0), letters(4))] * 2,
        *[("reward/160", letters(1), letters(5))] * 2,
    ]
    assert [len(ids) for ids, _, _ in calls] == [480, 164]
    assert calls[0][0][:5] == ["reward/0"] * 4 + ["reward/1"]
    assert calls[1][0][-5:] == ["reward/159"] + ["reward/160"] * 4
    assert [call[1:] for call in calls] == [(1.0, 5), (1.0, 5 + 120)]


# ---------------------------------------------------------------- training


def scene_pairs(count: int) -> list[tuple[Prompt, str, str]]:
    """The faithful answer against one that reads a digit wrongly."""
    scenes = DigitScenes("reward", 2 * count, 0.0, 0)
    pairs = []
    for row in range(count):
        asked, faithful = scenes.with_reasoning(row)
        wrong = faithful.replace("I see ", "I see 0")
        pairs.append((asked, faithful, wrong))
    return pairs


def train(monkeypatch: pytest.MonkeyPatch, steps: int) -> tuple[RewardModel, float, list[float]]:
    pairs = scene_pairs(20)
    monkeypatch.setattr(training, "build_pairs", lambda *_: pairs)
    monkeypatch.setattr(training, "PAIRS_PER_STEP", 6)
    monkeypatch.setattr(training, "REWARD_LR", 3e-3)
    losses: list[float] = []
    model, accuracy = train_reward_model(
        None,
        random_model(scale=1.0),
        encoder(),
        DigitScenes("reward", 40, 0.0, 0),
        steps,
        0,
        lambda _step, loss: losses.append(loss),
    )
    return model, accuracy, losses


def test_the_prompts_that_are_answered_grow_with_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def few(_policy: Any, _encoder: Any, _scenes: Any, prompts: int, _seed: int) -> list[tuple[Prompt, str, str]]:
        asked.append(prompts)
        return scene_pairs(1)

    monkeypatch.setattr(training, "build_pairs", few)
    for steps in (4, 40, 400):
        with pytest.raises(SkyrlError, match="make 1 pairs for the reward model; allowed: 2 or more"):
            train_reward_model(None, None, encoder(), DigitScenes("reward", 1000, 0, 0), steps, 0, lambda *_: None)
    assert asked == [48, 480, 1000]  # 40 steps are the default


def margin(model: RewardModel, pair: tuple[Prompt, str, str]) -> float:
    asked, better, worse = pair
    maker = encoder()
    values = []
    for text in (better, worse):
        ids = [*maker.tokenizer(text, add_special_tokens=False)["input_ids"], maker.tokenizer.eos_token_id]
        with torch.no_grad():
            values.append(float(model(maker.collate([(asked, maker.encode(asked)[0], np.array(ids, np.int32))]))))
    return values[0] - values[1]


def test_the_first_loss_is_bradley_terry_on_the_drawn_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, losses = train(monkeypatch, 1)
    untrained = RewardModel(random_model(scale=1.0), encoder(), likelihood=True)  # the same seed draws the same head
    chosen = np.random.default_rng(0).integers(0, 18, 6)
    margins = [margin(untrained, scene_pairs(20)[2 + i]) for i in chosen]  # the first tenth is held out
    expected = np.mean([math.log(1 + math.exp(-m)) for m in margins])
    assert losses == [pytest.approx(expected, abs=1e-4)]


def test_the_loss_falls_and_the_accuracy_is_of_held_out_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    model, accuracy, losses = train(monkeypatch, 10)
    assert len(losses) == 10
    assert np.mean(losses[-3:]) < 0.8 * losses[0]
    assert not model.training and model.likelihood
    assert accuracy == np.mean([margin(model, pair) > 0 for pair in scene_pairs(20)[:2]])
