"""Scores of whole groups: forests must give what whole rows give, and run nothing twice."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import answer_ids, encoder, noise, processor, prompt, random_model

from skyrl.digits.architecture import CHAT_TEMPLATE, build_processor
from skyrl.policy.encode import PromptEncoder
from skyrl.policy.packing import forest_tokens
from skyrl.records import DataError, Sample, SampleGroup
from skyrl.rewards import group_scorer
from skyrl.rewards.group_scorer import GroupScorer
from skyrl.rewards.reward_model import RewardModel

READS = "<think>I see 31/41. 3+1=4, 4+4=8, 8+1=9.</think><answer>9</answer>"
LARGEST = "<think>Largest is 5.</think><answer>5</answer>"
TEXTS = [
    (prompt("picture", noise(1)), [READS, "7", LARGEST]),
    (prompt("text", question="What is 3+4?"), ["7" * 9]),
    (prompt("pictures", noise(2), noise(3), question="What is the largest digit?"), [LARGEST, READS]),
    (prompt("long", noise(4), question="What is the sum of the digits? " * 3), ["7", READS * 2, "It is 7", LARGEST]),
    (prompt("none"), []),
]


def reward_model(body: Any = None, maker: PromptEncoder | None = None, likelihood: bool = True) -> RewardModel:
    torch.manual_seed(1)
    model = RewardModel(body or random_model(), maker or encoder(), likelihood)
    with torch.no_grad():  # all inputs of the head must show in the score
        model.head.weight.copy_(torch.randn_like(model.head.weight))
        model.head.bias.fill_(0.3)
    return model.eval()


def sample(index: int, ids: np.ndarray, text: str = "", truncated: bool = False) -> Sample:
    return Sample(index, ids, np.zeros(len(ids), np.float32), text, truncated, 0)


def groups(prompts: Sequence[str] = ()) -> list[SampleGroup]:
    """Groups of 3, 1, 2, 4 and 0 samples (or those named), whose lengths go up and down; every third is truncated."""
    maker = encoder()
    return [
        SampleGroup(
            p,
            maker.encode(p)[0],
            [sample(i, answer_ids(t, end=i % 3 != 1), t, truncated=i % 3 == 1) for i, t in enumerate(texts)],
        )
        for p, texts in TEXTS
        if not prompts or p.id in prompts
    ]


@torch.no_grad()
def alone(model: RewardModel, some: list[SampleGroup]) -> list[float]:
    """The definition: each whole row for itself, without padding or a cache."""
    rows = [(g.prompt, model.encoder.encode(g.prompt)[0], s.token_ids) for g in some for s in g.samples]
    return [float(model(model.encoder.collate([row]))) for row in rows]


def assert_scores(got: list[np.ndarray], expected: list[float]) -> None:
    flat = np.concatenate(got)
    np.testing.assert_allclose(flat, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    assert np.ptp(expected) > 0.1


class Passes:
    """Notes the rows and columns of each pass of a body, and counts the pictures."""

    def __init__(self, model: Any) -> None:
        self.seen: list[tuple[int, ...]] = []
        self.pictures = 0
        model.base_model.register_forward_pre_hook(self._body, with_kwargs=True)
        model.base_model.vision_model.register_forward_pre_hook(self._vision, with_kwargs=True)

    def _body(self, _module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        self.seen.append(tuple(kwargs["input_ids"].shape))

    def _vision(self, _module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        self.pictures += len(kwargs["pixel_values"])


# ---------------------------------------------------------------- equality with whole rows


@pytest.mark.parametrize("likelihood", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_scores_are_those_of_whole_rows(likelihood: bool, batch_size: int) -> None:
    model = reward_model(likelihood=likelihood)
    scorer = GroupScorer(model, batch_size, encoder())
    assert scorer.same_tokens
    got = scorer.score(groups())
    assert scorer.forests
    assert [part.shape for part in got] == [(3,), (1,), (2,), (4,), (0,)]
    assert all(part.dtype == np.float64 for part in got)
    assert_scores(got, alone(model, groups()))
    scorer.forests = False
    assert_scores(scorer.score(groups()), alone(model, groups()))
    assert scorer.score([]) == []


def test_every_prompt_picture_and_common_beginning_is_computed_once() -> None:
    model = reward_model()
    scorer = GroupScorer(model, 64, encoder())
    passes = Passes(model.model)
    some = groups()
    some[0].samples += [sample(3 + i, one.token_ids, "", one.truncated) for i, one in enumerate(some[0].samples)]
    scores = scorer.score(some)
    np.testing.assert_array_equal(scores[0][:3], scores[0][3:])
    rows = [(group.prompt, group.prompt_ids, one.token_ids) for group in groups() for one in group.samples]
    assert passes.seen == [(1, forest_tokens(rows))]
    assert passes.pictures == 4
    assert forest_tokens(rows) < sum(len(group.prompt_ids) for group in some) + sum(len(row[2]) for row in rows)


@pytest.mark.parametrize("shares", [True, False])
def test_no_pass_has_more_than_the_tokens_of_so_many_rows(shares: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = reward_model()
    scorer = GroupScorer(model, 2, encoder())
    scorer.forests = shares
    passes = Passes(model.model)
    longest = max(len(group.prompt_ids) + len(one.token_ids) for group in groups() for one in group.samples)
    scorer.score(groups())
    assert len(passes.seen) > 1
    assert all(rows * columns <= 2 * longest for rows, columns in passes.seen)
    monkeypatch.setattr(group_scorer, "FOREST_TOKENS", 1)
    passes.seen.clear()
    scorer.score(groups())
    assert len(passes.seen) == (10 if shares else 5)  # a row that is larger still runs


@pytest.mark.parametrize("shares", [True, False])
def test_an_answer_with_a_picture_placeholder_is_refused(shares: bool) -> None:
    some = groups()
    some[2].samples[1].token_ids[3] = processor().image_token_id
    scorer = GroupScorer(reward_model(), 4, encoder())
    scorer.forests = shares
    with pytest.raises(DataError, match=r"prompt 'pictures': an answer contains picture placeholders"):
        scorer.score(some)


def test_a_cut_off_answer_without_a_token_counts_as_one_that_ended() -> None:
    model = reward_model()
    some, ended = groups(["text"]), groups(["text"])
    some[0].samples[0] = sample(0, np.zeros(0, np.int32), "", truncated=True)
    ended[0].samples[0] = sample(0, encoder().ended([]), "")
    got = GroupScorer(model, 4, encoder()).score(some)
    np.testing.assert_allclose(got[0], alone(model, ended), rtol=1e-5)


# ---------------------------------------------------------------- the trial; other architectures: models/forests.py


def test_a_body_that_scores_otherwise_in_forests_is_found_out(caplog: pytest.LogCaptureFixture) -> None:
    model = reward_model()
    forward = model.model.base_model.text_model.forward

    def without_positions(**kwargs: Any) -> Any:
        return forward(**kwargs | {"position_ids": None})

    model.model.base_model.text_model.forward = without_positions
    with caplog.at_level(logging.WARNING):
        scorer = GroupScorer(model, 4, encoder())
    assert not scorer.forests
    assert_scores(scorer.score(groups()), alone(model, groups()))
    (record,) = caplog.records
    said = record.getMessage()
    assert said.startswith("the reward model runs each answer in a row of its own: its answers' tokens differ by")


def test_positions_that_depend_on_the_longest_row_stay_in_rows_of_like_length() -> None:
    model = reward_model()
    model.model.config.get_text_config().rope_parameters |= {"rope_type": "dynamic"}
    assert not GroupScorer(model, 4, encoder()).forests


def test_scores_that_are_not_finite_stay_so() -> None:
    model = reward_model()
    with torch.no_grad():
        model.model.base_model.text_model.norm.weight.fill_(torch.nan)
    assert np.isnan(np.concatenate(GroupScorer(model, 4, encoder()).score(groups()))).all()


# ---------------------------------------------------------------- tokenizers


def test_a_reward_model_with_another_tokenizer_reads_the_text() -> None:
    other = build_processor()
    other.tokenizer.add_tokens(["zebra"])
    model = reward_model()
    scorer = GroupScorer(model, 4, PromptEncoder(other))
    assert not scorer.same_tokens
    strange = groups()
    for group in strange:
        group.prompt_ids = np.arange(3, dtype=np.int32)  # ids of a vocabulary that the reward model doesn't know
        for one in group.samples:
            one.token_ids = np.full(2, 999_999, dtype=np.int32)
    # A truncated answer gets no end of sequence, as in its own ids.
    assert_scores(scorer.score(strange), alone(model, groups()))


def test_a_reward_model_of_the_same_vocabulary_sees_its_own_chat_template() -> None:
    """Its prompt may be rendered in another way than the policy's; only the answer's tokens are shared."""
    model, theirs = reward_model(), groups()
    for group in theirs:
        group.prompt_ids = np.insert(group.prompt_ids, 0, processor().tokenizer.eos_token_id)
    got = GroupScorer(model, 4, encoder()).score(theirs)
    own = GroupScorer(model, 4, encoder()).score(groups())
    np.testing.assert_array_equal(np.concatenate(got), np.concatenate(own))


# ---------------------------------------------------------------- how answers end, and begin


def with_template(template: str, **kwargs: Any) -> PromptEncoder:
    other = copy.deepcopy(processor())
    other.chat_template = template
    return PromptEncoder(other, **kwargs)


def test_an_answer_ends_as_the_reward_models_own_do_whatever_ended_it() -> None:
    """Its head reads the last token; a policy may have stop tokens that the reward model never saw there."""
    model = reward_model()
    stops = [processor().tokenizer.convert_tokens_to_ids(token) for token in ("<pad>", "<global-img>", "1")]
    scorer = GroupScorer(model, 4, PromptEncoder(processor(), stop_ids=stops))
    assert scorer.same_tokens
    ended = groups()
    for group in ended:
        for one in group.samples:
            if not one.truncated:
                one.token_ids[-1] = stops[one.index % 3]
    assert_scores(scorer.score(ended), alone(model, groups()))
    cut = groups()  # in the middle, and at the end of a truncated answer, a stop token stays what it is
    for group in cut:
        for one in group.samples:
            one.token_ids[-1 if one.truncated else 0] = stops[2]
    assert_scores(scorer.score(cut), alone(model, cut))


THINKS = CHAT_TEMPLATE.replace("<assistant>{% endif %}", "<assistant><think>{% endif %}")


@pytest.mark.parametrize(("own", "policys"), [(CHAT_TEMPLATE, THINKS), (THINKS, CHAT_TEMPLATE), (THINKS, THINKS)])
def test_the_reasoning_is_opened_once_whichever_template_opens_it(own: str, policys: str) -> None:
    model = reward_model(maker=with_template(own))
    policy = with_template(policys)
    scorer = GroupScorer(model, 4, policy)
    assert scorer.same_tokens is (own == policys)
    some, whole = groups(), groups()
    for theirs, ours in zip(some, whole, strict=True):
        for one, full in zip(theirs.samples, ours.samples, strict=True):
            if policys == THINKS:
                one.text = one.text.removeprefix("<think>")
                one.token_ids = answer_ids(one.text, end=not one.truncated)
            full.text = policy.answer_prefix + one.text
            full.token_ids = answer_ids(full.text.removeprefix(model.encoder.answer_prefix), end=not one.truncated)
    assert_scores(scorer.score(some), alone(model, whole))


def test_another_variant_of_a_prompt_is_another_prompt() -> None:
    model = reward_model()
    some = [group for name in ("picture", "pictures") for group in groups([name])]
    for group, variant in zip(groups(["picture", "pictures"]), ("blind", "masked"), strict=True):
        other = replace(group.prompt, images=group.prompt.images[:-1], variant=variant)
        some.append(SampleGroup(other, encoder().encode(other)[0], group.samples))
    for shares in (True, False):
        scorer = GroupScorer(model, 4, encoder())
        scorer.forests = shares
        got = scorer.score(some)
        assert_scores(got, alone(model, some))
        assert abs(got[0] - got[2]).min() > 1e-3 and abs(got[1] - got[3]).min() > 1e-3
