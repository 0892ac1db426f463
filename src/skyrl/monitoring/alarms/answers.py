"""Alarms about what the policy says."""

from __future__ import annotations

from skyrl.monitoring.alarms.facts import Facts, Side
from skyrl.monitoring.alarms.rules import ENOUGH, Verdict, rule, rule_of_answers
from skyrl.settings import Alarm

NEARLY_ALL = 0.95


@rule_of_answers(Alarm.cut_off, "truncated_share", "length_mean")
def cut_off(f: Facts, side: Side) -> Verdict:
    share, count = f[side["truncated_share"]], f.answers(side)
    if share < NEARLY_ALL or count < ENOUGH:
        return None if count < ENOUGH else ""
    return (
        f"{share:.0%} of the {count} {side.answers} were ended by the limit, after {f[side['length_mean']]:.4g} tokens "
        f"in the mean: raise rollout.max_new_tokens={f.cfg.rollout.max_new_tokens}, or see whether the token that ends "
        "an answer is among the model folder's eos_token_id"
    )


@rule_of_answers(Alarm.empty_answers, "length_mean")
def empty_answers(f: Facts, side: Side) -> Verdict:
    length, count = f[side["length_mean"]], f.answers(side)
    if length > 1.2 or count < ENOUGH:
        return None if count < ENOUGH else ""
    return (
        f"the {count} {side.answers} have {length:.3g} tokens in the mean, the one that ends them included: if the "
        "starting policy does that, see its chat template; else lower learner.lr and go back to an earlier checkpoint"
    )


@rule_of_answers(Alarm.looping, "repetition")
def looping(f: Facts, side: Side) -> Verdict:
    share, count = f[side["repetition"]], f.answers(side)
    if share < 0.7 or count < ENOUGH:
        return None if count < ENOUGH else ""
    return (
        f"{share:.0%} of the token 4-grams of the {side.answers} occurred before in the same answer: the policy loops. "
        "Lower learner.lr, or add algorithm.grpo.kl_weight, and go back to an earlier checkpoint"
    )


@rule(Alarm.same_answers, "response/same_share", "response/truncated_share", "reward/scored")
def same_answers(f: Facts) -> Verdict:
    """Whole ones: the beginnings of answers that are cut off are often the same."""
    share, groups, each = f["response/same_share"], f.cfg.rollout.prompts_per_step, f.cfg.rollout.samples_per_prompt
    if groups * (each - 1) < ENOUGH or f["response/truncated_share"] >= NEARLY_ALL:
        return None
    if share < NEARLY_ALL:
        return ""
    entropy = f", whose entropy is {f['learner/entropy']:.3g} nats a token" if "learner/entropy" in f.now else ""
    return (
        f"for {share:.0%} of the step's {groups} prompts all {each} answers are the same, token by token. Raise "
        f"rollout.temperature={f.cfg.rollout.temperature:g}; if it is not low, the answers were not drawn one by one, "
        f"or the policy has collapsed{entropy}"
    )


@rule_of_answers(Alarm.no_answer_found, "answer_share", "truncated_share", "accuracy")
def no_answer_found(f: Facts, side: Side) -> Verdict:
    count = f.answers(side)
    if f[side["truncated_share"]] >= NEARLY_ALL:
        return None
    if f[side["answer_share"]] > 0 or f[side["accuracy"]] > 0 or count < ENOUGH:
        return None if count < ENOUGH else ""
    return (
        f"in none of the {count} {side.answers} was one found where reward.answer.at={f.cfg.reward.answer.at.value} "
        "looks for it. Let the questions ask for that form, or say where the answer stands (docs/verifiers.md)"
    )
