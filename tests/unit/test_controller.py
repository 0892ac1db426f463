"""The control loop with fakes of its own interfaces: order of the calls, schedules, resume."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from fakes import FakeBuffer, FakeLearner, FakeReward, FakeRollout, FakeSyncer, ListSink, Log

from skyrl.data.stream import PromptStream
from skyrl.loop import Controller, Pools
from skyrl.records import SyncError
from skyrl.settings import Config, PairSource, Stage


def config(steps: int = 3, evaluate: int = 0, save: int = 0) -> Config:
    cfg = Config()
    cfg.hallucination.probe_prompts = 0
    cfg.controller.steps = steps
    cfg.rollout.prompts_per_step, cfg.rollout.samples_per_prompt = 2, 2
    cfg.evaluation.every, cfg.checkpoint.every = evaluate, save
    return cfg


def controller(
    cfg: Config, run_dir: Path, broken_at: int | None = None, rows: list[int] | None = None
) -> tuple[Controller, Log, ListSink]:
    log, sink = Log(), ListSink()
    pools = Pools(FakeRollout(log), FakeReward(log), FakeBuffer(log), FakeLearner(log), FakeSyncer(log, broken_at))
    ticks = itertools.count()
    made = Controller(cfg, pools, PromptStream(10, 0), 4, sink, run_dir, rows, clock=lambda: float(next(ticks)))
    return made, log, sink


def test_one_step_calls_every_part_in_the_order_of_the_dataflow(tmp_path: Path) -> None:
    made, log, _ = controller(config(steps=1), tmp_path)
    made.run()
    assert log.names() == [
        *("sync", "generate", "score", "wait_reward", "evaluate"),
        *("generate", "score", "wait_rollout", "wait_reward", "exchange", "train", "sync"),
        *("generate", "score", "wait_reward", "evaluate", "export"),
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


@pytest.mark.parametrize(("shares", "warned"), [((0.0, 0.5), 1), ((0.1, 0.0), 0)])
def test_answers_without_tags_at_the_start_are_warned_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, shares: tuple[float, float], warned: int
) -> None:
    made, _, _ = controller(config(steps=1), tmp_path)
    left = list(shares)
    made.pools.reward.evaluate = lambda *_: ({"eval/format": left.pop(0)}, [])  # type: ignore[method-assign]
    made.run()
    assert caplog.text.count("no answer of the first evaluation has the form") == warned


def test_a_broken_sync_stops_the_run_before_another_rollout(tmp_path: Path) -> None:
    made, log, _ = controller(config(steps=5), tmp_path, broken_at=2)
    with pytest.raises(SyncError, match="sync 2 is broken"):
        made.run()
    assert log.calls[-1] == ("sync", 2)
    assert log.names().count("train") == 2


def test_probes_ask_the_first_prompts_again_without_the_picture_and_show_their_cost(tmp_path: Path) -> None:
    cfg = config(steps=1)
    cfg.hallucination.probe_prompts = 3
    made, log, sink = controller(cfg, tmp_path)
    made.run()
    blind = [call[1] for call in log.calls if call[0] == "generate" and call[1].blind]
    assert [(r.split, r.rows, r.greedy) for r in blind] == [("eval", (0, 1, 2), True)] * 2
    assert [call[2] for call in log.calls if call[0] == "evaluate"] == [3, 3]
    evaluated = [metrics for _, metrics in sink.records if "eval/accuracy" in metrics]
    assert all(m["eval/picture_drop"] == 0.1 and 0 < m["eval/probe_seconds"] < m["eval/seconds"] for m in evaluated)


def test_dropout_ntp_continues_the_scored_groups_without_the_picture(tmp_path: Path) -> None:
    cfg = config(steps=3)
    cfg.algorithm.mpo.pairs = PairSource.dropout_ntp
    cfg.algorithm.stage, cfg.algorithm.mpo_steps = Stage.mpo_then_grpo, 2
    made, log, sink = controller(cfg, tmp_path)
    made.run()
    # In the second stage nothing forms pairs.
    assert [call[1] for call in log.calls if call[0] == "continue_blind"] == [1, 2]
    assert [("time/blind" in metrics) for _, metrics in sink.records if "time/step" in metrics] == [True, True, False]
    names = log.names()
    place = names.index("continue_blind")
    assert names[place - 1] == "wait_reward" and names[place + 2] == "exchange"


def test_offline_pairs_replace_sampling_and_scoring(tmp_path: Path) -> None:
    cfg = config(steps=2)
    cfg.data.pairs_path, cfg.algorithm.stage = "pairs.parquet", Stage.mpo
    made, log, _ = controller(cfg, tmp_path)
    made.run()
    assert not [call for call in log.calls if call[0] == "generate" and call[1].split == "train"]
    assert [call for call in log.calls if call[0] in ("offline", "train", "exchange")] == [
        ("offline", 1),
        ("train", ["pair 1"]),
        ("offline", 2),
        ("train", ["pair 2"]),
    ]


def test_a_pool_names_the_rows_that_are_asked(tmp_path: Path) -> None:
    pool = [100 + place for place in range(10)]
    made, log, _ = controller(config(steps=2), tmp_path, rows=pool)
    made.run()
    stream = PromptStream(10, 0)
    wanted = [tuple(pool[place] for place in stream.take(2)) for _ in range(2)]
    assert [call[1].rows for call in log.calls if call[0] == "generate" and call[1].split == "train"] == wanted
