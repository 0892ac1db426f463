"""What a term of the loss is. It declares its settings, its loss and its statistics; the rest follows from that.

The loss of a step is L = Σ_terms weight · (Σ over the step) / (a count of the whole step). A term gives the sum over
the samples, tokens or pairs of one micro-batch and names the count; so do its statistics. The learner adds over
micro-batches and ranks and divides once, so neither the micro-batch size nor the number of ranks changes a number.

A term of your own is one class, named in ``algorithm.terms`` as ``package.module:Class``; nothing else has to know it::

    class LengthSettings(Settings):  # skyrl.schema.Settings
        limit: int = 32

    class Length(Term):
        name, per = "length", "samples"
        text = "Log-likelihood of answers above the limit, mean over the step's samples."
        Settings = LengthSettings
        stats = (Stat("length/over", "samples", "share", "Answers above the limit, of the step's samples."),)

        def loss(self, view: BatchView) -> tuple[Tensor, Stats]:
            over = view.mask.sum(1) > self.settings.limit
            return (view.row_sums(view.logprobs) * over).sum(), {"length/over": over.sum()}

It is trained with its ``weight``, logged as ``loss/length`` and ``length/over``, and stands in the table of metrics.
Modules of terms need not import torch: tensors have methods. Then the table can be made where there is no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import BaseModel

from skyrl.records import TrainBatch, TrainItem

if TYPE_CHECKING:
    from torch import Tensor

Stats = dict[str, "Tensor"]
"""Name of a statistic → its sum (or maximum) over one micro-batch, a scalar without gradient."""


@dataclass(slots=True, frozen=True)
class Stat:
    """A number that a term reports."""

    name: str
    """The metric's, ``group/name``."""
    per: str
    """The count of :class:`Counts` that a sum is divided by; where that is 0 the step has no such metric."""
    unit: str
    """As in the table of metrics."""
    text: str
    """One sentence, with the denominator."""
    kind: Literal["sum", "max"] = "sum"
    when: Callable[[Any], bool] | None = None
    """Of the term's settings: whether there is such a statistic. None: always."""


@dataclass(slots=True, frozen=True)
class Counts:
    """What a whole step has of each thing, the same on every rank. Tokens are those of ``Sample.mask``."""

    samples: int
    tokens: int
    on_policy_tokens: int
    """Of samples that the learner's own version drew and whose log-probabilities were recorded."""
    grpo_samples: int
    grpo_tokens: int
    grpo_max_tokens: int
    """GRPO samples times ``rollout.max_new_tokens``."""
    pairs: int
    pair_tokens: int
    """Of both members of all pairs."""
    places: int = 0
    """Sum of the tokens' places in their answers, 0 for the first of each."""
    none: int = 1
    """Nothing is divided."""

    @classmethod
    def of(cls, batch: TrainBatch, max_new_tokens: int) -> Counts:
        tokens = [item.sample.trained_tokens for item in batch.items]
        return cls(
            samples=len(tokens),
            tokens=sum(tokens),
            on_policy_tokens=sum(i.sample.trained_tokens for i in batch.items if recorded_on_policy(batch, i)),
            grpo_samples=batch.grpo_samples,
            grpo_tokens=batch.grpo_tokens,
            grpo_max_tokens=batch.grpo_samples * max_new_tokens,
            pairs=len(batch.pairs),
            pair_tokens=sum(tokens[pair.chosen] + tokens[pair.rejected] for pair in batch.pairs),
            places=sum(int(np.flatnonzero(item.sample.mask).sum()) for item in batch.items),
        )


def recorded_on_policy(batch: TrainBatch, item: TrainItem) -> bool:
    """True if the sample's recorded log-probabilities are those of the learner's policy at the start of the step."""
    return item.sample.logprobs is not None and not batch.off_policy(item)


@dataclass(slots=True, frozen=True)
class BatchView:
    """What a term sees of one micro-batch: B samples, padded to T answer tokens. All tensors are on one device."""

    logprobs: Tensor
    """[B, T] log π_θ, with gradient. Where ``mask`` is False it may be anything, -inf and nan included."""
    behaviour: Tensor
    """[B, T] log-probabilities of the policy that drew the sample; 0 where nobody recorded them."""
    reference: Tensor | None
    """[B, T] log π_0, sure to be there for the samples of :meth:`Term.compared`; None if no term compares."""
    entropy: Tensor
    """[B, T] of the policy's distribution at each token, nats, without gradient."""
    mask: Tensor
    """bool [B, T]: the tokens that may be trained on."""
    advantages: Tensor
    """[B]."""
    weights: Tensor
    """[B] ``TrainItem.grpo_weight``; 0 for a sample that is here only as a member of a pair."""
    off_policy: Tensor
    """bool [B]: an older policy than that at the start of the step drew the sample."""
    recorded: Tensor
    """bool [B]: ``behaviour`` is known."""
    chosen: Tensor
    """int64 [pairs]: rows of the chosen members; both members of a pair are in one micro-batch."""
    rejected: Tensor
    """int64 [pairs]."""
    items: Sequence[TrainItem]
    """The B samples themselves: prompts, rewards, texts."""
    counts: Counts
    """Of the whole step."""
    progress: float
    """0 at the first step of the present ``algorithm.stage``, 1 at its last."""
    delta: float
    """δ of MPO's quality term at this step."""

    def row_sums(self, values: Tensor) -> Tensor:
        """[B] sums of [B, T] values over the trained tokens."""
        return values.masked_fill(~self.mask, 0.0).sum(1)


class Term:
    """A summand of the loss. Subclasses fill in what stands here.

    Args:
        settings: An instance of ``Settings``.
        key: What ``TrainBatch.weights`` has its weight under: the path of ``algorithm.terms``; the name if "".
    """

    name: ClassVar[str]
    """Of its metric ``loss/<name>``."""
    text: ClassVar[str]
    """What ``loss/<name>`` is, in one sentence."""
    Settings: ClassVar[type[BaseModel]]
    stats: ClassVar[tuple[Stat, ...]] = ()
    per: str = "samples"
    """The count of :class:`Counts` that the loss is divided by."""
    uses_reference: bool = False
    """Whether the loss reads ``view.reference``."""

    def __init__(self, settings: Any, key: str = "") -> None:
        self.settings, self.key = settings, key or self.name

    def compared(self, batch: TrainBatch) -> set[int]:
        """Items of a step whose log π_0 the loss reads."""
        return set(range(len(batch.items))) if self.uses_reference else set()

    def loss(self, view: BatchView) -> tuple[Tensor, Stats]:
        """The term of one micro-batch, not yet divided by ``per``, and every statistic that is declared."""
        raise NotImplementedError

    def parts(self, progress: float) -> dict[str, float]:
        """Of a term that is a weighted sum: the statistics of its parts, with their weights at ``progress`` (see
        :class:`BatchView`). The learner then checks that the loss is their sum. {}: it is no such sum."""
        return {}

    def declared(self) -> list[Stat]:
        """The statistics that there are under these settings; the loss is the first."""
        own = [stat for stat in self.stats if stat.when is None or stat.when(self.settings)]
        return [Stat(f"loss/{self.name}", self.per, "-", self.text), *own]
