"""Hallucination monitors: what an evaluation says beyond accuracy. docs/hallucination.md describes each.

A monitor only reads scored groups and returns numbers. Monitors stand in a registry, so that a judge model or the
checks of one's own data can be added without a change to the evaluation.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from skyrl.records import DataError, Metrics, Sample, SampleGroup, flatten
from skyrl.rewards.format import extract_answer
from skyrl.rewards.metrics import claim_metrics, means
from skyrl.settings import Config, HallucinationConfig, ThresholdKind

Monitor = Callable[[list[SampleGroup]], Metrics]
"""Takes the scored groups of an evaluation (asked with their pictures; greedy, so of one sample each) and returns
metrics. A metric that nothing was measured for is left out."""

MonitorFactory = Callable[[HallucinationConfig, float], Monitor]
"""Makes a monitor from the settings and the score of the reward-model gate (raw units)."""


def claims(groups: list[SampleGroup]) -> Metrics:
    """``eval/hallucination`` (CHAIR_s), ``eval/false_claim_share`` (CHAIR_i) and ``eval/coverage`` of the exact claim
    checks, and ``eval/hallucination/<kind>``, over the prompts whose claims can be checked."""
    by_kind: dict[str, list[bool]] = {}
    for group in groups:
        if group.checkable:
            false = [sample.false_claims > 0 for sample in group.samples]
            by_kind.setdefault(f"eval/hallucination/{group.prompt.kind}", []).extend(false)
    return claim_metrics(groups, "eval/hallucination", "eval/") | means(dict(sorted(by_kind.items())))


def gate_monitor(gate: float) -> Monitor:
    """Reward-model gate: of the right answers that have a reward-model score, the share scored below ``gate``
    (``eval/gate_rejected``), and the share with a false claim among those below
    (``eval/gate_hallucination_rejected``) and among the others (``eval/gate_hallucination_accepted``), each of the
    answers whose claims can be checked. A gate that works rejects answers that hallucinate more than those it accepts.
    """

    def monitor(groups: list[SampleGroup]) -> Metrics:
        rejected: list[bool] = []
        false: dict[bool, list[bool]] = {True: [], False: []}
        for group in groups:
            for sample in group.samples:
                if sample.reward is None or sample.reward.model is None or not sample.right:
                    continue
                rejected.append(sample.reward.model < gate)
                if group.checkable:
                    false[rejected[-1]].append(sample.false_claims > 0)
        return means(
            {
                "eval/gate_rejected": rejected,
                "eval/gate_hallucination_rejected": false[True],
                "eval/gate_hallucination_accepted": false[False],
            }
        )

    return monitor


def phrase_monitor(phrases: list[str]) -> Monitor:
    """``eval/denial``: share of the answers to prompts with pictures in which one of the regular expressions is found
    (case ignored). Without expressions it says nothing."""
    patterns = [re.compile(phrase, re.IGNORECASE) for phrase in phrases]

    def monitor(groups: list[SampleGroup]) -> Metrics:
        samples = flatten([group for group in groups if group.prompt.images])
        denials = [any(pattern.search(sample.text) for pattern in patterns) for sample in samples]
        return means({"eval/denial": denials if patterns else []})

    return monitor


MONITORS: dict[str, MonitorFactory] = {
    "claims": lambda cfg, gate: claims,
    "gate": lambda cfg, gate: gate_monitor(gate),
    "phrases": lambda cfg, gate: phrase_monitor(cfg.phrases),
}
"""Name → factory. The image-blind probe (:func:`blind_metrics`) is not among them: it needs a second asking."""


def register_monitor(name: str, factory: MonitorFactory) -> None:
    """Add a monitor to every evaluation. Replaces an earlier one of that name, also one of skyrl's own.

    The registry is that of this process: ``skyrl.rewards.rewarder.PLUGINS`` reaches those that score answers.
    """
    MONITORS[name] = factory


def build_monitors(cfg: Config) -> list[Monitor]:
    """All registered monitors, in the order of their registration. Their gate is τ of ``algorithm.gate`` if that is a
    fixed one, else ``hallucination.gate_score``: a τ that moves would make a run's evaluations incomparable."""
    gate = cfg.algorithm.gate
    score = gate.value if gate.kind is ThresholdKind.fixed else cfg.hallucination.gate_score
    return [factory(cfg.hallucination, score) for factory in MONITORS.values()]


def blind_metrics(groups: list[SampleGroup], blind: list[SampleGroup]) -> Metrics:
    """Image-blind probe: what the policy says to the same prompts without their pictures.

    ``eval/blind_agreement``: share of prompts with the same extracted answer both times (case and number of blanks
    ignored); no answer agrees with nothing. ``eval/blind_accuracy`` and ``eval/blind_accuracy_drop`` (with the picture
    minus without) are over the prompts of which both answers were scored. ``eval/blind_prompts`` counts the prompts.

    Args:
        groups: Scored groups, asked with their pictures.
        blind: Some of them asked again, variant ``blind``. The first sample of each group is compared.

    Raises:
        DataError: if a blind group has no counterpart, or one of the two has no sample.
    """
    seen = {group.prompt.key: group for group in groups}
    pairs: list[tuple[Sample, Sample]] = []
    for group in blind:
        name, variant = group.prompt.key
        original = seen.get((name, "")) if variant == "blind" else None
        if original is None:
            raise DataError(
                f"prompt {name!r} of variant {variant!r} was asked for the image-blind probe; allowed: variant 'blind' "
                "and the id of an evaluated prompt"
            )
        if not (group.samples and original.samples):
            raise DataError(f"prompt {name!r}: 0 samples with or without the picture; allowed is at least 1 each")
        pairs.append((original.samples[0], group.samples[0]))
    if not pairs:
        return {}
    metrics = {"eval/blind_prompts": float(len(pairs))}
    metrics |= means({"eval/blind_agreement": [_same_answer(a, b) for a, b in pairs]})
    right = [(a.right, b.right) for a, b in pairs if a.reward is not None and b.reward is not None]
    if right:
        with_picture, without = (sum(side) / len(right) for side in zip(*right, strict=True))
        metrics |= {"eval/blind_accuracy": without, "eval/blind_accuracy_drop": with_picture - without}
    return metrics


def _same_answer(first: Sample, second: Sample) -> bool:
    texts = [extract_answer(sample.text) for sample in (first, second)]
    plain = [" ".join(text.casefold().split()) for text in texts if text is not None]
    return len(plain) == 2 and plain[0] != "" and plain[0] == plain[1]
