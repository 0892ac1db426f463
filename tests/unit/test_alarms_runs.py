"""Whole runs in one process, each with a fault in it that raises no error: its alarm has the right name and step."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from plain_backend import PlainBackend
from tiny_runs import config, policy_folder, run_loop

from skyrl import run as module
from skyrl.crew.local_executor import LocalExecutor
from skyrl.data.parquet import write_parquet
from skyrl.digits.scenes import DigitScenes
from skyrl.monitoring.alarms.watch import Watch
from skyrl.monitoring.events import read_events
from skyrl.records import SampleGroup, SkyrlError
from skyrl.replay.ssb import SelectiveSampleBuffer
from skyrl.rewards import rewarder
from skyrl.rewards.answers import AnswerForm
from skyrl.rewards.rewarder import Rewarder
from skyrl.rewards.runner import Verdict
from skyrl.rollout.sampler import Sampler
from skyrl.settings import Alarm, Config

Change = Callable[[pytest.MonkeyPatch, Config], object]


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return policy_folder(tmp_path_factory.getbasetemp())


def settings(run_dir: Path, steps: int) -> Config:
    """Without probes, checkpoints and files of samples."""
    cfg = config(run_dir, steps)
    cfg.checkpoint.every, cfg.hallucination.probe_prompts = 0, 0
    cfg.learner.lr = 1e-4
    return cfg


def alarms(cfg: Config, policy: str) -> dict[str, int]:
    """Each alarm of the run and its first step. What ``run`` logs before the first step is told."""
    watch = Watch(cfg)
    watch.log(0, {"data/train_prompts": float(cfg.digits.train_size)})
    for step, metrics in run_loop(cfg, policy).all:
        watch.log(step, metrics)
    return {alarm.value: raised.first for alarm, raised in watch.raised.items()}


def test_a_run_without_a_fault_raises_none(policy: str, tmp_path: Path) -> None:
    assert alarms(settings(tmp_path, 3), policy) == {}


# ---------------------------------------------------------------- faults


def cut_off(patch: pytest.MonkeyPatch, cfg: Config) -> None:
    cfg.rollout.max_new_tokens = 3


def scores(judge: Callable[[Verdict], Verdict]) -> Change:
    """What becomes of each answer's rule score."""

    def change(patch: pytest.MonkeyPatch, cfg: Config) -> None:
        rule_score = rewarder.rule_score
        patch.setattr(rewarder, "rule_score", lambda parts: judge(rule_score(parts)))

    return change


def model_scores(of: Callable[[np.ndarray, np.random.Generator], np.ndarray]) -> Change:
    """A reward model by the rule scores of a group."""

    def change(patch: pytest.MonkeyPatch, cfg: Config) -> None:
        fill, random = Rewarder._fill, np.random.default_rng(0)
        cfg.rollout.prompts_per_step = cfg.rollout.samples_per_prompt = 8
        patch.setattr(
            Rewarder, "_fill", lambda self, samples, rules, said, _: fill(self, samples, rules, said, of(rules, random))
        )

    return change


def other_record(patch: pytest.MonkeyPatch, cfg: Config) -> None:
    """As if training sampled at another temperature than the probe; the first answers of each prompt only."""
    generate = Sampler.generate

    def generated(self: Sampler, *args: Any, **kwargs: Any) -> list[SampleGroup]:
        groups = generate(self, *args, **kwargs)
        for group in groups:
            for sample in group.samples[:2]:
                sample.logprobs = sample.logprobs * 0.8
        return groups

    patch.setattr(Sampler, "generate", generated)


def same_seed(patch: pytest.MonkeyPatch, cfg: Config) -> None:
    generate = Sampler.generate

    def generated(self: Sampler, *args: Any, **kwargs: Any) -> list[SampleGroup]:
        groups = generate(self, *args, **kwargs)
        for group in groups:
            for sample in group.samples[1:]:
                for name in ("token_ids", "logprobs", "text", "truncated", "mask"):
                    setattr(sample, name, getattr(group.samples[0], name))
        return groups

    patch.setattr(Sampler, "generate", generated)


def no_gradient(patch: pytest.MonkeyPatch, cfg: Config) -> None:
    patch.setattr(PlainBackend, "backward", lambda self, loss, last: (loss * 0).backward())


def not_applied(patch: pytest.MonkeyPatch, cfg: Config) -> None:
    def update(self: PlainBackend, lr: float) -> float:
        self.optimizer.zero_grad()
        return 1.0

    patch.setattr(PlainBackend, "update", update)


def moments_lost(patch: pytest.MonkeyPatch, cfg: Config) -> None:
    """The optimizer begins anew at each step, as after a checkpoint without it."""
    update = PlainBackend.update

    def anew(self: PlainBackend, lr: float) -> float:
        self.optimizer.state.clear()
        return update(self, lr)

    patch.setattr(PlainBackend, "update", anew)


def tiny_rate(patch: pytest.MonkeyPatch, cfg: Config) -> None:
    cfg.learner.lr = 1e-30


def reference_is_the_policy(patch: pytest.MonkeyPatch, cfg: Config) -> None:
    score = PlainBackend.score
    patch.setattr(PlainBackend, "score", lambda self, rows, reference=False: score(self, rows))


def turned_advantages(patch: pytest.MonkeyPatch, cfg: Config) -> None:
    """Each answer has that of its neighbour."""
    made = rewarder.group_advantages
    patch.setattr(rewarder, "group_advantages", lambda *args: np.roll(made(*args), 1))


def never_too_old(patch: pytest.MonkeyPatch, cfg: Config) -> None:
    cfg.buffer.max_age, cfg.buffer.mix = 1, 1.0
    patch.setattr(SelectiveSampleBuffer, "_young", lambda self, rows, version: rows)


def nothing_kept(patch: pytest.MonkeyPatch, cfg: Config) -> None:
    patch.setattr(SelectiveSampleBuffer, "add", lambda self, groups, version: 0)


def no_form(patch: pytest.MonkeyPatch, cfg: Config) -> None:
    patch.setattr(AnswerForm, "kept", lambda self, text, answer: 0.0)


def black_pictures(patch: pytest.MonkeyPatch, cfg: Config) -> None:
    made, cfg.hallucination.probe_prompts = DigitScenes.__getitem__, 4

    def black(self: DigitScenes, row: int) -> Any:
        prompt = made(self, row)
        for picture in prompt.images:
            picture[...] = 0
        return prompt

    patch.setattr(DigitScenes, "__getitem__", black)


FAULTS: list[tuple[Change, int, dict[str, int]]] = [
    (cut_off, 1, {"cut_off": 1}),
    (scores(lambda _: Verdict(0.0, None)), 1, {"no_contrast": 1}),
    (scores(lambda _: Verdict(1.0, None)), 1, {"no_contrast": 1}),
    (
        scores(lambda found: found if found.score == 1 else Verdict(None, "it crashed")),
        1,
        {"verifier_fails": 1, "verifier_fails_wrong": 1},
    ),
    (model_scores(lambda rules, random: 1e37 * random.normal(size=len(rules))), 1, {"reward_model_huge": 0}),
    (model_scores(lambda rules, random: np.full(len(rules), 0.7)), 1, {"reward_model_constant": 1}),
    (model_scores(lambda rules, random: random.normal(size=len(rules)) - 4 * rules), 1, {"reward_model_negated": 1}),
    (no_form, 1, {"format_denied": 1}),
    (same_seed, 1, {"same_answers": 1}),
    (other_record, 1, {"sampling_differs": 1}),
    (no_gradient, 1, {"no_gradient": 1}),
    (not_applied, 1, {"weights_still": 1}),
    (moments_lost, 2, {"optimizer_lost": 2}),
    (tiny_rate, 1, {"no_learning_rate": 1}),
    (reference_is_the_policy, 2, {"reference_wrong": 2}),
    (turned_advantages, 1, {"advantages_wrong": 1}),
    (never_too_old, 4, {"stale": 3}),
    (nothing_kept, 1, {"replay_empty": 1}),
    (black_pictures, 1, {"pictures_unused": 0}),
]


@pytest.mark.parametrize(("fault", "steps", "want"), FAULTS, ids=[next(iter(want)) for *_, want in FAULTS])
def test_each_fault_is_seen_at_its_first_step(
    policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Change, steps: int, want: dict[str, int]
) -> None:
    cfg = settings(tmp_path, steps)
    fault(monkeypatch, cfg)
    found = alarms(cfg, policy)
    assert want.items() <= found.items(), found


# ---------------------------------------------------------------- in a run


def test_the_run_itself_tells_stops_and_sums_up(
    policy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    scenes = DigitScenes("train", 40, 0.0, seed=0, kinds=("max",))
    write_parquet(tmp_path / "train.parquet", [scenes[row] for row in range(40)])
    again = [replace(scenes[row], id=f"eval/{row}") for row in range(4)]
    write_parquet(tmp_path / "eval.parquet", again)
    cfg = settings(tmp_path / "run", 2)
    cfg.model.policy, cfg.data.source = policy, "files"
    cfg.data.train_path, cfg.data.eval_path = str(tmp_path / "train.parquet"), str(tmp_path / "eval.parquet")
    summary = module.run(cfg, LocalExecutor())
    (found,) = summary["alarms"]
    assert (found["name"], found["first_step"], found["steps"]) == ("evaluation_trained_on", 0, 1)
    assert found["message"].startswith("100.0% of the evaluation prompts or more")
    said = capsys.readouterr().out
    assert said.count("step 0: alarm: evaluation_trained_on") == 1 and "ALARM evaluation_trained_on" in said
    (event,) = [event for event in read_events(tmp_path / "run") if event.kind == "alarm"]
    assert event.member == "evaluation_trained_on" and event.text == found["message"]
    assert "<b>evaluation_trained_on</b>" in (tmp_path / "run" / "report.html").read_text()

    cfg.run_dir, cfg.monitoring.stop_on = str(tmp_path / "stopped"), [Alarm.no_gradient]
    no_gradient(monkeypatch, cfg)
    with pytest.raises(SkyrlError, match=r"step 1: stopped by monitoring\.stop_on: no_gradient: \d+ tokens gave"):
        module.run(cfg, LocalExecutor())
    lines = [json.loads(line) for line in (tmp_path / "stopped" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 1 and lines[-1]["learner/grad_norm"] == 0.0
    assert {event.member for event in read_events(tmp_path / "stopped")} == {"evaluation_trained_on", "no_gradient"}
