"""Scores whole groups: rule, form and reward model, advantages, and the check of claims about the picture."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Protocol

import numpy as np

from skyrl.interfaces import Metrics, flatten
from skyrl.records import DataError, Prompt, RewardParts, Sample, SampleGroup, SkyrlError
from skyrl.rewards.advantages import group_advantages
from skyrl.rewards.claims import CHECKERS, HallucinationRates, check_claims, hallucination_rates
from skyrl.rewards.format import extract_answer, format_reward
from skyrl.rewards.hybrid import hybrid_reward
from skyrl.rewards.repetition import repeated_share
from skyrl.rewards.runner import VerifierRunner
from skyrl.settings import RewardConfig, Std


class ModelScorer(Protocol):
    """A reward model."""

    def score(self, groups: list[SampleGroup]) -> list[np.ndarray]:
        """Raw scores r_θ: one float array [G] per group."""
        ...


class RewardScorer:
    """Implements :class:`skyrl.interfaces.Rewarder`.

    Args:
        cfg: Weights, squashing, verifier limits.
        std: Divisor of the group advantages.
        model: The reward model; ``None`` if there is none, which makes ``RewardParts.model`` ``nan``.
    """

    def __init__(self, cfg: RewardConfig, std: Std, model: ModelScorer | None) -> None:
        self.cfg, self.std, self.model = cfg, std, model
        self._runner = VerifierRunner(cfg.verifier_timeout, cfg.numeric_tolerance)

    def score(self, groups: list[SampleGroup]) -> list[SampleGroup]:
        """Fill ``reward``, ``advantage``, ``rule_advantage``, ``claims``, ``false_claims`` and ``error`` in place.

        A sample that can't be scored gets an ``error``, no reward and advantages of 0, and its group's mean and
        standard deviation are taken without it. Fewer than two scored samples (always so in a group of one, as greedy
        evaluation draws) have nothing to be compared with: advantages of 0. Arrays are only read.

        Returns:
            ``groups`` itself.

        Raises:
            DataError: if a prompt names an unknown verifier or has malformed facts, or if the reward model returns
                arrays of the wrong shape; these are mistakes of the data set or the model, not of a sample.
        """
        for group, model_scores in zip(groups, self._model_scores(groups), strict=True):
            self._score_group(group, model_scores)
        return groups

    def check_verifiers(self, names: Iterable[str]) -> None:
        """Import verifiers where they will run, so that a wrong name or a missing module shows before the run starts.

        Raises:
            DataError: for one that can't be.
        """
        for name in sorted(set(names)):
            self._runner.check(name)

    def close(self) -> None:
        """End the verifier process."""
        self._runner.close()

    def _model_scores(self, groups: list[SampleGroup]) -> list[np.ndarray] | list[None]:
        if self.model is None:
            return [None] * len(groups)
        scores = [np.asarray(part, dtype=np.float64) for part in self.model.score(groups)]
        got, want = [part.shape for part in scores], [(len(group.samples),) for group in groups]
        if got != want:
            raise DataError(f"the reward model returned arrays of shapes {got}; one per group is needed: {want}")
        return scores

    def _score_group(self, group: SampleGroup, model: np.ndarray | None) -> None:
        rules = np.full(len(group.samples), math.nan)
        for place, sample in enumerate(group.samples):
            sample.reward, sample.advantage, sample.rule_advantage = None, 0.0, 0.0
            rules[place], sample.error = self._rule(group.prompt, sample)
            if sample.error is None and model is not None and not math.isfinite(model[place]):
                sample.error = (
                    f"prompt {group.prompt.id!r}, sample {sample.index}: the reward model gave {model[place]}"
                )
            _count_claims(group.prompt, sample)
        group.checkable = is_checkable(group.prompt)

        valid = [place for place, sample in enumerate(group.samples) if sample.error is None]
        samples, rules = [group.samples[place] for place in valid], rules[valid]
        formats = np.array([format_reward(sample.text) for sample in samples])
        model = None if model is None else model[valid]
        totals = hybrid_reward(rules, model, formats, self.cfg)
        for place, sample in enumerate(samples):
            r_model = math.nan if model is None else float(model[place])
            sample.reward = RewardParts(float(rules[place]), float(formats[place]), r_model, float(totals[place]))
        if len(samples) < 2:
            return
        advantages, rule_advantages = group_advantages(totals, self.std), group_advantages(rules, self.std)
        for sample, advantage, rule_advantage in zip(samples, advantages, rule_advantages, strict=True):
            sample.advantage, sample.rule_advantage = float(advantage), float(rule_advantage)

    def _rule(self, prompt: Prompt, sample: Sample) -> tuple[float, str | None]:
        """The verifier's score and ``None``, or ``nan`` and why there is none."""
        answer = extract_answer(sample.text)
        if answer is None:
            return 0.0, None
        try:
            verdict = self._runner.verify(prompt.verifier, answer, prompt.answer)
        except DataError as error:
            raise DataError(f"prompt {prompt.id!r}: {error}") from error
        if verdict.score is None:
            return math.nan, f"prompt {prompt.id!r}, sample {sample.index}: {verdict.error}"
        return verdict.score, None


def _count_claims(prompt: Prompt, sample: Sample) -> None:
    """Fill ``claims`` and ``false_claims``; without a picture or facts that a checker knows nothing can be checked."""
    sample.claims = sample.false_claims = 0
    if not is_checkable(prompt):
        return
    try:
        claims = check_claims(sample.text, prompt.facts)
    except DataError as error:
        raise DataError(f"prompt {prompt.id!r}: {error}") from error
    sample.claims = len(claims)
    sample.false_claims = sum(not claim.true for claim in claims)


def reward_metrics(groups: list[SampleGroup], prefix: str = "reward/") -> Metrics:
    """Means over a list of scored groups: those of :func:`answer_metrics`, and the claims about pictures.

    ``hallucination/rate`` (CHAIR_s), ``.../false_claim_share`` (CHAIR_i) and ``.../coverage`` are over all samples
    whose prompt has a picture and known facts; ``nan`` without such prompts.
    """
    rates = claim_rates(groups)
    return answer_metrics(groups, prefix) | {
        "hallucination/rate": rates.chair_s,
        "hallucination/false_claim_share": rates.chair_i,
        "hallucination/coverage": rates.coverage,
    }


def refuse_all_failed(groups: list[SampleGroup], when: str) -> None:
    """
    Raises:
        SkyrlError: if there are answers and not one could be scored; training would go on with nothing.
    """
    samples = flatten(groups)
    if samples and all(sample.error is not None for sample in samples):
        raise SkyrlError(f"{when}: none of the {len(samples)} answers could be scored; the first: {samples[0].error}")


def answer_metrics(groups: list[SampleGroup], prefix: str = "reward/") -> Metrics:
    """Means over a list of scored groups.

    Keys: ``total``, ``rule``, ``format``, ``model`` and ``accuracy`` (full rule score) are means over the samples
    without an error, ``errors`` counts the others; these six carry ``prefix``. ``response/length_mean`` (tokens),
    ``response/truncated_share`` and ``response/repetition`` (share of repeated token 4-grams) are over all samples.

    A mean over nothing is ``nan``: ``model`` without a reward model, all but ``errors`` without samples.
    """
    samples = flatten(groups)
    rewards = [sample.reward for sample in samples if sample.reward is not None]
    return {
        f"{prefix}total": _mean([reward.total for reward in rewards]),
        f"{prefix}rule": _mean([reward.rule for reward in rewards]),
        f"{prefix}format": _mean([reward.format for reward in rewards]),
        f"{prefix}model": _mean([reward.model for reward in rewards]),
        f"{prefix}errors": float(sum(sample.error is not None for sample in samples)),
        f"{prefix}accuracy": _mean([float(reward.rule >= 1.0) for reward in rewards]),
        "response/length_mean": _mean([len(sample.token_ids) for sample in samples]),
        "response/truncated_share": _mean([float(sample.truncated) for sample in samples]),
        "response/repetition": _mean([repeated_share(sample.token_ids) for sample in samples]),
    }


def claim_rates(groups: list[SampleGroup]) -> HallucinationRates:
    """Rates of false claims over the samples of the scored groups that can be checked."""
    samples = flatten([group for group in groups if group.checkable])
    return hallucination_rates([(sample.claims, sample.false_claims) for sample in samples])


def is_checkable(prompt: Prompt) -> bool:
    """True if claims about the prompt's picture can be checked in this process: it has facts, and one of them a checker
    that was registered here."""
    return bool(prompt.images) and any(name in CHECKERS for name in prompt.facts)


def _mean(values: list[float] | list[int]) -> float:
    return float(np.mean(values)) if values else math.nan
