"""Faults of sampling and of its records."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.gauntlet.fault import Fault, replaced
from benchmarks.gauntlet.prompts import scenes_in_files
from benchmarks.gauntlet.weights import STALE

LONG = "What is the sum of the digits? How many digits are there? What is the largest digit?"
"""So that prompts have a whole block of vLLM's prefix cache."""


@contextmanager
def _caches(kept: str) -> Iterator[None]:
    from skyrl.rollout.vllm_engine import VllmEngine

    def forget(original: Any, engine: Any) -> None:
        if kept != "prefix":
            engine.llm.reset_prefix_cache()
        if kept != "pictures":
            engine.llm.llm_engine.reset_encoder_cache()

    with replaced(VllmEngine, "forget_caches", forget):
        yield


@contextmanager
def placeholder_sampled() -> Iterator[None]:
    """No token is forbidden, and the policy likes the picture's placeholder."""
    from skyrl.rollout import vllm_engine
    from skyrl.rollout.sampler import Sampler

    liked: dict[int, float] = {}

    def asked(original: Any, sampler: Any, *args: Any, **kwargs: Any) -> Any:
        liked.update({sampler.encoder.image_token_id: 20.0})
        return original(sampler, *args, **kwargs)

    with (
        replaced(vllm_engine, "forbidding_bias", lambda original, ids: dict(liked)),
        replaced(Sampler, "_asked", asked),
    ):
        yield


@contextmanager
def wrong_stop_token() -> Iterator[None]:
    from skyrl.rollout.sampler import Sampler

    def build(original: Any, sampler: Any, *args: Any) -> None:
        original(sampler, *args)
        sampler._stop_ids = (sampler.encoder.pad_id,)

    with replaced(Sampler, "__init__", build):
        yield


@contextmanager
def tags_stripped() -> Iterator[None]:
    from skyrl.rollout.sampler import Sampler

    def text(original: Any, *args: Any) -> str:
        return re.sub("</?(think|answer)>", "", original(*args))

    with replaced(Sampler, "_text", text):
        yield


@contextmanager
def raw_logprobs() -> Iterator[None]:
    """The record is of the model's own distribution, the token of the one with the temperature."""
    from skyrl.rollout.vllm_engine import VllmEngine

    def generate(original: Any, engine: Any, *args: Any, **kwargs: Any) -> Any:
        worker = engine.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker
        parts = worker.model_runner.sampler, worker.model_runner.sampler.topk_topp_sampler
        for part in parts:
            part.logprobs_mode = "raw_logprobs"
        try:
            return original(engine, *args, **kwargs)
        finally:
            for part in parts:
                part.logprobs_mode = "processed_logprobs"

    with replaced(VllmEngine, "generate", generate):
        yield


@contextmanager
def _training_requests(changed: Any) -> Iterator[None]:
    """``changed(request)`` is what the engine is asked where several answers are drawn, as in training."""
    from skyrl.rollout.sampler import Sampler

    def answers(original: Any, sampler: Any, prompts: Any, asked: Any, **kwargs: Any) -> Any:
        training = bool(asked) and asked[0].n > 1
        return original(sampler, prompts, changed(asked) if training else asked, **kwargs)

    with replaced(Sampler, "_answers", answers):
        yield


@contextmanager
def same_seed() -> Iterator[None]:
    """All answers of a group are drawn with the seed of the first."""
    from skyrl.rollout.sampler import Sampler

    def answers(original: Any, *args: Any, **kwargs: Any) -> Any:
        return [[made[0]] * len(made) for made in original(*args, **kwargs)]

    with replaced(Sampler, "_answers", answers):
        yield


@contextmanager
def pictures_shuffled() -> Iterator[None]:
    def shuffled(asked: Any) -> Any:
        places = [place for place, one in enumerate(asked) if one.pictures]
        pictures = [asked[place].pictures for place in places]
        made = list(asked)
        for place, other in zip(places, pictures[1:] + pictures[:1], strict=True):
            made[place] = replace(asked[place], pictures=other)
        return made

    with _training_requests(shuffled):
        yield


@contextmanager
def default_top_p() -> Iterator[None]:
    """The model's own generation_config.json wins over the run's settings."""
    with _training_requests(lambda asked: [replace(one, top_p=0.8) for one in asked]):
        yield


@contextmanager
def other_temperature() -> Iterator[None]:
    with _training_requests(lambda asked: [replace(one, temperature=0.6) for one in asked]):
        yield


@contextmanager
def blank_pictures() -> Iterator[None]:
    """Every picture comes out of the loader black, for the rollout and for the learner."""
    from skyrl.digits.scenes import DigitScenes

    def scene(original: Any, scenes: Any, row: int) -> Any:
        prompt = original(scenes, row)
        return replace(prompt, images=tuple(np.zeros_like(picture) for picture in prompt.images))

    with replaced(DigitScenes, "__getitem__", scene):
        yield


@contextmanager
def end_left_out() -> Iterator[None]:
    """The engine's answers come without the token that ended them."""
    from skyrl.rollout.sampler import Sampler

    def answers(original: Any, *args: Any, **kwargs: Any) -> Any:
        return [
            [
                one
                if one.truncated or len(one.token_ids) < 2
                else replace(one, token_ids=one.token_ids[:-1], logprobs=one.logprobs[:-1])
                for one in made
            ]
            for made in original(*args, **kwargs)
        ]

    with replaced(Sampler, "_answers", answers):
        yield


FAULTS = [
    Fault(
        "prefix_cache_stale",
        "rollout",
        "Keys and values of prompts that the old weights computed are used by the new ones.",
        ("vllm-project/vllm-omni#6739", "NVIDIA-NeMo/RL#4018", "PrimeIntellect-ai/prime-rl#1650"),
        STALE,
        1,
        lambda: _caches("prefix"),
        (f"data.system_prompt='{LONG}'",),
        scenes_in_files,
    ),
    Fault(
        "picture_cache_stale",
        "rollout",
        "What the old vision tower made of a picture is used by the new weights.",
        ("vllm-project/vllm#45093", "vllm-project/vllm-omni#6739"),
        STALE,
        1,
        lambda: _caches("pictures"),
    ),
    Fault(
        "placeholder_sampled",
        "rollout",
        "The policy writes the picture's placeholder into its answer; hours later a forward pass counts one too many.",
        ("StarsfieldAI/R1-V#180",),
        "DataError.*an answer contains picture placeholders",
        0,
        placeholder_sampled,
    ),
    Fault(
        "wrong_stop_token",
        "rollout",
        "The engine waits for another end than the model writes: every answer runs into the length limit.",
        ("google/tunix#2314", "huggingface/trl#2387"),
        "cut_off",
        0,
        wrong_stop_token,
    ),
    Fault(
        "tags_stripped",
        "rollout",
        "Decoding leaves out the tags that the reward looks for: every reward is 0.",
        ("huggingface/trl#2897", "verl-project/verl#1724"),
        "no_answer_found",
        0,
        tags_stripped,
    ),
    Fault(
        "logprobs_before_temperature",
        "rollout",
        "vLLM records log-probabilities before the temperature, the learner computes them after it.",
        ("huggingface/trl#4159", "PrimeIntellect-ai/prime-rl#697"),
        "SyncError.*(compute otherwise)|sampling_differs",
        0,
        raw_logprobs,
        ("rollout.temperature=0.7",),
    ),
    Fault(
        "same_answers_in_a_group",
        "rollout",
        "One seed for all answers of a group: they are the same, and no advantage is left.",
        ("NovaSky-AI/SkyRL#1015",),
        "same_answers",
        1,
        same_seed,
    ),
    Fault(
        "pictures_of_other_prompts",
        "rollout",
        "Prompts are asked with the picture of a neighbour in the batch, and trained with their own.",
        ("huggingface/trl#3098",),
        "sampling_differs",
        1,
        pictures_shuffled,
    ),
    Fault(
        "top_p_of_the_model",
        "rollout",
        "The folder's generation_config.json sets top_p; its mass is divided out of the record and not in the learner.",
        ("huggingface/trl#6789",),
        "sampling_differs",
        1,
        default_top_p,
        further=True,
    ),
    Fault(
        "other_temperature",
        "rollout",
        "Training requests are sampled at another temperature than the learner computes.",
        ("NVIDIA-NeMo/RL#935",),
        "sampling_differs",
        1,
        other_temperature,
        further=True,
    ),
    Fault(
        "pictures_black",
        "rollout",
        "The loader gives black pictures; rollout and learner agree about them.",
        (),
        "pictures_unused",
        0,
        blank_pictures,
        further=True,
    ),
    Fault(
        "end_not_trained",
        "rollout",
        "The token that ends an answer is not part of what is trained: the policy forgets how to stop.",
        ("NVIDIA-NeMo/Megatron-Bridge#4660", "mlabonne/llm-course#33"),
        "SkyrlError.*trained without its end",
        0,
        end_left_out,
        further=True,
    ),
]
