"""From scored groups to the batch of one learner step: fresh samples, replayed ones and preference pairs."""

from __future__ import annotations

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
from skyrl.batch.journal import Exchanged, Journal, State
from skyrl.batch.measures import batch_metrics, effective, mean_and_max
from skyrl.batch.offline import OfflinePairs
from skyrl.batch.thresholds import Candidate, Threshold
from skyrl.monitoring.samples import SampleFiles
from skyrl.records import Begun, DataError, SampleGroup, SkyrlError, StepReport, TrainBatch, TrainItem, flatten
from skyrl.replay import saved
from skyrl.replay.amount import replay_places, replay_weights
from skyrl.replay.ssb import Drawn, SelectiveSampleBuffer
from skyrl.rewards.metrics import failures, refuse_all_failed, reward_metrics
from skyrl.settings import Config, GrpoFilter, PairSource, ThresholdKind


class Batcher:
    """The role that owns the Selective Sample Buffer, both thresholds and the offline pairs, and makes the batches.

    In a run's folder what a step changed is on the disk before the step is acknowledged (:mod:`skyrl.batch.journal`): a
    batcher that is built anew goes on with :meth:`recover`. Where that can't be written, the step's report says so.

    Args:
        policy_folder: Hugging Face folder whose tokenizer encodes offline pairs.

    Raises:
        DataError: for offline pairs that are broken or too long.
    """

    def __init__(self, cfg: Config, policy_folder: str) -> None:
        self.cfg = cfg
        self.pairs: OfflinePairs | None = None
        if cfg.data.pairs_path is not None:
            template, trust, tags = cfg.model.chat_template_kwargs, cfg.model.trust_remote_code, cfg.reward.answer.tags
            self.pairs = OfflinePairs(cfg.data, policy_folder, cfg.rollout, template, tags, trust)
        self.samples = SampleFiles(cfg)
        self.journal = Journal(cfg.run_dir)
        self._first_pair = None if self.pairs is None else self.pairs.stream.state_dict()
        self._begin()

    def _begin(self) -> None:
        """The state before the first step."""
        cfg = self.cfg
        self.buffer = SelectiveSampleBuffer(cfg.buffer, cfg.controller.seed)
        self.margin = Threshold(cfg.algorithm.mpo.threshold, "algorithm.mpo.threshold")
        self.gate = Threshold(cfg.algorithm.gate, "algorithm.gate")
        if self.pairs is not None and self._first_pair is not None:
            self.pairs.stream.load_state_dict(self._first_pair)
        self._pending: dict[tuple[int, int], list[SampleGroup]] = {}
        self._begun: dict[int, list[Begun]] = {}
        self._told = False
        self._step = 0
        """The last step whose batch was made."""

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
        if self.journal.is_due:
            self._begin_journal()
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
        kept = [replace(one.group, samples=one.passed()) for one in gated]
        drawn = self._replay(batch, gated, kept) if replays else []
        self.samples.step(step, version, groups, batch.items[len(batch.items) - len(drawn) :])
        tokens = [item.sample.trained_tokens for item in batch.items if item.grpo_weight != 0]
        batch.grpo_samples, batch.grpo_tokens = len(tokens), sum(tokens)
        seen = list(margin_candidates(gated, mpo.pairs)) if with_pairs else None
        self.margin.observe(seen or ())
        candidates = list(gate_candidates(gated))
        self.gate.observe(candidates)

        gates = self.cfg.algorithm.gate.kind is not ThresholdKind.off
        metrics = reward_metrics(groups, self.cfg) | batch_metrics(gated, batch, drawn, gates)
        metrics |= {"buffer/size": float(len(self.buffer))} | mean_and_max("batch/lag", lags)
        if gates:
            metrics |= self.gate.metrics("gate/")
        if self.cfg.rollout.oversample or any(group.carried for group in groups):
            metrics |= carried_metrics(groups)
        if with_pairs and mpo.pairs is not PairSource.dropout_ntp:
            metrics |= self.margin.metrics("threshold/")
        if replays:
            stats = self.buffer.stats(version)
            metrics |= {"buffer/prompts": stats["prompts"], "buffer/mass": stats["priority_mass"]}
        lengths = [len(sample.token_ids) for sample in flatten(groups)]
        note = failures(groups, f"step {step}")
        notes = (*((note,) if note and not self._told else ()), *self.samples.news())
        self._told = self._told or note is not None  # once in a run: the metric goes on counting
        self._acknowledge(step, version, kept if replays else None, seen, candidates)
        return batch, StepReport(metrics, len(lengths), sum(lengths), notes + self.journal.news())

    def offline(self, step: int, version: int) -> tuple[TrainBatch, StepReport]:
        """The batch of one step of offline MPO: the next ``data.pairs_per_step`` pairs of ``data.pairs_path``.

        Raises:
            DataError: if a picture can't be decoded or a prompt is too long.
            SkyrlError: if there are no offline pairs.
        """
        if self.pairs is None:
            raise SkyrlError("a step of offline MPO needs data.pairs_path: a Parquet file of pairs; got null")
        if self.journal.is_due:
            self._begin_journal()
        batch = self.pairs.batch(step, version, self.cfg.algorithm.weights(step))
        self._acknowledge(step, version)
        return batch, StepReport(
            {"batch/items": float(len(batch.items))}, samples=0, tokens=0, notes=self.journal.news()
        )

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
        pending = [(*place, groups) for place, groups in zip(places, parts, strict=False)]
        rest = iter(parts[len(places) :])
        begun = [(step, [one for part in islice(rest, count) for one in part]) for step, count in left.items()]
        saved.write(path, self._state(pending, begun), self._step)
        self._begin_journal(path)

    def load(self, path: Path) -> dict[int, int]:
        """Take over a saved state; :meth:`SelectiveSampleBuffer.load_state_dict` says what changed settings do. Returns
        the ``counts`` that it was saved with: :meth:`pending` has those groups.

        Raises:
            DataError: if the file is damaged, or of an older version of skyrl; if these settings refuse its samples; if
                one of the two runs has offline pairs and the other has none.
        """
        state, _ = saved.read(path, State)
        self._take_over(path, state, saved.step_of(path))
        self._begin_journal(path)
        return dict(Counter(step for step, _ in self._pending))

    def recover(self, path: Path | None, step: int) -> None:
        """Go to the state right after ``step``, the last one that was acknowledged, in this run's folder; later steps
        are forgotten. The next batches are then those that would have come anyway, to the last bit.

        Args:
            path: The newest complete checkpoint's state; None if there is none yet. It is read only if the journal
                does not reach ``step``.

        Raises:
            DataError: as :meth:`load`.
            SkyrlError: if neither the journal nor ``path`` has that state.
        """
        if step == 0:
            self._begin()
            self._begin_journal()
        elif found := self.journal.recover(step):
            state, records = found
            self._take_over(self.journal.folder, state, step)
            with saved.damage(self.journal.folder):
                for record in records:
                    self._redo(record)
            self._prune()
        elif path is not None and saved.step_of(path) == step:
            self.load(path)
        else:
            raise SkyrlError(
                f"the sample buffer can't go back to step {step}: {self.journal.folder} does not reach it, and the "
                f"newest checkpoint is {path}; resume the run from a checkpoint"
            )

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

    # ------------------------------------------------------------ state

    def _state(self, pending: list[tuple[int, int, list[SampleGroup]]], begun: list[tuple[int, list[Begun]]]) -> State:
        pairs = None if self.pairs is None else self.pairs.stream.state_dict()
        buffer, margin, gate = self.buffer.state_dict(), self.margin.state_dict(), self.gate.state_dict()
        return State(buffer, margin, gate, pairs, self._told, pending, begun)

    def _take_over(self, path: Path, state: State, step: int) -> None:
        if (state.pairs is None) != (self.pairs is None):
            had, has = ("without", "with") if state.pairs is None else ("with", "without")
            raise DataError(f"the checkpoint is of a run {had} data.pairs_path, this run is one {has} it")
        with saved.damage(path):
            self.buffer.load_state_dict(state.buffer)
            self.margin.load_state_dict(state.margin)
            self.gate.load_state_dict(state.gate)
            if self.pairs is not None and state.pairs is not None:
                self.pairs.stream.load_state_dict(state.pairs)
        self._pending = {(ahead, place): groups for ahead, place, groups in state.pending}
        self._begun, self._told = dict(state.begun), state.told
        self._step = step

    def _begin_journal(self, base: Path | None = None) -> None:
        """Start from the state as it is, which the file ``base`` holds if it is given."""
        pending = [(*place, groups) for place, groups in self._pending.items()]

        def write(path: Path) -> None:
            saved.write(path, self._state(pending, list(self._begun.items())), self._step)

        self.journal.begin(self._step, base or write)

    def _acknowledge(
        self,
        step: int,
        version: int,
        kept: list[SampleGroup] | None = None,
        margin: list[Candidate] | None = None,
        gate: list[Candidate] | None = None,
    ) -> None:
        """The step is over; write down what it changed, while its samples are written."""
        if not self.journal.off:
            if kept is not None:
                able = [replace(one, samples=[s for s in one.samples if s.effective], blind=None) for one in kept]
                kept = [one for one in able if one.samples]
            random = None if kept is None else self.buffer.random_state()
            pairs = None if self.pairs is None else self.pairs.stream.state_dict()
            self.journal.append(Exchanged(step, version, kept, random, margin, gate, pairs, self._told))
            self.samples.wait()
        self._step = step
        self._prune()

    def _redo(self, record: Exchanged) -> None:
        """What :meth:`exchange` or :meth:`offline` changed in that step."""
        if record.gate is not None:
            self.margin.calibrate(record.step)
            self.gate.calibrate(record.step)
            self.margin.observe(record.margin or ())
            self.gate.observe(record.gate)
        if record.groups is not None and record.random is not None:
            self.buffer.redo(record.groups, record.version, record.random)
        if self.pairs is not None and record.pairs is not None:
            self.pairs.stream.load_state_dict(record.pairs)
        self._told = record.told

    def _prune(self) -> None:
        """Forget what was asked for ahead of steps that are over."""
        self._pending = {place: groups for place, groups in self._pending.items() if place[0] > self._step}
        self._begun = {step: groups for step, groups in self._begun.items() if step >= self._step}

    # ------------------------------------------------------------ inside

    def _replay(self, batch: TrainBatch, gated: list[Gated], kept: list[SampleGroup]) -> list[Drawn]:
        """Append drawn samples with their GRPO weights; afterwards the fresh ones are in the buffer too."""
        cfg, only = self.cfg.buffer, self.cfg.algorithm.grpo.filter
        fresh = sum(len(one.group.samples) for one in gated)
        # Fresh samples take a place if they are effective, or with filter=all if they train.
        taken = effective(gated) if only is GrpoFilter.effective else sum(len(one.grpo(only)) for one in gated)
        drawn = self.buffer.draw(replay_places(fresh, taken, cfg), batch.version)
        for one, weight in zip(drawn, replay_weights(drawn, len(self.buffer), cfg).tolist(), strict=True):
            batch.items.append(TrainItem(one.prompt, one.prompt_ids, one.sample, weight))
        self.buffer.add(kept, batch.version)
        return drawn
