"""Groups that several steps sample: how the engine is asked to go on with one, and what becomes of its answers.

A group is *begun* until all its answers have ended. Each step asks for more than it needs, stops when it has enough
complete groups, and hands the begun ones to the next step; nothing of them stays in the worker.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from skyrl.records import Begun, Prompt, Sample, SampleGroup, SkyrlError
from skyrl.rollout.engine import Completion, EngineRequest

NO_TOKENS = np.empty(0, np.int32)


def begin(row: int, prompt: Prompt, step: int, n: int, lag: int) -> Begun:
    """A group of ``n`` answers without a token."""
    samples = [Sample(place, NO_TOKENS, NO_TOKENS.astype(np.float32), "", False, 0) for place in range(n)]
    return Begun(row, prompt.id, step, NO_TOKENS, samples, tuple(range(n)), lag)


def drawn(one: Begun) -> str:
    """What a begun group's further seeds come from: the length of every open answer. "" as long as nothing was sampled:
    then it is asked for as if it were asked for the first time."""
    lengths = [len(one.samples[place].token_ids) for place in one.open]
    return ",".join(map(str, lengths)) if len(one.prompt_ids) else ""


def going_on(one: Begun, request: EngineRequest) -> EngineRequest:
    """The request for the rest of the open answers, from one for all answers from the start.

    Raises:
        SkyrlError: if an answer is as long already as the request allows.
    """
    begun = tuple(one.samples[place].token_ids.tolist() for place in one.open)
    longest = max(map(len, begun))
    if longest >= request.max_tokens:
        raise SkyrlError(
            f"the checkpoint has an unfinished answer of {longest} tokens to prompt {one.prompt_id!r}; resume with a "
            f"rollout.max_new_tokens above that, not {request.max_tokens}"
        )
    return replace(request, n=len(begun), begun=begun if longest else ())


def extended(
    one: Begun, made: list[Completion], version: int, decode: Callable[[Completion, np.ndarray], str]
) -> Begun:
    """The group with what the engine made of its open answers.

    Args:
        decode: The text of an answer that has ended.
    """
    samples, still = list(one.samples), []
    for place, new in zip(one.open, made, strict=True):
        samples[place] = _longer(one.samples[place], new, version)
        if new.stopped:
            still.append(place)
        else:
            samples[place].text = decode(new, samples[place].token_ids)
    prompt_ids = max((one.prompt_ids, *(new.prompt_ids for new in made)), key=len)
    return replace(one, prompt_ids=prompt_ids, samples=samples, open=tuple(still))


def _longer(sample: Sample, new: Completion, version: int) -> Sample:
    """The answer with the new tokens behind its old ones, each with the version that drew it."""
    had = len(sample.token_ids)
    assert sample.logprobs is not None  # a begun answer was sampled
    ids, logprobs = np.concatenate([sample.token_ids, new.token_ids]), np.concatenate([sample.logprobs, new.logprobs])
    first, versions = version if had == 0 else sample.policy_version, sample.versions
    if len(new.token_ids) and first != version:
        before = np.full(had, first, np.int32) if versions is None else versions
        versions = np.concatenate([before, np.full(len(new.token_ids), version, np.int32)])
    return Sample(sample.index, ids, logprobs, "", new.truncated, first, versions=versions)


def finished(one: Begun, prompt: Prompt) -> SampleGroup:
    """The group, all of whose answers have ended. Its samples are copies: scoring writes into them, and a checkpoint
    may hold the begun group yet."""
    samples, lag = list(map(replace, one.samples)), one.lag if one.carried else 0
    return SampleGroup(prompt, one.prompt_ids, samples, carried=one.carried, begun_lag=lag)
