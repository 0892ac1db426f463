"""Scores of whole groups: one pass per prompt and one per distinct answer must give what whole rows give."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from tiny_models import answer_ids, encoder, noise, processor, prompt, random_model

from skyrl.digits.architecture import CHAT_TEMPLATE, build_processor
from skyrl.policy.encode import EncodedBatch, PromptEncoder
from skyrl.records import DataError, Prompt, Sample, SampleGroup
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
    """Notes each pass of a body: rows, columns and whether it goes on from a cache; and the pictures."""

    def __init__(self, model: Any) -> None:
        self.seen: list[tuple[int, int, bool]] = []
        self.pictures = 0
        model.base_model.register_forward_pre_hook(self._body, with_kwargs=True)
        model.base_model.vision_model.register_forward_pre_hook(self._vision, with_kwargs=True)

    def _body(self, _module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        self.seen.append((*kwargs["input_ids"].shape, kwargs.get("past_key_values") is not None))

    def _vision(self, _module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        self.pictures += len(kwargs["pixel_values"])

    def take(self) -> list[tuple[int, int, bool]]:
        seen, self.seen = self.seen, []
        return seen


# ---------------------------------------------------------------- equality with whole rows


@pytest.mark.parametrize("likelihood", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_scores_are_those_of_whole_rows(likelihood: bool, batch_size: int) -> None:
    model = reward_model(likelihood=likelihood)
    scorer = GroupScorer(model, batch_size, encoder())
    assert scorer.same_tokens
    got = scorer.score(groups())
    assert scorer.shares_prompts
    assert [part.shape for part in got] == [(3,), (1,), (2,), (4,), (0,)]
    assert all(part.dtype == np.float64 for part in got)
    assert_scores(got, alone(model, groups()))
    scorer.shares_prompts = False
    assert_scores(scorer.score(groups()), alone(model, groups()))
    assert scorer.score([]) == []


def test_every_prompt_picture_and_distinct_answer_is_computed_once() -> None:
    model = reward_model()
    passes = Passes(model.model)
    scorer = GroupScorer(model, 4, encoder())
    some = groups()
    some[0].samples += [sample(3 + i, one.token_ids, "", one.truncated) for i, one in enumerate(some[0].samples)]
    first = scorer.score(some)
    np.testing.assert_array_equal(first[0][:3], first[0][3:])
    passes.take()
    passes.pictures = 0

    again = scorer.score(some)  # nothing to compare any more
    seen = passes.take()
    assert passes.pictures == 4
    # four prompts, then their ten different answers, never more than four together
    assert [(rows, cached) for rows, _, cached in seen] == [(4, False), (4, True), (4, True), (2, True)]
    assert seen[1][1] < seen[2][1] < seen[3][1]  # short answers aren't padded to long ones
    np.testing.assert_array_equal(np.concatenate(again), np.concatenate(first))


@pytest.mark.parametrize("shares", [True, False])
def test_an_answer_with_a_picture_placeholder_is_refused(shares: bool) -> None:
    some = groups()
    some[2].samples[1].token_ids[3] = processor().image_token_id
    scorer = GroupScorer(reward_model(), 4, encoder())
    scorer.shares_prompts = shares
    with pytest.raises(DataError, match=r"prompt 'pictures': an answer contains picture placeholders"):
        scorer.score(some)


def test_left_padding_moves_token_types_with_their_tokens_and_no_pictures() -> None:
    ids = torch.tensor([[5, 6, 0, 0], [7, 8, 9, 0]])
    pixels = torch.randn(2, 3)
    batch = EncodedBatch(ids, (ids > 0).long(), ids > 8, {"token_type_ids": ids * 10, "pixel_values": pixels})
    left = group_scorer._left_padded(batch)
    assert left.input_ids.tolist() == [[0, 0, 5, 6], [0, 7, 8, 9]]
    assert left.attention_mask.tolist() == [[0, 0, 1, 1], [0, 1, 1, 1]]
    assert left.answer_mask.nonzero().tolist() == [[1, 3]]
    assert left.pictures["token_type_ids"].tolist() == [[0, 0, 50, 60], [0, 70, 80, 90]]
    assert left.pictures["pixel_values"] is pixels


# ---------------------------------------------------------------- other architectures


class FakeProcessor:
    """As much of a processor as an encoder with ready-made prompts needs."""

    image_token, image_token_id = "<image>", 63
    chat_template = "{{ messages[0]['content'] }}="

    @staticmethod
    def apply_chat_template(messages: list[dict[str, Any]], **_: Any) -> str:
        return "".join(part["text"] for message in messages for part in message["content"] if "text" in part) + "="

    class tokenizer:
        pad_token_id, eos_token_id = 0, 1
        all_special_ids, all_special_tokens = [0, 1], ["<pad>", "</s>"]
        added_tokens_decoder: ClassVar[dict[int, Any]] = {}

        def __new__(cls, text: str, **_: Any) -> Any:
            return {"input_ids": [2] * len(text)}

        @staticmethod
        def convert_ids_to_tokens(one: int) -> str:
            return f"<{one}>"

        @staticmethod
        def get_vocab() -> dict[str, int]:
            return {"a": 0}


SIZES: dict[str, Any] = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    pad_token_id=0,
    bos_token_id=None,
    eos_token_id=1,
)


def qwen_vl() -> Any:
    """Positions along three axes."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = dict(depth=1, hidden_size=32, intermediate_size=64, num_heads=2, patch_size=4, window_size=16)
    vision |= dict(spatial_merge_size=2, temporal_patch_size=2, fullatt_block_indexes=[0], out_hidden_size=32)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config=SIZES | {"rope_parameters": rope},
            vision_config=vision,
            image_token_id=63,
            video_token_id=62,
            vision_start_token_id=61,
            vision_end_token_id=60,
        )
    )


def sliding() -> Any:
    """Attention to the last 8 tokens only."""
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=8))


def recurrent() -> Any:
    """Convolutions between the attention layers."""
    from transformers import Lfm2Config, Lfm2ForCausalLM

    return Lfm2ForCausalLM(Lfm2Config(**SIZES, layer_types=["conv", "full_attention"]))


def length_scaled() -> Any:
    """Rotary positions that depend on the longest row."""
    from transformers import LlamaConfig, LlamaForCausalLM

    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    return LlamaForCausalLM(LlamaConfig(**SIZES, max_position_embeddings=256, rope_parameters=rope))


def other_groups(maker: PromptEncoder, pictured: bool) -> list[SampleGroup]:
    """Six groups of random tokens; with ``pictured`` every second prompt has a picture of 2×4 or 4×6 patches."""
    rng = np.random.default_rng(0)
    some = []
    for g in range(6):
        ids, pictures = rng.integers(2, 60, int(rng.integers(3, 30))), {}
        if pictured and g % 2:
            height, width = (2, 4) if g == 1 else (4, 6)
            ids = np.concatenate([ids[:2], [61], [63] * (height * width // 4), [60], ids[2:]])
            pictures = {
                "pixel_values": torch.from_numpy(rng.normal(size=(height * width, 96)).astype(np.float32)),
                "image_grid_thw": torch.tensor([[1, height, width]]),
                "mm_token_type_ids": torch.from_numpy((ids == 63).astype(np.int64))[None],
            }
        p = Prompt(f"p{g}", "", (np.zeros((1, 1, 3), np.uint8),) if pictures else (), "1", "exact")
        maker._cache[p.key] = (ids.astype(np.int32), pictures)
        answers = [rng.integers(2, 60, int(rng.integers(1, 20))).astype(np.int32) for _ in range(1 + g % 3)]
        some.append(SampleGroup(p, ids, [sample(i, answer, truncated=True) for i, answer in enumerate(answers)]))
    return some


@pytest.mark.parametrize(
    ("body", "shares"), [(qwen_vl, True), (sliding, True), (recurrent, False), (length_scaled, False)]
)
def test_other_bodies_share_prompts_only_if_they_can(body: Any, shares: bool) -> None:
    torch.manual_seed(0)
    model = body()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4.0)
    maker = PromptEncoder(FakeProcessor())
    reward = reward_model(model, maker)
    some = other_groups(maker, pictured=body is qwen_vl)
    scorer = GroupScorer(reward, 5, PromptEncoder(FakeProcessor()))
    assert_scores(scorer.score(some), alone(reward, some))
    assert scorer.shares_prompts is shares


# ---------------------------------------------------------------- the comparison


def wrong_positions(model: RewardModel, monkeypatch: pytest.MonkeyPatch, wider_than: int = 0) -> None:
    """Makes the body lose its positions in passes over many columns."""
    right = model.model._prepare_position_ids_for_generation

    def positions(ids: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        return right(ids, kwargs) * (ids.shape[1] <= wider_than)

    monkeypatch.setattr(model.model, "_prepare_position_ids_for_generation", positions)


def blind_to_padding(model: RewardModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the body look at the padding in front of a prompt."""
    right = model.model.base_model.forward

    def forward(**kwargs: Any) -> Any:
        if kwargs["use_cache"]:
            kwargs["attention_mask"] = torch.ones_like(kwargs["attention_mask"])
        return right(**kwargs)

    monkeypatch.setattr(model.model.base_model, "forward", forward)


@pytest.mark.parametrize("fault", [wrong_positions, blind_to_padding])
@pytest.mark.parametrize("name", ["text", "picture"])
def test_a_body_that_scores_otherwise_with_a_cache_is_found_out(
    fault: Any, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = reward_model()
    fault(model, monkeypatch)
    scorer = GroupScorer(model, 4, encoder())
    with caplog.at_level(logging.WARNING):
        scorer.score(groups([name]))  # a single prompt, where nothing needs padding
        assert not scorer.shares_prompts
        assert_scores(scorer.score(groups()), alone(model, groups()))
    assert len(caplog.records) == 1
    assert "Idefics3ForConditionalGeneration: the samples of a group can't share" in caplog.text
    assert "changes the features by up to" in caplog.text


def test_too_little_memory_is_no_fault_of_the_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    model = reward_model()
    plain = model.model.base_model.forward

    def forward(**inputs: Any) -> Any:
        if inputs.get("use_cache"):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(**inputs)

    monkeypatch.setattr(model.model.base_model, "forward", forward)
    scorer = GroupScorer(model, 4, encoder())
    with pytest.raises(torch.OutOfMemoryError):
        scorer.score(groups())
    assert scorer.shares_prompts


def test_a_body_without_such_a_cache_is_found_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = reward_model()
    plain = model.model.base_model.forward

    def forward(**kwargs: Any) -> Any:
        if "position_ids" in kwargs:
            raise TypeError("unexpected keyword argument 'position_ids'")
        return plain(**kwargs)

    monkeypatch.setattr(model.model.base_model, "forward", forward)
    scorer = GroupScorer(model, 4, encoder())
    with caplog.at_level(logging.WARNING):
        assert_scores(scorer.score(groups()), alone(model, groups()))
    assert not scorer.shares_prompts
    assert "TypeError: unexpected keyword argument 'position_ids'" in caplog.text


def test_longer_rows_and_the_first_with_pictures_are_compared_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = reward_model()
    passes = Passes(model.model)
    scorer = GroupScorer(model, 4, encoder())
    compared = []
    for names in (["text"], ["text"], ["picture"], ["picture", "text"], ["long"], ["pictures"]):
        passes.take()
        scorer.score(groups(names))
        compared.append(sum(not cached for _, _, cached in passes.take()) > 1)
    assert compared == [True, False, True, False, True, False]

    model = reward_model()
    short, long = (len(groups([name])[0].prompt_ids) for name in ("picture", "long"))
    assert short < long
    wrong_positions(model, monkeypatch, wider_than=short + 1)
    scorer = GroupScorer(model, 4, encoder())
    assert_scores(scorer.score(groups(["picture"])), alone(model, groups(["picture"])))
    assert scorer.shares_prompts
    assert_scores(scorer.score(groups(["picture", "long"])), alone(model, groups(["picture", "long"])))
    assert not scorer.shares_prompts


def test_scores_that_are_not_finite_are_no_difference() -> None:
    model = reward_model()
    with torch.no_grad():
        model.model.base_model.text_model.norm.weight.fill_(torch.nan)
    scorer = GroupScorer(model, 4, encoder())
    assert np.isnan(np.concatenate(scorer.score(groups()))).all()
    assert scorer.shares_prompts


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
        scorer.shares_prompts = shares
        compare, compared = scorer._compare, []
        scorer._compare = lambda rows, compare=compare, compared=compared: (compared.extend(rows), compare(rows))
        got = scorer.score(some)
        assert_scores(got, alone(model, some))
        assert scorer.shares_prompts is shares
        assert {row[0].key for row in compared} == ({group.prompt.key for group in some} if shares else set())
        assert abs(got[0] - got[2]).min() > 1e-3 and abs(got[1] - got[3]).min() > 1e-3
