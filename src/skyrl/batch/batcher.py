"""From scored groups to the batch of one learner step: fresh samples, replayed ones and preference pairs."""

from __future__ import annotations

import os
import pickle
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from skyrl.batch.assembly import (
    Gated,
    add_group,
    carried_metrics,
    check_fresh,
    gate_candidates,
    group_pairs,
    margin_candidates,
)
from skyrl.batch.offline import OfflinePairs
from skyrl.batch.thresholds import Threshold
from skyrl.monitoring.samples import SampleFiles
from skyrl.records import Begun, DataError, Metrics, SampleGroup, SkyrlError, StepReport, TrainBatch, TrainItem, flatten
from skyrl.replay.amount import replay_places, replay_weights
from skyrl.replay.ssb import Drawn, SelectiveSampleBuffer
from skyrl.rewards.metrics import failures, refuse_all_failed, reward_metrics
from skyrl.settings import Config, GrpoFilter, PairSource, ThresholdKind

HEADER = b"skyrl sample buffer 3\n"
"""Begins a saved state; those without it are of older versions."""


class Batcher:
    """The role that owns the Selective Sample Buffer, both thresholds and the offline pairs, and makes the batches.

    Args:
        policy_folder: Hugging Face folder whose tokenizer encodes offline pairs.

    Raises:
        DataError: for offline pairs that are broken or too long.
    """

    def __init__(self, cfg: Config, policy_folder: str) -> None:
        self.cfg = cfg
        self.buffer = SelectiveSampleBuffer(cfg.buffer, cfg.controller.seed)
        self.margin = Threshold(cfg.algorithm.mpo.threshold, "algorithm.mpo.threshold")
        self.gate = Threshold(cfg.algorithm.gate, "algorithm.gate")
        self.pairs: OfflinePairs | None = None
        if cfg.data.pairs_path is not None:
            template, trust, tags = cfg.model.chat_template_kwargs, cfg.model.trust_remote_code, cfg.reward.answer.tags
            self.pairs = OfflinePairs(cfg.data, policy_folder, cfg.rollout, template, tags, trust)
        self.samples = SampleFiles(cfg)
        self._pending: dict[tuple[int, int], list[SampleGroup]] = {}
        self._begun: dict[int, list[Begun]] = {}
        self._told = False

    def ready(self) -> None:
        """Returns once the member is up."""

    def exchange(self, step: int, version: int, *parts: list[SampleGroup]) -> tuple[TrainBatch, StepReport]:
        """Draw replayed samples, keep the fresh effective ones, and assemble the batch of one step.

        The draw comes first, so no sample is replayed in the step that it was asked for; ``replay_places`` says how
        many are drawn. In the batch the fresh samples come first, in order, then the replayed. The GRPO term sees a
        fresh sample if it can train, the filter lets it pass, its hybrid advantage is not 0, and the gate does not
        withhold a positive one. A pair member that it does not see has ``grpo_weight`` 0. Without a weight of MPO at
        this step no pairs are formed; without one of any other term there are neither GRPO items nor replay nor
        additions to the buffer. A batch without any item is allowed; the learner has nothing to do then.

        Both thresholds are calibrated before they are used and look at this step's answers after that, at all of them:
        the τ of a step is decided by earlier steps only, so it can't fit itself to the answers that it judges.

        Args:
            version: weight updates that the learner has received.
            parts: lists of scored groups, in the order of the prompts.

        Raises:
            SkyrlError: if no answer could be scored, or one is newer than ``version`` or older than the lag allows.
            DataError: if an answer has no tokens, reward-model scores needed for pairs are not finite, or a
                risk-controlled threshold never sees an answer that can be checked.
            ValueError: if an effective advantage is not finite.
        """
        groups = [group for part in parts for group in part]
        refuse_all_failed(groups, f"step {step}")
        check_fresh(groups, version, self.cfg.controller.lag)
        grpo, mpo, weights = self.cfg.algorithm.grpo, self.cfg.algorithm.mpo, self.cfg.algorithm.weights(step)
        with_pairs = weights["mpo"] > 0
        with_samples = any(weight > 0 for name, weight in weights.items() if name != "mpo")
        replays = with_samples and self.cfg.buffer.enabled
        self.margin.calibrate(step)
        self.gate.calibrate(step)
        gated = [Gated.at(group, self.gate.value) for group in groups]
        batch = TrainBatch(step, version, weights, [], [], grpo_samples=0, grpo_tokens=0)
        for one in gated:
            trained = one.grpo(grpo.filter) if with_samples else []
            pairs = group_pairs(one, mpo.pairs, mpo.pairs_per_prompt, self.margin.value) if with_pairs else []
            add_group(batch, one.group, trained, pairs)
        lags = [version - item.sample.policy_version for item in batch.items]
        drawn = self._replay(batch, gated) if replays else []
        self.samples.step(step, version, groups, batch.items[len(batch.items) - len(drawn) :])
        tokens = [item.sample.trained_tokens for item in batch.items if item.grpo_weight != 0]
        batch.grpo_samples, batch.grpo_tokens = len(tokens), sum(tokens)
        if with_pairs:
            self.margin.observe(margin_candidates(gated, mpo.pairs))
        self.gate.observe(gate_candidates(gated))

        metrics = reward_metrics(groups, self.cfg) | self._metrics(gated, batch, drawn)
        metrics |= _mean_and_max("batch/lag", lags)
        if self.cfg.rollout.oversample or any(group.carried for group in groups):
            metrics |= carried_metrics(groups)
        if with_pairs and mpo.pairs is not PairSource.dropout_ntp:
            metrics |= self.margin.metrics("threshold/")
        if replays:
            stats = self.buffer.stats(version)
            metrics |= {"buffer/prompts": stats["prompts"], "buffer/mass": stats["priority_mass"]}
        lengths = [len(sample.token_ids) for sample in flatten(groups)]
        note = failures(groups, f"step {step}")
        notes = (note,) if note and not self._told else ()
        self._told = self._told or note is not None  # once in a run: the metric goes on counting
        return batch, StepReport(metrics, len(lengths), sum(lengths), notes)

    def offline(self, step: int, version: int) -> tuple[TrainBatch, StepReport]:
        """The batch of one step of offline MPO: the next ``data.pairs_per_step`` pairs of ``data.pairs_path``.

        Raises:
            DataError: if a picture can't be decoded or a prompt is too long.
            SkyrlError: if there are no offline pairs.
        """
        if self.pairs is None:
            raise SkyrlError("a step of offline MPO needs data.pairs_path: a Parquet file of pairs; got null")
        batch = self.pairs.batch(step, version, self.cfg.algorithm.weights(step))
        return batch, StepReport({"batch/items": float(len(batch.items))}, samples=0, tokens=0)

    def save(self, path: Path, counts: dict[int, int], left: dict[int, int], *parts: Any) -> None:
        """Write everything that later batches depend on: the buffer with its random state, the thresholds, the position
        in the offline pairs, the scored groups of steps that were asked for ahead, and what steps left unfinished. The
        file appears as a whole.

        Args:
            counts: Step asked for ahead → how many of ``parts`` are its groups, in the order of the steps.
            left: Step → how many of the parts behind those are the groups that it left.
            parts: Lists of scored groups, and of begun ones, so many in all.
        """
        self.samples.wait()  # a checkpoint's steps have their samples
        places = [(step, place) for step, count in counts.items() for place in range(count)]
        begun, rest = dict[int, list[Begun]](), iter(parts[len(places) :])
        for step, count in left.items():
            begun[step] = [one for part in islice(rest, count) for one in part]
        state = {
            "buffer": self.buffer.state_dict(),
            "margin": self.margin.state_dict(),
            "gate": self.gate.state_dict(),
            "pairs": None if self.pairs is None else self.pairs.stream.state_dict(),
            "pending": dict(zip(places, parts[: len(places)], strict=True)),
            "begun": begun,
        }
        temporary = path.with_name(f"{path.name}.writing")
        with temporary.open("wb") as file:
            file.write(HEADER)
            pickle.dump(state, file)
        os.replace(temporary, path)

    def load(self, path: Path) -> dict[int, int]:
        """Take over a saved state; :meth:`SelectiveSampleBuffer.load_state_dict` says what changed settings do. Returns
        the ``counts`` that it was saved with: :meth:`pending` has those groups.

        Raises:
            DataError: if an older version of skyrl wrote it, or if one of the two runs has offline pairs and the other
                has none.
        """
        with path.open("rb") as file:
            if file.read(len(HEADER)) != HEADER:
                raise DataError(
                    f"{path} is no state of this version's sample buffer: checkpoints of older versions can't be "
                    "loaded; start a new run from the policy that the old one exported"
                )
            state = pickle.load(file)
        if (state["pairs"] is None) != (self.pairs is None):
            had, has = ("without", "with") if state["pairs"] is None else ("with", "without")
            raise DataError(f"the checkpoint is of a run {had} data.pairs_path, this run is one {has} it")
        self.buffer.load_state_dict(state["buffer"])
        self.margin.load_state_dict(state["margin"])
        self.gate.load_state_dict(state["gate"])
        if self.pairs is not None:
            self.pairs.stream.load_state_dict(state["pairs"])
        self._pending, self._begun = state["pending"], state["begun"]
        return dict(Counter(step for step, _ in self._pending))

    def pending(self, step: int, place: int) -> list[SampleGroup]:
        """Hand out, once, the part number ``place`` of a step that was asked for ahead when the loaded state was saved.

        Raises:
            SkyrlError: if there is none, or it was handed out already.
        """
        if (step, place) not in self._pending:
            raise SkyrlError(f"no saved part {place} of step {step}; there are {sorted(self._pending)}")
        return self._pending.pop((step, place))

    def begun(self, step: int) -> list[Begun]:
        """Hand out, once, the groups that a step left when the loaded state was saved.

        Raises:
            SkyrlError: if there are none, or they were handed out already.
        """
        if not self._begun.get(step):
            raise SkyrlError(f"the loaded state has no unfinished groups of step {step}")
        return self._begun.pop(step)

    def _replay(self, batch: TrainBatch, gated: list[Gated]) -> list[Drawn]:
        """Append drawn samples with their GRPO weights; afterwards the fresh ones are in the buffer too."""
        cfg, only = self.cfg.buffer, self.cfg.algorithm.grpo.filter
        fresh = sum(len(one.group.samples) for one in gated)
        # Fresh samples take a place if they are effective, or with filter=all if they train.
        taken = _effective(gated) if only is GrpoFilter.effective else sum(len(one.grpo(only)) for one in gated)
        drawn = self.buffer.draw(replay_places(fresh, taken, cfg), batch.version)
        for one, weight in zip(drawn, replay_weights(drawn, len(self.buffer), cfg).tolist(), strict=True):
            batch.items.append(TrainItem(one.prompt, one.prompt_ids, one.sample, weight))
        self.buffer.add([replace(one.group, samples=one.passed()) for one in gated], batch.version)
        return drawn

    def _metrics(self, gated: list[Gated], batch: TrainBatch, drawn: list[Drawn]) -> Metrics:
        fresh = flatten(one.group for one in gated)
        metrics: Metrics = {
            "buffer/size": float(len(self.buffer)),
            "buffer/replayed": float(len(drawn)),
            "batch/items": float(len(batch.items)),
        }
        if fresh:
            metrics["buffer/effective_share_fresh"] = sum(sample.effective for sample in fresh) / len(fresh)
            metrics["buffer/effective_share"] = (_effective(gated) + len(drawn)) / len(fresh)
            metrics["buffer/pairs_share"] = len(batch.pairs) / len(gated)
        if self.cfg.algorithm.gate.kind is not ThresholdKind.off:
            metrics |= self.gate.metrics("gate/")
            if right := sum(int(one.right.sum()) for one in gated):
                metrics["gate/withheld_share"] = sum(int(one.held.sum()) for one in gated) / right
        ages = [batch.version - one.sample.policy_version for one in drawn]
        return metrics | _mean_and_max("buffer/age", ages)


def _effective(gated: list[Gated]) -> int:
    """Fresh samples that carry a signal of the rule reward and are not withheld."""
    return sum(sample.effective for one in gated for sample in one.passed())


def _mean_and_max(name: str, versions: list[int]) -> Metrics:
    return {f"{name}_mean": sum(versions) / len(versions), f"{name}_max": float(max(versions))} if versions else {}
