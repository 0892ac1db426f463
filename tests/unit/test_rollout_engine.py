"""What vLLM is asked and what is made of its answers, with vLLM replaced by a scripted fake; tests/integration has the
real one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from skyrl.records import ConfigError, SkyrlError
from skyrl.rollout.engine import EngineRequest
from tests.tiny_models import noise, processor

ASKED = EngineRequest(
    prompt_ids=[5, 6],
    pictures=(),
    n=3,
    temperature=0.7,
    top_p=0.9,
    max_tokens=40,
    seed=2**61,
    stop_ids=(8, 9),
    forbidden_ids=(7, 10),
)


class FakeLlm:
    """vLLM as far as the engine uses it: each step gives every answer of its script a token, last answers first, and
    all calls are remembered. Its names of requests are its own, and it speaks of one that nobody knows any more.

    Args:
        script: Of an answer's place among its request's and its seed: its tokens, and what ends it.
        unread: Prompts that are never begun.
    """

    def __init__(
        self,
        script: Callable[[int, int], tuple[list[int], str]] = lambda at, seed: ([20], "stop"),
        resets: bool = True,
        unread: Sequence[list[int]] = (),
    ) -> None:
        self.script, self.resets, self.unread = script, resets, unread
        self.inputs: list[Any] = []
        self.params: list[Any] = []
        self.calls: list[Any] = []
        self.aborted: list[str] = []
        self.going: dict[str, tuple[list[int], str]] = {}
        self.steps = 0
        self.output_processor = SimpleNamespace(request_states={})
        self.llm_engine = SimpleNamespace(
            reset_encoder_cache=lambda: self.calls.append("encoder"),
            output_processor=self.output_processor,
            engine_core=SimpleNamespace(get_output=self.step),
            abort_request=self.abort,
        )

    def enqueue(self, inputs: list[Any], params: list[Any], use_tqdm: bool) -> list[str]:
        from vllm.exceptions import VLLMValidationError

        self.inputs, self.params = inputs, params
        if any(one.max_tokens > 500 for one in params):
            raise VLLMValidationError("The decoder prompt is longer than the maximum model length")
        names = [f"{place}-own" for place in range(len(inputs))]
        for name, asked, wanted in zip(names, inputs, params, strict=True):
            for at in range(wanted.n):
                child = name if wanted.n == 1 else f"{at}_{name}"
                parent = None if wanted.n == 1 else SimpleNamespace(request_id=name)
                prompt = [1, *asked["prompt_token_ids"]]
                state = SimpleNamespace(parent_req=parent, request_index=at, prompt_token_ids=prompt)
                self.output_processor.request_states[child] = state
                tokens, ended = self.script(at, (wanted.seed or 0) + at)
                if asked["prompt_token_ids"] not in self.unread:
                    self.going[child] = list(tokens), ended
        return names

    def step(self) -> Any:
        told, self.steps = [SimpleNamespace(request_id="stopped-earlier")], self.steps + 1
        for name, (tokens, ended) in reversed(list(self.going.items())):
            token = tokens.pop(0)
            logprobs = SimpleNamespace(logprobs=np.array([[-token / 100, 0.0]], np.float32))
            reason = None if tokens else ended
            told.append(
                SimpleNamespace(request_id=name, new_token_ids=[token], new_logprobs=logprobs, finish_reason=reason)
            )
            if not tokens:
                del self.going[name]
        return SimpleNamespace(outputs=told)

    def abort(self, names: list[str], internal: bool) -> None:
        assert internal
        states = self.output_processor.request_states
        for name in [n for n, s in states.items() if n in names or (s.parent_req and s.parent_req.request_id in names)]:
            del states[name]
            if self.going.pop(name, None):
                self.aborted.append(name)

    def collective_rpc(self, method: str, kwargs: dict[str, Any]) -> None:
        self.calls.append((method, kwargs))

    def reset_prefix_cache(self) -> bool:
        self.calls.append("prefix")
        return self.resets


def module() -> Any:
    """Imported by the tests and not with this file: vLLM takes seconds."""
    from skyrl.rollout import vllm_engine

    return vllm_engine


def engine(llm: Any) -> Any:
    """An engine without its constructor, which would start vLLM."""
    made = object.__new__(module().VllmEngine)
    made.llm, made.tokenizer = llm, processor().tokenizer
    return made


def test_vllm_is_asked_for_exactly_what_the_request_says() -> None:
    llm = FakeLlm()
    engine(llm).generate(
        [replace(ASKED, pictures=(noise(0), noise(1))), replace(ASKED, seed=None, temperature=0.0, n=1)]
    )
    first, second = llm.params
    assert (first.n, first.temperature, first.top_p, first.max_tokens, first.seed) == (3, 0.7, 0.9, 40, 2**61)
    assert (second.n, second.temperature, second.seed) == (1, 0.0, None)
    # vLLM would add the tokenizer's end of sequence and generation_config.json's to the stop tokens.
    assert sorted(first.stop_token_ids) == [8, 9] and first.ignore_eos
    first.update_from_generation_config({"eos_token_id": [10, 11]}, eos_token_id=12)
    assert sorted(first.stop_token_ids) == [8, 9] and first.eos_token_id is None
    assert first.logit_bias == {7: -math.inf, 10: -math.inf} and first.logprobs == 0 and not first.detokenize
    assert [one["prompt_token_ids"] for one in llm.inputs] == [[5, 6]] * 2
    assert "multi_modal_data" not in llm.inputs[1]
    pictures = [np.asarray(picture) for picture in llm.inputs[0]["multi_modal_data"]["image"]]
    assert np.array_equal(pictures, [noise(0), noise(1)])


def test_answers_keep_their_place_and_only_the_length_truncates() -> None:
    llm = FakeLlm(lambda at, _: ([20 + at, 8], ("stop", "length", "stop")[at]))
    first, second, third = engine(llm).generate(
        [ASKED, replace(ASKED, prompt_ids=[4]), replace(ASKED, n=1, prompt_ids=[3])]
    )
    said = [processor().tokenizer.decode([20 + i] + [8] * (i == 1)) for i in range(3)]
    assert [(one.text, one.truncated) for one in first] == list(zip(said, (False, True, False), strict=True))
    assert [one.token_ids.tolist() for one in first] == [[20, 8], [21, 8], [22, 8]]
    expected = np.array([[-0.2, -0.08], [-0.21, -0.08], [-0.22, -0.08]], np.float32)
    assert np.array_equal([one.logprobs for one in first], expected)
    assert {one.token_ids.dtype for one in first} == {one.prompt_ids.dtype for one in first} == {np.dtype(np.int32)}
    assert first[0].logprobs.dtype == np.float32 and (len(second), len(third)) == (3, 1)
    assert [one.prompt_ids.tolist() for one in (first[0], second[2], third[0])] == [[1, 5, 6], [1, 4], [1, 3]]
    assert not llm.output_processor.request_states and not llm.aborted
    with pytest.raises(SkyrlError, match="vLLM ended an answer after 1 tokens: error"):
        engine(FakeLlm(lambda *_: ([5], "error"))).generate([ASKED])


def test_what_vllm_refuses_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="decoder prompt"):
        engine(FakeLlm()).generate([ASKED, replace(ASKED, max_tokens=900)])


def test_a_load_is_one_whole_update_and_forgets_both_caches_of_states() -> None:
    llm = FakeLlm()
    parameters = iter([("w", torch.ones(2))])
    engine(llm).load(parameters, 3, whole=False)
    assert llm.calls == [
        ("start_weight_update", {}),
        ("update_weights", {"update_info": {"parameters": parameters, "version": 3, "whole": False}}),
        ("finish_weight_update", {}),
        "prefix",
        "encoder",
    ]
    with pytest.raises(SkyrlError, match="requests are still running"):
        engine(FakeLlm(resets=False)).load(parameters, 3, whole=True)


def test_caches_are_forgotten_after_the_last_call_of_a_transfer_and_not_before() -> None:
    llm = FakeLlm()
    made = engine(llm)
    methods = ["init_weight_transfer_engine", "start_weight_update", "update_weights"]
    for method in methods:
        made.transfer(method, {"x": 1})
    assert llm.calls == [(method, {"x": 1}) for method in methods]
    made.transfer("finish_weight_update", {})
    assert llm.calls[4:] == ["prefix", "encoder"]


def test_forbidden_tokens_get_probability_zero_up_to_vllms_limit() -> None:
    bias, limit = module().forbidding_bias, module().MAX_BIASES
    assert bias((3, 9)) == {3: -math.inf, 9: -math.inf}
    assert len(bias(tuple(range(limit)))) == limit
    with pytest.raises(ConfigError, match="1025 special tokens"):
        bias(tuple(range(limit + 1)))


def growing(at: int, seed: int) -> tuple[list[int], str]:
    """As many tokens as the seed says."""
    return [20 + 10 * seed + place for place in range(seed)], "stop"


def test_vllm_is_stepped_until_there_is_enough_and_the_rest_comes_back_as_far_as_it_is() -> None:
    llm = FakeLlm(growing, unread=[[4]])
    asked = [
        replace(ASKED, n=2, seed=2),  # answers of 2 and 3 tokens
        replace(ASKED, n=2, seed=4),  # of 4 and 5
        replace(ASKED, n=2, seed=3, begun=([11, 12], [13])),  # of 3 and 4 more
        replace(ASKED, n=1, seed=9, prompt_ids=[4]),  # waits for its turn
    ]
    heard: list[list[int]] = []

    def enough(done: Any) -> bool:
        heard.append(list(done))
        return len(done) == 2

    made = engine(llm).generate(asked, enough)
    assert llm.steps == 4 and heard == [[0], [0, 2]] and not llm.going
    assert [[len(one.token_ids) for one in answers] for answers in made] == [[2, 3], [4, 4], [3, 4], [0]]
    assert [[one.stopped for one in answers] for answers in made] == [[False] * 2, [False, True], [False] * 2, [True]]
    assert made[1][1].token_ids.tolist() == [70, 71, 72, 73] and made[1][1].logprobs[-1] == np.float32(-0.73)
    assert made[1][1].text == "" and made[2][0].text == processor().tokenizer.decode([11, 12, 50, 51])
    assert [one.prompt_ids.tolist() for answers in made for one in answers] == [[1, 5, 6]] * 6 + [[]]
    assert [one["prompt_token_ids"] for one in llm.inputs[2:4]] == [[5, 6, 11, 12], [5, 6, 13]]
    assert [llm.params[place].max_tokens for place in (0, 2, 3)] == [40, 38, 39]
    assert [llm.params[place].seed for place in (0, 2, 3)] == [2, 3, 4]
    assert llm.params[0].n == 2 and llm.aborted == ["1_1-own"] and not llm.output_processor.request_states


def test_nothing_goes_on_in_vllm_when_the_rule_fails() -> None:
    llm = FakeLlm(growing)
    with pytest.raises(ZeroDivisionError):
        engine(llm).generate([replace(ASKED, seed=2)], lambda done: 1 / 0)
    assert not llm.going and not llm.output_processor.request_states


def metaspace() -> Any:
    """A tokenizer in the manner of Llama's: ▁ is a space, one byte is one token, and a text loses its first space."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁so", "▁7"]
    made = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, [], byte_fallback=True, unk_token="<unk>"))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", unk_token="<unk>")


def test_a_text_follows_its_prompt_and_ends_before_a_character_that_is_cut() -> None:
    words = metaspace()
    end, so, seven = words.convert_tokens_to_ids(["</s>", "▁so", "▁7"])
    pi = [2 + byte for byte in "π".encode()]

    def text(tokens: Any, before: int, ids: list[int], ended: str, begun: tuple[int, ...] = ()) -> str:
        one = module()._Answer(0, 0, [before], list(begun), token_ids=ids, ended=ended)
        return str(module().answer_text(tokens, one))

    assert text(words, so, [seven], "length") == " 7" and words.decode([seven]) == "7"
    assert text(words, so, [seven, *pi, end, seven], "stop") == " 7π"
    assert text(words, so, [pi[1], end], "stop", begun=(seven, pi[0])) == " 7π"
    assert text(words, so, [seven, pi[0]], "length") == " 7" and words.decode([seven, pi[0]]) == "7�"
    assert text(words, so, [pi[0], seven], "length") == "� 7" and text(words, so, [end], "stop") == ""
    own = processor().tokenizer
    ids, image = own("a <answer>7</answer> é")["input_ids"], own.convert_tokens_to_ids("<image>")
    assert text(own, image, [*ids, own.eos_token_id], "stop") == text(own, image, [*ids, image], "length") != ""
    assert text(own, image, ids, "length") == "a <answer>7</answer> é"
    assert text(own, image, ids[:-1], "length") == "a <answer>7</answer> "
