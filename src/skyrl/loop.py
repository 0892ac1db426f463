"""The training loop.

::

    PromptStream ──rows──▶ Sampler ──groups──▶ Rewarder ──scored──▶ Batcher ──TrainBatch──▶ LearnerStep
         ▲                    ▲                                   (add, draw,                  │
         │                    └──────────── weights v+1, proved by a probe ◀──assemble)────────┘
       state ──▶ checkpoint

Everything that moves between members is a promise: this process never holds a tensor or a picture.

``controller.lag`` 0: the rollout of a step is asked for when the step begins; every fresh answer is on-policy. Lag L:
the rollout of step k+L is asked for before step k is trained, so sampling runs beside the learner, and fresh answers
are L versions old (the first L steps less); every sample records its version, and the ratio corrects. New weights wait
for the answers that were asked for before them: an answer has one version (docs/architecture.md has the price). With
``rollout.oversample`` a step does not wait for its longest answers: the next one goes on with them, under new weights.

A rollout, reward or buffer member that is lost is replaced by its crew, and the step goes on (:mod:`skyrl.crew`): new
rollout members get the learner's weights, the buffer comes back from its log. A lost learner rank takes the state of
all ranks with it: then the run goes back to its newest checkpoint, as a resumed run would, in this process.

Two branches of a step: ``algorithm.mpo.pairs=dropout_ntp`` lets the scored answers be continued without the picture;
``data.pairs_path`` (offline MPO) takes the whole batch from a file instead of rollout, reward and buffer.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from skyrl.ahead import Ahead
from skyrl.batch.batcher import Batcher
from skyrl.checkpoint import BUFFER, MANIFEST, Checkpoints, read_state
from skyrl.data.stream import Stream, rows_used
from skyrl.evaluation.summary import evaluate_policy
from skyrl.learner.step import LearnerStep
from skyrl.monitoring.laps import Laps
from skyrl.monitoring.records import write_json
from skyrl.monitoring.sinks import MetricSink
from skyrl.monitoring.timeline import Timeline
from skyrl.records import Event, MemberLost, Metrics, SkyrlError, StepReport, TrainBatch
from skyrl.rewards.scorers import SCALE_FILE, Scale, fitted_scale, restored_scale
from skyrl.settings import Config, Squash
from skyrl.system import System

logger = logging.getLogger(__name__)


class Loop:
    """Runs ``controller.steps`` steps.

    Args:
        cfg: The whole configuration.
        system: The members.
        stream: Order of the training prompts: numbers of the rows, or places in ``rows``.
        sink: Where metrics go.
        run_dir: The run's folder.
        rows: The data set's rows to train on (a filtered pool); None means all.
        clock: Seconds; replaced in tests.
    """

    def __init__(
        self,
        cfg: Config,
        system: System,
        stream: Stream,
        sink: MetricSink,
        run_dir: Path,
        rows: Sequence[int] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.cfg, self.system, self.sink, self.run_dir, self.clock = cfg, system, sink, run_dir, clock
        self.ahead = Ahead(cfg, system, stream, rows)
        self.checkpoints = Checkpoints(run_dir, cfg.checkpoint.keep)
        self.step = self.version = 0
        self.seconds_training = 0.0
        self.restarts = 0
        """How often the learner was built anew."""
        self.stop_after_step = False
        """Set from outside: end after the step that is going on, with a checkpoint."""
        self.timeline: Timeline | None = None
        """Set from outside: gets the calls and laps of each step."""
        self.scale: Scale | None = None
        """Of the reward model's scores, if it was fitted on the first evaluation."""
        self._start = stream.state_dict()
        self._kept = 0
        """The last step whose exchange with the buffer was answered."""
        self._saved = 0
        """The step of the last checkpoint."""
        self._unsaved = False
        """The one after it could not be written."""
        system.rollouts.revive = lambda place: system.syncer.bring(place, self.version)
        system.buffer.revive = self._recover_buffer
        for crew in system.crews:
            crew.tell = self._tell

    def run(self) -> None:
        """Train from the current step to the last one, evaluating and saving on schedule.

        Raises:
            MemberLost: if a learner rank was lost more often than ``controller.restarts``.
        """
        lost: MemberLost | None = None
        while True:
            try:
                if lost is not None:
                    self._go_back(lost)
                self._run()
                return
            except MemberLost as error:
                if self.restarts >= self.cfg.controller.restarts:
                    raise
                lost = error

    def _run(self) -> None:
        self.sink.log(self.step, self.system.syncer.sync(self.version))
        if self.step == 0:
            self._evaluate()
        while self.step < self.cfg.controller.steps and not self.stop_after_step:
            self.step += 1
            metrics = self._train_step()
            self.seconds_training += metrics["time/step"]
            self.sink.log(self.step, metrics)
            if self._due(self.cfg.evaluation.every):
                self._evaluate()
            if self._due(self.cfg.checkpoint.every) or self._unsaved or self.stop_after_step:
                self._save()
        if self.stop_after_step and self._saved < self.step:  # it was set behind the step's own look
            self._save()
        if self.stop_after_step:
            kept = f"after step {self.step}, with a checkpoint" if self.step else "before the first step"
            self._tell("stopped", "", f"stopped {kept}")
        if self.cfg.checkpoint.export and self.step == self.cfg.controller.steps:
            with self.system.hosts.gathered(self.run_dir / "policy", self.system.learners):
                self.system.learners.each(LearnerStep.export, self.run_dir / "policy")

    def _train_step(self) -> Metrics:
        self.system.rollouts.tend()
        self.system.rewards.tend()
        laps = Laps(self.clock)
        if self.cfg.data.pairs_path is None:
            asked = self.ahead.ask_until(self.step + self.cfg.controller.lag)
            batch, report = self._batch(laps)
        else:
            batch, report = self._exchanged(*self.system.buffer.pair(Batcher.offline, self.step, self.version))
            laps.end("time/buffer")
        metrics = report.metrics | self.system.learners.each(LearnerStep.train_step, batch)[0]
        if self.cfg.data.pairs_path is None:
            metrics["data/position"] = float(rows_used(self.ahead.position))
        self.version += 1
        laps.end("time/learner")
        if self.cfg.controller.lag:
            metrics |= self._finish_sampling(laps, asked)
        metrics |= self.system.syncer.sync(self.version)
        laps.end("time/sync")
        total = laps.total()
        metrics["throughput/samples_per_second"] = report.samples / total
        metrics["throughput/tokens_per_second"] = report.tokens / total
        if self.timeline is not None:
            self.timeline.add(self.step, self.version, laps, self.system.learners.executor.history)
        return metrics | laps.seconds | {"time/step": total}

    def _batch(self, laps: Laps) -> tuple[TrainBatch, StepReport]:
        """Wait for this step's answers and their scores, replay, and make the (promised) batch."""
        rollout = self.ahead.take(self.step)
        self.system.rollouts.wait(rollout.fresh)
        laps.end("time/rollout")
        self.system.rewards.wait(rollout.judged)
        laps.end("time/reward")
        if rollout.scored is not rollout.judged:
            self.system.rollouts.wait(rollout.scored)
            laps.end("time/blind")
        promised = self.system.buffer.pair(Batcher.exchange, self.step, self.version, *rollout.scored)
        batch, report = self._exchanged(*promised)
        self.system.rollouts.forget(rollout.left.parts)  # else each step would remember all before it
        for note in report.notes:
            logger.warning(note)
        laps.end("time/buffer")
        return batch, report

    def _exchanged(self, batch: TrainBatch, told: StepReport) -> tuple[TrainBatch, StepReport]:
        """Wait for the buffer. Its state has this step from then on: the exchange must not be made again."""
        report = self.system.buffer.fetch([told])[0]
        self._kept = self.step
        self.system.buffer.forget([batch])
        return batch, report

    def _finish_sampling(self, laps: Laps, asked: int) -> Metrics:
        """Wait for the answers to later steps, so that the sync that follows takes its own time only."""
        self.system.rollouts.wait(self.ahead.sampling())
        waited = laps.end("time/rollout")
        sampled = self.system.rollouts.seconds(self.ahead.sampling_call) if asked else 0.0
        return {"overlap/rollout": max(0.0, min(sampled - waited, laps.seconds["time/learner"]))}

    def _due(self, every: int) -> bool:
        return self.step == self.cfg.controller.steps or (every > 0 and self.step % every == 0)

    def _evaluate(self) -> None:
        metrics = evaluate_policy(self.cfg, self.system, self.step, self.run_dir, self.clock)
        self.sink.log(self.step, metrics)
        if self.step == 0 and self._fits_scale():
            self._use_scale(fitted_scale(metrics))

    def _fits_scale(self) -> bool:
        squashed = self.cfg.reward.squash in (Squash.sigmoid, Squash.tanh)
        return self.cfg.model.reward is not None and squashed and self.cfg.reward.squash_scale is None

    def _use_scale(self, scale: Scale) -> None:
        """Reward members read it from the run's folder, also one that is built anew."""
        self.scale = scale
        write_json(self.run_dir / SCALE_FILE, scale._asdict())
        self.system.hosts.hand_out(self.run_dir / SCALE_FILE)

    # ------------------------------------------------------------ losses

    def _tell(self, kind: str, member: str, text: str) -> None:
        logger.warning(text)
        self.sink.event(Event(time.time(), self.step, kind, member, text))

    def _recover_buffer(self, place: int) -> None:
        """Bring a buffer member that was built anew to where the lost one was: its newest checkpoint, and its log."""
        newest = next(iter(self.checkpoints.complete()), None)  # read only if the journal does not reach so far
        path = None if newest is None else newest / BUFFER
        try:
            self.system.buffer.fetch([self.system.buffer.at(place, Batcher.recover, path, self._kept)])
        except MemberLost:
            raise
        except SkyrlError as error:  # its log went with its host: the whole run goes back
            raise MemberLost(self.system.buffer.specs[place].name, "Batcher.recover", str(error)) from error

    def _go_back(self, lost: MemberLost) -> None:
        """Build the learner anew and continue from the newest checkpoint, or from the beginning."""
        self.restarts += 1
        at, newest = self.step, self.checkpoints.newest()
        self.system.restart_learners()
        if newest is None:
            self.step = self.version = self._kept = 0
            self.seconds_training = 0.0
            self.ahead.start_over(self._start)
            self._recover_buffer(0)
        else:
            self.restore(newest)
        self.sink.rewind(self.step)
        self._tell(
            "restarted", lost.member, f"{lost}; all learner ranks were built anew, from step {at} to {self.step}"
        )

    # ------------------------------------------------------------ state

    def _save(self) -> None:
        """Write a checkpoint. One that can't be written is tried again after the next step; the last one must be."""
        state: dict[str, Any] = {"step": self.step, "version": self.version, "seconds_training": self.seconds_training}
        if self.scale is not None:
            state |= {"reward_scale": self.scale._asdict()}
        try:
            with self.checkpoints.writing(self.step, state | self.ahead.state_dict()) as folder:
                with self.system.hosts.gathered(folder / "learner", self.system.learners):
                    self.system.learners.each(LearnerStep.save, folder / "learner")
                self.ahead.save(folder / BUFFER)
                if not (folder / BUFFER).is_file():
                    raise SkyrlError(f"the sample buffer did not write {folder / BUFFER}: it is on another host")
            self._saved, self._unsaved = self.step, False
        except MemberLost:
            raise
        except SkyrlError as error:
            if self.step == self.cfg.controller.steps or self.stop_after_step:
                raise
            self._unsaved = True
            self._tell("unsaved", "", f"{error}; tried again after the next step")

    def restore(self, folder: Path) -> None:
        """Continue after the step that the (verified) checkpoint ``folder`` was written at."""
        state = read_state(folder)
        with self.system.hosts.lent(folder / "learner", self.system.learners):
            self.system.learners.each(LearnerStep.load, folder / "learner")
        self.step, self.version = state["step"], state["version"]
        self._kept = self._saved = self.step  # a buffer that is lost while it loads comes back to here
        self.ahead.load(folder / BUFFER, state, self.step)
        self.seconds_training = state["seconds_training"]
        if self._fits_scale():
            self._use_scale(restored_scale(state, folder))
        (folder / MANIFEST).touch()  # the newest by time: from here this run goes on, and to here it goes back
