"""From scored groups to the batch of one learner step: fresh samples, replayed ones and preference pairs."""

from __future__ import annotations

from typing import Any

import numpy as np

from skyrl.batch.assembly import (
    add_group,
    gate_candidates,
    gate_of,
    group_pairs,
    in_grpo,
    is_right,
    let_through,
    margin_candidates,
)
from skyrl.batch.offline import OfflinePairs
from skyrl.batch.thresholds import Threshold
from skyrl.interfaces import Metrics, flatten
from skyrl.records import DataError, PreferencePair, SampleGroup, SkyrlError, TrainBatch, TrainItem
from skyrl.replay.amount import replay_places, replay_weights
from skyrl.replay.ssb import Drawn, SelectiveSampleBuffer
from skyrl.settings import (
    AlgorithmConfig,
    BufferConfig,
    DataConfig,
    GrpoFilter,
    PairSource,
    RolloutConfig,
    ThresholdKind,
)


class BufferService:
    """Owns the Selective Sample Buffer, both reward thresholds and the offline pairs, and assembles the train batches
    (``interfaces.SampleBuffer``)."""

    def __init__(
        self,
        cfg: BufferConfig,
        algorithm: AlgorithmConfig,
        seed: int,
        data: DataConfig | None = None,
        policy_folder: str | None = None,
        rollout: RolloutConfig | None = None,
    ) -> None:
        """
        Args:
            cfg: the buffer's settings. Without ``enabled``, or with a GRPO weight of 0, nothing is kept or replayed.
            algorithm: which terms are on at which step, the GRPO filter, the source of pairs, the thresholds.
            seed: of the buffer's draws.
            data: names the offline pairs, if there are any.
            policy_folder: whose tokenizer encodes them.
            rollout: the longest prompt and answer that they may have; ``None`` checks no length.

        Raises:
            ValueError: for a capacity, age or alpha outside the buffer's limits.
            DataError: for offline pairs that are broken or too long.
            SkyrlError: for offline pairs without a policy folder.
        """
        self.cfg = cfg
        self.algorithm = algorithm
        self.buffer = SelectiveSampleBuffer(cfg, seed)
        self.margin = Threshold(algorithm.mpo.threshold, "algorithm.mpo.threshold")
        self.gate = Threshold(algorithm.gate, "algorithm.gate")
        self.pairs: OfflinePairs | None = None
        if data is not None and data.pairs_path is not None:
            if policy_folder is None:
                raise SkyrlError(f"data.pairs_path={data.pairs_path} needs the policy's folder: its tokenizer is used")
            self.pairs = OfflinePairs(data, policy_folder, rollout)

    def exchange(self, groups: list[SampleGroup], step: int, version: int) -> tuple[TrainBatch, Metrics]:
        """Draw replayed samples, keep the fresh effective ones, and assemble the batch of one step.

        The draw comes first, so no sample is replayed in the step that sampled it; ``replay_places`` says how many are
        drawn. In the batch the fresh samples come first, in order, then the replayed. The GRPO term sees a fresh
        sample if the filter lets it pass, its hybrid advantage is not 0, and the gate does not withhold a positive
        one. A pair member that it does not see has ``grpo_weight`` 0. A term whose weight is 0 at this step gets
        nothing: no pairs, or neither GRPO items nor replay nor additions to the buffer. A batch without any item is
        allowed; the learner has nothing to do then.

        Both thresholds are calibrated before they are used and look at this step's answers after that, at all of them:
        the τ of a step is decided by earlier steps only, so it can't fit itself to the answers that it judges.

        Args:
            groups: scored groups of this step.
            step: number of the step.
            version: the current policy version.

        Returns:
            ``(batch, metrics)``. Shares need a fresh sample (``gate/withheld_share`` a right one) and
            ``buffer/age_mean`` a drawn one; without, the key is absent.

        Raises:
            DataError: if reward-model scores needed for pairs are not finite, a sample has no tokens, or a
                risk-controlled threshold never sees an answer that can be checked.
            ValueError: if an effective advantage is not finite or a sample is newer than ``version``.
        """
        self.margin.calibrate(step)
        self.gate.calibrate(step)
        held = [gate_of(group, self.gate.value) for group in groups]
        items, pairs = self._fresh(groups, held, step)
        drawn, weights = self._replay(groups, held, step, version)
        items += [
            TrainItem(one.stored.prompt, one.stored.prompt_ids, one.sample, grpo_weight=weight, replayed=True)
            for one, weight in zip(drawn, weights.tolist(), strict=True)
        ]
        lengths = [len(item.sample.token_ids) for item in items if item.grpo_weight != 0]
        batch = TrainBatch(step, items, pairs, grpo_samples=len(lengths), grpo_tokens=sum(lengths))
        self._observe(groups, held, step)
        metrics = self._buffer_metrics(groups, held, batch, drawn, version)
        return batch, metrics | self._threshold_metrics(groups, held, step)

    def offline(self, step: int) -> tuple[TrainBatch, Metrics]:
        """The batch of one step of offline MPO: the next ``data.pairs_per_step`` pairs of ``data.pairs_path``.

        Raises:
            DataError: if a picture can't be decoded or a prompt is too long.
            SkyrlError: if there are no offline pairs.
        """
        if self.pairs is None:
            raise SkyrlError("a step of offline MPO needs data.pairs_path: a Parquet file of pairs; got null")
        batch = self.pairs.batch(step)
        # Nothing is sampled; the controller counts throughput from these.
        return batch, {"batch/items": float(len(batch.items)), "rollout_samples": 0.0, "rollout_tokens": 0.0}

    def state_dict(self) -> dict[str, Any]:
        """The buffer with its random state, the thresholds, the position in the offline pairs; picklable."""
        return {
            "buffer": self.buffer.state_dict(),
            "margin_threshold": self.margin.state_dict(),
            "gate": self.gate.state_dict(),
            "pairs": None if self.pairs is None else self.pairs.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved state; see :meth:`SelectiveSampleBuffer.load_state_dict` for changed settings.

        Raises:
            DataError: if a part is missing, as in checkpoints of older versions, or if the state is that of a run with
                offline pairs and this is one without, or the other way round.
        """
        missing = {"buffer", "margin_threshold", "gate", "pairs"} - state.keys()
        if missing:
            raise DataError(
                f"the saved sample buffer lacks {', '.join(sorted(missing))}: the checkpoint is of an older version; "
                "start a new run from its exported policy"
            )
        if (state["pairs"] is None) != (self.pairs is None):
            had, has = ("without", "with") if state["pairs"] is None else ("with", "without")
            raise DataError(f"the checkpoint is of a run {had} data.pairs_path, this run is one {has} it")
        self.buffer.load_state_dict(state["buffer"])
        self.margin.load_state_dict(state["margin_threshold"])
        self.gate.load_state_dict(state["gate"])
        if self.pairs is not None:
            self.pairs.load_state_dict(state["pairs"])

    # ------------------------------------------------------------ inside

    def _terms(self, step: int) -> tuple[bool, bool]:
        """Whether GRPO and MPO are trained at a step."""
        grpo, mpo = self.algorithm.weights(step)
        return grpo > 0, mpo > 0

    def _fresh(
        self, groups: list[SampleGroup], held: list[np.ndarray], step: int
    ) -> tuple[list[TrainItem], list[PreferencePair]]:
        with_grpo, with_mpo = self._terms(step)
        only, mpo = self.algorithm.grpo.filter, self.algorithm.mpo
        items: list[TrainItem] = []
        pairs: list[PreferencePair] = []
        for group, gate in zip(groups, held, strict=True):
            trained = [with_grpo and in_grpo(s, bool(no), only) for s, no in zip(group.samples, gate, strict=True)]
            found = group_pairs(group, mpo, self.margin.value, gate) if with_mpo else []
            add_group(items, pairs, group, np.array(trained, dtype=bool), found)
        return items, pairs

    def _replay(
        self, groups: list[SampleGroup], held: list[np.ndarray], step: int, version: int
    ) -> tuple[list[Drawn], np.ndarray]:
        """Drawn samples and their GRPO weights; afterwards the fresh ones are in the buffer too."""
        if not (self.cfg.enabled and self._terms(step)[0]):
            return [], np.zeros(0)
        places = replay_places(len(flatten(groups)), self._taken(groups, held), self.cfg)
        drawn = self.buffer.draw(places, version)
        weights = replay_weights(drawn, len(self.buffer), self.cfg)
        self.buffer.add(let_through(groups, held), version)
        return drawn, weights

    def _taken(self, groups: list[SampleGroup], held: list[np.ndarray]) -> int:
        """Places of the batch that fresh samples take: the effective ones, or with ``filter=all`` all that train."""
        only = self.algorithm.grpo.filter
        if only is GrpoFilter.effective:
            return _effective(groups, held)
        return sum(
            in_grpo(sample, bool(no), only)
            for group, gate in zip(groups, held, strict=True)
            for sample, no in zip(group.samples, gate, strict=True)
        )

    def _observe(self, groups: list[SampleGroup], held: list[np.ndarray], step: int) -> None:
        if self._terms(step)[1]:
            margins = margin_candidates(groups, held, self.algorithm.mpo)
            self.margin.observe(margins.scores, margins.bad)
        right = gate_candidates(groups)
        self.gate.observe(right.scores, right.bad)

    def _threshold_metrics(self, groups: list[SampleGroup], held: list[np.ndarray], step: int) -> Metrics:
        metrics: Metrics = {}
        if self._terms(step)[1] and self.algorithm.mpo.pairs is not PairSource.dropout_ntp:
            metrics |= self.margin.metrics("threshold/")
        if self.algorithm.gate.kind is not ThresholdKind.off:
            metrics |= self.gate.metrics("gate/")
            right = sum(is_right(sample) for sample in flatten(groups))
            if right:
                metrics["gate/withheld_share"] = sum(int(gate.sum()) for gate in held) / right
        return metrics

    def _buffer_metrics(
        self, groups: list[SampleGroup], held: list[np.ndarray], batch: TrainBatch, drawn: list[Drawn], version: int
    ) -> Metrics:
        fresh = flatten(groups)
        metrics: Metrics = {
            "buffer/size": float(len(self.buffer)),
            "buffer/replayed": float(len(drawn)),
            "batch/items": float(len(batch.items)),
        }
        if fresh:
            metrics["buffer/effective_share_fresh"] = sum(sample.effective for sample in fresh) / len(fresh)
            metrics["buffer/effective_share"] = (_effective(groups, held) + len(drawn)) / len(fresh)
            metrics["buffer/pairs_share"] = len(batch.pairs) / len(groups)
        if self.cfg.enabled and self._terms(batch.step)[0]:
            stats = self.buffer.stats(version)
            metrics |= {"buffer/prompts": stats["prompts"], "buffer/mass": stats["priority_mass"]}
        if drawn:
            ages = [version - one.sample.policy_version for one in drawn]
            metrics |= {"buffer/age_mean": sum(ages) / len(ages), "buffer/age_max": float(max(ages))}
        return metrics


def _effective(groups: list[SampleGroup], held: list[np.ndarray]) -> int:
    """Fresh samples that carry a signal of the rule reward and are not withheld."""
    return sum(sample.effective for group in let_through(groups, held) for sample in group.samples)
