"""Means over scored groups. What nothing was measured for has no key."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from skyrl.records import Metrics, Sample, SampleGroup, SkyrlError, flatten
from skyrl.rewards.hybrid import length_penalty
from skyrl.settings import Config, GrpoFilter, Truncated

SHORT = 100
"""n-grams up to which a set of tuples is faster."""
_FACTORS = np.random.default_rng(0).integers(0, 2**64, 4, dtype=np.uint64)


def answer_metrics(groups: list[SampleGroup]) -> Metrics:
    """Means over the answers of scored groups: ``reward/…`` over the samples without an error (``reward/errors`` counts
    the others), ``response/…`` over all samples. docs/metrics.md defines each."""
    samples = flatten(groups)
    rewards = [sample.reward for sample in samples if sample.reward is not None]
    names = sorted({name for reward in rewards for name in reward.rules})
    parts = {f"reward/rule/{name}": [r.rules[name] for r in rewards if name in r.rules] for name in names}
    metrics = {"reward/errors": float(sum(sample.error is not None for sample in samples))}
    metrics |= {"reward/scored": float(len(rewards))}
    if rewards:
        metrics["reward/rule_std"] = float(np.std([reward.rule for reward in rewards]))
    if scores := [reward.model for reward in rewards if reward.model is not None]:
        metrics |= {"reward/model_std": float(np.std(scores)), "reward/model_largest": float(np.abs(scores).max())}
    return metrics | means(
        {
            "reward/total": [reward.total for reward in rewards],
            "reward/rule": [reward.rule for reward in rewards],
            **parts,
            "reward/format": [reward.format for reward in rewards],
            "reward/format_of_right": [reward.format for reward in rewards if reward.right],
            "reward/model": scores,
            "reward/accuracy": [reward.right for reward in rewards],
            "response/length_mean": [len(sample.token_ids) for sample in samples],
            "response/truncated_share": [sample.truncated for sample in samples],
            "response/repetition": [repeated_share(sample.token_ids) for sample in samples],
            "response/answer_share": [bool(sample.answer) for sample in samples],
        }
    )


def reward_metrics(groups: list[SampleGroup], cfg: Config) -> Metrics:
    """What is logged of the scored groups of a training step: :func:`answer_metrics` and :func:`group_metrics`;
    ``hallucination/…`` of :func:`claim_metrics`; and, over all samples, what ``reward.truncated`` makes of them: the
    mean ``reward/length_penalty``, or ``response/left_out_share``."""
    samples, lengths = flatten(groups), {}
    if cfg.reward.truncated is Truncated.soft_penalty:
        tokens = np.array([len(sample.token_ids) for sample in samples])
        penalties = length_penalty(tokens, cfg.rollout.max_new_tokens, cfg.reward.soft_penalty_tokens)
        lengths = {"reward/length_penalty": penalties.tolist()}
    elif cfg.reward.truncated is Truncated.leave_out:
        lengths = {"response/left_out_share": [sample.truncated and not sample.mask.any() for sample in samples]}
    claims = claim_metrics(groups, "hallucination/rate", "hallucination/")
    return answer_metrics(groups) | group_metrics(groups, cfg) | claims | means(lengths)


def group_metrics(groups: list[SampleGroup], cfg: Config) -> Metrics:
    """What only the answers to one prompt together say: whether they differ, in tokens and in what GRPO learns from,
    and whether the reward model agrees with the rule on them. And which prompts these are."""
    compared = [group for group in groups if len(group.samples) > 1]
    learned = "advantage" if cfg.algorithm.grpo.filter is GrpoFilter.all else "rule_advantage"
    scored = [[sample for sample in group.samples if sample.error is None] for group in compared]
    shares = {
        "response/same_share": [len({s.token_ids.tobytes() for s in group.samples}) == 1 for group in compared],
        "reward/tied_share": [not any(getattr(s, learned) for s in some) for some in scored if len(some) > 1],
    }
    metrics = means(shares) | model_agreement(scored, "reward/model_agreement") | _advantage_metrics(scored)
    return metrics | ({"data/fingerprint": fingerprint(group.prompt.id for group in groups)} if groups else {})


def _advantage_metrics(sets: Iterable[Sequence[Sample]]) -> Metrics:
    """Whether the advantages are those of the answers that have them, and of their groups."""
    ordered, centres = list[bool](), list[float]()
    for some in sets:
        totals = np.array([sample.reward.total for sample in some if sample.reward is not None])
        advantages = np.array([sample.advantage for sample in some if sample.reward is not None])
        if len(totals) > 1:
            steps = np.sign(np.subtract.outer(totals, totals))
            ordered += (steps * np.sign(np.subtract.outer(advantages, advantages)) >= 0)[steps > 0].tolist()
            centres.append(abs(float(advantages.mean())))
    centre = {"reward/advantage_centre": max(centres)} if centres else {}
    return means({"reward/advantage_order": ordered}) | centre


def model_agreement(sets: Iterable[Sequence[Sample]], name: str) -> Metrics:
    """Under ``name``, of the pairs of a right and a wrong answer within one set, the share whose right one has the
    higher r_θ (a tie is half of one); under ``<name>_sd`` the standard deviation that this share would have about 1/2
    if r_θ knew nothing of right and wrong (Mann-Whitney). Nothing without such a pair."""
    higher = pairs = variance = 0.0
    for some in sets:
        known = [sample.reward for sample in some if sample.reward is not None and sample.reward.model is not None]
        right, wrong = (np.array([r.model for r in known if r.right is side], dtype=float) for side in (True, False))
        difference = right[:, None] - wrong
        higher += float((difference > 0).sum() + (difference == 0).sum() / 2)
        pairs += difference.size
        variance += difference.size * (len(known) + 1) / 12
    return {name: higher / pairs, f"{name}_sd": variance**0.5 / pairs} if pairs else {}


def fingerprint(names: Iterable[str]) -> float:
    """A whole number below 2^32 that is the same for the same names, in whatever order."""
    return float(zlib.crc32("\0".join(sorted(names)).encode()))


def claim_metrics(groups: list[SampleGroup], rate: str, prefix: str) -> Metrics:
    """Rates over the samples whose claims about a picture can be checked: under the name ``rate`` those with a false
    claim (CHAIR_s); ``<prefix>false_claim_share``, false claims of all claims (CHAIR_i); ``<prefix>coverage``, samples
    with a claim."""
    samples = flatten(group for group in groups if group.checkable)
    claims, false = sum(sample.claims for sample in samples), sum(sample.false_claims for sample in samples)
    shares = {rate: [sample.false_claims > 0 for sample in samples]}
    shares[f"{prefix}coverage"] = [sample.claims > 0 for sample in samples]
    return means(shares) | ({f"{prefix}false_claim_share": false / claims} if claims else {})


def means(values: Mapping[str, Sequence[float]]) -> Metrics:
    """The mean of each list that isn't empty."""
    return {name: float(np.mean(some)) for name, some in values.items() if len(some)}


def refuse_all_failed(groups: list[SampleGroup], when: str) -> None:
    """Raise :class:`SkyrlError` if there are answers and not one could be scored: training would go on with nothing."""
    samples = flatten(groups)
    if samples and all(sample.error is not None for sample in samples):
        raise SkyrlError(f"{when}: none of the {len(samples)} answers could be scored; the first: {samples[0].error}")


def failures(groups: list[SampleGroup], when: str) -> str | None:
    """What the user should read of answers that could not be scored, if there are any: how many, by which verifiers,
    and the first of each. A verifier that fails only for wrong answers would else look like an accuracy of 1."""
    asked: Counter[str] = Counter()
    first: dict[str, str] = {}
    failed: Counter[str] = Counter()
    for group in groups:
        name = " and ".join(check.verifier or "reward.verifier" for check in group.prompt.all_checks)
        asked[name] += len(group.samples)
        errors = [sample.error for sample in group.samples if sample.error is not None]
        failed[name] += len(errors)
        first |= {name: errors[0]} if errors and name not in first else {}
    counts = [f"{failed[name]} of {asked[name]} by {name}" for name in asked if failed[name]]
    if not counts:
        return None
    return (
        f"{when}: answers that could not be scored: {', '.join(counts)}. They train nothing and count in no accuracy "
        f"(reward/errors, eval/errors). The first of each: {' | '.join(first.values())}"
    )


def repeated_share(token_ids: np.ndarray, n: int = 4) -> float:
    """Share of an answer's token n-grams that occurred before in the same answer, the sign of a policy that loops: 1 −
    distinct n-grams / n-grams, in [0, 1); 0.0 for fewer than ``n`` tokens. ``token_ids`` is int [T]; another shape and
    an ``n`` below 1 are a :class:`ValueError`."""
    token_ids = np.asarray(token_ids)
    if token_ids.ndim != 1 or n < 1:
        raise ValueError(f"token_ids have shape {token_ids.shape}, n is {n}; allowed: [T] and 1 or more")
    places = len(token_ids) - n + 1
    if places < 1:
        return 0.0
    if places <= SHORT or n > len(_FACTORS):
        tokens = token_ids.tolist()
        return 1.0 - len(set(zip(*(tokens[start : start + places] for start in range(n)), strict=True))) / places
    # Sorted 64-bit hashes: 13 times as fast for 16,384 tokens, and this is done where a step waits for it. Different
    # n-grams have equal hashes with a chance of about 2^-63 each, which would move the share by 1 / places.
    values = token_ids.astype(np.uint64)
    hashes = np.sort(sum(_FACTORS[start] * values[start : start + places] for start in range(n)))
    return 1.0 - (1 + int(np.count_nonzero(hashes[1:] != hashes[:-1]))) / places
