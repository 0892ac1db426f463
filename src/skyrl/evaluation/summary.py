"""What one evaluation says: greedy answers to the held-out prompts, scored like any others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from skyrl.evaluation.monitors import Monitor, blind_metrics, build_monitors
from skyrl.monitoring.gallery import add_after, gallery_entries
from skyrl.records import DataError, Metrics, SampleGroup
from skyrl.rewards.metrics import answer_metrics, means, refuse_all_failed
from skyrl.rewards.rewarder import Rewarder

NAMES = {
    "reward/accuracy": "eval/accuracy",
    "reward/format": "eval/format",
    "reward/model": "eval/reward_model",
    "reward/errors": "eval/errors",
    "response/length_mean": "eval/length_mean",
    "response/truncated_share": "eval/truncated_share",
    "response/repetition": "eval/repetition",
}


def evaluate(
    rewarder: Rewarder, gallery: list[dict[str, Any]] | None, shown: int, *parts: list[SampleGroup]
) -> tuple[Metrics, list[dict[str, Any]]]:
    """Metrics of an evaluation and the report's gallery.

    Args:
        rewarder: Where the groups were scored: its settings and its process, in which plug-ins have registered.
        gallery: The gallery chosen before training, whose "after" side is filled in; ``None`` chooses it now.
        shown: So many of the parts were asked with their pictures.
        parts: Scored groups of one greedy sample each, in the order of the rows; after the ``shown`` ones those that
            were asked again without their pictures. With none there are no ``eval/blind_…`` metrics.

    Raises:
        SkyrlError: if no answer could be scored.
        DataError: as :func:`evaluation_metrics` and :func:`~skyrl.evaluation.monitors.blind_metrics`, or if a prompt of
            the gallery was not evaluated again.
    """
    groups = [group for part in parts[:shown] for group in part]
    blind = [group for part in parts[shown:] for group in part]
    refuse_all_failed(groups, "evaluation")
    limit = rewarder.cfg.evaluation.gallery
    entries = gallery_entries(groups, limit) if gallery is None else add_after(gallery, groups)
    monitors = [*build_monitors(rewarder.cfg), lambda seen: blind_metrics(seen, blind)]
    return evaluation_metrics(groups, monitors), entries


def evaluation_metrics(groups: list[SampleGroup], monitors: Sequence[Monitor]) -> Metrics:
    """``eval/…`` over scored groups of one greedy sample each, the accuracy of each kind of question, and what the
    monitors say (``skyrl.evaluation.monitors``; without them nothing is said about hallucination).

    Raises:
        DataError: if two monitors, or a monitor and the evaluation, give the same metric.
    """
    overall = answer_metrics(groups)
    metrics = {new: overall[old] for old, new in NAMES.items() if old in overall}
    right: dict[str, list[bool]] = {}
    for group in groups:
        scored = [sample.right for sample in group.samples if sample.reward is not None]
        right.setdefault(f"eval/accuracy/{group.prompt.kind}", []).extend(scored)
    metrics |= means(dict(sorted(right.items())))
    for monitor in monitors:
        found = monitor(groups)
        twice = sorted(metrics.keys() & found.keys())
        if twice:
            raise DataError(f"a monitor gives {', '.join(twice)} once more; every metric must come from one place")
        metrics |= found
    return metrics
