"""Alarms, by numbers made by hand: each begins at the first log that shows it, and neither before nor beside it."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console

from skyrl.monitoring.alarms.watch import CALM, RULES, Watch
from skyrl.monitoring.events import ALARM, EVENTS, OVER, AlarmSink, EventSink, alarms_of, read_events
from skyrl.monitoring.metrics import METRICS, check_names
from skyrl.monitoring.records import read_metrics
from skyrl.monitoring.report import write_report
from skyrl.monitoring.sinks import JsonlSink, Sinks
from skyrl.monitoring.summary import print_summary, write_summary
from skyrl.records import ConfigError, DataError, Event, SkyrlError
from skyrl.settings import Alarm, Config, Schedule, Squash, Stage, ThresholdKind, Trainable, checked

Numbers = Mapping[str, float]
ROOT = Path(__file__).parents[2]
STEP = {
    "mpo/pairs": 5.0,
    "mpo/kl_reference": 2e-4,
    "mpo/reference_age": 3.0,
    "grpo/clip_fraction": 0.02,
    "grpo/kl_behaviour": 1e-9,
    "learner/entropy": 0.1,
    "learner/logprob_gap_fresh": 3e-5,
    "learner/logprob_gap_fresh_mean": 3e-7,
    "learner/grad_norm": 0.5,
    "learner/lr": 1e-4,
    "learner/tokens": 1500.0,
    "learner/pictures": 60.0,
    "learner/moved/language": 1.0,
    "learner/moved/vision": 0.9,
    "learner/whole_steps": 0.02,
    "reward/scored": 64.0,
    "reward/errors": 0.0,
    "reward/rule": 0.5,
    "reward/rule_std": 0.5,
    "reward/accuracy": 0.5,
    "reward/format": 0.9,
    "reward/format_of_right": 0.95,
    "reward/model_std": 2.0,
    "reward/model_largest": 9.0,
    "reward/model_agreement": 0.7,
    "reward/model_agreement_sd": 0.1,
    "reward/advantage_order": 1.0,
    "reward/advantage_centre": 1e-16,
    "reward/tied_share": 0.25,
    "response/length_mean": 20.0,
    "response/truncated_share": 0.05,
    "response/repetition": 0.01,
    "response/answer_share": 0.95,
    "response/same_share": 0.1,
    "buffer/size": 90.0,
    "buffer/replayed": 10.0,
    "buffer/effective_share_fresh": 0.6,
    "buffer/age_max": 4.0,
    "sync/retries": 0.0,
    "sync/logprob_gap": 2e-6,
    "sync/logprob_gap_mean": 3e-7,
    "sync/logprob_gap_limit": 1e-4,
}
EVAL = {
    "eval/scored": 32.0,
    "eval/errors": 0.0,
    "eval/accuracy": 0.5,
    "eval/format": 0.9,
    "eval/format_of_right": 0.95,
    "eval/truncated_share": 0.0,
    "eval/length_mean": 20.0,
    "eval/repetition": 0.01,
    "eval/answer_share": 0.95,
    "eval/reward_model_std": 2.0,
    "eval/reward_model_largest": 9.0,
    "eval/model_agreement": 0.7,
    "eval/model_agreement_sd": 0.08,
    "eval/picture_drop": 0.7,
}


def config(**changes: Any) -> Config:
    cfg = Config()
    cfg.rollout.prompts_per_step = cfg.rollout.samples_per_prompt = 8
    cfg.controller.steps = 100
    for key, value in changes.items():
        owner, names = cfg, key.split("__")
        for name in names[:-1]:
            owner = getattr(owner, name)
        setattr(owner, names[-1], value)
    return cfg


def healthy(step: int) -> dict[str, float]:
    """A log of a good step, whose prompts are its own. At the first one the policy is the reference."""
    own = {"data/fingerprint": float(step), "data/position": 8.0 * step, "buffer/fingerprint": float(step)}
    return STEP | own | ({"mpo/kl_reference": 1e-14} if step == 1 else {})


def seen(cfg: Config, last: int = 4) -> Watch:
    """One that has seen the start of a good run."""
    watch = Watch(cfg)
    watch.log(0, {"data/train_prompts": 1000.0})
    watch.log(0, {name: value for name, value in STEP.items() if name.startswith("sync/")} | EVAL)
    for step in range(1, last + 1):
        watch.log(step, healthy(step))
    assert not watch.raised
    return watch


def test_a_good_run_is_quiet_and_its_numbers_are_those_of_the_table() -> None:
    check_names(STEP)
    check_names(EVAL)
    watch = seen(config(), last=60)
    watch.log(60, EVAL)
    assert not watch.raised


SQUASHED = {"reward__squash": Squash.sigmoid}
NO_MPO = {"mpo/pairs": 0.0}
CASES: list[tuple[str, Numbers, Sequence[Numbers], dict[str, Any]]] = [
    ("cut_off", {"response/truncated_share": 0.96}, [{"response/truncated_share": 0.9}], {}),
    ("cut_off", {"eval/truncated_share": 1.0}, [{"eval/truncated_share": 0.9}], {}),
    ("empty_answers", {"response/length_mean": 1.0}, [{"response/length_mean": 2.0}], {}),
    ("empty_answers", {"eval/length_mean": 1.1}, [{"eval/length_mean": 2.0}], {}),
    ("looping", {"response/repetition": 0.9}, [{"response/repetition": 0.5}], {}),
    ("looping", {"eval/repetition": 0.8}, [{"eval/repetition": 0.5}], {}),
    ("same_answers", {"response/same_share": 1.0}, [{"response/same_share": 7 / 8}], {}),
    (
        "verifier_fails",
        {"reward/errors": 8.0, "reward/scored": 56.0},
        [{"reward/errors": 3.0, "reward/scored": 5.0}, {"reward/errors": 4.0, "reward/scored": 60.0}],
        {},
    ),
    ("verifier_fails", {"eval/errors": 4.0, "eval/scored": 28.0}, [{"eval/errors": 3.0, "eval/scored": 29.0}], {}),
    (
        "reward_model_huge",
        {"reward/model_largest": 1e37, "reward/model_std": 1e37},
        [{"reward/model_largest": 9e5}],
        SQUASHED,
    ),
    (
        "reward_model_huge",
        {"eval/reward_model_largest": 2e6, "eval/reward_model_std": 9e5},
        [{"eval/reward_model_largest": 9e5}],
        SQUASHED,
    ),
    (
        "reward_model_huge",
        {"reward/model_largest": 2e4},
        [{"reward/model_largest": 9e3}],
        {"reward__squash": Squash.none},
    ),
    ("reward_model_constant", {"reward/model_std": 1e-6}, [{"reward/model_std": 1e-4}], {}),
    (
        "reward_model_constant",
        {"eval/reward_model_std": 0.0, "eval/reward_model_largest": 0.0},
        [{"eval/reward_model_std": 0.01}],
        {},
    ),
    ("advantages_wrong", {"reward/advantage_order": 0.99}, [{"reward/advantage_centre": 1e-6}], {}),
    ("advantages_wrong", {"reward/advantage_centre": 0.1}, [], {}),
    ("evaluation_trained_on", {"data/repeated_share": 0.01}, [{"data/repeated_share": 0.0}], {}),
    ("pictures_unused", {"eval/picture_drop": 0.0}, [{"eval/picture_drop": -4e-5}], {}),
    ("same_prompts", {"data/fingerprint": 3.0}, [], {}),
    ("prompts_skipped", {"data/position": 48.0}, [], {}),
    ("prompts_skipped", {"data/position": 32.0}, [], {}),
    (
        "replay_stuck",
        {"buffer/fingerprint": 4.0},
        [
            {"buffer/fingerprint": 4.0, "buffer/size": 19.0},
            {"buffer/fingerprint": 4.0, "buffer/replayed": 3.0},
            {"buffer/fingerprint": 3.0},
        ],
        {},
    ),
    ("replay_empty", {"buffer/size": 0.0}, [{"buffer/size": 0.0, "buffer/effective_share_fresh": 0.05}], {}),
    ("stale", {"buffer/age_max": 9.0}, [{"buffer/age_max": 8.0}], {}),
    ("no_tokens", {"learner/tokens": 0.0}, [{"learner/tokens": 1.0}], {}),
    ("no_gradient", {"learner/grad_norm": 0.0}, [{"learner/grad_norm": 1e-9}], {}),
    ("no_learning_rate", {"learner/lr": 1e-30}, [{"learner/lr": 1e-9}], {}),
    ("no_learning_rate", {"learner/lr": 0.0}, [], {}),
    (
        "weights_still",
        {"learner/moved/language": 0.0},
        [{"learner/moved/language": 0.1}, {"learner/moved/language": 0.0, "learner/lr": 1e-10}],
        {},
    ),
    ("weights_still", {"learner/moved/vision": 0.0}, [], {}),
    (
        "weights_still",
        {"learner/moved/language": 0.0, "learner/moved/vision": 0.0},
        [
            {"learner/moved/language": 0.0},
            {"learner/moved/language": 0.0, "learner/moved/vision": 0.0, "learner/lr": 1e-8},
        ],
        {"model__dtype": "bfloat16"},
    ),
    ("optimizer_lost", {"learner/whole_steps": 0.98}, [{"learner/whole_steps": 0.3}], {}),
    ("all_clipped", {"grpo/clip_fraction": 0.99}, [{"grpo/clip_fraction": 0.9}], {}),
    ("all_clipped", {"grpo/masked_fraction": 0.96}, [{"grpo/masked_fraction": 0.5}], {}),
    ("entropy_collapsed", {"learner/entropy": 0.004}, [{"learner/entropy": 0.02}], {}),
    (
        "sampling_differs",
        {"learner/logprob_gap_fresh_mean": 0.01},
        [{"learner/logprob_gap_fresh_mean": 1e-4, "learner/logprob_gap_fresh": 5e-3}],
        {},
    ),
    ("sampling_differs", {"learner/logprob_gap_fresh": 0.5}, [], {}),  # of one answer in a thousand
    (
        "sampling_differs",
        {"learner/logprob_gap_fresh": 0.5},
        [{"learner/logprob_gap_fresh": 0.1}],  # -log 0.9 is 0.105
        {"rollout__top_p": 0.9},
    ),
    (
        "sampling_differs",
        {"learner/logprob_gap_fresh_mean": 0.4, "sync/logprob_gap_mean": 0.01, "sync/logprob_gap_limit": 0.2},
        [{"learner/logprob_gap_fresh_mean": 0.04, "learner/logprob_gap_fresh": 0.6}],
        {"model__dtype": "bfloat16"},
    ),
    ("record_ignored", {"grpo/kl_behaviour": 0.0}, [{"grpo/kl_behaviour": 0.0, "learner/tokens": 90.0}], {}),
    ("reference_wrong", {"mpo/kl_reference": 0.0}, [], {}),
    ("sync_repeated", {"sync/retries": 1.0}, [], {}),
]


@pytest.mark.parametrize(("name", "bad", "neighbours", "changes"), CASES)
def test_each_begins_with_the_first_log_that_shows_it(
    name: str, bad: Numbers, neighbours: Sequence[Numbers], changes: dict[str, Any]
) -> None:
    cfg = config(**changes)
    usual = EVAL if any(metric.startswith("eval/") for metric in bad) else healthy(5)
    usual |= {metric: value for metric, value in bad.items() if metric.startswith("sync/logprob")}
    watch = seen(cfg)
    for neighbour in neighbours:
        quiet = seen(cfg)
        quiet.log(5, usual | neighbour)
        assert not quiet.raised, neighbour
    (change,) = watch.log(5, {**usual, **bad})
    assert {alarm.value: (raised.first, raised.steps) for alarm, raised in watch.raised.items()} == {name: (5, 1)}
    assert change.raised.alarm is Alarm(name) and change.text == change.raised.text
    # Its words have the figures, and no formatting has gone wrong.
    assert re.search(r"\d", change.text) and not re.search(r"nan|\{|\}|  |\.\.", change.text), change.text


def test_all_alarms_are_tried_and_have_rules_on_known_metrics() -> None:
    others = {
        "no_contrast",
        "verifier_fails_wrong",
        "reward_model_negated",
        "reward_fell",
        "no_pairs",
        "sync_gap_grows",
        "format_denied",
    }
    assert {case[0] for case in CASES} | others | {"no_answer_found"} == {alarm.value for alarm in Alarm}
    assert {rule.alarm for rule in RULES} == set(Alarm)
    check_names({name for rule in RULES for name in rule.needs})


def test_too_few_answers_say_nothing() -> None:
    few = {
        "reward/scored": 12.0,
        "response/truncated_share": 1.0,
        "response/repetition": 0.99,
        "response/length_mean": 1.0,
    }
    watch = seen(config())
    watch.log(5, healthy(5) | few)
    assert not watch.raised


# ---------------------------------------------------------------- those that count, or look back

ALL_WRONG = {"reward/rule": 0.0, "reward/rule_std": 0.0, "reward/accuracy": 0.0, "reward/tied_share": 1.0}
ALL_RIGHT = {"reward/rule": 1.0, "reward/rule_std": 0.0, "reward/accuracy": 1.0, "reward/tied_share": 1.0}
TIED = {"reward/tied_share": 1.0}
NOTHING_EFFECTIVE = {"buffer/effective_share_fresh": 0.0}


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (ALL_WRONG, "none of the step's 64 answers earns anything"),
        (ALL_RIGHT, "all of the step's 64 answers are right"),
        ({**ALL_WRONG, "reward/rule": 0.5}, "get one score (reward/rule 0.5)"),
        (TIED, "the 8 answers to one prompt get one score each, at all 8 prompts"),
    ],
)
def test_rewards_that_never_differ(bad: Numbers, words: str) -> None:
    for evaluation in ({}, EVAL | {"eval/accuracy": 0.0}, EVAL | {"eval/accuracy": 1.0, "eval/format": 1.0}):
        watch = Watch(config())
        watch.log(0, evaluation)
        (change,) = watch.log(1, {**healthy(1), **bad, **NOTHING_EFFECTIVE})
        assert change.raised.alarm is Alarm.no_contrast and words in change.text


def test_small_steps_take_as_many_as_they_need_to_be_no_accident() -> None:
    """Six groups of four: a tie of all is likely once in (2 / 5)^6, some steps in ten thousand are less."""
    cfg = config(rollout__prompts_per_step=6, rollout__samples_per_prompt=4)
    small = {"reward/scored": 24.0}
    watch = Watch(cfg)
    firsts = []
    for step in range(1, 5):
        position = {"data/position": 6.0 * step}
        firsts += [change.raised.first for change in watch.log(step, healthy(step) | small | TIED | position)]
    assert firsts == [2]
    watch = Watch(cfg)  # and that all answers of all six are wrong, once in (1 / 5)^6
    assert [c.raised.first for c in watch.log(1, healthy(1) | small | ALL_WRONG | {"data/position": 6.0})] == [1]


def test_a_policy_that_is_mostly_right_may_be_right_for_some_steps() -> None:
    """With 97 % of answers right, groups mostly tie: that a whole step does is to be expected."""
    watch = Watch(config())
    mostly = {"reward/accuracy": 0.97, "reward/rule": 0.97, "reward/tied_share": 7 / 8}
    for step in range(1, 31):
        watch.log(step, healthy(step) | mostly)
    begun = [change for step in (31, 32) for change in watch.log(step, healthy(step) | ALL_RIGHT | NOTHING_EFFECTIVE)]
    assert not begun
    for step in range(33, 60):  # but not for good
        watch.log(step, healthy(step) | ALL_RIGHT | NOTHING_EFFECTIVE)
    assert set(watch.raised) == {Alarm.no_contrast} and 33 < watch.raised[Alarm.no_contrast].first < 60


def test_answers_that_are_cut_off_are_that_and_nothing_else() -> None:
    cut = {"response/truncated_share": 1.0, "response/same_share": 1.0, "response/answer_share": 0.0}
    watch = seen(config())
    watch.log(5, healthy(5) | cut | {"reward/accuracy": 0.0})
    assert set(watch.raised) == {Alarm.cut_off}


def test_no_answer_found() -> None:
    nothing = {"response/answer_share": 0.0, "reward/accuracy": 0.0}
    watch = seen(config())
    watch.log(5, healthy(5) | {"response/answer_share": 0.0})  # a verifier that reads the whole text
    assert not watch.raised
    watch.log(6, healthy(6) | nothing)
    assert watch.raised[Alarm.no_answer_found].first == 6
    first = Watch(config())
    (change,) = first.log(0, EVAL | {"eval/answer_share": 0.0, "eval/accuracy": 0.0})
    assert change.raised.alarm is Alarm.no_answer_found and "reward.answer.at=tags" in change.text


def test_right_answers_without_their_form() -> None:
    without = {"reward/format_of_right": 0.0}
    watch = Watch(config())
    (change,) = watch.log(1, healthy(1) | without)
    assert change.raised.alarm is Alarm.format_denied and "none of the 32 right answers of the step" in change.text
    evaluated = Watch(config())
    evaluated.log(0, EVAL | {"eval/format_of_right": 0.0, "eval/accuracy": 0.2})  # of six
    assert not evaluated.raised
    evaluated.log(0, EVAL | {"eval/format_of_right": 0.0})
    assert set(evaluated.raised) == {Alarm.format_denied}
    gave_up = seen(config())
    gave_up.log(5, healthy(5) | without)
    assert not gave_up.raised
    unpaid = Watch(config(reward__format_weight=0.0))
    unpaid.log(1, healthy(1) | without)
    assert not unpaid.raised


def test_wrong_answers_that_fail() -> None:
    bad = {"reward/errors": 30.0, "reward/scored": 34.0, "reward/accuracy": 1.0}
    watch = seen(config())
    watch.log(5, healthy(5) | bad)
    assert set(watch.raised) == {Alarm.verifier_fails_wrong, Alarm.verifier_fails}
    # Without anything known before: eight right answers are no accident, three are.
    for scored, found in ((8.0, True), (3.0, False)):
        watch = Watch(config())
        watch.log(0, EVAL | {"eval/errors": 4.0, "eval/scored": scored, "eval/accuracy": 1.0})
        assert (Alarm.verifier_fails_wrong in watch.raised) is found
    # Where all were right before, a few that fail are not the wrong ones.
    watch = Watch(config())
    for step in range(1, 6):
        watch.log(step, healthy(step) | {"reward/accuracy": 1.0})
    watch.log(6, healthy(6) | {"reward/errors": 4.0, "reward/scored": 60.0, "reward/accuracy": 1.0})
    assert Alarm.verifier_fails_wrong not in watch.raised


def test_a_negated_reward_model() -> None:
    watch = seen(config())
    watch.log(5, healthy(5) | {"reward/model_agreement": 0.05})  # 4.5 deviations, but four steps said otherwise
    assert not watch.raised
    fresh = Watch(config())
    (change,) = fresh.log(1, healthy(1) | {"reward/model_agreement": 0.05})
    assert change.raised.alarm is Alarm.reward_model_negated and "in 95% of the cases" in change.text
    slow = Watch(config())
    for step in range(1, 6):  # each 2.5 deviations: two are 3.5, three are 4.3
        slow.log(step, healthy(step) | {"reward/model_agreement": 0.25})
    assert slow.raised[Alarm.reward_model_negated].first == 3
    evaluated = seen(config())
    evaluated.log(4, EVAL | {"eval/model_agreement": 0.15})
    assert evaluated.raised[Alarm.reward_model_negated].first == 4


def test_what_breaks_down() -> None:
    cfg = config(rollout__prompts_per_step=32)
    usual = {"reward/scored": 256.0, "reward/format": 0.98, "data/position": 0.0}
    watch = Watch(cfg)
    for step in range(1, 5):
        watch.log(step, healthy(step) | usual | {"data/position": 32.0 * step})
    watch.log(5, healthy(5) | usual | {"reward/format": 0.6, "reward/accuracy": 0.3, "data/position": 160.0})
    assert not watch.raised
    watch.log(6, healthy(6) | usual | {"reward/format": 0.28, "data/position": 192.0})
    assert {a.value: r.first for a, r in watch.raised.items()} == {"reward_fell": 6}
    assert "28% of the answers of the step are in the form" in watch.raised[Alarm.reward_fell].text
    evaluated = seen(config())
    evaluated.log(4, EVAL | {"eval/accuracy": 0.03})
    assert evaluated.raised[Alarm.reward_fell].first == 4


def test_the_entropy_at_the_first_step() -> None:
    watch = Watch(config())
    watch.log(1, healthy(1) | {"learner/entropy": 1e-5})
    assert set(watch.raised) == {Alarm.entropy_collapsed}


def test_no_pairs_for_ten_steps() -> None:
    none = {name: value for name, value in STEP.items() if not name.startswith("mpo/")} | NO_MPO
    watch = Watch(config())
    for step in range(1, 12):
        watch.log(step, healthy(step) if step == 1 else dict(none))
    assert watch.raised[Alarm.no_pairs].first == 11 and len(watch.raised) == 1
    off = Watch(config(algorithm__mpo__weight=0.0))
    for step in range(1, 20):
        off.log(step, dict(none))
    assert not off.raised


def test_the_gap_grows() -> None:
    gap, limit = "sync/logprob_gap", "sync/logprob_gap_limit"
    watch = seen(config(), last=10)
    for step, value in ((11, 8e-5), (12, 2e-6), (13, 8e-5), (14, 7e-5), (15, 9e-5)):
        watch.log(step, healthy(step) | {gap: value})
    assert watch.raised[Alarm.sync_gap_grows].first == 15
    coarse = seen(config(), last=10)
    for step in range(11, 20):  # as it is with 16 bits: the limit is three times what rounding does
        coarse.log(step, healthy(step) | {gap: 0.06, limit: 0.2})
    assert not coarse.raised


def test_nothing_to_train_on_for_some_steps() -> None:
    watch = seen(config())
    nothing = {"learner/tokens": 0.0, "reward/tied_share": 1.0}
    for step in range(5, 9):
        watch.log(step, healthy(step) | nothing)
    assert watch.raised[Alarm.no_tokens].first == 7
    pairs_only = config(algorithm__stage=Stage.mpo)
    watch = Watch(pairs_only)
    for step in range(1, 4):
        watch.log(step, {"learner/tokens": 0.0, "reward/tied_share": 0.2})
    assert watch.raised[Alarm.no_tokens].first == 3


def test_a_schedule_may_end_at_0() -> None:
    cfg = config(learner__schedule=Schedule.cosine, learner__min_lr_ratio=0.0)
    watch = Watch(cfg)
    watch.log(100, {"learner/lr": 0.0, "learner/tokens": 100.0})
    assert not watch.raised
    watch.log(50, {"learner/lr": 0.0, "learner/tokens": 100.0})
    assert set(watch.raised) == {Alarm.no_learning_rate}


def test_modules_that_see_no_picture_may_rest() -> None:
    still, none = {"learner/moved/vision": 0.0}, {"learner/pictures": 0.0}
    watch = seen(config())
    for step in range(5, 9):
        watch.log(step, healthy(step) | still | none)
    assert not watch.raised
    watch.log(9, healthy(9) | none | {"learner/moved/language": 0.0})
    assert (
        watch.raised[Alarm.weights_still].first == 9
        and "no weight of language" in watch.raised[Alarm.weights_still].text
    )
    cfg = config(learner__trainable=Trainable.adapter)
    watch = Watch(cfg)
    watch.log(1, {"learner/tokens": 99.0, "learner/grad_norm": 0.0, "learner/pictures": 0.0})
    assert not watch.raised
    watch.log(2, {"learner/tokens": 99.0, "learner/grad_norm": 0.0, "learner/pictures": 3.0})
    assert watch.raised[Alarm.no_gradient].first == 2


def test_the_reference_before_the_first_step() -> None:
    for kl, found in ((1e-12, False), (0.3, True)):
        watch = Watch(config())
        watch.log(1, healthy(1) | {"mpo/kl_reference": kl, "mpo/reference_age": 0.0})
        assert (Alarm.reference_wrong in watch.raised) is found
    renewed = seen(config(algorithm__mpo__reference_every=1))
    renewed.log(5, healthy(5) | {"mpo/kl_reference": 0.0, "mpo/reference_age": 0.0})
    assert not renewed.raised


def test_a_resumed_run_is_held_against_what_came_before() -> None:
    history = [{"step": 0, "data/train_prompts": 1000.0}, *({"step": step, **healthy(step)} for step in range(1, 5))]
    for position, fingerprint, name in ((48.0, 9.0, "prompts_skipped"), (40.0, 4.0, "same_prompts")):
        watch = Watch.over(config(), history)
        watch.log(5, healthy(5) | {"data/position": position, "data/fingerprint": fingerprint})
        assert [alarm.value for alarm in watch.raised] == [name]
    carried = config(rollout__oversample=0.5)
    watch = Watch.over(carried, history)
    watch.log(5, healthy(5) | {"data/position": 36.0})
    assert not watch.raised


def test_few_prompts_may_make_two_equal_steps() -> None:
    for there_are, found in ((30.0, False), (60.0, True)):
        watch = Watch(config())
        watch.log(0, {"data/train_prompts": there_are})
        for step in range(1, 4):
            watch.log(step, healthy(step))
        watch.log(4, healthy(4) | {"data/fingerprint": 3.0})
        assert (Alarm.same_prompts in watch.raised) is found
    another_pass = Watch(config())
    another_pass.log(0, {"data/train_prompts": 60.0})
    for step in range(1, 9):
        another_pass.log(step, healthy(step))
    another_pass.log(9, healthy(9) | {"data/fingerprint": 2.0})  # seven steps are a pass
    another_pass.log(10, healthy(10) | {"data/fingerprint": 2.0})
    assert another_pass.raised[Alarm.same_prompts].first == 10


# ---------------------------------------------------------------- the watch


def test_no_numbers_break_the_watch() -> None:
    """A run of days must not end for a rule that meets what it did not think of."""
    rng = np.random.default_rng(0)
    names = sorted({name for rule in RULES for name in rule.needs} | STEP.keys() | EVAL.keys())
    odd = [0.0, 1.0, -1.0, 1e-300, 1e300, math.inf, -math.inf, math.nan]
    whole = {"reward/scored", "reward/errors", "eval/scored", "eval/errors", "learner/tokens", "data/train_prompts"}
    for _ in range(40):
        watch = Watch(config())
        for step in range(30):
            some = rng.choice(names, size=rng.integers(1, len(names)), replace=False).tolist()
            numbers = {name: float(rng.choice(odd)) for name in some if name not in whole}
            shares = {name for name in numbers if name in METRICS and METRICS[name].unit == "share"}
            numbers |= {name: float(rng.choice([0.0, 1e-300, 0.5, 1.0])) for name in shares}
            numbers |= {name: float(rng.integers(0, 70)) for name in some if name in whole}
            watch.log(step, numbers)


CUT = {"response/truncated_share": 1.0}


def test_an_alarm_is_over_after_some_quiet_steps_and_may_come_back() -> None:
    watch = seen(config())
    told = []
    for step, wrong in enumerate([True, True, False, True, *[False] * CALM, False, True], start=5):
        told += [(step, c.raised.on, c.text) for c in watch.log(step, healthy(step) | (CUT if wrong else {}))]
    assert [(step, on) for step, on, _ in told] == [(5, True), (8 + CALM, False), (10 + CALM, True)]
    assert told[1][2] == "over: last seen at step 8" and told[2][2] == told[0][2]
    raised = watch.raised[Alarm.cut_off]
    assert (raised.first, raised.last, raised.steps) == (5, 10 + CALM, 4)


def test_a_quiet_step_is_no_end_while_the_evaluation_says_otherwise() -> None:
    watch = seen(config())
    watch.log(4, EVAL | {"eval/truncated_share": 1.0})
    for step in range(5, 12):
        assert not watch.log(step, healthy(step))
    assert watch.raised[Alarm.cut_off].on
    for step in (12, 13, 14):
        watch.log(step, EVAL)
    assert not watch.raised[Alarm.cut_off].on


def test_what_a_resumed_run_replays_is_what_the_run_saw(tmp_path: Path) -> None:
    sink, live = JsonlSink(tmp_path / "metrics.jsonl"), Watch(config())
    logs = [(0, EVAL), *((step, healthy(step) | (CUT if step in (3, 4, 9) else {})) for step in range(1, 12))]
    logs.insert(5, (4, EVAL | {"eval/truncated_share": 1.0}))
    for step, numbers in logs:
        sink.log(step, numbers | {"reward/model": float("nan")})  # null in the file
        live.log(step, numbers)
    sink.close()
    assert alarms_of(config(), read_metrics(tmp_path / "metrics.jsonl")) == list(live.raised.values())


def test_going_back_forgets_the_later_steps() -> None:
    watch = seen(config(), last=6)
    watch.rewind(4)
    for step in (5, 6):  # the same prompts again, by right
        assert not watch.log(step, healthy(step))


# ---------------------------------------------------------------- where it is told


def sinks(cfg: Config, folder: Path, history: Sequence[Mapping[str, Any]] = ()) -> tuple[Sinks, io.StringIO]:
    file = io.StringIO()
    writing = Sinks(
        [JsonlSink(folder / "metrics.jsonl", resume_step=99 if history else None), EventSink(folder / EVENTS)]
    )
    return Sinks([writing, AlarmSink(cfg, writing.event, Console(file=file, width=40), history)]), file


def test_an_alarm_is_one_line_an_event_and_part_of_summary_and_report(tmp_path: Path) -> None:
    cfg = config()
    sink, said = sinks(cfg, tmp_path)
    for step in range(1, 5):
        sink.log(step, healthy(step) | (CUT if step > 2 else {}))
    sink.event(Event(1.0, 4, "replaced", "rollout-0", "rollout-0 died & was <replaced>"))
    sink.close()
    (line,) = said.getvalue().splitlines()
    assert line.startswith(
        "step 3: alarm: cut_off: 100% of the 64 answers of the step were ended by the limit, after 20"
    )
    alarm, replaced = read_events(tmp_path)
    assert (alarm.step, alarm.kind, alarm.member) == (3, ALARM, "cut_off") and alarm.text in line
    assert (replaced.kind, replaced.member) == ("replaced", "rollout-0")
    report = write_report(tmp_path).read_text()  # of a run that has not ended
    assert "<b>cut_off</b>" in report and "died &amp; was &lt;replaced&gt;" in report
    history = read_metrics(tmp_path / "metrics.jsonl")
    summary = write_summary(tmp_path / "summary.json", history, config=cfg, alarms=alarms_of(cfg, history))
    (found,) = json.loads((tmp_path / "summary.json").read_text())["alarms"]
    message = found.pop("message")
    other = config(rollout__max_new_tokens=99)  # of the run that went on with it
    assert alarms_of(other, history)[0].text != message
    assert alarms_of(other, history, read_events(tmp_path))[0].text == message
    assert (
        found == {"name": "cut_off", "first_step": 3, "last_step": 4, "steps": 2, "on": True} and message == alarm.text
    )
    assert "<td>3 … 4</td>" in write_report(tmp_path).read_text()
    console = Console(file=io.StringIO(), width=40)
    print_summary(summary, console=console)
    assert f"ALARM cut_off (steps 3 … 4, seen at 2): {message}" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_run_without_alarms_has_no_word_of_them(tmp_path: Path) -> None:
    sink, said = sinks(config(), tmp_path)
    sink.log(1, healthy(1))
    sink.close()
    assert said.getvalue() == "" and read_events(tmp_path) == []
    history = read_metrics(tmp_path / "metrics.jsonl")
    assert write_summary(tmp_path / "summary.json", history, config=config())["alarms"] == []
    assert "alarm" not in write_report(tmp_path).read_text().lower().replace("alarms-", "")


def test_it_is_over_and_that_is_told_too(tmp_path: Path) -> None:
    sink, said = sinks(config(), tmp_path)
    for step in range(1, 8):
        sink.log(step, healthy(step) | (CUT if step == 2 else {}))
    sink.close()
    assert [event.kind for event in read_events(tmp_path)] == [ALARM, OVER]
    assert said.getvalue().splitlines()[1] == "step 5: alarm over: cut_off: over: last seen at step 2"
    assert ", over</td>" in write_report(tmp_path).read_text()


def test_the_run_stops_by_setting_after_the_numbers_are_written(tmp_path: Path) -> None:
    cfg = config(monitoring__stop_on=[Alarm.stale, Alarm.cut_off])
    sink, _ = sinks(cfg, tmp_path)
    sink.log(1, healthy(1) | {"response/repetition": 0.9})  # not one of them
    with pytest.raises(SkyrlError, match=r"step 2: stopped by monitoring\.stop_on: cut_off: 100% of the 64 answers"):
        sink.log(2, healthy(2) | CUT)
    sink.close()
    history = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in history] == [1, 2] and history[1]["response/truncated_share"] == 1.0
    assert [event.member for event in read_events(tmp_path)] == ["looping", "cut_off"]
    # A resumed run that still shows it stops again, though it tells nothing new.
    again, said = sinks(cfg, tmp_path, history)
    with pytest.raises(SkyrlError, match="stopped by"):
        again.log(3, healthy(3) | CUT)
    assert said.getvalue() == ""
    again.log(4, healthy(4))
    again.close()


def test_events_go_on_with_their_file_and_a_broken_one_is_named(tmp_path: Path) -> None:
    for number in range(2):
        sink = EventSink(tmp_path / EVENTS)
        sink.event(Event(float(number), number, "joined", "rollout-1", "é"))
        sink.close()
    assert [event.time for event in read_events(tmp_path)] == [0.0, 1.0]
    with (tmp_path / EVENTS).open("a") as file:
        file.write('{"time": 2.0, "st')  # killed in the middle of a line
    assert len(read_events(tmp_path)) == 2
    (tmp_path / EVENTS).write_text('{"time": 2.0}\n{"time": 1, "step": 1, "kind": "", "member": "", "text": ""}\n')
    with pytest.raises(DataError, match="line 1 is no event"):
        read_events(tmp_path)


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(
        ConfigError, match=r"monitoring\.stop_on=\['cut_of'\]: must be a list, each.*did you mean cut_off\?"
    ):
        checked({"monitoring": {"stop_on": ["cut_of"]}})
    assert checked({"monitoring": {"stop_on": ["stale"]}}).monitoring.stop_on == [Alarm.stale]
    assert Config().monitoring.stop_on == []


def test_the_gate_may_keep_the_buffer_empty() -> None:
    watch = seen(config(algorithm__gate__kind=ThresholdKind.fixed))
    watch.log(5, healthy(5) | {"buffer/size": 0.0})
    assert not watch.raised


def test_the_document_has_each_alarm_and_the_strict_setting_only_what_is_known() -> None:
    text = (ROOT / "docs" / "monitoring.md").read_text(encoding="utf-8")
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate_configuration.py")
    assert spec is not None and spec.loader is not None
    generator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generator)
    rows = [generator.row(f"`{name}`", meaning) for name, meaning in generator.member_docs(Alarm)]
    assert "\n".join(["| Alarm | Meaning |", "|---|---|", *rows, ""]) in text, "the table must be\n" + "\n".join(rows)
    strict = yaml.safe_load((ROOT / "conf" / "monitoring" / "strict.yaml").read_text(encoding="utf-8"))
    stops = checked({"monitoring": strict}).monitoring.stop_on
    assert stops and len(set(stops)) == len(stops)
    # What a policy or its data may come to by themselves, for a while, does not end a run by this setting.
    assert not {Alarm.cut_off, Alarm.no_contrast, Alarm.looping, Alarm.reward_fell, Alarm.entropy_collapsed} & set(
        stops
    )
