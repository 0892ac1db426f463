"""What vLLM is asked and what is made of its answers, with vLLM replaced by a scripted fake; tests/integration has the
real one."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from skyrl.records import ConfigError, SkyrlError, WeightSnapshot
from skyrl.rollout.engine import EngineRequest
from tests.tiny_models import noise

SNAPSHOT = WeightSnapshot(3, [], [], [], np.empty(0, np.uint8), [])
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
    """Answers every request as ``finished`` says, answers in no order, and remembers all calls."""

    def __init__(self, *finished: str, resets: bool = True) -> None:
        self.finished, self.resets = finished, resets
        self.inputs: list[Any] = []
        self.params: list[Any] = []
        self.calls: list[Any] = []
        self.llm_engine = SimpleNamespace(reset_encoder_cache=lambda: self.calls.append("encoder"))

    def generate(self, inputs: list[Any], params: list[Any], use_tqdm: bool) -> list[Any]:
        self.inputs, self.params = inputs, params
        completions = [
            SimpleNamespace(
                index=i,
                token_ids=[20 + i, 8],
                logprobs=SimpleNamespace(logprobs=[-0.5 - i, -0.25]),
                text=f"said {i}",
                finish_reason=reason,
            )
            for i, reason in enumerate(self.finished)
        ]
        return [
            SimpleNamespace(prompt_token_ids=[1, *one["prompt_token_ids"]], outputs=completions[::-1]) for one in inputs
        ]

    def collective_rpc(self, method: str, kwargs: dict[str, Any]) -> None:
        self.calls.append((method, kwargs))

    def reset_prefix_cache(self) -> bool:
        self.calls.append("prefix")
        return self.resets

    def reset_mm_cache(self) -> None:
        self.calls.append("multimodal")


def module() -> Any:
    """Imported by the tests and not with this file: vLLM takes seconds."""
    from skyrl.rollout import vllm_engine

    return vllm_engine


def engine(llm: Any) -> Any:
    """An engine without its constructor, which would start vLLM."""
    made = object.__new__(module().VllmEngine)
    made.llm = llm
    return made


def test_vllm_is_asked_for_exactly_what_the_request_says() -> None:
    llm = FakeLlm("stop")
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
    assert first.logit_bias == {7: -math.inf, 10: -math.inf} and first.logprobs == 0
    assert [one["prompt_token_ids"] for one in llm.inputs] == [[5, 6]] * 2
    assert "multi_modal_data" not in llm.inputs[1]
    pictures = [np.asarray(picture) for picture in llm.inputs[0]["multi_modal_data"]["image"]]
    assert np.array_equal(pictures, [noise(0), noise(1)])


def test_answers_keep_their_place_and_only_the_length_truncates() -> None:
    first, second = engine(FakeLlm("stop", "length", "stop")).generate([ASKED, replace(ASKED, prompt_ids=[4])])
    assert [(one.text, one.truncated) for one in first] == [("said 0", False), ("said 1", True), ("said 2", False)]
    assert [one.token_ids.tolist() for one in first] == [[20, 8], [21, 8], [22, 8]]
    assert [one.logprobs.tolist() for one in first] == [[-0.5, -0.25], [-1.5, -0.25], [-2.5, -0.25]]
    assert {one.token_ids.dtype for one in first} == {one.prompt_ids.dtype for one in first} == {np.dtype(np.int32)}
    assert first[0].logprobs.dtype == np.float32
    assert [one.prompt_ids.tolist() for one in (first[0], second[2])] == [[1, 5, 6], [1, 4]]


def test_what_vllm_refuses_is_a_value_error() -> None:
    from vllm.exceptions import VLLMValidationError

    class Refusing(FakeLlm):
        def generate(self, inputs: list[Any], params: list[Any], use_tqdm: bool) -> list[Any]:
            raise VLLMValidationError("The decoder prompt is longer than the maximum model length")

    with pytest.raises(ValueError, match="decoder prompt"):
        engine(Refusing()).generate([ASKED])


def test_a_load_is_one_whole_update_and_forgets_all_three_caches() -> None:
    llm = FakeLlm()
    engine(llm).load(SNAPSHOT)
    assert llm.calls == [
        ("start_weight_update", {}),
        ("update_weights", {"update_info": {"snapshot": SNAPSHOT}}),
        ("finish_weight_update", {}),
        "prefix",
        "encoder",
        "multimodal",
    ]
    with pytest.raises(SkyrlError, match="requests are still running"):
        engine(FakeLlm(resets=False)).load(SNAPSHOT)


def test_caches_are_forgotten_after_the_last_call_of_a_transfer_and_not_before() -> None:
    llm = FakeLlm()
    made = engine(llm)
    methods = ["init_weight_transfer_engine", "start_weight_update", "update_weights"]
    for method in methods:
        made.transfer(method, {"x": 1})
    assert llm.calls == [(method, {"x": 1}) for method in methods]
    made.transfer("finish_weight_update", {})
    assert llm.calls[4:] == ["prefix", "encoder", "multimodal"]


def test_forbidden_tokens_get_probability_zero_up_to_vllms_limit() -> None:
    bias, limit = module().forbidding_bias, module().MAX_BIASES
    assert bias((3, 9)) == {3: -math.inf, 9: -math.inf}
    assert len(bias(tuple(range(limit)))) == limit
    with pytest.raises(ConfigError, match="1025 special tokens"):
        bias(tuple(range(limit + 1)))
