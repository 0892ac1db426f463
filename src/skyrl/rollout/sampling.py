"""What a request to vLLM is made of: seeds, forbidden tokens, prompts without their picture, answers cut in two."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np

from skyrl.records import BLIND_SUFFIX, ConfigError, Prompt, Sample

MAX_BIASES = 1024
"""Most entries of a request's ``logit_bias`` in vLLM's GPU sampler."""


def sample_seed(run_seed: int, step: int, prompt_id: str) -> int:
    """Seed of a prompt's group at a step, 0 … 2^62; sample ``i`` of the group uses this plus ``i``.

    A hash, so that neither the number of workers nor the order of the prompts changes what is sampled.
    """
    digest = hashlib.blake2b(f"{run_seed}/{step}/{prompt_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2


def forbidding_bias(forbidden: list[int], vocabulary: int) -> dict[int, float]:
    """vLLM's ``logit_bias`` that gives forbidden tokens probability 0. Placeholders of pictures and padding must never
    be sampled: the learner could not embed them.

    A list of the allowed tokens would say the same, but vLLM's GPU sampler refuses one of more than 1,024.

    Raises:
        ConfigError: for more forbidden tokens than vLLM takes.
    """
    bias = {i: float("-inf") for i in forbidden if i < vocabulary}
    if len(bias) > MAX_BIASES:
        raise ConfigError(
            f"model.policy: its tokenizer has {len(bias)} special tokens that must not be sampled; vLLM can forbid "
            f"{MAX_BIASES}. Make ordinary tokens of those that answers may hold"
        )
    return bias


def blind_prompt(prompt: Prompt) -> Prompt:
    """The same question without the picture, under an id of its own, because caches go by id."""
    return replace(prompt, id=prompt.id + BLIND_SUFFIX, images=())


def best_answer(samples: list[Sample]) -> int | None:
    """Place of the answer with the highest r_θ that ended by itself and can be cut in two; without a reward model, of
    the highest rule score. Among equals the first. ``None`` if there is no such answer."""
    usable = [
        (place, sample.reward)
        for place, sample in enumerate(samples)
        if sample.error is None and sample.reward is not None and not sample.truncated and len(sample.token_ids) > 1
    ]
    if not usable:
        return None
    with_model = not any(np.isnan(reward.model) for _, reward in usable)
    return max(usable, key=lambda one: one[1].model if with_model else one[1].rule)[0]


def first_half(token_ids: np.ndarray) -> np.ndarray:
    """The first ⌊T/2⌋ of T ≥ 2 tokens: at least one is kept and one left out."""
    return token_ids[: len(token_ids) // 2]
