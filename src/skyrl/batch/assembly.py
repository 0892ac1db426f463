"""What scored groups contribute to a batch: GRPO items, preference pairs, and what the thresholds learn from. No state.

Throughout, ``held`` is a group's gate as a bool array [G]: True for answers whose reinforcement is withheld.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from skyrl.batch.pairs import NO_THRESHOLD, RIGHT, Pair, reward_margin_pairs, rule_pairs
from skyrl.records import DataError, PreferencePair, Sample, SampleGroup, TrainItem
from skyrl.settings import GrpoFilter, MpoConfig, PairSource


@dataclass(slots=True, frozen=True)
class Candidates:
    """What a threshold looks at: all that it could let pass, whether it does or not."""

    scores: np.ndarray
    """float64 [n]: what the threshold is compared with; finite."""
    bad: np.ndarray
    """float64 [n]: 1 if the answer makes a false claim about its picture, 0 if not, ``nan`` if nothing is known of the
    picture or there is none."""


def is_right(sample: Sample) -> bool:
    """True for a scored answer with the full rule score."""
    return sample.error is None and sample.reward is not None and sample.reward.rule >= RIGHT


def gate_of(group: SampleGroup, tau: float) -> np.ndarray:
    """bool [G]: right by the rule, and r_θ below the gate's τ (-inf withholds nothing)."""
    return np.array([is_right(sample) and _score(sample) < tau for sample in group.samples], dtype=bool)


def reinforced(sample: Sample, held: bool) -> bool:
    """False if the gate forbids to make the sample likelier; one that is made less likely is none of its business."""
    return not (held and sample.advantage > 0)


def let_through(groups: list[SampleGroup], held: list[np.ndarray]) -> list[SampleGroup]:
    """The groups without the samples that the gate keeps from GRPO."""
    return [
        replace(group, samples=[s for s, no in zip(group.samples, gate, strict=True) if reinforced(s, bool(no))])
        for group, gate in zip(groups, held, strict=True)
    ]


# ---------------------------------------------------------------- pairs


def group_pairs(group: SampleGroup, mpo: MpoConfig, tau: float, held: np.ndarray) -> list[Pair]:
    """Pairs of one group from the configured source; samples with an error or without tokens take no part.

    Args:
        group: A scored group.
        mpo: Source and largest number of pairs.
        tau: Smallest margin. Without meaning for ``dropout_ntp``, whose margin is ``nan``.
        held: The group's gate; a withheld sample is never chosen.

    Returns:
        Places in :func:`members`.

    Raises:
        DataError: if reward-model scores that are needed are not finite.
    """
    valid = np.array([_usable(sample) for sample in group.samples], dtype=bool)
    if mpo.pairs is PairSource.dropout_ntp:
        return _blind_pair(group, valid & ~held)
    scores = np.array([_score(sample) for sample in group.samples])
    try:
        if mpo.pairs is PairSource.rule:
            rules = np.array([np.nan if s.reward is None else s.reward.rule for s in group.samples])
            return rule_pairs(rules, scores, valid, tau, mpo.pairs_per_prompt, ~held)
        return reward_margin_pairs(scores, valid, tau, mpo.pairs_per_prompt, ~held)
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
    if not choosable[chosen] or np.array_equal(group.samples[chosen].token_ids, rejected.token_ids):
        return []  # without the picture it said the same: nothing is to be preferred
    return [(chosen, len(group.samples), np.nan)]


def _usable(sample: Sample) -> bool:
    return sample.error is None and sample.reward is not None and len(sample.token_ids) > 0


def _score(sample: Sample) -> float:
    return np.nan if sample.reward is None else sample.reward.model


# ---------------------------------------------------------------- items


def in_grpo(sample: Sample, held: bool, only: GrpoFilter) -> bool:
    """True if the GRPO term sees the fresh sample."""
    if sample.error is not None or sample.advantage == 0 or not reinforced(sample, held):
        return False
    return only is GrpoFilter.all or sample.effective


def add_group(
    items: list[TrainItem], pairs: list[PreferencePair], group: SampleGroup, trained: np.ndarray, found: list[Pair]
) -> None:
    """Append a fresh group's items, and its pairs as places in ``items``.

    Args:
        items: The batch so far.
        pairs: Its pairs so far.
        group: A scored group.
        trained: bool [G]: the samples that the GRPO term sees. A pair member that it does not see gets weight 0.
        found: The group's pairs, places in :func:`members`.

    Raises:
        DataError: if one of these samples has no tokens.
    """
    paired = {place for chosen, rejected, _ in found for place in (chosen, rejected)}
    at: dict[int, int] = {}
    for place, sample in enumerate(members(group)):
        weight = 1.0 if place < len(trained) and trained[place] else 0.0
        if weight == 0 and place not in paired:
            continue
        if len(sample.token_ids) == 0:
            raise DataError(f"prompt {group.prompt.id}, sample {sample.index}: 0 answer tokens; allowed: 1 or more")
        at[place] = len(items)
        items.append(TrainItem(group.prompt, group.prompt_ids, sample, grpo_weight=weight))
    pairs += [PreferencePair(at[chosen], at[rejected], margin) for chosen, rejected, margin in found]


# ---------------------------------------------------------------- what thresholds learn from


def margin_candidates(groups: list[SampleGroup], held: list[np.ndarray], mpo: MpoConfig) -> Candidates:
    """The first pair that each group would form without a threshold: its margin, labelled by its chosen answer.

    Margins that are ``nan`` (no reward model, or ``dropout_ntp``) are compared with nothing and left out.
    """
    one = replace(mpo, pairs_per_prompt=1)
    rows: list[tuple[float, float]] = []
    for group, gate in zip(groups, held, strict=True):
        first = group_pairs(group, one, NO_THRESHOLD, gate)
        rows += [(margin, _label(group, group.samples[chosen])) for chosen, _, margin in first]
    return _candidates(rows)


def gate_candidates(groups: list[SampleGroup]) -> Candidates:
    """The answers that are right by the rule, with r_θ."""
    return _candidates(
        [(_score(sample), _label(group, sample)) for group in groups for sample in group.samples if is_right(sample)]
    )


def _label(group: SampleGroup, sample: Sample) -> float:
    return float(sample.false_claims > 0) if group.checkable else np.nan


def _candidates(rows: list[tuple[float, float]]) -> Candidates:
    scored = np.array([row for row in rows if not np.isnan(row[0])], dtype=np.float64).reshape(-1, 2)
    return Candidates(scored[:, 0], scored[:, 1])
