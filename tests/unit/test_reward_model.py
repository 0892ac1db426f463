"""The reward model on random weights: what its head sees, files, batches."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import answer_ids, encoder, noise, processor, prompt, random_model

from skyrl.data.encode import EncodedBatch, PromptEncoder
from skyrl.models.digits_architecture import build_processor
from skyrl.models.reward_model import HEAD_FILE, LIKELIHOOD_SCALES, GroupScorer, RewardModel
from skyrl.types import Prompt, Sample, SampleGroup, SkyrlError

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


def test_a_folder_without_a_head_is_no_reward_model(tmp_path: Path) -> None:
    reward_model(False).save(tmp_path)
    (tmp_path / HEAD_FILE).unlink()
    with pytest.raises(SkyrlError, match=rf"model\.reward=.* is no reward model: {HEAD_FILE} is missing there"):
        RewardModel.load(str(tmp_path))


# ---------------------------------------------------------------- groups


class Watched(RewardModel):
    """Notes the shape of every batch."""

    shapes: list[tuple[int, ...]]

    def forward(self, batch: EncodedBatch) -> torch.Tensor:
        self.shapes.append(tuple(batch.input_ids.shape))
        return super().forward(batch)


def watched() -> Watched:
    torch.manual_seed(1)
    model = Watched(random_model(), encoder(), likelihood=True)
    model.shapes = []
    return model.eval()


def sample(index: int, ids: np.ndarray, text: str = "") -> Sample:
    return Sample(index, ids, np.zeros(len(ids), np.float32), text, False, 0)


def groups() -> list[SampleGroup]:
    """Groups of 3, 1 and 2 samples whose lengths go up and down."""
    maker = encoder()
    texts = [[ANSWERS[0], ANSWERS[1], ANSWERS[2]], [ANSWERS[1] * 9], [ANSWERS[2], ANSWERS[0]]]
    return [
        SampleGroup(p, maker.encode(p)[0], [sample(i, answer_ids(text), text) for i, text in enumerate(own)])
        for p, own in zip(QUESTIONS, texts, strict=True)
    ]


def test_groups_are_scored_in_batches_and_come_back_in_order() -> None:
    model = watched()
    scorer = GroupScorer(model, 4, encoder())
    assert scorer.same_tokens
    got = scorer.score(groups())
    assert [part.shape for part in got] == [(3,), (1,), (2,)]
    assert all(part.dtype == np.float64 for part in got)
    assert [shape[0] for shape in model.shapes] == [4, 2]
    assert model.shapes[0][1] < model.shapes[1][1]  # sorted by length, so that short rows aren't padded to long ones
    for group, part in zip(groups(), got, strict=True):
        for one, score in zip(group.samples, part, strict=True):
            alone = scores(model, [(group.prompt, group.prompt_ids, one.token_ids)])
            assert score == pytest.approx(float(alone), abs=1e-4)
    assert scorer.score([]) == []


def test_a_reward_model_with_another_tokenizer_reads_the_text() -> None:
    other = build_processor()
    other.tokenizer.add_tokens(["zebra"])
    model = watched()
    scorer = GroupScorer(model, 4, PromptEncoder(other))
    assert not scorer.same_tokens
    strange = groups()
    for group in strange:
        group.prompt_ids = np.arange(3, dtype=np.int32)  # ids of a vocabulary that the reward model doesn't know
        for one in group.samples:
            one.token_ids = np.full(2, 999_999, dtype=np.int32)
    got = np.concatenate(scorer.score(strange))
    expected: list[Any] = [expected_score(model, row) for row in _rows_of(groups())]
    np.testing.assert_allclose(got, expected, atol=1e-4, rtol=1e-4)


def test_a_truncated_answer_gets_no_end_of_sequence_also_when_it_is_read_as_text() -> None:
    other = build_processor()
    other.tokenizer.add_tokens(["zebra"])
    model, group = watched(), groups()[0]
    for one in group.samples:
        one.truncated, one.token_ids = True, answer_ids(one.text, end=False)
    same, read = (GroupScorer(model, 4, maker).score([group])[0] for maker in (encoder(), PromptEncoder(other)))
    np.testing.assert_allclose(read, same, atol=1e-4)


def test_a_reward_model_of_the_same_vocabulary_sees_its_own_chat_template() -> None:
    """Its prompt may be rendered in another way than the policy's; only the answer's tokens are shared."""
    model, theirs = watched(), groups()
    for group in theirs:
        group.prompt_ids = np.insert(group.prompt_ids, 0, processor().tokenizer.eos_token_id)
    got = GroupScorer(model, 4, encoder()).score(theirs)
    own = GroupScorer(model, 4, encoder()).score(groups())
    np.testing.assert_array_equal(np.concatenate(got), np.concatenate(own))


def _rows_of(some: list[SampleGroup]) -> list[Row]:
    assert all(one.token_ids[-1] == processor().tokenizer.eos_token_id for group in some for one in group.samples)
    return [(group.prompt, group.prompt_ids, one.token_ids) for group in some for one in group.samples]
