"""What a batch's metrics are computed from: fresh groups under the gate, what was drawn, and how old both are."""

from __future__ import annotations

from skyrl.batch.assembly import Gated
from skyrl.records import Metrics, TrainBatch, flatten
from skyrl.replay.ssb import Drawn
from skyrl.rewards.metrics import fingerprint


def batch_metrics(gated: list[Gated], batch: TrainBatch, drawn: list[Drawn], gate: bool) -> Metrics:
    """Of the fresh answers and what became of them; ``gate``: whether one is on."""
    fresh = flatten(one.group for one in gated)
    metrics: Metrics = {"buffer/replayed": float(len(drawn)), "batch/items": float(len(batch.items))}
    if fresh:
        metrics["buffer/effective_share_fresh"] = sum(sample.effective for sample in fresh) / len(fresh)
        metrics["buffer/effective_share"] = (effective(gated) + len(drawn)) / len(fresh)
        metrics["buffer/pairs_share"] = len(batch.pairs) / len(gated)
    if gate and (right := sum(int(one.right.sum()) for one in gated)):
        metrics["gate/withheld_share"] = sum(int(one.held.sum()) for one in gated) / right
    if drawn:
        names = (f"{one.prompt.id}\0{one.sample.policy_version}\0{one.sample.index}" for one in drawn)
        metrics["buffer/fingerprint"] = fingerprint(names)
    ages = [batch.version - one.sample.policy_version for one in drawn]
    return metrics | mean_and_max("buffer/age", ages)


def effective(gated: list[Gated]) -> int:
    """Fresh samples that carry a signal of the rule reward and are not withheld."""
    return sum(sample.effective for one in gated for sample in one.passed())


def mean_and_max(name: str, versions: list[int]) -> Metrics:
    """``name`` with ``_mean`` and ``_max``; nothing of an empty list."""
    return {f"{name}_mean": sum(versions) / len(versions), f"{name}_max": float(max(versions))} if versions else {}
