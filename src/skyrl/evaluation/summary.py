"""What one evaluation says: greedy answers to the held-out prompts, scored like any others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from skyrl.evaluation.monitors import Monitor, blind_metrics
from skyrl.interfaces import Metrics
from skyrl.monitoring.gallery import add_after, gallery_entries
from skyrl.records import DataError, SampleGroup
from skyrl.rewards.scorer import answer_metrics

NAMES = {
    "reward/accuracy": "eval/accuracy",
    "reward/format": "eval/format",
    "reward/model": "eval/reward_model",
    "reward/errors": "eval/errors",
    "response/length_mean": "eval/length_mean",
    "response/truncated_share": "eval/truncated_share",
    "response/repetition": "eval/repetition",
}


def evaluation_metrics(groups: list[SampleGroup], monitors: Sequence[Monitor]) -> Metrics:
    """``eval/…`` over scored groups of one greedy sample each, the accuracy of each kind of question, and what the
    monitors say (``skyrl.evaluation.monitors``; without them nothing is said about hallucination).

    A kind whose samples all failed to be scored is left out.

    Raises:
        DataError: if two monitors, or a monitor and the evaluation, give the same metric.
    """
    overall = answer_metrics(groups)
    metrics = {new: overall[old] for old, new in NAMES.items()}
    right: dict[str, list[bool]] = {}
    for group in groups:
        for sample in group.samples:
            if sample.reward is not None:
                right.setdefault(group.prompt.kind, []).append(sample.reward.rule >= 1.0)
    metrics |= {f"eval/accuracy/{kind}": sum(own) / len(own) for kind, own in sorted(right.items())}
    for monitor in monitors:
        found = monitor(groups)
        twice = sorted(metrics.keys() & found.keys())
        if twice:
            raise DataError(f"a monitor gives {', '.join(twice)} once more; every metric must come from one place")
        metrics |= found
    return metrics


def summarise(
    groups: list[SampleGroup],
    blind: list[SampleGroup],
    gallery: list[dict[str, Any]] | None,
    limit: int,
    monitors: Sequence[Monitor],
) -> tuple[Metrics, list[dict[str, Any]]]:
    """Metrics and the report's gallery.

    Args:
        groups: All evaluated groups, scored, in the order of the rows.
        blind: Some of them asked again without their pictures, scored; with none there are no ``eval/blind_…`` metrics.
        gallery: The gallery chosen before training, whose "after" side is filled in; None chooses it now.
        limit: Scenes in a new gallery.
        monitors: From :func:`skyrl.evaluation.monitors.build_monitors`.
    """
    entries = gallery_entries(groups, limit=limit) if gallery is None else add_after(gallery, groups)
    return evaluation_metrics(groups, [*monitors, lambda seen: blind_metrics(seen, blind)]), entries
