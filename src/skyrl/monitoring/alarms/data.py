"""Alarms about prompts, pictures and the sample buffer."""

from __future__ import annotations

import math

from skyrl.monitoring.alarms.facts import TRAIN, Facts
from skyrl.monitoring.alarms.rules import FAILED, Verdict, rule
from skyrl.settings import Alarm, ThresholdKind

SETS = 10**8
"""Sets of prompts that a step could have, without which two may be the same by chance."""


@rule(Alarm.evaluation_trained_on, "data/repeated_share")
def evaluation_trained_on(f: Facts) -> Verdict:
    share = f["data/repeated_share"]
    if share <= 0:
        return ""
    return (
        f"{share:.1%} of the evaluation prompts or more are also trained on: accuracy on them says what is known by "
        "heart. python -m skyrl.doctor names one; give data.eval_path other prompts"
    )


@rule(Alarm.pictures_unused, "eval/picture_drop")
def pictures_unused(f: Facts) -> Verdict:
    if abs(f["eval/picture_drop"]) > 1e-9:
        return ""
    return (
        "blackening most of each picture changes no log-probability of the greedy answers (eval/picture_drop 0): the "
        "policy gets no picture, or always the same. See python -m skyrl.doctor, its checks of pictures"
    )


@rule(Alarm.same_prompts, "data/fingerprint")
def same_prompts(f: Facts) -> Verdict:
    """Of the steps that may be of one pass through the data; where there are few prompts two passes may agree."""
    there_are, step = int(f.last("data/train_prompts")), f.cfg.rollout.prompts_per_step
    if there_are < 4 * step or math.comb(there_are, step) < SETS:
        return None
    if f["data/fingerprint"] not in f.before("data/fingerprint")[1 - there_are // step :]:
        return ""
    return (
        f"the step has the very prompts of an earlier one, of {there_are} that there are: the order of the data stands "
        "still, or a resumed run went back in it"
    )


@rule(Alarm.prompts_skipped, "data/position")
def prompts_skipped(f: Facts) -> Verdict:
    past, rollout = f.before("data/position"), f.cfg.rollout
    if not past and f.step > 1:
        return None
    moved, most = f["data/position"] - (past[-1] if past else 0), rollout.in_flight * rollout.num_workers
    if moved == most or (rollout.oversample and 0 <= moved <= most):
        return ""
    return (
        f"the step took {moved:g} prompts from the data, where {most} were due: "
        f"{'some come again' if moved < most else 'some were left out'}, as after a checkpoint of another position"
    )


@rule(Alarm.replay_stuck, "buffer/fingerprint", "buffer/replayed", "buffer/size")
def replay_stuck(f: Facts) -> Verdict:
    drawn, size, past = f["buffer/replayed"], f["buffer/size"], f.before("buffer/fingerprint")
    if drawn < FAILED or size < 2 * drawn or not past:
        return None
    if f["buffer/fingerprint"] != past[-1]:
        return ""
    return (
        f"the {int(drawn)} replayed samples are those of the step before, though the buffer has {int(size)}: lower "
        f"buffer.alpha={f.cfg.buffer.alpha:g} or raise buffer.uniform_share; else its draws stand still"
    )


@rule(Alarm.replay_empty, "buffer/size", "buffer/effective_share_fresh", "reward/scored")
def replay_empty(f: Facts) -> Verdict:
    kept = f["buffer/effective_share_fresh"] * f.answers(TRAIN)
    if not f.cfg.buffer.enabled or f.weight("grpo") == 0 or f.cfg.algorithm.gate.kind is not ThresholdKind.off:
        return None
    if f["buffer/size"] > 0 or kept < FAILED:
        return ""
    return f"the buffer is empty after a step with {kept:.0f} effective answers: nothing will ever be replayed"


@rule(Alarm.stale, "buffer/age_max")
def stale(f: Facts) -> Verdict:
    if f["buffer/age_max"] <= f.cfg.buffer.max_age:
        return ""
    return (
        f"a replayed sample is {f['buffer/age_max']:g} versions old; buffer.max_age={f.cfg.buffer.max_age} allows less"
    )
