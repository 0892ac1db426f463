"""What a batch and the numbers of a step must be, or the policy stays as it was."""

from __future__ import annotations

import math

from skyrl.records import SkyrlError, TrainBatch


def require_records(batch: TrainBatch) -> None:
    """Raise SkyrlError for an answer that the policy gradient can't weigh."""
    for item in batch.items:
        if item.grpo_weight != 0 and item.sample.logprobs is None:
            raise SkyrlError(
                f"step {batch.step}: sample {item.sample.index} of prompt {item.prompt.id!r} has grpo_weight "
                f"{item.grpo_weight:g}, but its log-probabilities were not recorded; allowed: a record, or weight 0"
            )


def require_finite(step: int, what: str, value: float) -> None:
    """Raise SkyrlError for a number that may not reach the optimizer."""
    if not math.isfinite(value):
        raise SkyrlError(
            f"step {step}: {what} is {value}, so the policy was not updated; continue from the last checkpoint "
            "with a smaller learner.lr, or look at the batch for log-probabilities that are not finite"
        )
