"""The role that scores answers: rule, form and reward model, group advantages, and the check of claims."""

from __future__ import annotations

import math
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

import numpy as np

from skyrl.records import DataError, RewardParts, Sample, SampleGroup
from skyrl.rewards.claims import CHECKERS, check_claims
from skyrl.rewards.format import extract_answer, format_reward
from skyrl.rewards.hybrid import group_advantages, hybrid_reward, length_penalty
from skyrl.rewards.runner import Verdict, VerifierRunner
from skyrl.settings import Config, Truncated

if TYPE_CHECKING:
    from skyrl.rewards.group_scorer import GroupScorer

PLUGINS = "skyrl.plugins"
"""Entry-point group of installed packages whose modules register claim checkers and monitors when imported."""


class Rewarder:
    """Scores whole groups; one of the run's reward workers.

    Args:
        cfg: All settings.
        policy_folder: Hugging Face folder of the policy.
        reward_folder: Folder of the reward model; ``None`` if there is none.
        threads: Of the reward model on a CPU.
    """

    def __init__(self, cfg: Config, policy_folder: str, reward_folder: str | None, threads: int) -> None:
        from skyrl.policy.encode import PromptEncoder

        for plugin in entry_points(group=PLUGINS):
            plugin.load()
        self.cfg = cfg
        encoder = PromptEncoder.from_pretrained(policy_folder, cfg.model.chat_template_kwargs)
        self.answer_prefix = encoder.answer_prefix
        """``<think>`` if the chat template writes it before each answer, else "": a part of the answer's form."""
        self.model: GroupScorer | None = None
        if reward_folder is not None:
            import torch

            from skyrl.rewards.group_scorer import GroupScorer
            from skyrl.rewards.reward_model import RewardModel

            torch.set_num_threads(threads)
            body = RewardModel.load(reward_folder, cfg.model.dtype).to(cfg.reward.device)
            self.model = GroupScorer(body, cfg.reward.model_batch, encoder)
        self.runner = VerifierRunner(cfg.reward.verifier_timeout, cfg.reward.numeric_tolerance, cfg.reward.verifiers)

    def ready(self) -> None:
        """Import the verifiers that the data name here, where they will run: one that can't be is a :class:`DataError`
        before the run starts."""
        from skyrl.data.datasets import build_datasets, verifier_names

        for name in verifier_names(build_datasets(self.cfg).values()):
            self.runner.check(name)

    def score(self, groups: list[SampleGroup]) -> list[SampleGroup]:
        """Fill ``reward``, ``advantage``, ``rule_advantage``, ``claims``, ``false_claims`` and ``error`` in place, and
        the ``mask`` of truncated answers that shall not train (``reward.truncated=leave_out``). Returns ``groups``.

        A sample that can't be scored gets an ``error``, no reward and advantages of 0, and its group's mean and
        standard deviation are taken without it. Fewer than two scored samples (always so in a group of one, as greedy
        evaluation draws) have nothing to be compared with: advantages of 0. Arrays are only read.

        Raises:
            DataError: if a prompt names an unknown verifier or has malformed facts, or if the reward model returns
                arrays of the wrong shape; these are mistakes of the data set or the model, not of a sample.
        """
        for group, model_scores in zip(groups, self._model_scores(groups), strict=True):
            try:
                self._score_group(group, model_scores)
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

    def _score_group(self, group: SampleGroup, model: np.ndarray | None) -> None:
        prompt = group.prompt
        group.checkable = bool(prompt.images) and any(name in CHECKERS for name in prompt.facts)
        scores: list[float | None] = []
        for place, sample in enumerate(group.samples):
            sample.reward, sample.advantage, sample.rule_advantage = None, 0.0, 0.0
            answer, verdict = extract_answer(sample.text), Verdict(0.0, None)  # no answer is wrong, but no error
            if answer is not None:
                verdict = self.runner.verify(prompt.verifier, answer, prompt.answer)
            scores.append(verdict.score)
            problem = verdict.error
            if problem is None and model is not None and not math.isfinite(model[place]):
                problem = f"the reward model gave {model[place]}"
            sample.error = None if problem is None else f"prompt {prompt.id!r}, sample {sample.index}: {problem}"
            claims = check_claims(sample.text, prompt.facts) if group.checkable else []
            sample.claims, sample.false_claims = len(claims), sum(not claim.true for claim in claims)
            if sample.truncated and self.cfg.reward.truncated is Truncated.leave_out:
                sample.mask = np.zeros(len(sample.token_ids), dtype=bool)

        valid = [place for place, sample in enumerate(group.samples) if sample.error is None]
        rules = np.array(scores, dtype=np.float64)[valid]  # None becomes nan, and has an error
        self._fill([group.samples[place] for place in valid], rules, None if model is None else model[valid])

    def _fill(self, samples: list[Sample], rules: np.ndarray, model: np.ndarray | None) -> None:
        """Rewards and advantages of the samples of a group that have a rule score."""
        cfg, length = self.cfg, None
        formats = np.array([format_reward(self.answer_prefix + sample.text) for sample in samples])
        if cfg.reward.truncated is Truncated.soft_penalty:
            tokens = np.array([len(sample.token_ids) for sample in samples])
            length = length_penalty(tokens, cfg.rollout.max_new_tokens, cfg.reward.soft_penalty_tokens)
        totals, noise = hybrid_reward(rules, model, formats, cfg.reward, length)
        for place, sample in enumerate(samples):
            r_model = None if model is None else float(model[place])
            sample.reward = RewardParts(float(rules[place]), float(formats[place]), r_model, float(totals[place]))
        if len(samples) < 2:
            return
        std = cfg.algorithm.grpo.std
        advantages, rule_advantages = group_advantages(totals, std, noise), group_advantages(rules, std)
        for sample, advantage, rule_advantage in zip(samples, advantages, rule_advantages, strict=True):
            sample.advantage, sample.rule_advantage = float(advantage), float(rule_advantage)
