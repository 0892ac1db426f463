"""Alarms about the optimizer step."""

from __future__ import annotations

import math

from skyrl.monitoring.alarms.facts import Facts
from skyrl.monitoring.alarms.rules import Verdict, rule
from skyrl.settings import Alarm, PairSource, Schedule, Trainable


@rule(Alarm.no_tokens, "learner/tokens")
def no_tokens(f: Facts) -> Verdict:
    if f["learner/tokens"] > 0:
        return ""
    # Without a contrast there can be nothing: no_contrast says that. Pairs may fail to form for a while.
    before = f.before("learner/tokens")[-2:]
    may_be = f.get("reward/tied_share") == 1 or f.weight("grpo") == 0
    if may_be and (len(before) < 2 or any(before)):
        return None
    return (
        "the learner got no token to train on, though rewards differ between the answers to one prompt "
        f"(cut off: {f.get('response/truncated_share'):.0%}; withheld by the gate: "
        f"{f.get('gate/withheld_share'):.0%} of the right ones): see reward.truncated, algorithm.gate and "
        "algorithm.mpo.threshold"
    )


@rule(Alarm.no_pairs, "mpo/pairs", "reward/tied_share")
def no_pairs(f: Facts) -> Verdict:
    steps = 10
    if f["mpo/pairs"] > 0:
        return ""
    pairs, tied = f.before("mpo/pairs")[1 - steps :], f.before("reward/tied_share")[1 - steps :]
    by_rule = f.cfg.algorithm.mpo.pairs is not PairSource.dropout_ntp
    if not by_rule or f.weight("mpo") == 0 or len(pairs) < steps - 1 or any(pairs) or 1 in tied:
        return None
    return (
        f"no preference pair was formed in {steps} steps, though rewards differ: algorithm.mpo.weight="
        f"{f.cfg.algorithm.mpo.weight:g} has no effect. See algorithm.mpo.threshold and algorithm.mpo.pairs"
    )


@rule(Alarm.no_gradient, "learner/grad_norm", "learner/tokens")
def no_gradient(f: Facts) -> Verdict:
    if f["learner/tokens"] == 0 or f["learner/grad_norm"] != 0:
        return ""
    if f.get("learner/pictures") == 0 and f.cfg.learner.trainable in (Trainable.adapter, Trainable.adapter_and_vision):
        return None
    return (
        f"{int(f['learner/tokens'])} tokens gave a gradient of exactly 0: what is trained (learner.trainable, "
        "learner.lora) has no part in the loss, or its weights and advantages are 0"
    )


@rule(Alarm.no_learning_rate, "learner/lr", "learner/tokens")
def no_learning_rate(f: Facts) -> Verdict:
    cfg, done = f.cfg.learner, f.step / f.cfg.controller.steps
    if f["learner/tokens"] == 0 or (cfg.schedule is Schedule.cosine and cfg.min_lr_ratio < 1e-3 and done > 0.99):
        return None
    if f["learner/lr"] > 1e-12:
        return ""
    return f"the step's learning rate is {f['learner/lr']:.3g}, and no weight can change by it: raise learner.lr"


@rule(Alarm.weights_still, "learner/lr", "learner/tokens", "learner/grad_norm")
def weights_still(f: Facts) -> Verdict:
    moved = {name.rpartition("/")[2]: value for name, value in f.now.items() if name.startswith("learner/moved/")}
    if not moved or f["learner/tokens"] == 0 or f["learner/grad_norm"] == 0 or f["learner/lr"] < 1e-9:
        return None
    still = [module for module, share in moved.items() if share == 0]
    if f.cfg.model.dtype != "float32":  # a small step is below the last place of most weights
        still = still if len(still) == len(moved) and f["learner/lr"] >= 1e-7 else []
    elif f.get("learner/pictures") == 0:  # then only the language model must move
        still = [name for name in still if name == "language"]
    if not still:
        return ""
    return (
        f"no weight of {' and '.join(still)} that was looked at changed in the step, with a learning rate of "
        f"{f['learner/lr']:.3g} and a gradient of norm {f['learner/grad_norm']:.3g}: the optimizer does not have "
        f"them, or model.dtype={f.cfg.model.dtype} rounds the step away"
    )


@rule(Alarm.optimizer_lost, "learner/whole_steps")
def optimizer_lost(f: Facts) -> Verdict:
    if f["learner/whole_steps"] < 0.5 or not f.before("learner/whole_steps"):
        return ""
    return (
        f"{f['learner/whole_steps']:.0%} of the weights moved by just the learning rate, as at an optimizer's very "
        "first step, which this is not: its moments were lost, as by a checkpoint without them"
    )


@rule(Alarm.all_clipped, "learner/tokens")
def all_clipped(f: Facts) -> Verdict:
    names = ("grpo/clip_fraction", "grpo/masked_fraction", "grpo/truncated_fraction")
    found = {name: f.now[name] for name in names if name in f.now}
    if not found or f["learner/tokens"] < 100:
        return None
    name = max(found, key=lambda one: found[one])
    if found[name] < 0.95:
        return ""
    return (
        f"{name} is {found[name]:.0%}: nearly no token moves the policy freely. The policy is far from the one that "
        f"sampled (grpo/kl_behaviour {f.get('grpo/kl_behaviour', math.nan):.3g} nats): lower learner.lr, "
        "buffer.max_age or controller.lag, or widen algorithm.grpo.clip_low, clip_high, mismatch_cap"
    )


@rule(Alarm.entropy_collapsed, "learner/entropy", "learner/tokens")
def entropy_collapsed(f: Facts) -> Verdict:
    begun, now = sorted(f.first("learner/entropy")), f["learner/entropy"]
    if f["learner/tokens"] < 100:
        return None
    usual = begun[len(begun) // 2] if begun else math.inf
    if now > 1e-3 and not (begun and now < usual / 20):
        return ""
    at_first = f", at first it was {usual:.3g}" if begun else ""
    return (
        f"the policy's entropy is {now:.3g} nats a token{at_first}: all answers to a prompt will be the same. Lower "
        "learner.lr, raise algorithm.grpo.clip_high, or go back to an earlier checkpoint"
    )
