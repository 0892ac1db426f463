"""What one evaluation says: greedy answers to the held-out prompts, scored like any others."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import partial
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
        gallery: The one chosen before training, whose "after" side is filled in; ``None`` chooses it now.
        parts: Scored groups of one greedy sample each, in the order of the rows: first ``shown`` parts that were asked
            with their pictures, then those asked again without, if any.

    Raises:
        SkyrlError: if no answer could be scored.
        DataError: as :func:`evaluation_metrics` and :func:`~skyrl.evaluation.monitors.blind_metrics`, or if a prompt of
            the gallery was not evaluated again.
    """
    groups = [group for part in parts[:shown] for group in part]
    blind = [group for part in parts[shown:] for group in part]
    refuse_all_failed(groups, "evaluation")
    cfg = rewarder.cfg
    entries = gallery_entries(groups, cfg.evaluation.gallery) if gallery is None else add_after(gallery, groups)
    return evaluation_metrics(groups, [*build_monitors(cfg), partial(blind_metrics, blind=blind)]), entries


def evaluation_metrics(groups: list[SampleGroup], monitors: Sequence[Monitor]) -> Metrics:
    """``eval/…`` over scored groups of one greedy sample each, the accuracy of each kind of question, and what the
    monitors say (``skyrl.evaluation.monitors``; without them nothing is said about hallucination).

    Raises:
        DataError: if two monitors, or a monitor and the evaluation, give the same metric.
    """
    overall = answer_metrics(groups)
    metrics = {new: overall[old] for old, new in NAMES.items() if old in overall}
    right: defaultdict[str, list[bool]] = defaultdict(list)
    for group in groups:
        right[f"eval/accuracy/{group.prompt.kind}"] += [s.right for s in group.samples if s.reward is not None]
    metrics |= means(dict(sorted(right.items())))
    for monitor in monitors:
        found = monitor(groups)
        if twice := sorted(metrics.keys() & found.keys()):
            raise DataError(f"a monitor gives {', '.join(twice)} once more; every metric must come from one place")
        metrics |= found
    return metrics
