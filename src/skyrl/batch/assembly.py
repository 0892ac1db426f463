"""What scored groups contribute to a batch: GRPO items, preference pairs, and what the thresholds learn from. No state.

An answer *can train* if it was scored and its mask leaves it a token. All others are in no GRPO item, no pair and no
threshold's window.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from skyrl.batch.pairs import NO_THRESHOLD, Pair, reward_margin_pairs, rule_pairs
from skyrl.batch.thresholds import Candidate
from skyrl.records import DataError, PreferencePair, Sample, SampleGroup, SkyrlError, TrainBatch, TrainItem
from skyrl.settings import GrpoFilter, MpoConfig, PairSource


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
    """Refuse fresh answers that the learner, at ``version``, may not train on.

    Raises:
        SkyrlError: for one that is more than ``lag`` versions older, or newer.
        DataError: for one that was scored and has no tokens.
    """
    for group in groups:
        for sample in members(group):
            where = f"prompt {group.prompt.id}, sample {sample.index}"
            if not version - lag <= sample.policy_version <= version:
                raise SkyrlError(
                    f"{where}: drawn by policy version {sample.policy_version}, to be trained at version {version}; "
                    f"allowed: that version or up to controller.lag={lag} older ones"
                )
            if sample.error is None and len(sample.token_ids) == 0:
                raise DataError(f"{where}: 0 answer tokens; allowed: 1 or more")


def group_pairs(gated: Gated, mpo: MpoConfig, tau: float) -> list[Pair]:
    """Pairs of one group from the configured source; samples that can't train take no part, and one that the gate holds
    is never chosen.

    Args:
        mpo: Source and largest number of pairs.
        tau: Smallest margin. Without meaning for ``dropout_ntp``, which has no margins.

    Returns:
        Places in :func:`members`.

    Raises:
        DataError: if reward-model scores that are needed are not finite.
    """
    group, most, choosable = gated.group, mpo.pairs_per_prompt, ~gated.held
    if mpo.pairs is PairSource.dropout_ntp:
        return _blind_pair(group, gated.able & choosable)
    try:
        if mpo.pairs is PairSource.rule:
            scores = None if np.isnan(gated.scores[gated.able]).all() else gated.scores
            return rule_pairs(gated.right, scores, gated.able, tau, most, choosable)
        return reward_margin_pairs(gated.scores, gated.able, tau, most, choosable)
    except ValueError as error:
        raise DataError(f"prompt {group.prompt.id}: no preference pairs: {error}") from error


def members(group: SampleGroup) -> list[Sample]:
    """What a pair's places refer to: the group's samples and, last, the continuation without the picture if any."""
    return group.samples if group.blind is None else [*group.samples, group.blind[1]]


def _blind_pair(group: SampleGroup, choosable: np.ndarray) -> list[Pair]:
    """DropoutNTP: an answer against its own first half, continued without the picture."""
    if group.blind is None:
        return []
    chosen, rejected = group.blind
    if not choosable[chosen] or not rejected.mask.any():
        return []
    if np.array_equal(group.samples[chosen].token_ids, rejected.token_ids):
        return []  # without the picture it said the same: nothing is to be preferred
    return [(chosen, len(group.samples), None)]


def add_group(batch: TrainBatch, group: SampleGroup, trained: list[int], found: list[Pair]) -> None:
    """Append a fresh group's items and pairs.

    Args:
        batch: What there is so far.
        group: A scored group.
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


def margin_candidates(gated: list[Gated], mpo: MpoConfig) -> list[Candidate]:
    """The first pair that each group would form without a threshold: its margin, labelled by its chosen answer.

    Pairs without a margin (no reward model, or ``dropout_ntp``) are compared with nothing and left out.
    """
    one = mpo.model_copy(update={"pairs_per_prompt": 1})
    firsts = [(each.group, *pair) for each in gated for pair in group_pairs(each, one, NO_THRESHOLD)]
    return [Candidate(m, _bad(group, group.samples[chosen])) for group, chosen, _, m in firsts if m is not None]


def gate_candidates(gated: list[Gated]) -> list[Candidate]:
    """The answers that are right by the rule, with r_θ where it is known."""
    places = [(one, place) for one in gated for place in np.flatnonzero(one.right & ~np.isnan(one.scores)).tolist()]
    return [Candidate(float(one.scores[p]), _bad(one.group, one.group.samples[p])) for one, p in places]


def _bad(group: SampleGroup, sample: Sample) -> bool | None:
    """Whether it makes a false claim about its picture; ``None`` where no claim can be checked."""
    return sample.false_claims > 0 if group.checkable else None
