"""The rollout engine: a plain class round one vLLM engine. Knows nothing of Ray."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from vllm import LLM, SamplingParams
from vllm.config import WeightTransferConfig

from skyrl.interfaces import PromptDataset
from skyrl.policy.encode import PromptEncoder
from skyrl.records import (
    DataError,
    Prompt,
    RolloutRequest,
    Sample,
    SampleGroup,
    SkyrlError,
    WeightSnapshot,
)
from skyrl.rollout.sampling import best_answer, blind_prompt, first_half, forbidding_bias, sample_seed
from skyrl.settings import Config, WeightSync
from skyrl.sync import shm_transfer

CPU_BATCHED_TOKENS = 16384


class VllmRolloutEngine:
    """Samples groups of answers with vLLM and takes new weights through its weight-transfer API.

    Args:
        cfg: The whole configuration.
        policy_folder: Hugging Face folder of the starting policy.
        datasets: Split name → prompts; requests name rows of these.
    """

    def __init__(self, cfg: Config, policy_folder: str, datasets: dict[str, PromptDataset]) -> None:
        self.cfg = cfg
        self.datasets = datasets
        self.version = 0
        self.encoder = PromptEncoder.from_pretrained(policy_folder)
        self.llm = _start_llm(cfg, policy_folder)
        self._bias = forbidding_bias(self.encoder.forbidden_token_ids(), self.llm.model_config.get_vocab_size())

    # ------------------------------------------------------------ sampling

    def generate(self, request: RolloutRequest) -> list[SampleGroup]:
        """One group per requested row, in the order of the rows; a blind request leaves out rows without pictures.

        Raises:
            DataError: for an unknown split, or a prompt longer than ``rollout.max_prompt_tokens``.
        """
        if request.split not in self.datasets:
            raise DataError(f"unknown split {request.split!r}; this worker has: {', '.join(self.datasets)}")
        prompts = [self.datasets[request.split][row] for row in request.rows]
        if request.blind:
            prompts = [blind_prompt(prompt) for prompt in prompts if prompt.images]
        return self._sample(prompts, request, self.cfg.rollout.max_new_tokens, self.cfg.rollout.top_p)

    def continue_blind(self, groups: list[SampleGroup], step: int) -> list[SampleGroup]:
        """Fill ``SampleGroup.blind`` in place: the best answer's first half, continued without the picture.

        DropoutNTP of InternVL's MPO: a continuation that can't look any more tends to make things up, which makes it
        the rejected answer of a pair whose chosen one is the whole answer. Groups without a picture, or without an
        answer that can be cut, keep ``blind=None``.

        Args:
            groups: Scored groups.
            step: Number of the step; the continuation's seed is derived from it.

        Returns:
            ``groups`` itself.

        Raises:
            DataError: for a prompt longer than ``rollout.max_prompt_tokens``.
        """
        rollout = self.cfg.rollout
        request = RolloutRequest("train", (), step, 1, False, self.cfg.controller.seed)
        cuts: list[tuple[SampleGroup, int]] = []
        inputs, params = [], []
        for group in groups:
            group.blind = None
            place = best_answer(group.samples) if group.prompt.images else None
            if place is None:
                continue
            cuts.append((group, place))
            prompt, kept = blind_prompt(group.prompt), first_half(group.samples[place].token_ids)
            inputs.append({"prompt_token_ids": [*self.input(prompt)["prompt_token_ids"], *kept.tolist()]})
            params.append(self.params(prompt, request, rollout.max_new_tokens - len(kept), rollout.top_p))
        outputs = self.llm.generate(inputs, params, use_tqdm=False) if inputs else []
        for (group, place), output in zip(cuts, outputs, strict=True):
            group.blind = (place, self._continued(group.samples, place, output.outputs[0]))
        return groups

    def _continued(self, samples: list[Sample], place: int, completion: Any) -> Sample:
        kept = first_half(samples[place].token_ids)
        ids = np.concatenate([kept, np.asarray(completion.token_ids, dtype=np.int32)])
        truncated = completion.finish_reason == "length"
        spoken = ids if truncated else ids[:-1]  # without the end of sequence
        return Sample(
            index=len(samples),
            token_ids=ids,
            # The first half was drawn with the picture and the second without: no distribution gave the whole.
            logprobs=np.full(len(ids), np.nan, dtype=np.float32),
            # As vLLM decodes, but for a character that the end cuts in two: no special tokens, blanks as they are.
            text=self.encoder.tokenizer.decode(
                spoken.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False
            ),
            truncated=truncated,
            policy_version=self.version,
        )

    def probe(self) -> list[SampleGroup]:
        """Short sampled answers to the first evaluation prompts, seeded by the policy version."""
        rollout = self.cfg.rollout
        dataset = self.datasets["eval"]
        rows = tuple(range(min(rollout.probe_prompts, len(dataset))))
        request = RolloutRequest("eval", rows, self.version, 1, False, self.cfg.controller.seed)
        # Without top-p: it renormalises log-probabilities in a way that the learner can't know.
        return self._sample([dataset[row] for row in rows], request, rollout.probe_new_tokens, top_p=1.0)

    def _sample(
        self, prompts: list[Prompt], request: RolloutRequest, max_new_tokens: int, top_p: float
    ) -> list[SampleGroup]:
        if not prompts:
            return []
        inputs = [self.input(prompt) for prompt in prompts]
        params = [self.params(prompt, request, max_new_tokens, top_p) for prompt in prompts]
        try:
            outputs = self.llm.generate(inputs, params, use_tqdm=False)
        except ValueError:
            # Pictures may have made one longer than the engine takes; its error names no prompt.
            for prompt in prompts:
                self._check_length(prompt, len(self.encoder.encode(prompt)[0]))
            raise
        return [self._group(prompt, output) for prompt, output in zip(prompts, outputs, strict=True)]

    def input(self, prompt: Prompt) -> Any:
        """One prompt as vLLM takes it: placeholders not yet expanded, pictures beside them.

        Raises:
            DataError: if it is longer than ``rollout.max_prompt_tokens``.
        """
        ids = self.encoder.text_ids(prompt)
        self._check_length(prompt, len(ids))  # placeholders not expanded yet; _group checks the whole
        if not prompt.images:
            return {"prompt_token_ids": ids}
        pictures = [Image.fromarray(picture) for picture in prompt.images]
        return {"prompt_token_ids": ids, "multi_modal_data": {"image": pictures}}

    def params(self, prompt: Prompt, request: RolloutRequest, max_new_tokens: int, top_p: float) -> SamplingParams:
        """vLLM's parameters for one prompt of a request."""
        return SamplingParams(
            n=request.samples_per_prompt,
            temperature=0.0 if request.greedy else self.cfg.rollout.temperature,
            top_p=1.0 if request.greedy else top_p,
            max_tokens=max_new_tokens,
            seed=None if request.greedy else sample_seed(request.seed, request.step, prompt.id),
            logprobs=0,
            logit_bias=self._bias,
        )

    def _check_length(self, prompt: Prompt, length: int) -> None:
        limit = self.cfg.rollout.max_prompt_tokens
        if length > limit:
            raise DataError(f"prompt {prompt.id!r} has {length} tokens; rollout.max_prompt_tokens allows {limit}")

    def _group(self, prompt: Prompt, output: Any) -> SampleGroup:
        prompt_ids = np.asarray(output.prompt_token_ids, dtype=np.int32)
        self._check_length(prompt, len(prompt_ids))
        samples = []
        for completion in sorted(output.outputs, key=lambda c: c.index):
            ids = np.asarray(completion.token_ids, dtype=np.int32)
            logprobs = [entry[int(token)].logprob for token, entry in zip(ids, completion.logprobs, strict=True)]
            samples.append(
                Sample(
                    index=completion.index,
                    token_ids=ids,
                    logprobs=np.asarray(logprobs, dtype=np.float32),
                    text=completion.text,
                    truncated=completion.finish_reason == "length",
                    policy_version=self.version,
                )
            )
        return SampleGroup(prompt, prompt_ids, samples)

    # ------------------------------------------------------------ weights

    def load_weights(self, snapshot: WeightSnapshot) -> None:
        """Replace all weights by the snapshot's and forget every cache that was filled with the old ones.

        Raises:
            SyncError: if the snapshot does not cover the policy.
        """
        self.llm.collective_rpc("start_weight_update")
        self.llm.collective_rpc("update_weights", kwargs={"update_info": {"snapshot": snapshot}})
        self.llm.collective_rpc("finish_weight_update")
        self.forget_caches()
        self.version = snapshot.version

    def forget_caches(self) -> None:
        """Drop prefix, vision-encoder and multimodal caches: they hold states of the old weights."""
        if not self.llm.reset_prefix_cache():
            raise SkyrlError("vLLM could not reset its prefix cache; requests are still running during a weight sync")
        self.llm.llm_engine.reset_encoder_cache()
        self.llm.reset_mm_cache()

    def transfer_rpc(self, method: str, kwargs: dict[str, Any]) -> None:
        """One call of vLLM's weight-transfer control plane, for the backends that vLLM drives itself (nccl, ipc)."""
        self.llm.collective_rpc(method, kwargs=kwargs)

    def finish_transfer(self, version: int) -> None:
        """After a vLLM-driven transfer: new version, no old caches."""
        self.forget_caches()
        self.version = version


def _start_llm(cfg: Config, policy_folder: str) -> LLM:
    rollout = cfg.rollout
    length = rollout.max_prompt_tokens + rollout.max_new_tokens
    options: dict[str, Any] = {}
    if rollout.weight_sync is WeightSync.shm:
        shm_transfer.register()
        backend = shm_transfer.BACKEND
    else:
        if not torch.cuda.is_available():
            raise SkyrlError(
                f"rollout.weight_sync={rollout.weight_sync.value} needs CUDA in the rollout process; on CPU use shm"
            )
        backend = rollout.weight_sync.value
    if rollout.device == "cpu":
        # Chunked prefill is off: with per-request seeds vLLM 0.32 rewinds a random generator after a partial prefill
        # by its offset, and CPU generators have none.
        options |= {
            "enforce_eager": True,
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(CPU_BATCHED_TOKENS, length),
            "skip_mm_profiling": True,
        }
    else:
        options |= {"gpu_memory_utilization": rollout.gpu_memory_utilization}
    llm = LLM(
        model=policy_folder,
        dtype=cfg.model.dtype,
        max_model_len=length,
        max_num_seqs=rollout.max_num_seqs,
        tensor_parallel_size=rollout.tensor_parallel_size,
        seed=cfg.controller.seed,
        # The distribution that was sampled from, not the raw one: temperature and forbidden tokens applied.
        logprobs_mode="processed_logprobs",
        generation_config="vllm",
        disable_log_stats=True,
        weight_transfer_config=WeightTransferConfig(backend=backend),
        **options,
    )
    if rollout.device == "cpu":
        # vLLM leaves a function here that only warns; its own picture processor then warns at every request.
        torch.set_num_threads = lambda _: None
    return llm
