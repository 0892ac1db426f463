"""Hallucination monitors: what an evaluation says beyond accuracy. docs/hallucination.md describes each.

A monitor only reads scored groups and returns numbers. Monitors stand in a registry, so that a judge model or the
checks of one's own data can be added without a change to the evaluation.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from importlib.metadata import entry_points

from skyrl.interfaces import Metrics, flatten
from skyrl.records import BLIND_SUFFIX, DataError, RewardParts, Sample, SampleGroup
from skyrl.rewards.format import extract_answer
from skyrl.rewards.scorer import claim_rates
from skyrl.settings import HallucinationConfig

PLUGINS = "skyrl.plugins"
"""Entry-point group of installed packages whose modules register monitors and claim checkers when imported."""

Monitor = Callable[[list[SampleGroup]], Metrics]
"""Takes the scored groups of an evaluation (asked with their pictures; greedy, so of one sample each) and returns
metrics. A metric that nothing was measured for is left out."""

MonitorFactory = Callable[[HallucinationConfig, float], Monitor]
"""Makes a monitor from the settings and the score of the reward-model gate (raw units)."""


def claims(groups: list[SampleGroup]) -> Metrics:
    """``eval/hallucination`` (CHAIR_s), ``eval/false_claim_share`` (CHAIR_i) and ``eval/coverage`` of the exact claim
    checks, ``nan`` without pictures of known facts; ``eval/hallucination/<kind>`` for each kind that has such pictures.
    """
    rates = claim_rates(groups)
    metrics = {
        "eval/hallucination": rates.chair_s,
        "eval/false_claim_share": rates.chair_i,
        "eval/coverage": rates.coverage,
    }
    by_kind: dict[str, list[SampleGroup]] = {}
    for group in groups:
        if group.checkable and group.samples:
            by_kind.setdefault(group.prompt.kind, []).append(group)
    return metrics | {f"eval/hallucination/{kind}": claim_rates(own).chair_s for kind, own in sorted(by_kind.items())}


def gate_monitor(gate: float) -> Monitor:
    """Reward-model gate: of the answers that are right by the rule and have a reward-model score, the share scored
    below ``gate`` (``eval/gate_rejected``), and the share with a false claim among those below
    (``eval/gate_hallucination_rejected``) and among the others (``eval/gate_hallucination_accepted``), each of the
    answers to pictures of known facts. A gate that works rejects answers that hallucinate more than those it accepts.
    """

    def monitor(groups: list[SampleGroup]) -> Metrics:
        answers = [
            (sample.reward.model >= gate, group.checkable, sample.false_claims > 0)
            for group in groups
            for sample in group.samples
            if sample.reward is not None and _right(sample.reward) and not math.isnan(sample.reward.model)
        ]
        if not answers:
            return {}
        metrics = {"eval/gate_rejected": sum(not accepted for accepted, _, _ in answers) / len(answers)}
        for name, side in (("rejected", False), ("accepted", True)):
            false = [is_false for accepted, known, is_false in answers if known and accepted is side]
            if false:
                metrics[f"eval/gate_hallucination_{name}"] = sum(false) / len(false)
        return metrics

    return monitor


def phrase_monitor(phrases: list[str]) -> Monitor:
    """``eval/denial``: share of the answers to prompts with pictures in which one of the regular expressions is found
    (case ignored). Without expressions it says nothing."""
    patterns = [re.compile(phrase, re.IGNORECASE) for phrase in phrases]

    def monitor(groups: list[SampleGroup]) -> Metrics:
        samples = flatten([group for group in groups if group.prompt.images])
        if not (samples and patterns):
            return {}
        denials = sum(any(pattern.search(sample.text) for pattern in patterns) for sample in samples)
        return {"eval/denial": denials / len(samples)}

    return monitor


MONITORS: dict[str, MonitorFactory] = {
    "claims": lambda cfg, gate: claims,
    "gate": lambda cfg, gate: gate_monitor(gate),
    "phrases": lambda cfg, gate: phrase_monitor(cfg.phrases),
}
"""Name → factory. The image-blind probe (:func:`blind_metrics`) is not among them: it needs a second asking."""


def register_monitor(name: str, factory: MonitorFactory) -> None:
    """Add a monitor to every evaluation. Replaces an earlier one of that name, also one of skyrl's own.

    The registry is that of this process: see :data:`PLUGINS` for how to reach the processes that score answers.
    """
    MONITORS[name] = factory


def build_monitors(cfg: HallucinationConfig, gate_value: float | None) -> list[Monitor]:
    """All registered monitors, in the order of their registration, after the installed plug-ins were imported.

    Args:
        cfg: The settings.
        gate_value: τ of ``algorithm.gate``; ``None`` if that has none of its own, which takes ``cfg.gate_score``.
    """
    for plugin in entry_points(group=PLUGINS):
        plugin.load()
    gate = cfg.gate_score if gate_value is None else gate_value
    return [factory(cfg, gate) for factory in MONITORS.values()]


def blind_metrics(groups: list[SampleGroup], blind: list[SampleGroup]) -> Metrics:
    """Image-blind probe: what the policy says to the same prompts without their pictures.

    ``eval/blind_agreement``: share of prompts with the same extracted answer both times (case and number of blanks
    ignored); no answer agrees with nothing. ``eval/blind_accuracy`` and ``eval/blind_accuracy_drop`` (with the picture
    minus without) are over the prompts of which both answers were scored and absent if there is none.
    ``eval/blind_prompts`` counts the prompts.

    Args:
        groups: Scored groups, asked with their pictures.
        blind: Some of them asked again; ids end in :data:`BLIND_SUFFIX`. The first sample of each group is compared.

    Raises:
        DataError: if a blind group has no counterpart, or one of the two has no sample.
    """
    seen = {group.prompt.id: group for group in groups}
    pairs: list[tuple[Sample, Sample]] = []
    for group in blind:
        name = group.prompt.id
        original = seen.get(name.removesuffix(BLIND_SUFFIX)) if name.endswith(BLIND_SUFFIX) else None
        if original is None:
            raise DataError(
                f"prompt {name!r} was asked without its picture, but no evaluated prompt has that id without "
                f"{BLIND_SUFFIX!r}; the id must be that of an evaluated prompt and end so"
            )
        if not (group.samples and original.samples):
            raise DataError(f"prompt {name!r}: 0 samples with or without the picture; allowed is at least 1 each")
        pairs.append((original.samples[0], group.samples[0]))
    if not pairs:
        return {}
    metrics = {
        "eval/blind_prompts": float(len(pairs)),
        "eval/blind_agreement": sum(_same_answer(a, b) for a, b in pairs) / len(pairs),
    }
    right = [(_right(a.reward), _right(b.reward)) for a, b in pairs if a.reward is not None and b.reward is not None]
    if right:
        with_picture, without = (sum(side) / len(right) for side in zip(*right, strict=True))
        metrics |= {"eval/blind_accuracy": without, "eval/blind_accuracy_drop": with_picture - without}
    return metrics


def _right(reward: RewardParts) -> bool:
    return reward.rule >= 1.0


def _same_answer(first: Sample, second: Sample) -> bool:
    texts = [extract_answer(sample.text) for sample in (first, second)]
    plain = [" ".join(text.casefold().split()) for text in texts if text is not None]
    return len(plain) == 2 and plain[0] != "" and plain[0] == plain[1]
