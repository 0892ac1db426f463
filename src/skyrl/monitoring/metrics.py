"""The one table of metric names. What is not defined here can't be logged.

``docs/metrics.md`` is generated from it::

    python -m skyrl.monitoring.metrics > docs/metrics.md
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from skyrl.objective.hybrid import STEP_STATS, TERMS, own_terms
from skyrl.objective.term import Term
from skyrl.records import ConfigError, SkyrlError
from skyrl.settings import Config


class MetricError(SkyrlError):
    """A metric was logged under a name that the table does not define."""


@dataclass(slots=True, frozen=True)
class MetricInfo:
    """What one metric means."""

    unit: str
    """``share`` is a number in [0, 1]; ``nats`` are natural-log probabilities; ``-`` has no unit."""
    description: str
    """One sentence, with the denominator where there is one."""


_M = MetricInfo


def _threshold(prefix: str, what: str) -> dict[str, MetricInfo]:
    """The metrics of one calibrated threshold τ."""
    return {
        f"{prefix}/tau": _M("-", f"τ on {what}, raw reward-model units; absent while nothing passes."),
        f"{prefix}/controlled": _M(
            "-", "1 if the last calibration found a τ that keeps the risk under its target; 0: fallback or first value."
        ),
        f"{prefix}/labelled": _M("samples", "Candidates in the calibration window whose facts are known."),
        f"{prefix}/acceptance": _M("share", "Candidates at or above τ, of the window."),
        f"{prefix}/risk": _M(
            "share", "Hallucinating ones, of the labelled candidates at or above τ; absent where there is none."
        ),
        f"{prefix}/risk_bound": _M(
            "share",
            "Upper confidence bound of that share (Clopper-Pearson); under `risk_controlled` it holds for every "
            "threshold that could have been chosen, so it can be above the target while `controlled` is 1.",
        ),
    }


def _of_term(term: type[Term] | Term) -> dict[str, MetricInfo]:
    return {f"loss/{term.name}": _M("-", term.text)} | {stat.name: _M(stat.unit, stat.text) for stat in term.stats}


METRICS: dict[str, MetricInfo] = {
    "loss/total": _M("-", "The value that is minimised: the terms that are trained, each times its weight, summed."),
    # ---- what the terms of the loss and the learner's step declare themselves
    **{name: info for term in TERMS for name, info in _of_term(term).items()},
    **{stat.name: _M(stat.unit, stat.text) for stat in STEP_STATS},
    # ---- mpo
    "mpo/pairs": _M("pairs", "Preference pairs trained on in the step."),
    "mpo/reference_age": _M("steps", "Steps since the reference became the policy, before this step (iterated MPO)."),
    "mpo/delta": _M("nats", "BCO's reward shift: the running mean of the implicit rewards that its term subtracts."),
    # ---- learner
    "learner/grad_norm": _M("-", "L2 norm of the whole gradient before clipping."),
    "learner/lr": _M("-", "Learning rate of the step."),
    "learner/moved/<module>": _M("share",
        "Tensors of a module that is trained (vision, adapter, language) in which the step changed one of the weights "
        "that are looked at, of its tensors on rank 0; in 16 bits a small step may change none."),
    "learner/whole_steps": _M("share",
        "Weights that the step changed by just the learning rate, of the changed ones that are looked at (of the "
        "language model if it is trained): nearly all at the optimizer's very first step, few once it has moments."),
    "learner/tokens": _M("tokens", "Answer tokens trained on in the step, over all ranks."),
    "learner/pictures": _M("pictures", "Pictures of the samples trained on in the step; a sample's count each time."),
    "learner/distinct_share": _M("share",
        "Part of the train batch that is left when equal answers to one prompt count once, over the whole step; a "
        "forward pass runs equal rows of its own micro-batch once."),
    "learner/shared_rows": _M("0 or 1", "1 if each prompt ran once for all its answers, 0 if in a row of each."),
    "learner/tower_hits": _M("share",
        "Pictures whose features by the frozen vision tower were there, of those that forward passes asked for since "
        "the last step; equal ones in one pass count each."),
    "learner/micro_batches": _M("batches", "Forward passes into which the step was cut, of the rank with most."),
    # ---- reward
    "reward/total": _M("-", "Total hybrid reward, mean over the scored answers of the step."),
    "reward/rule": _M("-",
        "Verifiers' score, in [0, 1] but for functions of other systems, mean over the scored answers of the step."),
    "reward/rule_std": _M("-", "Standard deviation of that score over the scored answers of the step."),
    "reward/rule/<name>": _M("-",
        "Score of the verifier of that name, mean over the scored answers of the step that it judged."),
    "reward/format": _M("share", "Answers that keep the form of `reward.answer`, of the scored answers of the step."),
    "reward/format_of_right": _M("share", "Answers that keep that form, of the step's right answers."),
    "reward/model": _M("-", "Raw score of the reward model (unbounded), mean over the scored answers of the step."),
    "reward/model_std": _M("-", "Standard deviation of that score over the scored answers of the step."),
    "reward/model_largest": _M("-", "Largest absolute value of that score in the step."),
    "reward/model_agreement": _M("share",
        "Pairs whose right answer has the higher score of the reward model, of all pairs of a right and a wrong answer "
        "to one prompt in the step."),
    "reward/model_agreement_sd": _M("-",
        "Standard deviation of that share about 1/2 if the reward model knew nothing of right and wrong."),
    "reward/advantage_order": _M("share",
        "Pairs of answers to one prompt whose advantages are not in the reverse order of their total rewards, of the "
        "step's pairs with different ones."),
    "reward/advantage_centre": _M("-",
        "Largest absolute mean of the advantages of the answers to one prompt in the step; 0 up to rounding."),
    "reward/tied_share": _M("share",
        "Prompts between whose answers there is no advantage to learn from, of the step's prompts with two or more "
        "scored answers."),
    "reward/length_penalty": _M("-",
        "Soft penalty for length near the limit (DAPO), mean over the answers sampled in the step."),
    "reward/errors": _M("answers", "Answers that could not be scored; they take no part in training."),
    "reward/scored": _M("answers", "Answers of the step that could be."),
    "reward/accuracy": _M("share", "Sampled (not greedy) answers with the full rule score, of the scored answers."),
    # ---- response
    "response/length_mean": _M("tokens", "Length of an answer, mean over the answers sampled in the step."),
    "response/truncated_share": _M("share", "Answers that the length limit ended, of all answers sampled in the step."),
    "response/left_out_share": _M("share",
        "Answers that the length limit ended and that therefore train nothing, of all answers sampled in the step."),
    "response/repetition": _M("share",
        "Token 4-grams that occurred before in the same answer, mean over the step's answers."),
    "response/answer_share": _M("share",
        "Answers in which something was found where `reward.answer` looks, of all answers sampled in the step."),
    "response/same_share": _M("share",
        "Prompts whose answers are all the same, token by token, of the step's prompts with two or more answers."),
    "data/position": _M("prompts",
        "Rows that the stream of training prompts had given when those of the step were taken, all passes over the "
        "data together; also that of a resumed run."),
    # ---- data, with data.overlong=drop
    "data/left_out_train": _M("prompts",
        "Training prompts that were left out as longer than `rollout.max_prompt_tokens`, of the data set or the pool."),
    "data/left_out_eval": _M("prompts", "Evaluation prompts that were left out for that."),
    # ---- data, always
    "data/train_prompts": _M("prompts", "Prompts that are trained on."),
    "data/repeated_share": _M("share", "Evaluation prompts that are also trained on, of the evaluation prompts."),
    "data/fingerprint": _M("-", "A number that only steps with the very same prompts have in common."),
    # ---- hallucination
    "hallucination/rate": _M("share",
        "Answers with at least one false claim about the picture, of the sampled answers to prompts whose picture has "
        "known facts."),
    "hallucination/false_claim_share": _M("share",
        "False claims, of all checkable claims about pictures made in the step's answers (CHAIR_i)."),
    "hallucination/coverage": _M("share",
        "Answers with at least one checkable claim, of the answers to prompts whose picture has known facts."),
    # ---- thresholds
    **_threshold("threshold", "the reward-model margin of a preference pair"),
    **_threshold("gate", "the reward-model score of answers that are right by the rule"),
    "gate/withheld_share": _M("share",
        "Answers right by the rule whose reinforcement the gate withheld, of the step's right answers."),
    # ---- buffer
    "buffer/effective_share_fresh": _M("share",
        "Fresh answers whose rule advantage is not 0, of all answers sampled in the step: without the buffer."),
    "buffer/effective_share": _M("share",
        "Fresh effective (without what a gate withholds) and replayed answers together, of the places of the rollout "
        "batch (all answers sampled in the step): with the buffer."),
    "buffer/size": _M("samples", "Samples in the buffer after the step's exchange."),
    "buffer/age_mean": _M("versions", "Policy versions since sampling, mean over the replayed samples of the step."),
    "buffer/age_max": _M("versions", "Policy versions since sampling of the oldest replayed sample of the step."),
    "buffer/prompts": _M("prompts",
        "Sampled groups that the buffer holds samples of; a prompt sampled twice counts twice."),
    "buffer/mass": _M("-",
        "Sum of the sampling priorities over the buffer: |advantage|^alpha, by group its mean, times recency."),
    "buffer/replayed": _M("samples", "Replayed samples in the batch of the step."),
    "buffer/fingerprint": _M("-",
        "A number that only steps with the very same replayed samples have in common; absent without any."),
    "buffer/pairs_share": _M("pairs/prompt", "Preference pairs formed in the step, per fresh prompt of the step."),
    "batch/items": _M("samples", "Samples in the batch: fresh, replayed, and those there only for a preference pair."),
    "batch/lag_mean": _M("versions",
        "Policy versions between an answer's sampling and its training, mean over the step's fresh answers."),
    "batch/lag_max": _M("versions",
        "The largest such number; `controller.lag`, with `rollout.oversample` and `rollout.max_carried`, bounds it."),
    # ---- rollout, with rollout.oversample
    "rollout/carried": _M("share",
        "Groups that an earlier step had begun and left unfinished, of the step's groups."),
    "rollout/carried_max": _M("steps", "Most steps that had left one of them; `rollout.max_carried` bounds it."),
    "rollout/stopped": _M("share", "Answers whose tokens several policy versions drew, of the step's answers."),
    "rollout/versions_mean": _M("versions",
        "Policy version of an answer's last token minus that of its first, mean over the step's answers."),
    "rollout/versions_max": _M("versions", "The largest such number."),
    # ---- sync
    "sync/logprob_gap": _M("nats",
        "Largest difference of rollout and learner log-probability over the probe's tokens, after a sync."),
    "sync/logprob_gap_mean": _M("nats", "The mean difference over the same tokens."),
    "sync/logprob_gap_limit": _M("nats",
        "What `sync/logprob_gap` was allowed to be: 1e-4 or, where the gap was above that, what rounding can do to "
        "this policy (`rollout.logprob_gap_limit`)."),
    "sync/retries": _M("syncs", "Weight syncs that had to be sent a second time because the first probe failed."),
    "sync/seconds": _M("s", "Wall time of the weight transfer and its probe."),
    "sync/megabytes": _M("MB", "Weights sent to each rollout worker (10^6 bytes), a second sending included."),
    # ---- time and throughput
    "time/rollout": _M("s", "Wall time of sampling in the step."),
    "time/reward": _M("s", "Wall time of scoring in the step."),
    "time/blind": _M("s", "Wall time of continuing chosen answers without the picture in the step (DropoutNTP)."),
    "time/buffer": _M("s", "Wall time of the buffer's exchange in the step."),
    "time/learner": _M("s", "Wall time of the learner in the step."),
    "time/sync": _M("s", "Wall time of the weight sync in the step."),
    "time/step": _M("s", "Wall time of the whole training step, without evaluation and checkpoint."),
    "overlap/rollout": _M("s", "Sampling for later steps that ran while the learner worked, in the step."),
    "throughput/samples_per_second": _M("samples/s", "Answers sampled in the step, per second of `time/step`."),
    "throughput/tokens_per_second": _M("tokens/s", "Answer tokens sampled in the step, per second of `time/step`."),
    # ---- eval
    "eval/accuracy": _M("share", "Greedy answers with the full rule score, of the scored evaluation prompts."),
    "eval/accuracy/<kind>": _M("share", "The same for the evaluation prompts of one kind."),
    "eval/rule/<name>": _M("-",
        "Score of the verifier of that name, mean over the scored evaluation prompts that it judged."),
    "eval/format": _M("share", "Greedy answers that keep the form of `reward.answer`, of the scored prompts."),
    "eval/format_of_right": _M("share", "Greedy answers that keep that form, of the right ones."),
    "eval/answer_share": _M("share",
        "Greedy answers in which something was found where `reward.answer` looks, of all of them."),
    "eval/hallucination": _M("share",
        "Greedy answers with at least one false claim about the picture, of the evaluation prompts whose picture has "
        "known facts."),
    "eval/hallucination/<kind>": _M("share", "The same for the evaluation prompts of one kind."),
    "eval/false_claim_share": _M("share", "False claims, of all checkable claims in the greedy answers (CHAIR_i)."),
    "eval/coverage": _M("share",
        "Greedy answers with at least one checkable claim, of the evaluation prompts with known facts."),
    "eval/length_mean": _M("tokens", "Length of a greedy answer, mean over the evaluation prompts."),
    "eval/truncated_share": _M("share", "Greedy answers that the length limit ended, of the evaluation prompts."),
    "eval/reward_model": _M("-", "Raw score of the reward model, mean over the scored evaluation prompts."),
    "eval/reward_model_median": _M("-", "Raw score of the reward model, median over the scored evaluation prompts."),
    "eval/reward_model_iqr": _M("-", "Raw score of the reward model, interquartile range over those prompts."),
    "eval/reward_model_std": _M("-", "Raw score of the reward model, standard deviation over those prompts."),
    "eval/reward_model_largest": _M("-", "Largest absolute raw score of the reward model over those prompts."),
    "eval/model_agreement": _M("share",
        "Pairs whose right answer has the higher score of the reward model, of all pairs of a right and a wrong answer "
        "to any two evaluation prompts."),
    "eval/model_agreement_sd": _M("-",
        "Standard deviation of that share about 1/2 if the reward model knew nothing of right and wrong."),
    "eval/errors": _M("answers", "Greedy answers that could not be scored."),
    "eval/scored": _M("answers", "Greedy answers that could be."),
    "eval/repetition": _M("share", "Token 4-grams that occurred before in the same greedy answer, mean over answers."),
    "eval/gate_rejected": _M("share",
        "Right answers that the reward model scores below the gate, of the right answers with such a score."),
    "eval/gate_hallucination_rejected": _M("share",
        "Answers with a false claim, of the right ones below the gate whose picture has known facts."),
    "eval/gate_hallucination_accepted": _M("share",
        "Answers with a false claim, of the right ones at or above the gate whose picture has known facts."),
    "eval/denial": _M("share", "Answers that deny seeing a picture, of the answers to prompts with a picture."),
    "eval/blind_agreement": _M("share",
        "Prompts whose extracted answer is the same with and without the picture, of the blind prompts."),
    "eval/blind_accuracy": _M("share", "Right answers without the picture, of the prompts scored both times."),
    "eval/blind_accuracy_drop": _M("-", "Accuracy with minus accuracy without the picture, on the same prompts."),
    "eval/blind_prompts": _M("prompts", "Evaluation prompts asked again without their picture."),
    "eval/picture_drop": _M("nats",
        "Log-probability of the greedy answers with the picture minus with most of it blackened, mean over tokens."),
    "eval/probe_seconds": _M("s", "Wall time of the image-blind and the masked-picture probe, a part of eval/seconds."),
    "eval/own/<name>": _M("-", "Metric of a monitor that a plug-in registered."),
    "eval/seconds": _M("s", "Wall time of the evaluation."),
}  # fmt: skip
"""Every metric of the library itself."""


def metric_table(cfg: Config) -> dict[str, MetricInfo]:
    """Every metric that a run may log: :data:`METRICS`, and what the terms of ``algorithm.terms`` declare.

    Raises:
        ConfigError: for such a term that can't be built, or whose metrics have the name of another.
    """
    table = dict(METRICS)
    for term, _ in own_terms(cfg.algorithm):
        names = [f"loss/{term.name}", *(stat.name for stat in term.stats)]
        taken = {n for n in names if n in table or names.count(n) > 1 or any(p.fullmatch(n) for p in _PATTERNS)}
        if taken:
            raise ConfigError(
                f"algorithm.terms: the term {term.name!r} ({term.key}) declares metrics that there are already: "
                f"{', '.join(sorted(taken))}; give each a name of its own, such as {term.name}/…"
            )
        table |= _of_term(term)
    return table


def _pattern(name: str) -> re.Pattern[str]:
    """Regular expression of a table name; ``<kind>`` stands for one non-empty part without a slash."""
    return re.compile("[^/]+".join(re.escape(part) for part in re.split(r"<\w+>", name)))


_PATTERNS = [_pattern(name) for name in METRICS if "<" in name]


def check_names(names: Iterable[str], table: Mapping[str, MetricInfo] = METRICS) -> None:
    """Check that every name (or every key of a metrics dictionary) is defined.

    Args:
        table: :func:`metric_table` of the run, if it has terms of its own.

    Raises:
        MetricError: naming those that are not.
    """
    unknown = [n for n in names if n not in table and not any(p.fullmatch(n) for p in _PATTERNS)]
    if unknown:
        prefixes = sorted({f"{name.split('/')[0]}/" for name in table})
        raise MetricError(
            f"undefined metric {', '.join(map(repr, sorted(unknown)))}; allowed are the names in "
            f"skyrl.monitoring.metrics.METRICS, which begin with {', '.join(prefixes)}"
        )


def markdown() -> str:
    """The text of ``docs/metrics.md``."""
    lines = [
        "# Metrics",
        "",
        "Generated by `python -m skyrl.monitoring.metrics`: change `src/skyrl/monitoring/metrics.py` instead or, for a",
        "statistic of the loss, the term in `src/skyrl/objective/` that declares it. A run with terms of its own",
        "(`algorithm.terms`) has theirs too.",
        "",
        "A *share* is a number in [0, 1], *nats* are natural-log probabilities, `-` has no unit. *Fresh* answers were",
        "sampled for this step, *replayed* ones come from the Selective Sample Buffer; *on-policy* ones were drawn by",
        "the weights that the step starts from. A value without a denominator in a step (no pairs, no pictures) has no",
        "entry there; it is never 0.",
    ]
    rows: dict[str, list[str]] = {}
    for name, info in METRICS.items():
        # A pipe would end the table cell, even inside code.
        text = info.description.replace("|", "\\|")
        rows.setdefault(name.split("/")[0], []).append(f"| `{name}` | {info.unit} | {text} |")
    for section, own in rows.items():
        lines += ["", f"## {section}", "", "| Name | Unit | Meaning |", "|---|---|---|", *own]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
