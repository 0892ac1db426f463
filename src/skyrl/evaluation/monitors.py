"""Hallucination monitors: what an evaluation says beyond accuracy. docs/hallucination.md describes each.

They stand in a registry, so that a judge model or the checks of one's own data can be added.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial

from skyrl.records import DataError, Metrics, Sample, SampleGroup, flatten
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
    by_kind: defaultdict[str, list[bool]] = defaultdict(list)
    for group in groups:
        if group.checkable:
            by_kind[f"eval/hallucination/{group.prompt.kind}"] += [s.false_claims > 0 for s in group.samples]
    return claim_metrics(groups, "eval/hallucination", "eval/") | means(dict(sorted(by_kind.items())))


def gated(groups: list[SampleGroup], gate: float) -> Metrics:
    """Reward-model gate: of the right answers that have a reward-model score, the share scored below ``gate``
    (``eval/gate_rejected``), and the share with a false claim among those below
    (``eval/gate_hallucination_rejected``) and among the others (``eval/gate_hallucination_accepted``), each of the
    answers whose claims can be checked. A gate that works rejects answers that hallucinate more than those it accepts.
    """
    found: defaultdict[str, list[bool]] = defaultdict(list)
    for group in groups:
        for sample in group.samples:
            if sample.reward is None or sample.reward.model is None or not sample.right:
                continue
            rejected = sample.reward.model < gate
            found["eval/gate_rejected"].append(rejected)
            if group.checkable:
                side = "rejected" if rejected else "accepted"
                found[f"eval/gate_hallucination_{side}"].append(sample.false_claims > 0)
    return means(found)


def denials(groups: list[SampleGroup], phrases: Sequence[str]) -> Metrics:
    """``eval/denial``: share of the answers to prompts with pictures in which one of the regular expressions is found
    (case ignored). Without expressions it says nothing."""
    texts = [sample.text for sample in flatten(group for group in groups if group.prompt.images)]
    found = [any(re.search(phrase, text, re.IGNORECASE) for phrase in phrases) for text in texts]
    return means({"eval/denial": found if phrases else []})


MONITORS: dict[str, MonitorFactory] = {
    "claims": lambda cfg, gate: claims,
    "gate": lambda cfg, gate: partial(gated, gate=gate),
    "phrases": lambda cfg, gate: partial(denials, phrases=cfg.phrases),
}
"""Name → factory. The image-blind probe (:func:`blind_metrics`) is not among them: it needs a second asking."""


def register_monitor(name: str, factory: MonitorFactory) -> None:
    """Add a monitor to every evaluation, in place of an earlier one of that name, also of skyrl's own. The registry is
    that of this process: ``skyrl.rewards.rewarder.PLUGINS`` reaches those that score answers."""
    MONITORS[name] = factory


def build_monitors(cfg: Config) -> list[Monitor]:
    """All registered monitors, in the order of their registration. Their gate is τ of ``algorithm.gate`` if that is a
    fixed one, else ``hallucination.gate_score``: a τ that moves would make a run's evaluations incomparable."""
    gate = cfg.algorithm.gate
    score = gate.value if gate.kind is ThresholdKind.fixed else cfg.hallucination.gate_score
    return [factory(cfg.hallucination, score) for factory in MONITORS.values()]


def blind_metrics(groups: list[SampleGroup], blind: list[SampleGroup]) -> Metrics:
    """Image-blind probe: the first answer to each prompt of ``blind`` (its variant too) beside that of ``groups``.

    ``eval/blind_agreement``: share of prompts with the same extracted answer both times (case and number of blanks
    ignored); no answer agrees with nothing. ``eval/blind_accuracy`` and ``eval/blind_accuracy_drop`` (with the picture
    minus without) are over the prompts of which both answers were scored. ``eval/blind_prompts`` counts the prompts.

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
    answers = (first.answer, second.answer)
    plain = [" ".join(answer.casefold().split()) for answer in answers if answer is not None]
    return len(plain) == 2 and plain[0] != "" and plain[0] == plain[1]
