"""The reward model on random weights: what its head sees, and files."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import answer_ids, encoder, noise, prompt, random_model

from skyrl.records import Prompt, SkyrlError
from skyrl.rewards.reward_model import HEAD_FILE, LIKELIHOOD_SCALES, RewardModel

Row = tuple[Prompt, np.ndarray, np.ndarray]

QUESTIONS = [
    prompt("picture", noise(1)),
    prompt("text", question="What is 3+4?"),
    prompt("pictures", noise(2), noise(3), question="What is the largest digit?"),
]
ANSWERS = [
    "<think>I see 31/41. 3+1=4, 4+4=8, 8+1=9.</think><answer>9</answer>",
    "7",
    "<think>Largest is 5.</think><answer>5</answer>",
]


@lru_cache(maxsize=2)
def reward_model(likelihood: bool) -> RewardModel:
    torch.manual_seed(1)
    model = RewardModel(random_model(), encoder(), likelihood)
    with torch.no_grad():  # all inputs of the head must show in the score
        model.head.weight.copy_(torch.randn_like(model.head.weight))
        model.head.bias.fill_(0.3)
    return model.eval()


def rows() -> list[Row]:
    maker = encoder()
    return [(p, maker.encode(p)[0], answer_ids(text)) for p, text in zip(QUESTIONS, ANSWERS, strict=True)]


@torch.no_grad()
def scores(model: RewardModel, some: list[Row]) -> torch.Tensor:
    return model(model.encoder.collate(some))


@torch.no_grad()
def expected_score(model: RewardModel, row: Row) -> float:
    """The definition, step by step, for one row without any padding."""
    batch = encoder().collate([row])
    out = model.model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True, **batch.pictures
    )
    features = out.hidden_states[-1][0, -1]
    if model.likelihood:
        logprobs = out.logits[0].log_softmax(-1)
        start, ids = len(row[1]), row[2]
        own = [float(logprobs[start + t - 1, int(token)]) for t, token in enumerate(ids)]
        likelihoods = [sum(own), sum(own) / len(own), min(own)]
        scaled = [value * scale for value, scale in zip(likelihoods, LIKELIHOOD_SCALES, strict=True)]
        features = torch.cat([features, torch.tensor(scaled)])
    return float(model.head.weight[0] @ features + model.head.bias)


@pytest.mark.parametrize("likelihood", [False, True])
def test_the_score_is_the_head_on_the_last_token_and_the_likelihoods(likelihood: bool) -> None:
    model = reward_model(likelihood)
    expected = [expected_score(model, row) for row in rows()]
    torch.testing.assert_close(scores(model, rows()), torch.tensor(expected), atol=1e-4, rtol=1e-4)
    assert np.ptp(expected) > 0.1


@pytest.mark.parametrize("likelihood", [False, True])
def test_scores_do_not_depend_on_neighbours_or_padding(likelihood: bool) -> None:
    model = reward_model(likelihood)
    together = scores(model, rows())
    alone = torch.cat([scores(model, [row]) for row in rows()])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-5)
    with torch.no_grad():
        wide = model(model.encoder.collate(rows(), length=100))
    torch.testing.assert_close(wide, alone, atol=1e-4, rtol=1e-5)
    backwards = scores(model, rows()[::-1]).flip(0)
    torch.testing.assert_close(backwards, alone, atol=1e-4, rtol=1e-5)


def test_a_likelier_answer_starts_as_a_better_one() -> None:
    model = RewardModel(random_model(), encoder(), likelihood=True)
    assert model.head.weight[0, -3:].tolist() == [1.0, 1.0, 1.0]
    assert model.head.weight[0, :-3].abs().max() < 0.1
    assert model.head.bias.tolist() == [0.0]


@pytest.mark.parametrize("likelihood", [False, True])
def test_what_is_saved_and_loaded_scores_the_same(likelihood: bool, tmp_path: Path) -> None:
    model = reward_model(likelihood)
    model.save(tmp_path)
    loaded = RewardModel.load(str(tmp_path))
    assert loaded.likelihood is likelihood
    assert not loaded.training
    assert loaded.encoder.processor is not model.encoder.processor
    assert torch.equal(scores(loaded, rows()), scores(model, rows()))


def test_the_stop_tokens_of_a_saved_reward_model_are_its_bodys(tmp_path: Path) -> None:
    model = RewardModel(random_model(), encoder())
    own, other = encoder().turn_end_id, encoder().tokenizer.convert_tokens_to_ids("<global-img>")
    model.model.generation_config.eos_token_id = [own, other]
    model.save(tmp_path)
    loaded = RewardModel.load(str(tmp_path)).encoder
    assert loaded.stop_token_ids == tuple(sorted([own, other])) and loaded.turn_end_id == own


def test_a_folder_without_a_head_is_no_reward_model(tmp_path: Path) -> None:
    reward_model(False).save(tmp_path)
    (tmp_path / HEAD_FILE).unlink()
    with pytest.raises(SkyrlError, match=rf"model\.reward=.* is no reward model: {HEAD_FILE} is missing there"):
        RewardModel.load(str(tmp_path))
