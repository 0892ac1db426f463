"""The role that scores answers: rule, form and reward model, group advantages, and the check of claims."""

from __future__ import annotations

import math
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

import numpy as np

from skyrl.records import DataError, RewardParts, Sample, SampleGroup, SkyrlError
from skyrl.redaction import redact
from skyrl.rewards.answers import AnswerForm
from skyrl.rewards.claims import CHECKERS, check_claims
from skyrl.rewards.hybrid import group_advantages, hybrid_reward, length_penalty
from skyrl.rewards.judging import Checks, Part, rule_score
from skyrl.rewards.scorers import configured_scale, open_scorer
from skyrl.settings import Config, Squash, Truncated

if TYPE_CHECKING:
    from skyrl.rewards.conversation_scorer import ConversationScorer
    from skyrl.rewards.endpoint import EndpointScorer
    from skyrl.rewards.group_scorer import GroupScorer

PLUGINS = "skyrl.plugins"
"""Entry-point group of installed packages whose modules register claim checkers and monitors when imported."""


class Rewarder:
    """Scores whole groups; one of the run's reward workers.

    Args:
        cfg: All settings.
        policy_folder: Hugging Face folder of the policy.
        reward_folder: Folder or address of the reward model; ``None`` if there is none.
        threads: Of the reward model on a CPU.
    """

    def __init__(self, cfg: Config, policy_folder: str, reward_folder: str | None, threads: int) -> None:
        from skyrl.policy.encode import PromptEncoder

        for plugin in entry_points(group=PLUGINS):
            plugin.load()
        self.cfg = cfg
        answer = cfg.reward.answer
        encoder = PromptEncoder.configured(policy_folder, cfg)
        self.form = AnswerForm(answer, encoder.answer_prefix, cfg.reward.verifier_timeout)
        self.model: GroupScorer | ConversationScorer | EndpointScorer | None = None
        if reward_folder is not None:
            import torch

            torch.set_num_threads(threads)
            self.model = open_scorer(cfg, reward_folder, encoder)
        self.scale = configured_scale(cfg)
        self.checks = Checks(cfg, self.form)

    def ready(self) -> None:
        """Import the verifiers that the data name here, where they will run: one that can't be is a :class:`DataError`
        before the run starts."""
        from skyrl.data.datasets import build_datasets, verifier_names

        self.checks.ready(verifier_names(build_datasets(self.cfg).values()))

    def score(self, groups: list[SampleGroup]) -> list[SampleGroup]:
        """Fill ``answer``, ``reward``, ``advantage``, ``rule_advantage``, ``claims``, ``false_claims`` and ``error`` in
        place, and the ``mask`` of truncated answers that shall not train (``reward.truncated=leave_out``). Returns
        ``groups``.

        A sample that can't be scored gets an ``error``, no reward and advantages of 0, and its group's mean and
        standard deviation are taken without it. Fewer than two scored samples (always so in a group of one, as greedy
        evaluation draws) have nothing to be compared with: advantages of 0. Arrays are only read.

        Raises:
            DataError: if a prompt names an unknown verifier or has malformed facts, or if the reward model returns
                arrays of the wrong shape; these are mistakes of the data set or the model, not of a sample.
        """
        model = self._model_scores(groups)
        for group in groups:
            for sample in group.samples:
                sample.answer, sample.error = None, None
                try:
                    sample.answer = self.form.find(sample.text)
                except DataError as error:
                    sample.error = f"prompt {group.prompt.id!r}, sample {sample.index}: {error}"
        for group, parts, model_scores in zip(groups, self.checks.parts(groups), model, strict=True):
            try:
                self._score_group(group, parts, model_scores)
            except DataError as error:
                raise DataError(f"prompt {group.prompt.id!r}: {error}") from error
        return groups

    def _model_scores(self, groups: list[SampleGroup]) -> list[np.ndarray] | list[None]:
        if self.model is None:
            return [None] * len(groups)
        scores = [np.asarray(part, dtype=np.float64) for part in self.model.score(groups)]
        got, want = [part.shape for part in scores], [(len(group.samples),) for group in groups]
        if got != want:
            raise DataError(f"the reward model returned arrays of shapes {got}; one per group is needed: {want}")
        return scores

    def _score_group(self, group: SampleGroup, parts: list[list[Part]], model: np.ndarray | None) -> None:
        prompt = group.prompt
        group.checkable = bool(prompt.images) and any(name in CHECKERS for name in prompt.facts)
        scores: list[float | None] = []
        for place, sample in enumerate(group.samples):
            sample.reward, sample.advantage, sample.rule_advantage = None, 0.0, 0.0
            score, problem = rule_score(parts[place])
            scores.append(score)
            if problem is None and model is not None and not math.isfinite(model[place]):
                problem = f"the reward model gave {model[place]}"
            if sample.error is None and problem is not None:
                sample.error = redact(f"prompt {prompt.id!r}, sample {sample.index}: {problem}")
            claims = check_claims(sample.text, prompt.facts) if group.checkable else []
            sample.claims, sample.false_claims = len(claims), sum(not claim.true for claim in claims)
            if sample.truncated and self.cfg.reward.truncated is Truncated.leave_out:
                sample.mask = np.zeros(len(sample.token_ids), dtype=bool)

        valid = [place for place, sample in enumerate(group.samples) if sample.error is None]
        rules = np.array(scores, dtype=np.float64)[valid]  # None becomes nan, and has an error
        said = [{part.name: part.verdict.score for part in parts[place]} for place in valid]
        self._fill([group.samples[place] for place in valid], rules, said, None if model is None else model[valid])

    def _scalable(self, model: np.ndarray | None, samples: list[Sample]) -> np.ndarray | None:
        """The reward model's scores, unless their scale is still to be fitted: on the first evaluation, whose groups
        are of one sample and whose totals are without them."""
        if model is None or self.scale is not None or self.cfg.reward.squash not in (Squash.sigmoid, Squash.tanh):
            return model
        self.scale = configured_scale(self.cfg)
        if self.scale is None and len(samples) > 1:
            raise SkyrlError(
                "reward.squash_scale=null, but nothing was fitted before this group: give it a number here, or, in a "
                "training run on several hosts, a run_dir that all of them see"
            )
        return None if self.scale is None else model

    def _fill(
        self, samples: list[Sample], rules: np.ndarray, said: list[dict[str, float | None]], model: np.ndarray | None
    ) -> None:
        """Rewards and advantages of the samples of a group that have a rule score, whose parts are ``said``."""
        cfg, length = self.cfg, None
        formats = np.array([self.form.kept(sample.text, sample.answer) for sample in samples])
        if cfg.reward.truncated is Truncated.soft_penalty:
            tokens = np.array([len(sample.token_ids) for sample in samples])
            length = length_penalty(tokens, cfg.rollout.max_new_tokens, cfg.reward.soft_penalty_tokens)
        totals, noise = hybrid_reward(rules, self._scalable(model, samples), formats, cfg.reward, length, self.scale)
        for place, sample in enumerate(samples):
            r_model = None if model is None else float(model[place])
            parts = {name: score for name, score in said[place].items() if score is not None}
            total = float(totals[place])
            sample.reward = RewardParts(float(rules[place]), float(formats[place]), r_model, total, parts)
        if len(samples) < 2:
            return
        std = cfg.algorithm.grpo.std
        advantages, rule_advantages = group_advantages(totals, std, noise), group_advantages(rules, std)
        for sample, advantage, rule_advantage in zip(samples, advantages, rule_advantages, strict=True):
            sample.advantage, sample.rule_advantage = float(advantage), float(rule_advantage)
