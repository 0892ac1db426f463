"""What one evaluation says: greedy answers to the held-out prompts, scored like any others."""

from __future__ import annotations

import math
from typing import Any

from skyrl.interfaces import Metrics
from skyrl.monitoring.gallery import add_after, gallery_entries
from skyrl.rewards.scorer import reward_metrics
from skyrl.types import SampleGroup

NAMES = {
    "reward/accuracy": "eval/accuracy",
    "reward/format": "eval/format",
    "reward/model": "eval/reward_model",
    "reward/errors": "eval/errors",
    "response/length_mean": "eval/length_mean",
    "response/truncated_share": "eval/truncated_share",
    "hallucination/rate": "eval/hallucination",
    "hallucination/false_claim_share": "eval/false_claim_share",
    "hallucination/coverage": "eval/coverage",
}


def evaluation_metrics(groups: list[SampleGroup]) -> Metrics:
    """``eval/…`` over scored groups of one greedy sample each, and the accuracy of each kind of question.

    A kind whose samples all failed to be scored is left out.
    """
    overall = reward_metrics(groups)
    metrics = {new: overall[old] for old, new in NAMES.items()}
    by_kind: dict[str, list[SampleGroup]] = {}
    for group in groups:
        by_kind.setdefault(group.prompt.kind, []).append(group)
    for kind, own in sorted(by_kind.items()):
        accuracy = reward_metrics(own)["reward/accuracy"]
        if not math.isnan(accuracy):
            metrics[f"eval/accuracy/{kind}"] = accuracy
    return metrics


def summarise(
    groups: list[SampleGroup], gallery: list[dict[str, Any]] | None, limit: int
) -> tuple[Metrics, list[dict[str, Any]]]:
    """Metrics and the report's gallery.

    Args:
        groups: All evaluated groups, scored, in the order of the rows.
        gallery: The gallery chosen before training, whose "after" side is filled in; None chooses it now.
        limit: Scenes in a new gallery.
    """
    entries = gallery_entries(groups, limit=limit) if gallery is None else add_after(gallery, groups)
    return evaluation_metrics(groups), entries
