"""The training loop.

::

    PromptStream ──rows──▶ rollout pool ──groups──▶ reward pool ──scored──▶ buffer ──TrainBatch──▶ learner pool
         ▲                     ▲                                             (add, draw,              │
         │                     └──────────── weights v+1, proved by a probe ◀─assemble)───────────────┘
       state ──▶ checkpoint

Who waits for whom in one step: scoring starts as each rollout part is ready; the buffer waits for all scored parts;
the learner for the batch; the next rollout for the proved sync. So every fresh sample is on-policy. Everything that
moves between actors is a handle: this process never holds a tensor or a picture.

Two branches of a step: ``algorithm.mpo.pairs=dropout_ntp`` sends the scored groups back to the rollout pool, which
continues the chosen answers without the picture; ``data.pairs_path`` (offline MPO) takes the whole batch from a file
instead of rollout, reward and buffer.

The seam for overlap is ``_sample``: it returns handles at once, so asking for step k+1 before ``learner.train_step``
of step k gives rollouts that are one version old, which every sample records and the ratio corrects.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from skyrl.checkpoint import Checkpoints, read_state
from skyrl.data.stream import PromptStream
from skyrl.interfaces import (
    BufferService,
    Handle,
    LearnerPool,
    Metrics,
    MetricSink,
    RewardPool,
    RolloutPool,
    WeightSyncer,
)
from skyrl.monitoring.records import read_json, write_json
from skyrl.records import RolloutRequest
from skyrl.settings import Config, PairSource

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Pools:
    """Everything that the controller gives orders to. Only a system that does not train lacks the last three."""

    rollout: RolloutPool
    reward: RewardPool
    buffer: BufferService = None  # type: ignore[assignment]
    learner: LearnerPool = None  # type: ignore[assignment]
    syncer: WeightSyncer = None  # type: ignore[assignment]


class Controller:
    """Runs ``controller.steps`` synchronous steps.

    Args:
        cfg: The whole configuration.
        pools: The workers.
        stream: Order of the training prompts: numbers of the rows, or places in ``rows``.
        eval_size: Number of evaluation prompts.
        sink: Where metrics go.
        run_dir: The run's folder.
        rows: The data set's rows to train on (a filtered pool); None means all.
        clock: Seconds; replaced in tests.
    """

    def __init__(
        self,
        cfg: Config,
        pools: Pools,
        stream: PromptStream,
        eval_size: int,
        sink: MetricSink,
        run_dir: Path,
        rows: Sequence[int] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.cfg, self.pools, self.stream, self.sink, self.run_dir = cfg, pools, stream, sink, run_dir
        self.rows = rows
        self.eval_rows = tuple(range(eval_size))
        self.checkpoints = Checkpoints(run_dir, cfg.checkpoint.keep)
        self.clock = clock
        self.step = 0
        self.version = 0
        self.seconds_training = 0.0

    def run(self) -> None:
        """Train from the current step to the last one, evaluating and saving on schedule."""
        self.sink.log(self.step, self.pools.syncer.sync(self.version))
        if self.step == 0:
            self._evaluate()
        while self.step < self.cfg.controller.steps:
            self.step += 1
            metrics = self._train_step()
            self.seconds_training += metrics["time/step"]
            self.sink.log(self.step, metrics)
            if self._due(self.cfg.evaluation.every):
                self._evaluate()
            if self._due(self.cfg.checkpoint.every):
                self._save()
        if self.cfg.checkpoint.export:
            self.pools.learner.export(self.run_dir / "policy")

    def _train_step(self) -> Metrics:
        times = _Stopwatch(self.clock)
        batch, metrics = self._offline_batch(times) if self.cfg.data.pairs_path else self._batch(times)
        metrics = metrics | self.pools.learner.train_step(batch)
        times.lap("time/learner")
        self.version += 1
        metrics |= self.pools.syncer.sync(self.version)
        times.lap("time/sync")
        total = times.total()
        metrics["throughput/samples_per_second"] = metrics.pop("rollout_samples") / total
        metrics["throughput/tokens_per_second"] = metrics.pop("rollout_tokens") / total
        return metrics | times.laps | {"time/step": total}

    def _batch(self, times: _Stopwatch) -> tuple[Handle, Metrics]:
        """Sample, score, replay: the handle of the step's batch."""
        fresh = self._sample()
        scored = self.pools.reward.score(fresh)
        self.pools.rollout.wait(fresh)
        times.lap("time/rollout")
        self.pools.reward.wait(scored)
        times.lap("time/reward")
        mpo_weight = self.cfg.algorithm.weights(self.step)[1]
        if self.cfg.algorithm.mpo.pairs is PairSource.dropout_ntp and mpo_weight > 0:
            scored = self.pools.rollout.continue_blind(scored, self.step)
            self.pools.rollout.wait(scored)
            times.lap("time/blind")
        batch, metrics = self.pools.buffer.exchange(scored, self.step, self.version)
        times.lap("time/buffer")
        return batch, metrics

    def _offline_batch(self, times: _Stopwatch) -> tuple[Handle, Metrics]:
        batch, metrics = self.pools.buffer.offline(self.step)
        times.lap("time/buffer")
        return batch, metrics

    def _sample(self) -> list[Handle]:
        """Ask for this step's rollouts; returns at once."""
        rollout = self.cfg.rollout
        places = self.stream.take(rollout.prompts_per_step)
        rows = places if self.rows is None else tuple(int(self.rows[place]) for place in places)
        seed = self.cfg.controller.seed
        return self.pools.rollout.generate(
            RolloutRequest("train", rows, self.step, rollout.samples_per_prompt, greedy=False, seed=seed)
        )

    def _due(self, every: int) -> bool:
        return self.step == self.cfg.controller.steps or (every > 0 and self.step % every == 0)

    def _evaluate(self) -> None:
        started = self.clock()
        request = RolloutRequest("eval", self.eval_rows, self.step, 1, greedy=True, seed=self.cfg.controller.seed)
        scored = self.pools.reward.score(self.pools.rollout.generate(request))
        self.pools.reward.wait(scored)
        asked = self.clock()
        blind, drop = self._probe(request, scored)
        probed = self.clock()
        path = self.run_dir / "gallery.json"
        chosen = read_json(path) if self.step > 0 and path.is_file() else None
        metrics, gallery = self.pools.reward.evaluate(scored, blind, chosen)
        write_json(path, gallery)
        if self.step == 0 and metrics.get("eval/format") == 0:
            logger.warning(
                "no answer of the first evaluation has the form <think>…</think><answer>…</answer>, and only what "
                "stands inside the answer tags is scored: let the questions ask for it (docs/data.md)"
            )
        if self.cfg.hallucination.probe_prompts:
            metrics = metrics | drop | {"eval/probe_seconds": probed - asked}
        self.sink.log(self.step, metrics | {"eval/seconds": self.clock() - started})

    def _probe(self, request: RolloutRequest, scored: list[Handle]) -> tuple[list[Handle], Metrics]:
        """What the policy says without the picture, and how much its own answers depend on it."""
        limit = self.cfg.hallucination.probe_prompts
        if not limit:
            return [], {}
        blind_request = replace(request, rows=request.rows[:limit], blind=True)
        blind = self.pools.reward.score(self.pools.rollout.generate(blind_request))
        self.pools.reward.wait(blind)
        return blind, self.pools.learner.picture_drop(scored)

    # ------------------------------------------------------------ state

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "version": self.version,
            "seconds_training": self.seconds_training,
            "stream": self.stream.state_dict(),
        }

    def _save(self) -> None:
        with self.checkpoints.writing(self.step, self._state()) as folder:
            self.pools.learner.save(folder / "learner")
            self.pools.buffer.save(folder / "buffer.pkl")

    def restore(self, folder: Path) -> None:
        """Continue after the step that the (verified) checkpoint ``folder`` was written at."""
        state = read_state(folder)
        self.pools.learner.load(folder / "learner")
        self.pools.buffer.load(folder / "buffer.pkl")
        self.stream.load_state_dict(state["stream"])
        self.step, self.version = state["step"], state["version"]
        self.seconds_training = state["seconds_training"]


class _Stopwatch:
    """Lap times of one step."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.laps: Metrics = {}
        self.started = self.last = clock()

    def lap(self, name: str) -> None:
        now = self.clock()
        self.laps[name] = now - self.last
        self.last = now

    def total(self) -> float:
        return self.last - self.started
