"""vLLM as the sampler's engine. The only module that builds a vLLM engine."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from vllm import LLM, SamplingParams
from vllm.config import WeightTransferConfig
from vllm.exceptions import VLLMClientError
from vllm.model_executor.models import registry
from vllm.v1.engine.detokenizer import IncrementalDetokenizer

from skyrl.records import ConfigError, SkyrlError
from skyrl.rollout.engine import Completion, EngineRequest, Enough
from skyrl.settings import Config, WeightSync
from skyrl.sync import shm_transfer

CPU_BATCHED_TOKENS = 16384
PICTURE_CACHE_GIB = 0.01
"""Processed pictures that are kept on a CPU host: those of the probe come again at each sync."""
BAD_MODEL = (ValueError, NotImplementedError, KeyError, ImportError)
"""What vLLM raises for lengths beyond the model's positions, heads that no kernel takes, a token that is not there, a
package that is missing."""
MAX_BIASES = 1024
"""Most entries of a request's ``logit_bias`` in vLLM's GPU sampler."""
DECODED = SamplingParams()
"""Says how tokens become text: without special tokens."""


@dataclass(slots=True)
class _Answer:
    """One answer as far as it is."""

    place: int
    """Of its request."""
    at: int
    """Its own among the request's answers."""
    prompt_ids: list[int]
    """Placeholders expanded, without the tokens of ``begun``."""
    begun: list[int]
    """Tokens that it had already."""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ended: str = ""
    """``stop`` or ``length``."""


class VllmEngine:
    """An :class:`~skyrl.rollout.engine.Engine` that takes new weights through vLLM's weight-transfer API."""

    def __init__(self, cfg: Config, policy_folder: str) -> None:
        self.llm = _start_llm(cfg, policy_folder)
        self.tokenizer = self.llm.get_tokenizer()
        self.vocabulary: int = self.llm.model_config.get_vocab_size()

    def generate(self, requests: list[EngineRequest], enough: Enough | None = None) -> list[list[Completion]]:
        # Answers that have begun have prompts of their own.
        asked = [
            (place, at, one)
            for place, request in enumerate(requests)
            for at, one in enumerate(request.singly if request.begun else [request])
        ]
        try:
            inputs, params = [_input(one) for *_, one in asked], [_params(one) for *_, one in asked]
            names = self.llm.enqueue(inputs, params, use_tqdm=False)
        except VLLMClientError as error:  # a request's fault, yet no ValueError
            raise ValueError(str(error)) from error
        try:
            answers = self._answers(dict(zip(names, asked, strict=True)))
            self._run(answers, [request.n for request in requests], enough)
        finally:
            self.llm.llm_engine.abort_request(names, internal=True)
        groups: list[list[_Answer]] = [[] for _ in requests]
        for one in sorted(answers.values(), key=lambda one: one.at):
            groups[one.place].append(one)
        return [self._completions(group) for group in groups]

    def _answers(self, asked: dict[str, tuple[int, int, EngineRequest]]) -> dict[str, _Answer]:
        """By vLLM's name of each. It makes several of a request with ``n`` above 1."""
        answers = {}
        for name, state in self.llm.llm_engine.output_processor.request_states.items():
            place, at, one = asked[name if state.parent_req is None else state.parent_req.request_id]
            begun, ids = list(chain(*one.begun)), list(state.prompt_token_ids)
            answers[name] = _Answer(place, at + state.request_index, ids[: len(ids) - len(begun)], begun)
        return answers

    def _run(self, answers: dict[str, _Answer], waiting: list[int], enough: Enough | None) -> None:
        """Step by step, until all answers have ended or there is enough. On CPU the steps are those of this process, so
        the same requests are always stopped at the same tokens.

        This takes what vLLM's core says. Its own loop, ``LLM.generate``, keeps records of each token on the way, which
        take a fifth to a third of a small model's time.

        Args:
            waiting: Answers to each request.

        Raises:
            SkyrlError: if something else than a stop token or the limit ended an answer.
        """
        core, left, done = self.llm.llm_engine.engine_core, len(answers), list[int]()
        while left:
            before = len(done)
            for told in core.get_output().outputs:
                one = answers.get(told.request_id)
                if one is None:  # a core in another process may still speak of what was stopped earlier
                    continue
                if told.new_token_ids:
                    one.token_ids += told.new_token_ids
                    one.logprobs += told.new_logprobs.logprobs[:, 0].tolist()
                if told.finish_reason is not None:
                    one.ended = str(told.finish_reason)
                    if one.ended not in ("stop", "length"):
                        raise SkyrlError(f"vLLM ended an answer after {len(one.token_ids)} tokens: {one.ended}")
                    left -= 1
                    waiting[one.place] -= 1
                    if waiting[one.place] == 0:
                        done.append(one.place)
            if enough is not None and len(done) > before and enough(done):
                break

    def _completions(self, answers: list[_Answer]) -> list[Completion]:
        """Those of one request."""
        read = any(one.token_ids for one in answers)
        prompt_ids = np.asarray(answers[0].prompt_ids if read else [], dtype=np.int32)
        return [
            Completion(
                prompt_ids=prompt_ids,
                token_ids=np.asarray(one.token_ids, dtype=np.int32),
                logprobs=np.asarray(one.logprobs, dtype=np.float32),
                text=answer_text(self.tokenizer, one) if one.ended else "",
                truncated=one.ended == "length",
                stopped=not one.ended,
            )
            for one in answers
        ]

    def load(self, parameters: Iterable[tuple[str, torch.Tensor]], version: int, whole: bool) -> None:
        self.transfer("start_weight_update", {})
        update = {"parameters": parameters, "version": version, "whole": whole}
        self.transfer("update_weights", {"update_info": update})
        self.transfer("finish_weight_update", {})

    def transfer(self, method: str, kwargs: dict[str, Any]) -> None:
        self.llm.collective_rpc(method, kwargs=kwargs)
        if method == "finish_weight_update":
            self.forget_caches()

    def forget_caches(self) -> None:
        """Drop the prefix and vision-encoder caches: they hold states of the old weights. What the picture processor
        made of pictures does not depend on weights and stays."""
        if not self.llm.reset_prefix_cache():
            raise SkyrlError("vLLM could not reset its prefix cache; requests are still running during a weight sync")
        self.llm.llm_engine.reset_encoder_cache()


def _input(request: EngineRequest) -> Any:
    made: dict[str, Any] = {"prompt_token_ids": [*request.prompt_ids, *chain(*request.begun)]}
    if request.pictures:
        made["multi_modal_data"] = {"image": [Image.fromarray(picture) for picture in request.pictures]}
    return made


def _params(request: EngineRequest) -> SamplingParams:
    return SamplingParams(
        n=request.n,
        temperature=request.temperature,
        top_p=request.top_p,
        max_tokens=request.max_tokens - sum(map(len, request.begun)),
        seed=request.seed,
        # Else vLLM adds stop tokens of its own: the tokenizer's end of sequence and those of generation_config.json.
        ignore_eos=True,
        stop_token_ids=list(request.stop_ids),
        logit_bias=forbidding_bias(request.forbidden_ids),
        logprobs=0,
        flat_logprobs=True,
        # Else each token is decoded twice on the way, for the text and for the log-probabilities; see answer_text.
        detokenize=False,
    )


def answer_text(tokenizer: Any, answer: _Answer) -> str:
    """Text of an answer as vLLM's own detokenizer writes it, all at once.

    That is not what decoding the answer alone gives: what stands before it decides with some tokenizers whether it
    begins with a space, and a character that the end cuts in two is left out.
    """
    asked: Any = SimpleNamespace(request_id="", prompt_token_ids=answer.prompt_ids, sampling_params=DECODED)
    made = IncrementalDetokenizer.from_new_request(tokenizer, asked)
    made.update([*answer.begun, *answer.token_ids], answer.ended == "stop")
    return made.get_next_output_text(finished=True, delta=False)


@lru_cache(maxsize=1)
def forbidding_bias(forbidden: tuple[int, ...]) -> dict[int, float]:
    """vLLM's ``logit_bias`` that gives forbidden tokens probability 0. (It takes no more than 1,024 *allowed* ones.)

    Raises:
        ConfigError: for more forbidden tokens than vLLM takes.
    """
    if len(forbidden) > MAX_BIASES:
        raise ConfigError(
            f"model.policy: its tokenizer has {len(forbidden)} special tokens that must not be sampled; vLLM can "
            f"forbid {MAX_BIASES}. Make ordinary tokens of those that answers may hold"
        )
    return dict.fromkeys(forbidden, float("-inf"))


def _start_llm(cfg: Config, policy_folder: str) -> LLM:
    rollout = cfg.rollout
    length = rollout.max_prompt_tokens + rollout.max_new_tokens
    if rollout.weight_sync is WeightSync.shm:
        shm_transfer.register()
        backend = shm_transfer.BACKEND
    elif torch.cuda.is_available():
        backend = rollout.weight_sync.value
    else:
        raise SkyrlError(
            f"rollout.weight_sync={rollout.weight_sync.value} needs CUDA in the rollout process; on CPU use shm"
        )
    options: dict[str, Any] = {"gpu_memory_utilization": rollout.gpu_memory_utilization}
    if rollout.device == "cpu":
        # vLLM looks at an architecture's class in a process of its own, so that CUDA is not initialised here. That
        # process has no stand-in for torchvision, and takes ten seconds to start.
        registry._run_in_subprocess = lambda look: look()
        # Chunked prefill is off: with per-request seeds vLLM 0.32 rewinds a random generator after a partial prefill
        # by its offset, and CPU generators have none.
        options = {
            "enforce_eager": True,
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(CPU_BATCHED_TOKENS, length),
            "skip_mm_profiling": True,
            "mm_processor_cache_gb": PICTURE_CACHE_GIB,
        }
    try:
        llm = LLM(
            model=policy_folder,
            dtype=cfg.model.dtype,
            trust_remote_code=cfg.model.trust_remote_code,
            max_model_len=length,
            max_num_seqs=rollout.max_num_seqs,
            tensor_parallel_size=rollout.tensor_parallel_size,
            seed=cfg.controller.seed,
            # The distribution that was sampled from, not the raw one: temperature and forbidden tokens applied.
            logprobs_mode="processed_logprobs",
            generation_config="vllm",
            disable_log_stats=True,
            limit_mm_per_prompt={"video": 0, "audio": 0},  # else some models are shown one when they start
            weight_transfer_config=WeightTransferConfig(backend=backend),
            **options,
        )
    except BAD_MODEL as error:
        what = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ConfigError(f"vLLM can't serve model.policy with these settings: {what}") from error
    if rollout.device == "cpu":
        if llm.model_config.is_mm_prefix_lm:  # vLLM itself computes something else then, and says nothing
            raise ConfigError(
                f"model.policy: {llm.model_config.architecture} lets the tokens of a picture look at each other in "
                "both directions, which vLLM's attention on a CPU can't do; it needs a GPU (rollout.device=cuda)"
            )
        # vLLM leaves a function here that only warns; its own picture processor then warns at every request.
        torch.set_num_threads = lambda _: None
    return llm
