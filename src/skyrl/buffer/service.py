"""From scored groups to the batch of one learner step: fresh samples, replayed ones and preference pairs."""

from __future__ import annotations

from typing import Any

import numpy as np

from skyrl.algorithms.pairs import select_pairs
from skyrl.buffer.ssb import Drawn, SelectiveSampleBuffer
from skyrl.config import AlgorithmConfig, BufferConfig, GrpoFilter
from skyrl.interfaces import Metrics, flatten
from skyrl.types import DataError, PreferencePair, Sample, SampleGroup, TrainBatch, TrainItem


class BufferService:
    """Owns the Selective Sample Buffer and assembles the train batches (``interfaces.SampleBuffer``)."""

    def __init__(self, cfg: BufferConfig, algorithm: AlgorithmConfig, seed: int) -> None:
        """
        Args:
            cfg: the buffer's settings. Without ``enabled``, or with a GRPO weight of 0, nothing is kept or replayed.
            algorithm: which terms are on, the GRPO filter, the pairs' threshold.
            seed: of the buffer's draws.

        Raises:
            ValueError: for a capacity, age or alpha outside the buffer's limits.
        """
        self.cfg = cfg
        self.algorithm = algorithm
        self.buffer = SelectiveSampleBuffer(cfg.capacity, cfg.max_age, cfg.alpha, seed)
        self._replays = cfg.enabled and algorithm.grpo.weight > 0

    def exchange(self, groups: list[SampleGroup], step: int, version: int) -> tuple[TrainBatch, Metrics]:
        """Draw replayed samples, keep the fresh effective ones, and assemble the batch of one step.

        The draw comes first, so no sample is replayed in the step that sampled it. Number drawn::

            n = min(round(mix · fresh), fresh that are not effective)

        with all fresh samples counted, failed ones too: replay fills places that carry no signal and never
        outgrows the rollout batch. In the batch the fresh samples come first, in order, then the replayed.
        The GRPO term sees a fresh sample if the filter lets it pass and its hybrid advantage is not 0. A pair member
        that it does not see has ``grpo_weight`` 0. A batch without any item is allowed: nothing was effective and
        no pair reached the threshold; the learner has nothing to do then.

        Args:
            groups: scored groups of this step.
            step: number of the step, passed on.
            version: the current policy version.

        Returns:
            ``(batch, metrics)``. Shares need a fresh sample and ``buffer/age_mean`` a drawn one; without, the key
            is absent.

        Raises:
            DataError: if reward-model scores needed for pairs are not finite, or a sample has no tokens.
            ValueError: if an effective advantage is not finite or a sample is newer than ``version``.
        """
        fresh = flatten(groups)
        effective = sum(sample.effective for sample in fresh)
        drawn: list[Drawn] = []
        if self._replays:
            drawn = self.buffer.draw(min(round(self.cfg.mix * len(fresh)), len(fresh) - effective), version)
            self.buffer.add(groups, version)
        items, pairs = self._fresh_items(groups)
        items += self._replayed_items(drawn)
        lengths = [len(item.sample.token_ids) for item in items if item.grpo_weight != 0]
        batch = TrainBatch(step, items, pairs, grpo_samples=len(lengths), grpo_tokens=sum(lengths))

        metrics: Metrics = {
            "buffer/size": float(len(self.buffer)),
            "buffer/replayed": float(len(drawn)),
            "batch/items": float(len(items)),
        }
        if fresh:
            metrics["buffer/effective_share_fresh"] = effective / len(fresh)
            metrics["buffer/effective_share"] = (effective + len(drawn)) / len(fresh)
            metrics["buffer/pairs_share"] = len(pairs) / len(groups)
        if self._replays:
            stats = self.buffer.stats(version)
            metrics |= {"buffer/prompts": stats["prompts"], "buffer/mass": stats["priority_mass"]}
        if drawn:
            ages = [version - one.sample.policy_version for one in drawn]
            metrics |= {"buffer/age_mean": sum(ages) / len(ages), "buffer/age_max": float(max(ages))}
        return batch, metrics

    def state_dict(self) -> dict[str, Any]:
        """The buffer with its random state; picklable."""
        return {"buffer": self.buffer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved buffer; see :meth:`SelectiveSampleBuffer.load_state_dict` for changed settings."""
        self.buffer.load_state_dict(state["buffer"])

    def _in_grpo(self, sample: Sample) -> bool:
        grpo = self.algorithm.grpo
        if grpo.weight == 0 or sample.error is not None or sample.advantage == 0:
            return False
        return grpo.filter is GrpoFilter.all or sample.effective

    def _fresh_items(self, groups: list[SampleGroup]) -> tuple[list[TrainItem], list[PreferencePair]]:
        items: list[TrainItem] = []
        pairs: list[PreferencePair] = []
        for group in groups:
            chosen_rejected = self._group_pairs(group)
            paired = {place for chosen, rejected, _ in chosen_rejected for place in (chosen, rejected)}
            at: dict[int, int] = {}
            for place, sample in enumerate(group.samples):
                in_grpo = self._in_grpo(sample)
                if not in_grpo and place not in paired:
                    continue
                if len(sample.token_ids) == 0:
                    raise DataError(
                        f"prompt {group.prompt.id}, sample {sample.index}: 0 answer tokens; allowed: 1 or more"
                    )
                at[place] = len(items)
                items.append(TrainItem(group.prompt, group.prompt_ids, sample, grpo_weight=1.0 if in_grpo else 0.0))
            pairs += [PreferencePair(at[chosen], at[rejected], margin) for chosen, rejected, margin in chosen_rejected]
        return items, pairs

    def _group_pairs(self, group: SampleGroup) -> list[tuple[int, int, float]]:
        """Pairs of one group as (chosen, rejected, margin), places in ``group.samples``."""
        mpo = self.algorithm.mpo
        if mpo.weight == 0:
            return []
        scores = [np.nan if sample.reward is None else sample.reward.model for sample in group.samples]
        valid = [sample.error is None and sample.reward is not None for sample in group.samples]
        try:
            return select_pairs(np.array(scores), np.array(valid), mpo.margin_threshold, mpo.pairs_per_prompt)
        except ValueError as error:
            raise DataError(f"prompt {group.prompt.id}: no preference pairs: {error}") from error

    def _replayed_items(self, drawn: list[Drawn]) -> list[TrainItem]:
        weights = np.ones(len(drawn))
        if self.cfg.importance_correction and drawn:
            # 1/(N·P): the buffer's size N drops out when the mean is set to 1. Draws are without replacement,
            # so this is exact only while few of many are drawn.
            weights = 1.0 / np.array([one.probability for one in drawn])
            weights /= weights.mean()
        return [
            TrainItem(one.stored.prompt, one.stored.prompt_ids, one.sample, grpo_weight=weight, replayed=True)
            for one, weight in zip(drawn, weights.tolist(), strict=True)
        ]
