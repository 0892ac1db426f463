"""The rollout engine's own choices, with vLLM replaced by a scripted fake; tests/integration has the real one."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from skyrl.records import ConfigError, DataError, Prompt, RewardParts, RolloutRequest, Sample, SampleGroup
from skyrl.rollout.sampling import MAX_BIASES, best_answer, forbidding_bias, sample_seed
from skyrl.settings import Config
from tests.tiny_models import answer_ids, encoder, noise, processor, prompt

EOS = processor().tokenizer.eos_token_id
ENDED = "<think>I see 31/41. 3+1=4.</think><answer>9</answer>"


class FakeLlm:
    """Answers every request with ``said`` and remembers what it was asked."""

    def __init__(self, said: str, ends: bool = True) -> None:
        self.said, self.ends = answer_ids(said, end=ends), ends
        self.inputs: list[Any] = []
        self.params: list[Any] = []

    def generate(self, inputs: list[Any], params: list[Any], use_tqdm: bool) -> list[Any]:
        assert inputs  # vLLM is not asked for nothing
        self.inputs, self.params = inputs, params
        logprobs = [{int(token): SimpleNamespace(logprob=-0.5)} for token in self.said]
        reason = "stop" if self.ends else "length"
        completion = SimpleNamespace(
            index=0, token_ids=self.said.tolist(), logprobs=logprobs, text="said", finish_reason=reason
        )
        return [SimpleNamespace(prompt_token_ids=one["prompt_token_ids"], outputs=[completion]) for one in inputs]


def module() -> Any:
    """Imported by the tests and not with this file: vLLM takes seconds."""
    from skyrl.rollout import vllm_engine as engine

    return engine


def engine(llm: Any, *prompts: Prompt, **rollout: Any) -> Any:
    """An engine without its constructor, which would start vLLM."""
    made = object.__new__(module().VllmRolloutEngine)
    made.cfg = Config()
    for name, value in rollout.items():
        setattr(made.cfg.rollout, name, value)
    made.cfg.controller.seed = 3
    made.datasets, made.encoder, made.llm = {"eval": list(prompts)}, encoder(), llm
    made._bias, made.version = {7: float("-inf")}, 5
    return made


def sample(index: int, model: float, rule: float = 0.0, text: str = ENDED, **fields: Any) -> Sample:
    ids = fields.pop("ids", answer_ids(text, end=not fields.get("truncated", False)))
    values = {"truncated": False, "reward": RewardParts(rule, 1.0, model, 1.0)} | fields
    return Sample(index, ids, np.zeros(len(ids), np.float32), text, policy_version=1, **values)


def group(*samples: Sample, pictured: bool = True, name: str = "train/1") -> SampleGroup:
    asked = prompt(name, *([noise(0)] if pictured else []))
    return SampleGroup(asked, encoder().encode(asked)[0], list(samples))


def test_a_blind_request_shows_no_picture_and_leaves_out_rows_that_have_none() -> None:
    llm = FakeLlm("9")
    made = engine(llm, prompt("eval/0", noise(0)), prompt("eval/1"), prompt("eval/2", noise(1)))
    asked = RolloutRequest("eval", (2, 1, 0), 4, 1, True, 3, blind=True)
    groups = made.generate(asked)
    assert [one.prompt.id for one in groups] == ["eval/2#blind", "eval/0#blind"]
    assert all(one.prompt.images == () and one.prompt.question == prompt("x").question for one in groups)
    assert llm.inputs == [{"prompt_token_ids": encoder().text_ids(prompt("x"))}] * 2
    assert made.generate(RolloutRequest("eval", (1,), 4, 1, True, 3, blind=True)) == []
    # The same rows with the picture: nothing is left out and ids stay.
    groups = made.generate(RolloutRequest("eval", (2, 1), 4, 1, True, 3))
    assert [one.prompt.id for one in groups] == ["eval/2", "eval/1"]
    assert ["multi_modal_data" in one for one in llm.inputs] == [True, False]


def test_a_prompt_that_vllm_finds_too_long_is_named() -> None:
    class Refusing(FakeLlm):
        def generate(self, inputs: list[Any], params: list[Any], use_tqdm: bool) -> list[Any]:
            raise ValueError("The decoder prompt is longer than the maximum model length")

    pictured = prompt("eval/1", noise(0))
    text, whole = len(encoder().text_ids(pictured)), len(encoder().encode(pictured)[0])
    made = engine(Refusing("9"), prompt("eval/0"), pictured, max_prompt_tokens=whole - 1)
    assert text < whole
    with pytest.raises(DataError, match=rf"prompt 'eval/1' has {whole} tokens"):
        made.generate(RolloutRequest("eval", (0, 1), 4, 1, True, 3))
    made = engine(Refusing("9"), pictured, max_prompt_tokens=whole)
    with pytest.raises(ValueError, match="decoder prompt"):  # not for us to explain
        made.generate(RolloutRequest("eval", (0,), 4, 1, True, 3))


@pytest.mark.parametrize("blind", [False, True])
def test_too_long_prompts_are_refused(blind: bool) -> None:
    made = engine(FakeLlm("9"), prompt("eval/0", noise(0)), max_prompt_tokens=2)
    name = "eval/0#blind" if blind else "eval/0"
    with pytest.raises(DataError, match=rf"prompt '{name}' has \d+ tokens; rollout\.max_prompt_tokens allows 2"):
        made.generate(RolloutRequest("eval", (0,), 4, 1, True, 3, blind=blind))
    with pytest.raises(DataError, match="prompt 'train/1#blind' has"):
        made.continue_blind([group(sample(0, 1.0))], 1)


@pytest.mark.parametrize(
    ("samples", "best"),
    [
        ([sample(0, 1.0), sample(1, 3.0), sample(2, 3.0)], 1),
        ([sample(0, 1.0), sample(1, 3.0, truncated=True), sample(2, 2.0, error="crashed"), sample(3, -1.0)], 0),
        ([sample(0, 1.0, ids=np.array([EOS], np.int32)), sample(1, -2.0, ids=np.array([7, EOS], np.int32))], 1),
        ([sample(0, math.nan), sample(1, math.nan, 1.0), sample(2, math.nan, 1.0)], 1),
        (
            [sample(0, 9.0, truncated=True), sample(1, 9.0, reward=None, error="crashed"), sample(2, 1.0, reward=None)],
            None,
        ),
        ([], None),
    ],
)
def test_the_best_answer_that_can_be_cut(samples: list[Sample], best: int | None) -> None:
    assert best_answer(samples) == best


def test_the_best_answers_first_half_is_continued_without_the_picture() -> None:
    llm = FakeLlm("4+1=5.</think><answer>5</answer>")
    made = engine(llm, max_new_tokens=40, temperature=0.7, top_p=0.9)
    groups = [
        group(sample(0, 1.0), sample(1, 2.0, text=f"{ENDED}1")),
        group(sample(0, 1.0), pictured=False, name="train/2"),
        group(sample(0, 1.0, truncated=True), name="train/3"),
        group(sample(0, 1.0), name="train/4"),
    ]
    groups[1].blind = (0, sample(1, 1.0))  # a stale one goes
    before = [one.token_ids.copy() for one in groups[0].samples]
    assert made.continue_blind(groups, 6) is groups
    assert [one.blind is None for one in groups] == [False, True, True, False]

    kept = answer_ids(f"{ENDED}1")[: len(answer_ids(f"{ENDED}1")) // 2]
    question = encoder().text_ids(prompt("x"))
    assert llm.inputs[0] == {"prompt_token_ids": [*question, *kept.tolist()]} and len(llm.inputs) == 2
    params = llm.params[0]
    assert (params.n, params.temperature, params.top_p, params.max_tokens) == (1, 0.7, 0.9, 40 - len(kept))
    assert params.logit_bias == {7: float("-inf")}
    assert params.seed == sample_seed(3, 6, "train/1#blind") != llm.params[1].seed

    assert groups[0].blind is not None
    place, made_up = groups[0].blind
    assert place == 1 and made_up.index == 2 and made_up.policy_version == 5 and not made_up.truncated
    assert np.array_equal(made_up.token_ids, [*kept, *llm.said]) and made_up.token_ids.dtype == np.int32
    assert made_up.logprobs.shape == made_up.token_ids.shape and np.isnan(made_up.logprobs).all()
    assert made_up.logprobs.dtype == np.float32 and made_up.reward is None
    assert made_up.text == processor().tokenizer.decode(kept) + "4+1=5.</think><answer>5</answer>"
    assert all(map(np.array_equal, before, [one.token_ids for one in groups[0].samples]))


def test_a_continuation_that_reaches_the_limit_is_truncated() -> None:
    groups = [group(sample(0, 1.0))]
    engine(FakeLlm("4+1=5", ends=False)).continue_blind(groups, 6)
    assert groups[0].blind is not None and groups[0].blind[1].truncated
    assert groups[0].blind[1].text.endswith("4+1=5")
    nothing = [group(sample(0, 1.0), pictured=False)]
    assert engine(FakeLlm("9")).continue_blind(nothing, 6)[0].blind is None


def test_forbidden_tokens_get_probability_zero_and_unknown_ids_nothing() -> None:
    # vLLM refuses a bias for an id at or above the vocabulary's size.
    assert forbidding_bias([3, 9, 10], vocabulary=10) == {3: -math.inf, 9: -math.inf}
    assert len(forbidding_bias(list(range(MAX_BIASES)), 5000)) == MAX_BIASES
    with pytest.raises(ConfigError, match="1025 special tokens"):
        forbidding_bias(list(range(MAX_BIASES + 1)), 5000)
