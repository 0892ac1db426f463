"""Whole runs in one process: the order of the calls, schedules, lag, and resume whatever the step of the kill.

Four of these tests fail on a loop that only asks ahead: the gap of fresh answers, δ, the position that is saved, and
the time that the sync takes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_runs import PROMPTS, Watched, config, numbers, policy_folder, run_loop

from skyrl.crew.executor import Member, MemberSpec
from skyrl.crew.local_executor import LocalExecutor
from skyrl.data.stream import PromptStream
from skyrl.learner.step import LearnerStep
from skyrl.records import ConfigError, MemberLost, SampleGroup, SkyrlError, SyncError, TrainBatch
from skyrl.rewards.reward_model import RewardModel
from skyrl.rewards.scorers import SCALE_FILE
from skyrl.settings import Config, PairSource, Stage
from skyrl.system import start_system

STEPS = 4


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return policy_folder(tmp_path_factory.getbasetemp())


def asked(batches: list[TrainBatch]) -> list[set[str]]:
    """Ids of the prompts whose answers are in each batch and were sampled for its step."""
    return [{item.prompt.id for item in batch.items} for batch in batches]


# ---------------------------------------------------------------- lag


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_every_sample_is_as_old_as_the_lag_says(policy: str, tmp_path: Path, lag: int) -> None:
    cfg = config(tmp_path, STEPS, lag)
    cfg.buffer.enabled = False
    watched = Watched()
    sink = run_loop(cfg, policy, watched)
    for batch in watched.batches:
        assert batch.version == batch.step - 1
        assert {batch.version - item.sample.policy_version for item in batch.items} <= {min(lag, batch.step - 1)}
    lags = {step: metrics["batch/lag_max"] for step, metrics in sink.steps.items() if "batch/lag_max" in metrics}
    assert lags == {step: min(lag, step - 1) for step in lags} and len(lags) >= 3 and max(lags) > lag
    # The rollout of step k + lag is asked for before step k is trained, and not earlier.
    calls = [call for call in watched.calls if call in ("generate", "train_step")]
    before_first = calls[1:].index("train_step")  # the first call is the evaluation's
    assert before_first == min(lag, STEPS - 1) + 2  # the blind probe's, step 1's, and those ahead
    assert calls.count("generate") == STEPS + 4  # two evaluations ask twice; nothing is asked for beyond the last step


def test_the_gap_of_fresh_answers_is_that_of_on_policy_ones_only(policy: str, tmp_path: Path) -> None:
    gaps = {lag: numbers(run_loop(config(tmp_path / str(lag), STEPS, lag), policy)) for lag in (0, 1)}
    assert all(step["learner/logprob_gap_fresh"] < 1e-5 for step in gaps[0].values())
    assert gaps[1][1]["learner/logprob_gap_fresh"] < 1e-5  # nothing was trained before step 1
    assert all("learner/logprob_gap_fresh" not in gaps[1][step] for step in (2, 3, 4))
    assert gaps[1][2]["grpo/ratio_max"] > 1.001  # off-policy: the ratio says so


@pytest.mark.parametrize("lag", [0, 1])
def test_delta_is_that_of_the_policy_which_is_trained(policy: str, tmp_path: Path, lag: int) -> None:
    """δ from log π_θ of the policy as it stands before the step, computed here; its reference is the first policy."""
    means: dict[int, float] = {}

    def sums(learner: LearnerStep, batch: TrainBatch) -> np.ndarray:
        members = [batch.items[i] for pair in batch.pairs for i in (pair.chosen, pair.rejected)]
        groups = [SampleGroup(item.prompt, item.prompt_ids, [item.sample]) for item in members]
        return np.array([values.astype(np.float64).sum() for values in learner.logprobs(groups)])

    def before(learner: LearnerStep, batch: TrainBatch) -> None:
        if not batch.pairs:
            return
        own = {name: whole.clone() for name, whole in learner.backend.parameters()}
        now = sums(learner, batch)
        _copy(learner.backend, dict(learner.backend.parameters(reference=True)))
        start = sums(learner, batch)
        _copy(learner.backend, own)
        means[batch.step] = 0.1 * float((now - start).mean())

    sink = run_loop(config(tmp_path, STEPS, lag), policy, Watched(before))
    assert len(means) >= 3 and abs(list(means.values())[1]) > 1e-3  # it moves by far more than the tolerance
    for count, step in enumerate(means, start=1):
        expected = float(np.mean(list(means.values())[:count]))
        assert sink.steps[step]["mpo/delta"] == pytest.approx(expected, abs=2e-5), step


def _copy(backend: Any, parameters: dict[str, Any]) -> None:
    import torch

    with torch.no_grad():
        for name, parameter in backend.model.named_parameters():
            parameter.copy_(parameters[name])


def test_killed_at_any_step_and_resumed_it_is_the_run_that_never_stopped(policy: str, tmp_path: Path) -> None:
    whole, seen = config(tmp_path / "whole", STEPS, lag=1), Watched()
    expected = numbers(run_loop(whole, policy, seen))
    for kill_at in range(2, STEPS + 1):
        cfg, first, second = config(tmp_path / f"cut{kill_at}", STEPS, lag=1), Watched(), Watched()
        before = numbers(run_loop(cfg, policy, first, kill_at=kill_at))
        after = numbers(run_loop(cfg, policy, second, resume=True))
        assert before | after == expected
        assert sorted(before) + sorted(after) == [1, 2, 3, 4]
        # What the killed process trained and did not save is trained again, and nothing else.
        trained = first.batches[: kill_at - 1] + second.batches
        assert asked(trained) == asked(seen.batches)
        for a, b in zip(trained, seen.batches, strict=True):
            assert [i.sample.token_ids.tolist() for i in a.items] == [i.sample.token_ids.tolist() for i in b.items]


def test_the_scale_of_the_reward_model_is_fitted_once_and_kept(policy: str, tmp_path: Path) -> None:
    """On the first evaluation's raw scores; the totals that are trained on are those of the fitted scale."""
    from tiny_models import encoder, random_model

    RewardModel(random_model(7), encoder()).save(tmp_path / "reward")

    def changed(run_dir: Path) -> Config:
        cfg = config(run_dir, STEPS, lag=1)
        cfg.model.reward, cfg.reward.model_weight = str(tmp_path / "reward"), 1.0
        cfg.reward.squash_scale, cfg.data.eval_size = None, 16
        return cfg

    seen, first, second = Watched(), Watched(), Watched()
    sink = run_loop(changed(tmp_path / "whole"), policy, seen)
    found = next(metrics for _, metrics in sink.all if "eval/reward_model_iqr" in metrics)
    centre, scale = found["eval/reward_model_median"], found["eval/reward_model_iqr"] / (2 * np.log(3))
    rewards = [item.sample.reward for batch in seen.batches for item in batch.items]
    assert len(rewards) > 20
    for reward in rewards:
        squashed = 1 / (1 + np.exp(-(reward.model - centre) / scale))
        assert reward.total == pytest.approx(reward.rule + 0.1 * reward.format + squashed)
    cut = changed(tmp_path / "cut")
    before = numbers(run_loop(cut, policy, first, kill_at=3))
    (tmp_path / "cut" / SCALE_FILE).unlink()  # the checkpoint has it too
    assert before | numbers(run_loop(cut, policy, second, resume=True)) == numbers(sink)
    cut.reward.squash_scale = 0.5
    run_loop(cut, policy, resume=True)


def test_a_resumed_run_may_change_its_lag_and_still_trains_every_prompt_once(policy: str, tmp_path: Path) -> None:
    stream = PromptStream(400, 0)
    rows = [stream.take(PROMPTS) for _ in range(5)]
    for before, after in ((2, 0), (0, 1)):
        cfg, watched = config(tmp_path / str(before), 5, before), Watched()
        cfg.buffer.enabled = False
        run_loop(cfg, policy, watched, kill_at=3)
        cfg.controller.lag = after
        again = Watched()
        run_loop(cfg, policy, again, resume=True)
        trained = [*asked(watched.batches[:2]), *asked(again.batches)]
        assert len(trained) == 5
        for ids, mine in zip(trained, rows, strict=True):
            assert ids <= {f"train/{row}" for row in mine}


def test_the_rows_of_a_checkpoint_must_come_again(policy: str, tmp_path: Path) -> None:
    cfg = config(tmp_path, STEPS, lag=1)
    run_loop(cfg, policy, kill_at=3, rows=list(range(100, 200)))
    with pytest.raises(SkyrlError, match=r"the checkpoint holds answers to rows .* for step 3, the data now give"):
        run_loop(cfg, policy, resume=True, rows=list(range(200, 300)))


@pytest.mark.parametrize("lag", [0, 1])
def test_times_add_up_and_throughput_uses_the_step(policy: str, tmp_path: Path, lag: int) -> None:
    ticks = itertools.count()
    sink = run_loop(config(tmp_path, 2, lag), policy, clock=lambda: float(next(ticks)))
    for step, metrics in sink.steps.items():
        laps = {name: value for name, value in metrics.items() if name.startswith("time/") and name != "time/step"}
        assert metrics["time/step"] == sum(laps.values()) == 5.0 + lag
        assert laps == dict.fromkeys(("time/reward", "time/buffer", "time/learner", "time/sync"), 1.0) | {
            "time/rollout": 1.0 + lag
        }
        assert metrics["throughput/samples_per_second"] == pytest.approx(24 / metrics["time/step"]), step


# ---------------------------------------------------------------- several members


def test_a_system_ends_what_it_started_and_leaves_a_crew_that_it_was_given(policy: str, tmp_path: Path) -> None:
    ended: list[str] = []

    class Ending(LocalExecutor):
        def stop(self, member: Member[Any]) -> None:
            ended.append(type(member.build()).__name__)
            super().stop(member)

    cfg, executor = config(tmp_path, 1), Ending()
    with start_system(cfg, policy, None, executor) as first:
        with pytest.raises(KeyError), start_system(cfg, policy, None, executor, rollouts=first.rollouts):
            raise KeyError
        assert sorted(ended) == ["Batcher", "LearnerStep", "Rewarder"]
        assert first.sizes() == {"train": 400, "eval": 4}
    assert sorted(ended) == ["Batcher", "Batcher", "LearnerStep", "LearnerStep", "Rewarder", "Rewarder", "Sampler"]


def test_learner_ranks_that_wait_for_each_other_need_processes_of_their_own(tmp_path: Path) -> None:
    cfg = config(tmp_path, 1)
    cfg.learner.num_workers = 2
    with pytest.raises(ConfigError, match=r"learner\.num_workers=2: must be 1 where all runs in one process"):
        run_loop(cfg, "no such policy")


@pytest.mark.parametrize("lag", [0, 2])
def test_members_that_share_the_work_and_a_kill_at_every_step_change_no_number(
    policy: str, tmp_path: Path, lag: int
) -> None:
    """From the second kill on, the checkpoint is of a step whose answers the one before held."""
    alone = numbers(run_loop(config(tmp_path / "alone", STEPS, lag), policy))
    cfg = config(tmp_path / "shared", STEPS, lag)
    cfg.rollout.num_workers, cfg.reward.num_workers = 2, 3
    shared = numbers(run_loop(cfg, policy, kill_at=2))
    for kill_at in (3, 4, None):
        shared |= numbers(run_loop(cfg, policy, kill_at=kill_at, resume=True))
    assert shared == alone and shared.keys() == {1, 2, 3, 4}


def test_one_rollout_member_with_old_weights_stops_the_run(policy: str, tmp_path: Path) -> None:
    class Deaf(Watched):
        def start(self, spec: MemberSpec[Any], lost: Callable[[Any, MemberLost], Any]) -> Member[Any]:
            member = super().start(spec, lost)
            if spec.name == "rollout-1":
                member.build().engine.load = lambda *_: None
            return member

    cfg, watched = config(tmp_path, 3), Deaf()
    cfg.rollout.num_workers = 2
    with pytest.raises(SyncError, match="after weight sync 1 rollout and learner differ"):
        run_loop(cfg, policy, watched)
    assert watched.calls.count("train_step") == 1


# ---------------------------------------------------------------- order and schedules


def test_one_step_calls_every_part_in_the_order_of_the_dataflow(policy: str, tmp_path: Path) -> None:
    cfg, watched = config(tmp_path, 1), Watched()
    cfg.checkpoint.export = True
    run_loop(cfg, policy, watched)
    sync = ["snapshot", "update", "probe_gap"]
    evaluation, first = ["sizes", "generate", "score", "generate", "score", "picture_drop", "evaluate"], ["remarks"]
    start = ["sizes", "ready", "ready", "free_port", "join", "sizes"]
    step = ["generate", "score", "exchange", "train_step", *sync]
    assert watched.calls == [*start, *sync, *evaluation, *first, *step, *evaluation, "save", "save", "export"]
    assert (tmp_path / "policy" / "config.json").is_file()


def test_training_rows_follow_the_stream_and_a_pool_names_them(policy: str, tmp_path: Path) -> None:
    pool = list(range(300, 400))
    for rows, size in ((None, 400), (pool, 100)):
        cfg, watched, stream = config(tmp_path / str(size), 2), Watched(), PromptStream(size, 0)
        cfg.buffer.enabled = False
        run_loop(cfg, policy, watched, rows=rows)
        for ids in asked(watched.batches):
            mine = [place if rows is None else rows[place] for place in stream.take(PROMPTS)]
            assert ids and ids <= {f"train/{row}" for row in mine}


def test_evaluation_and_checkpoints_come_on_schedule_and_at_the_end(policy: str, tmp_path: Path) -> None:
    cfg = config(tmp_path, 5)
    cfg.evaluation.every = cfg.checkpoint.every = cfg.checkpoint.keep = 2
    sink = run_loop(cfg, policy)
    evaluated = [(step, metrics) for step, metrics in sink.all if "eval/accuracy" in metrics]
    assert [step for step, _ in evaluated] == [0, 2, 4, 5]
    assert all(0 < metrics["eval/probe_seconds"] < metrics["eval/seconds"] for _, metrics in evaluated)
    assert all({"eval/picture_drop", "eval/blind_prompts"} <= metrics.keys() for _, metrics in evaluated)
    # keep=2: the checkpoint of step 2 is gone.
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_000004", "step_000005"]
    cfg.controller.steps = 6
    again = run_loop(cfg, policy, resume=True)
    assert [step for step, metrics in again.all if "eval/accuracy" in metrics] == [6]  # that of step 5 is not repeated


def test_dropout_ntp_continues_the_scored_groups_without_the_picture(policy: str, tmp_path: Path) -> None:
    waited: list[int] = []

    class Waited(Watched):
        def wait(self, promises: Sequence[Any], timeout: float) -> None:
            waited.append(len(promises))

    cfg, watched = config(tmp_path, 3, lag=1), Waited()
    cfg.hallucination.probe_prompts = cfg.evaluation.every = 0
    cfg.algorithm.mpo.pairs = PairSource.dropout_ntp
    cfg.algorithm.stage, cfg.algorithm.mpo_steps = Stage.mpo_then_grpo, 2
    sink = run_loop(cfg, policy, watched)
    # In the second stage nothing forms pairs.
    assert watched.calls.count("continue_blind") == 2
    assert ["time/blind" in sink.steps[step] for step in (1, 2, 3)] == [True, True, False]
    # An evaluation waits for its answers; a step for its own, their scores and continuations, and before the sync for
    # whatever the engines still make for the next one.
    assert waited == [1, *(1, 1, 1, 2), *(1, 1, 1, 1), *(1, 1, 0), 1]


def test_a_broken_sync_stops_the_run_before_another_step(policy: str, tmp_path: Path) -> None:
    cfg, watched = config(tmp_path, 5), Watched()

    def break_it(learner: LearnerStep, batch: TrainBatch) -> None:
        if batch.step == 2:  # the weights that the engines get from now on are not the learner's
            learner._outgoing.sent = lambda parameters: ((n, p * 1.1) for n, p in parameters)  # type: ignore

    watched.before_step = break_it
    with pytest.raises(SkyrlError, match="after weight sync 2 rollout and learner differ"):
        run_loop(cfg, policy, watched)
    assert watched.calls.count("train_step") == 2


@pytest.mark.parametrize("tags", [True, False])
def test_answers_without_tags_at_the_start_are_warned_of_once(
    policy: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, tags: bool
) -> None:
    cfg = config(tmp_path, 1)
    cfg.rollout.max_new_tokens = 24 if tags else 3
    cfg.rollout.probe_new_tokens = 3
    run_loop(cfg, policy)
    assert caplog.text.count("no answer was found in any of the 4 texts") == int(not tags)
