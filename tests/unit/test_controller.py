"""The control loop with fakes of its own interfaces: order of the calls, schedules, resume."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from fakes import FakeBuffer, FakeLearner, FakeReward, FakeRollout, FakeSyncer, ListSink, Log

from skyrl.config import Config
from skyrl.controller import Controller, Pools
from skyrl.data.stream import PromptStream
from skyrl.types import SyncError


def config(steps: int = 3, evaluate: int = 0, save: int = 0) -> Config:
    cfg = Config()
    cfg.controller.steps = steps
    cfg.rollout.prompts_per_step, cfg.rollout.samples_per_prompt = 2, 2
    cfg.evaluation.every, cfg.checkpoint.every = evaluate, save
    return cfg


def controller(cfg: Config, run_dir: Path, broken_at: int | None = None) -> tuple[Controller, Log, ListSink]:
    log, sink = Log(), ListSink()
    pools = Pools(FakeRollout(log), FakeReward(log), FakeBuffer(log), FakeLearner(log), FakeSyncer(log, broken_at))
    ticks = itertools.count()
    made = Controller(cfg, pools, PromptStream(10, 0), 4, sink, run_dir, clock=lambda: float(next(ticks)))
    return made, log, sink


def test_one_step_calls_every_part_in_the_order_of_the_dataflow(tmp_path: Path) -> None:
    made, log, _ = controller(config(steps=1), tmp_path)
    made.run()
    assert log.names() == [
        *("sync", "generate", "score", "evaluate"),
        *("generate", "wait_rollout", "score", "wait_reward", "exchange", "train", "sync"),
        *("generate", "score", "evaluate", "export"),
    ]


def test_versions_count_weight_updates_and_steps_count_from_one(tmp_path: Path) -> None:
    made, log, _ = controller(config(steps=3), tmp_path)
    made.run()
    assert [call[1] for call in log.calls if call[0] == "sync"] == [0, 1, 2, 3]
    # A sample of step s is made by the policy that has had s - 1 updates.
    assert [call[1:3] for call in log.calls if call[0] == "exchange"] == [(1, 0), (2, 1), (3, 2)]


def test_training_rows_follow_the_stream_and_evaluation_is_greedy_on_all_rows(tmp_path: Path) -> None:
    made, log, _ = controller(config(steps=2), tmp_path)
    made.run()
    requests = [call[1] for call in log.calls if call[0] == "generate"]
    stream = PromptStream(10, 0)
    assert [r.rows for r in requests if r.split == "train"] == [stream.take(2), stream.take(2)]
    evaluations = [r for r in requests if r.split == "eval"]
    assert [(r.rows, r.greedy, r.samples_per_prompt) for r in evaluations] == [((0, 1, 2, 3), True, 1)] * 2


def test_evaluation_and_checkpoints_come_on_schedule_and_at_the_end(tmp_path: Path) -> None:
    made, _, sink = controller(config(steps=5, evaluate=2, save=2), tmp_path)
    made.run()
    assert [step for step, metrics in sink.records if "eval/accuracy" in metrics] == [0, 2, 4, 5]
    # keep=2: the checkpoint of step 2 is gone.
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_000004", "step_000005"]


def test_times_add_up_and_throughput_uses_the_step(tmp_path: Path) -> None:
    made, _, sink = controller(config(steps=1), tmp_path)
    made.run()
    metrics = next(metrics for _, metrics in sink.records if "time/step" in metrics)
    phases = [metrics[f"time/{name}"] for name in ("rollout", "reward", "buffer", "learner", "sync")]
    assert phases == [1.0] * 5
    assert metrics["time/step"] == 5.0
    assert metrics["throughput/tokens_per_second"] == 20.0
    assert "rollout_tokens" not in metrics


def test_three_and_three_steps_see_what_six_see(tmp_path: Path) -> None:
    whole, log, _ = controller(config(steps=6), tmp_path / "whole")
    whole.run()
    first, first_log, _ = controller(config(steps=3), tmp_path / "cut")
    first.run()
    second, second_log, second_sink = controller(config(steps=6), tmp_path / "cut")
    second.restore(second.checkpoints.complete()[0])
    second.run()

    def trained(log: Log) -> list[tuple[object, ...]]:
        return [call for call in log.calls if call[0] in ("exchange", "train")]

    assert trained(first_log) + trained(second_log) == trained(log)
    assert second.seconds_training == whole.seconds_training
    assert second_sink.records[0][0] == 3  # the restored weights are synced and proved first
    assert second_log.calls[0] == ("sync", 3)
    assert not any("eval/accuracy" in metrics for step, metrics in second_sink.records if step == 3)


def test_the_gallery_chosen_at_the_start_is_kept(tmp_path: Path) -> None:
    made, log, _ = controller(config(steps=2), tmp_path)
    made.run()
    assert [call[1] for call in log.calls if call[0] == "evaluate"] == [None, [{"id": "eval/0"}]]


def test_a_broken_sync_stops_the_run_before_another_rollout(tmp_path: Path) -> None:
    made, log, _ = controller(config(steps=5), tmp_path, broken_at=2)
    with pytest.raises(SyncError, match="sync 2 is broken"):
        made.run()
    assert log.calls[-1] == ("sync", 2)
    assert log.names().count("train") == 2
