"""What scored groups contribute to a batch: GRPO items, preference pairs, and what the thresholds learn from. No state.

An answer *can train* if it was scored and its mask leaves it a token. All others are in no GRPO item, no pair and no
threshold's window.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from skyrl.batch.pairs import NO_THRESHOLD, Pair, reward_margin_pairs, rule_pairs
from skyrl.batch.thresholds import Candidate
from skyrl.records import (
    DataError,
    Metrics,
    PreferencePair,
    Sample,
    SampleGroup,
    SkyrlError,
    TrainBatch,
    TrainItem,
    flatten,
)
from skyrl.settings import GrpoFilter, PairSource


@dataclass(slots=True, frozen=True)
class Gated:
    """A scored group with what the gate says of it. All arrays are [G]."""

    group: SampleGroup
    able: np.ndarray
    """bool: can train."""
    right: np.ndarray
    """bool: right by the rule, and can train."""
    scores: np.ndarray
    """float64: r_θ, ``nan`` where it is unknown."""
    held: np.ndarray
    """bool: right, and r_θ below the gate's τ. Such an answer may not be made likelier."""

    @classmethod
    def at(cls, group: SampleGroup, tau: float) -> Gated:
        """The group under a gate at τ; -inf holds nothing, and an unknown r_θ is never held."""
        able = np.array([s.error is None and s.reward is not None and s.mask.any() for s in group.samples], dtype=bool)
        right = able & np.array([sample.right for sample in group.samples], dtype=bool)
        known = [None if sample.reward is None else sample.reward.model for sample in group.samples]
        scores = np.array(known, dtype=np.float64)
        return cls(group, able, right, scores, right & (scores < tau))

    def passed(self) -> list[Sample]:
        """The samples without those that GRPO would make likelier against the gate; one that is made less likely is
        none of its business."""
        pairs = zip(self.group.samples, self.held, strict=True)
        return [sample for sample, held in pairs if not (held and sample.advantage > 0)]

    def grpo(self, only: GrpoFilter) -> list[int]:
        """Places of the samples that the GRPO term sees."""
        signal = [s.advantage if only is GrpoFilter.all or s.effective else 0.0 for s in self.group.samples]
        return [p for p, a in enumerate(signal) if a != 0 and self.able[p] and not (self.held[p] and a > 0)]


def check_fresh(groups: list[SampleGroup], version: int, lag: int) -> None:
    """Refuse fresh answers that the learner, at ``version``, may not train on. A group that was carried on may be older
    by the steps that it was.

    Raises:
        SkyrlError: for one that is more than ``lag`` versions older, or newer.
        DataError: for one that was scored and has no tokens.
    """
    for group in groups:
        oldest = version - max(lag, group.begun_lag) - group.carried
        for sample in members(group):
            where = f"prompt {group.prompt.id}, sample {sample.index}"
            if not oldest <= sample.policy_version <= version:
                raise SkyrlError(
                    f"{where}: drawn by policy version {sample.policy_version}, to be trained at version {version}; "
                    f"allowed: that version or up to controller.lag={lag} older ones"
                    f"{f', older by {group.carried} as it was carried on so often' * (group.carried > 0)}"
                )
            if sample.error is None and len(sample.token_ids) == 0:
                raise DataError(f"{where}: 0 answer tokens; allowed: 1 or more")


def carried_metrics(groups: list[SampleGroup]) -> Metrics:
    """How many groups and answers of a step were stopped earlier and continued, and how far their tokens' policy
    versions are apart."""
    spreads = [0 if s.versions is None else int(s.versions[-1] - s.versions[0]) for s in flatten(groups)]
    carried = [group.carried for group in groups]
    return {
        "rollout/carried": sum(count > 0 for count in carried) / len(groups),
        "rollout/carried_max": float(max(carried)),
        "rollout/stopped": sum(spread > 0 for spread in spreads) / len(spreads),
        "rollout/versions_mean": sum(spreads) / len(spreads),
        "rollout/versions_max": float(max(spreads)),
    }


def members(group: SampleGroup) -> list[Sample]:
    """What a pair's places refer to: the group's samples and, last, the continuation without the picture if any."""
    return group.samples if group.blind is None else [*group.samples, group.blind[1]]


def group_pairs(gated: Gated, source: PairSource, most: int, tau: float) -> list[Pair]:
    """At most ``most`` pairs of places in :func:`members`; samples that can't train take no part, and one that the gate
    holds is never chosen. Margins are at least τ, which has no meaning for ``dropout_ntp``: its pairs have none.

    Raises:
        DataError: if reward-model scores that are needed are not finite.
    """
    group, able, choosable, scores = gated.group, gated.able, ~gated.held, gated.scores
    if source is PairSource.dropout_ntp:  # an answer against its own first half, continued without the picture
        if group.blind is None:
            return []
        chosen, rejected = group.blind
        # If it said the same without looking, nothing is to be preferred.
        same = np.array_equal(group.samples[chosen].token_ids, rejected.token_ids)
        fits = able[chosen] and choosable[chosen] and rejected.mask.any() and not same
        return [(chosen, len(group.samples), None)] if fits else []
    unscored = source is PairSource.rule and np.isnan(scores[able]).all()
    broken = np.flatnonzero(able & ~np.isfinite(scores))
    if len(broken) and not unscored:
        got = f"reward-model scores of samples {broken.tolist()} are {scores[broken].tolist()}"
        raise DataError(f"prompt {group.prompt.id}: no preference pairs: {got}; allowed: finite")
    if source is PairSource.rule:
        return rule_pairs(gated.right, None if unscored else scores, able, choosable, tau, most)
    return reward_margin_pairs(scores, able, choosable, tau, most)


def add_group(batch: TrainBatch, group: SampleGroup, trained: list[int], found: list[Pair]) -> None:
    """Append a fresh group's items and pairs.

    Args:
        trained: Places of the samples that the GRPO term sees. A pair member that it does not see gets weight 0.
        found: Its pairs, places in :func:`members`; in the batch they are places in ``batch.items``.
    """
    paired = {place for chosen, rejected, _ in found for place in (chosen, rejected)}
    at: dict[int, int] = {}
    for place, sample in enumerate(members(group)):
        if place in trained or place in paired:
            at[place] = len(batch.items)
            batch.items.append(TrainItem(group.prompt, group.prompt_ids, sample, 1.0 if place in trained else 0.0))
    batch.pairs += [PreferencePair(at[chosen], at[rejected], margin) for chosen, rejected, margin in found]


def margin_candidates(gated: list[Gated], source: PairSource) -> list[Candidate]:
    """The first pair that each group would form without a threshold: its margin, labelled by its chosen answer. Those
    without a margin (no reward model, or ``dropout_ntp``) are compared with nothing and left out."""
    firsts = [(one, *pair) for one in gated for pair in group_pairs(one, source, 1, NO_THRESHOLD)]
    return [_candidate(one, chosen, margin) for one, chosen, _, margin in firsts if margin is not None]


def gate_candidates(gated: list[Gated]) -> list[Candidate]:
    """The answers that are right by the rule, with r_θ where it is known."""
    known = [(one, place) for one in gated for place in np.flatnonzero(one.right & ~np.isnan(one.scores)).tolist()]
    return [_candidate(one, place, float(one.scores[place])) for one, place in known]


def _candidate(gated: Gated, place: int, score: float) -> Candidate:
    """Bad if it makes a false claim about its picture; unknown where no claim can be checked."""
    group = gated.group
    return Candidate(score, group.samples[place].false_claims > 0 if group.checkable else None)
