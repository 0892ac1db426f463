"""Alarms about what the answers earn."""

from __future__ import annotations

import math

from skyrl.monitoring.alarms.facts import EVAL, Facts, Side
from skyrl.monitoring.alarms.rules import ENOUGH, FAILED, PRIOR, Verdict, rule, rule_of_answers
from skyrl.settings import Alarm, Squash

CHANCE = 1e-4
"""What is less likely than this is no accident."""


@rule(Alarm.no_contrast, "reward/tied_share", "reward/rule_std", "reward/rule", "reward/accuracy", "reward/scored")
def no_contrast(f: Facts) -> Verdict:
    """Among how many groups in a row there was nothing to compare; and how likely that is, as far as the run can tell:
    that all answers to one prompt get one score, and, where it is the same for all prompts, that it is this one."""
    if f["reward/tied_share"] < 1:
        return ""
    groups, each, rate = f.cfg.rollout.prompts_per_step, f.cfg.rollout.samples_per_prompt, f["reward/rule"]
    past = f.before("reward/tied_share")
    in_a_row = 1 + next((steps for steps, share in enumerate(reversed(past)) if share < 1), len(past))
    seen = past[: len(past) + 1 - in_a_row]
    # Were all rates of right answers equally frequent, groups of G would tie with 2 / (G + 1).
    chance = (PRIOR * 2 / (each + 1) + groups * sum(seen)) / (PRIOR + groups * len(seen))
    one_score = f["reward/rule_std"] == 0
    if one_score:
        before = f.before("reward/accuracy")[: len(seen)] + f.before("eval/accuracy")
        outcome = [value if rate >= 1 else 1 - value if rate <= 0 else 0.0 for value in before]
        chance *= (PRIOR / 2 + ENOUGH * sum(outcome)) / (PRIOR + ENOUGH * len(outcome)) if seen else 0.5
    if chance ** (groups * in_a_row) > CHANCE:
        return None
    answers, score = int(f["reward/scored"]), f"reward/rule {rate:.4g}"
    if not one_score:
        what = f"the {each} answers to one prompt get one score each, at all {groups} prompts ({score} in the mean)"
        mend = "the verifier may not read the answer, or the answers to one prompt may be the same"
    elif rate <= 0:
        what = f"none of the step's {answers} answers earns anything ({score})"
        mend = "read some answers (python -m skyrl.show): does the verifier find them, and are they wrong? Then the "
        mend += "questions are too hard"
    elif rate >= 1:
        what = f"all of the step's {answers} answers are right ({score})"
        mend = "the verifier may accept everything, or the questions are too easy"
    else:
        what, mend = f"the step's {answers} answers all get one score ({score})", "the verifier may not read the answer"
    return f"{what}; {in_a_row} step{'s' * (in_a_row > 1)} in a row without a reward to learn from: {mend}"


@rule_of_answers(Alarm.verifier_fails, "errors")
def verifier_fails(f: Facts, side: Side) -> Verdict:
    errors, count = int(f[side["errors"]]), f.answers(side)
    if errors < FAILED or errors < count / 10:
        return ""
    return (
        f"{errors} of the {count} {side.answers} could not be scored, and train nothing. The samples in the run's "
        "folder say why (python -m skyrl.show, mark 'error'); mend the verifier or raise reward.verifier_timeout"
    )


@rule_of_answers(Alarm.verifier_fails_wrong, "errors", "accuracy")
def verifier_fails_wrong(f: Facts, side: Side) -> Verdict:
    errors, scored, accuracy = int(f[side["errors"]]), int(f[side["scored"]]), f[side["accuracy"]]
    if errors < FAILED or accuracy < 1:
        return ""
    pairs = zip(f.before(side["accuracy"]), f.before(side["errors"]), strict=False)
    healthy = [right for right, failed in pairs if failed == 0]
    usual = (PRIOR / 2 + ENOUGH * sum(healthy)) / (PRIOR + ENOUGH * len(healthy))
    if usual**scored > 1e-2:
        return None
    return (
        f"{errors} of the {errors + scored} {side.answers} could not be scored, and all {scored} others are right: the "
        "verifier fails for wrong answers, and what is left of them is no accuracy. The samples say of each why it "
        "failed (python -m skyrl.show, mark 'error')"
    )


@rule_of_answers(Alarm.format_denied, "format_of_right", "accuracy")
def format_denied(f: Facts, side: Side) -> Verdict:
    """Never before either: what gave up its form is a matter of ``reward_fell``."""
    right = round(f[side["accuracy"]] * f[side["scored"]])
    if right < ENOUGH / 2 or f.cfg.reward.format_weight == 0:
        return None
    if f[side["format_of_right"]] > 0 or any(f.before("reward/format_of_right") + f.before("eval/format_of_right")):
        return ""
    return (
        f"none of the {right} right {side.answers} keeps the form that reward.answer asks for, so none earns the "
        "reward for it: let the questions ask for that form, set reward.answer to the policy's, or "
        "reward.format_weight to 0"
    )


@rule_of_answers(Alarm.reward_model_huge, "model_largest")
def reward_model_huge(f: Facts, side: Side) -> Verdict:
    largest, added = f[side["model_largest"]], f.cfg.reward.squash is Squash.none and f.cfg.reward.model_weight > 0
    if largest < (1e4 if added else 1e6):  # at 1e6 the last place of float32 is as large as a score should be
        return ""
    return (
        f"the reward model's scores of the {side.answers} go up to {largest:.3g}: "
        + ("with reward.squash=none nothing else counts beside them. " if added else "they say nothing any more. ")
        + "See whether model.reward is the right model and its head was loaded"
    )


@rule_of_answers(Alarm.reward_model_constant, "model_std", "model_largest")
def reward_model_constant(f: Facts, side: Side) -> Verdict:
    if f[side["scored"]] < ENOUGH / 2:
        return None
    if f[side["model_std"]] > 1e-6 * f[side["model_largest"]]:
        return ""
    return (
        f"the reward model gives all {int(f[side['scored']])} {side.answers} one score, of size "
        f"{f[side['model_largest']]:.6g}: see whether model.reward is the right model and its head was loaded"
    )


@rule_of_answers(Alarm.reward_model_negated, "model_agreement", "model_agreement_sd")
def reward_model_negated(f: Facts, side: Side) -> Verdict:
    shares = [*f.before(side["model_agreement"])[-20:], f[side["model_agreement"]]]
    deviations = [*f.before(side["model_agreement_sd"])[-20:], f[side["model_agreement_sd"]]]
    if side is EVAL:
        shares, deviations = shares[-1:], deviations[-1:]
    if not all(1e-6 < deviation < 1 for deviation in deviations):
        return None
    weights = [deviation**-2 for deviation in deviations]
    mean = sum(share * weight for share, weight in zip(shares, weights, strict=True)) / sum(weights)
    if mean > 0.4 or (mean - 0.5) * sum(weights) ** 0.5 > -4 or shares[-1] > 0.5:
        return ""
    return (
        f"of two {side.answers}, one right and one wrong, the reward model prefers the wrong one in "
        f"{1 - shares[-1]:.0%} of the cases: its sign may be turned round, or it answers to something else"
    )


@rule(Alarm.advantages_wrong, "reward/advantage_order", "reward/advantage_centre")
def advantages_wrong(f: Facts) -> Verdict:
    order, centre = f["reward/advantage_order"], f["reward/advantage_centre"]
    if order == 1 and centre < 1e-3:
        return ""
    return (
        f"of two answers to one prompt the one with the lower total reward has the higher advantage in {1 - order:.0%} "
        f"of the cases, and the advantages of a prompt's answers are up to {centre:.3g} in the mean, where 0 is right: "
        "they belong to other answers, or were not made within their group"
    )


@rule_of_answers(Alarm.reward_fell, "accuracy")
def accuracy_fell(f: Facts, side: Side) -> Verdict:
    return _fell(f, side, "accuracy", "right")


@rule_of_answers(Alarm.reward_fell, "format")
def format_fell(f: Facts, side: Side) -> Verdict:
    return _fell(f, side, "format", "in the form that reward.answer asks for")


def _fell(f: Facts, side: Side, name: str, what: str) -> Verdict:
    """Against the best three steps in a row before, or the best evaluation, by four standard deviations. Answers to one
    prompt are as one: some steps have harder prompts."""
    past, now, count = f.before(side[name]), f[side[name]], f[side["scored"]]
    if side is not EVAL:
        count = min(count, f.cfg.rollout.prompts_per_step)
    if not past or count < 1:
        return None
    width = 1 if side is EVAL else min(3, len(past))
    best = max(sum(past[at : at + width]) / width for at in range(len(past) - width + 1))
    common = (best * width + now) / (width + 1)
    deviation = math.sqrt(max(0.0, common * (1 - common)) / count * (1 + 1 / width))
    if now >= best / 2 or best - now < 4 * deviation:
        return ""
    return (
        f"{now:.0%} of the {side.answers} are {what}; before it were up to {best:.0%}. "
        f"Lower learner.lr={f.cfg.learner.lr:g} and go back to an earlier checkpoint"
    )
