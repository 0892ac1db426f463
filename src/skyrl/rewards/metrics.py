"""Means over scored groups. What nothing was measured for has no key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from skyrl.records import Metrics, SampleGroup, SkyrlError, flatten
from skyrl.rewards.hybrid import length_penalty
from skyrl.rewards.repetition import repeated_share
from skyrl.settings import Config, Truncated


def answer_metrics(groups: list[SampleGroup]) -> Metrics:
    """Means over the answers of scored groups.

    ``reward/total``, ``rule``, ``format``, ``model`` and ``accuracy`` (right answers) are over the samples without an
    error, ``reward/errors`` counts the others. ``response/length_mean`` (tokens), ``response/truncated_share`` and
    ``response/repetition`` (share of repeated token 4-grams) are over all samples.
    """
    samples = flatten(groups)
    rewards = [sample.reward for sample in samples if sample.reward is not None]
    return {"reward/errors": float(sum(sample.error is not None for sample in samples))} | means(
        {
            "reward/total": [reward.total for reward in rewards],
            "reward/rule": [reward.rule for reward in rewards],
            "reward/format": [reward.format for reward in rewards],
            "reward/model": [reward.model for reward in rewards if reward.model is not None],
            "reward/accuracy": [reward.right for reward in rewards],
            "response/length_mean": [len(sample.token_ids) for sample in samples],
            "response/truncated_share": [sample.truncated for sample in samples],
            "response/repetition": [repeated_share(sample.token_ids) for sample in samples],
        }
    )


def reward_metrics(groups: list[SampleGroup], cfg: Config) -> Metrics:
    """What is logged of the scored groups of a training step: :func:`answer_metrics`; ``hallucination/…`` of
    :func:`claim_metrics`; and, over all samples, what ``reward.truncated`` makes of them: the mean
    ``reward/length_penalty``, or ``response/left_out_share``."""
    samples, lengths = flatten(groups), {}
    if cfg.reward.truncated is Truncated.soft_penalty:
        tokens = np.array([len(sample.token_ids) for sample in samples])
        penalties = length_penalty(tokens, cfg.rollout.max_new_tokens, cfg.reward.soft_penalty_tokens)
        lengths = {"reward/length_penalty": penalties.tolist()}
    elif cfg.reward.truncated is Truncated.leave_out:
        lengths = {"response/left_out_share": [sample.truncated and not sample.mask.any() for sample in samples]}
    return answer_metrics(groups) | claim_metrics(groups, "hallucination/rate", "hallucination/") | means(lengths)


def claim_metrics(groups: list[SampleGroup], rate: str, prefix: str) -> Metrics:
    """Rates over the samples whose claims about a picture can be checked: under the name ``rate`` those with a false
    claim (CHAIR_s); ``false_claim_share``, false claims of all claims (CHAIR_i); ``coverage``, samples with a claim.

    Args:
        prefix: Begins the names of the last two.
    """
    samples = flatten(group for group in groups if group.checkable)
    claims, false = sum(sample.claims for sample in samples), sum(sample.false_claims for sample in samples)
    shares = {rate: [sample.false_claims > 0 for sample in samples]}
    shares[f"{prefix}coverage"] = [sample.claims > 0 for sample in samples]
    return means(shares) | ({f"{prefix}false_claim_share": false / claims} if claims else {})


def means(values: Mapping[str, Sequence[float]]) -> Metrics:
    """The mean of each list that isn't empty."""
    return {name: float(np.mean(some)) for name, some in values.items() if len(some)}


def refuse_all_failed(groups: list[SampleGroup], when: str) -> None:
    """
    Raises:
        SkyrlError: if there are answers and not one could be scored; training would go on with nothing.
    """
    samples = flatten(groups)
    if samples and all(sample.error is not None for sample in samples):
        raise SkyrlError(f"{when}: none of the {len(samples)} answers could be scored; the first: {samples[0].error}")
