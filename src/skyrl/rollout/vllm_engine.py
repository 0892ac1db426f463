"""vLLM as the sampler's engine. The only module that builds a vLLM engine."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from vllm import LLM, SamplingParams
from vllm.config import WeightTransferConfig
from vllm.exceptions import VLLMClientError
from vllm.model_executor.models import registry

from skyrl.records import ConfigError, SkyrlError, WeightSnapshot
from skyrl.rollout.engine import Completion, EngineRequest
from skyrl.settings import Config, WeightSync
from skyrl.sync import shm_transfer

CPU_BATCHED_TOKENS = 16384
BAD_MODEL = (ValueError, NotImplementedError, KeyError, ImportError)
"""What vLLM raises for lengths beyond the model's positions, heads that no kernel takes, a token that is not there, a
package that is missing."""
MAX_BIASES = 1024
"""Most entries of a request's ``logit_bias`` in vLLM's GPU sampler."""


class VllmEngine:
    """An :class:`~skyrl.rollout.engine.Engine` that takes new weights through vLLM's weight-transfer API."""

    def __init__(self, cfg: Config, policy_folder: str) -> None:
        self.llm = _start_llm(cfg, policy_folder)
        self.vocabulary: int = self.llm.model_config.get_vocab_size()

    def generate(self, requests: list[EngineRequest]) -> list[list[Completion]]:
        try:
            outputs = self.llm.generate(list(map(_input, requests)), list(map(_params, requests)), use_tqdm=False)
        except VLLMClientError as error:  # a request's fault, yet no ValueError
            raise ValueError(str(error)) from error
        return [_completions(output) for output in outputs]

    def load(self, snapshot: WeightSnapshot) -> None:
        self.transfer("start_weight_update", {})
        self.transfer("update_weights", {"update_info": {"snapshot": snapshot}})
        self.transfer("finish_weight_update", {})

    def transfer(self, method: str, kwargs: dict[str, Any]) -> None:
        self.llm.collective_rpc(method, kwargs=kwargs)
        if method == "finish_weight_update":
            self.forget_caches()

    def forget_caches(self) -> None:
        """Drop prefix, vision-encoder and multimodal caches: they hold states of the old weights."""
        if not self.llm.reset_prefix_cache():
            raise SkyrlError("vLLM could not reset its prefix cache; requests are still running during a weight sync")
        self.llm.llm_engine.reset_encoder_cache()
        self.llm.reset_mm_cache()


def _input(request: EngineRequest) -> Any:
    made: dict[str, Any] = {"prompt_token_ids": request.prompt_ids}
    if request.pictures:
        made["multi_modal_data"] = {"image": [Image.fromarray(picture) for picture in request.pictures]}
    return made


def _params(request: EngineRequest) -> SamplingParams:
    return SamplingParams(
        n=request.n,
        temperature=request.temperature,
        top_p=request.top_p,
        max_tokens=request.max_tokens,
        seed=request.seed,
        # Else vLLM adds stop tokens of its own: the tokenizer's end of sequence and those of generation_config.json.
        ignore_eos=True,
        stop_token_ids=list(request.stop_ids),
        logit_bias=forbidding_bias(request.forbidden_ids),
        logprobs=0,
        flat_logprobs=True,
    )


def _completions(output: Any) -> list[Completion]:
    prompt_ids = np.asarray(output.prompt_token_ids, dtype=np.int32)
    return [
        Completion(
            prompt_ids=prompt_ids,
            token_ids=np.asarray(one.token_ids, dtype=np.int32),
            logprobs=np.asarray(one.logprobs.logprobs, dtype=np.float32),
            text=one.text,
            truncated=one.finish_reason == "length",
        )
        for one in sorted(output.outputs, key=lambda one: one.index)
    ]


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
