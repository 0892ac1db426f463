"""Alarms about the policies that should be one: the one that samples, the one that learns, the reference."""

from __future__ import annotations

import math

from skyrl.monitoring.alarms.facts import Facts
from skyrl.monitoring.alarms.rules import Verdict, rule
from skyrl.settings import Alarm

SAME = 1e-11
"""Divergence in nats a token: what rounding does in float32 is far less, a step with a learning rate of 1e-6 far more.
"""


@rule(Alarm.sampling_differs, "learner/logprob_gap_fresh", "learner/logprob_gap_fresh_mean")
def sampling_differs(f: Facts) -> Verdict:
    """Far beyond what the probe of the last sync found between the same two programs; in 16 bits, where its few tokens
    say little of the largest gap of many, the mean alone counts. With top-p the record counts the kept tokens alone,
    which makes each likelier by up to 1 / top_p."""
    largest, mean = f["learner/logprob_gap_fresh"], f["learner/logprob_gap_fresh_mean"]
    probe, limit = f.last("sync/logprob_gap_mean"), f.last("sync/logprob_gap_limit", 1e-4)
    allowed = -math.log(f.cfg.rollout.top_p)
    most, peak = (max(30 * probe, 2e-3), 100 * limit) if f.cfg.model.dtype == "float32" else (0.1 + 5 * probe, math.inf)
    if mean <= most + allowed and largest <= peak + allowed:
        return ""
    return (
        "the learner gives fresh answers other log-probabilities than were recorded when they were drawn: they differ "
        f"by {mean:.3g} nats in the mean and {largest:.3g} at most, on the sync probe by {probe:.3g} in the mean. "
        "Training samples otherwise than the probe (temperature, top_p, pictures, a cache of old weights), or the "
        "record is wrong"
    )


@rule(Alarm.record_ignored, "grpo/kl_behaviour", "learner/tokens")
def record_ignored(f: Facts) -> Verdict:
    if f["learner/tokens"] < 100:
        return None
    if f["grpo/kl_behaviour"] != 0:
        return ""
    return (
        f"on {int(f['learner/tokens'])} tokens the sampling policy's log-probabilities are the learner's own to the "
        "last bit: they were not recorded by the engine, and the ratio corrects nothing"
    )


@rule(Alarm.reference_wrong, "learner/lr")
def reference_wrong(f: Facts) -> Verdict:
    """At the first step the policy is the reference, up to rounding; after steps whose learning rates add up to 1e-6,
    unless the reference was renewed, it is not."""
    kls = {name: f.now[name] for name in ("mpo/kl_reference", "grpo/kl_reference") if name in f.now}
    if not kls:
        return None
    name = max(kls, key=lambda one: kls[one])
    trained = sum(f.before("learner/lr"))
    if f.step == 1 and f.get("batch/lag_max") <= 1 and kls[name] > (1e-3 if f.cfg.model.dtype == "float32" else 5e-2):
        return f"{name} is {kls[name]:.3g} nats before the first step: the reference is another model than the policy"
    mpo = f.cfg.algorithm.mpo
    renewed = (mpo.reference_every or mpo.reference_kl is not None) and f.get("mpo/reference_age") < 1
    name = min(kls, key=lambda one: kls[one])
    if kls[name] > (SAME if f.cfg.model.dtype == "float32" else 0) or renewed or trained < 1e-6:
        return ""
    return (
        f"{name} is {kls[name]:.3g} nats after {f.step - 1} steps: the reference moves with the policy, and what is "
        "compared with it has no effect"
    )


@rule(Alarm.sync_repeated, "sync/retries")
def sync_repeated(f: Facts) -> Verdict:
    if f["sync/retries"] == 0:
        return ""
    return (
        "new weights had to be sent a second time, as the first probe found others in the rollout members: what is "
        f"sent in part does not arrive (sync/retries {f['sync/retries']:g}; the log names the gap). Training goes on "
        "with the right ones"
    )


@rule(Alarm.sync_gap_grows, "sync/logprob_gap", "sync/logprob_gap_limit")
def sync_gap_grows(f: Facts) -> Verdict:
    """In 16 bits the gap grows with the policy, and the limit, which is measured, with it."""
    past, first = f.before("sync/logprob_gap"), sorted(f.first("sync/logprob_gap"))
    if len(past) < 8:
        return None
    newest, limit, usual = min(*past[-2:], f["sync/logprob_gap"]), f["sync/logprob_gap_limit"], first[len(first) // 2]
    if newest < max(10 * usual, limit / 2):
        return ""
    return (
        f"at the last three weight syncs rollout and learner differed by {newest:.3g} nats or more on the probe, at "
        f"first by {usual:.3g}, and the run ends at {limit:.3g}: something that is sent in part, or computed "
        "otherwise, adds up"
    )
