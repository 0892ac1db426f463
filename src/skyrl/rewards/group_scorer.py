"""Scores whole groups with the reward model; the samples of a group share the computation of their prompt.

Micro-batches are forests (:mod:`skyrl.policy.forest`), as the learner's are: each prompt with its pictures runs once,
and once what its answers have in common at their beginning. Not every architecture gives the same that way as in one
plain pass, so the model is tried when it is loaded (:mod:`skyrl.policy.trial`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from skyrl.policy.attention import last_states, share_prompts, states_before
from skyrl.policy.encode import EncodedBatch, PromptEncoder
from skyrl.policy.forest import Rows
from skyrl.policy.output_layer import answer_logprobs
from skyrl.policy.packing import Row, distinct_rows, plan_forests
from skyrl.policy.trial import forests_agree
from skyrl.records import DataError, SampleGroup
from skyrl.rewards.reward_model import LIKELIHOOD_SCALES, RewardModel

FOREST_TOKENS = 8192
"""Most tokens of a forest that has more than one row: what attention gathers for it grows with them."""
LENGTH_SCALED = frozenset({"dynamic", "longrope"})
"""Types of rotary positions that change with the longest row of a pass: rows of like length run together."""


class GroupScorer:
    """Scores all samples of groups; what the reward worker calls.

    Args:
        reward_model: Model on its device, in evaluation mode.
        batch_size: Samples per forward pass. A forest has as many tokens as so many samples may have in rows of their
            own, but at most :data:`FOREST_TOKENS`.
        policy_encoder: Encoder of the policy, whose token ids the samples carry. If the reward model has another
            vocabulary, or only one of the chat templates opens the reasoning, answers are encoded again from their
            text. Either way they end as the reward model's own do.
    """

    def __init__(self, reward_model: RewardModel, batch_size: int, policy_encoder: PromptEncoder) -> None:
        self.reward_model, self.model = reward_model, reward_model.model
        self.encoder, self.policy_encoder = reward_model.encoder, policy_encoder
        self.batch_size = batch_size
        own, policys = ((one.tokenizer.get_vocab(), one.answer_prefix) for one in (self.encoder, policy_encoder))
        self.same_tokens = own == policys
        self.device = next(reward_model.parameters()).device
        share_prompts(self.model)
        able = not _rope_types(self.model.config) & LENGTH_SCALED
        self.forests = able and forests_agree(_Body(self.model, self.device), self.encoder, "the reward model")

    @torch.no_grad()
    def score(self, groups: list[SampleGroup]) -> list[np.ndarray]:
        """Raw scores, float64 [G] of each group; :class:`DataError` if an answer holds a picture placeholder, or if the
        pictures of two prompts can't be joined."""
        rows, places = distinct_rows([row for group in groups for row in self._rows(group)])
        scores = np.empty(len(rows))
        for part in self._batches(rows):
            scores[part] = self.reward_model.judge(self._features([rows[i] for i in part])).cpu().numpy()
        ends = np.cumsum([len(group.samples) for group in groups])
        return [scores[places[end - len(group.samples) : end]] for group, end in zip(groups, ends, strict=True)]

    def _rows(self, group: SampleGroup) -> list[Row]:
        own, policy = self.encoder, self.policy_encoder
        prompt_ids = own.encode(group.prompt)[0]
        if self.same_tokens:
            answers = [s.token_ids if s.truncated else own.ended(policy.spoken(s.token_ids)) for s in group.samples]
        else:
            texts = [policy.answer_prefix + sample.text for sample in group.samples]
            answers = own.answer_ids(texts, [sample.truncated for sample in group.samples])
        placeholder = own.image_token_id
        if placeholder is not None and any((answer == placeholder).any() for answer in answers):
            raise DataError(f"prompt {group.prompt.id!r}: an answer contains picture placeholders (id {placeholder})")
        # What was cut off before it said anything has a last token, too.
        return [(group.prompt, prompt_ids, answer if len(answer) else own.ended([])) for answer in answers]

    def _batches(self, rows: list[Row]) -> list[list[int]]:
        """Indices of the rows of each forward pass: forests, or plain rows sorted by length, so that short ones aren't
        padded to long ones."""
        lengths = [len(prompt_ids) + len(answer_ids) for _, prompt_ids, answer_ids in rows]
        if self.forests:
            budget = min(self.batch_size * max(lengths, default=0), FOREST_TOKENS)
            return plan_forests(rows, [], 1, budget)[0]
        ordered = sorted(range(len(rows)), key=lengths.__getitem__)
        return [ordered[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size)]

    def _features(self, some: Sequence[Row]) -> torch.Tensor:
        """[B, H or H + 3] of B rows: what the head reads, see :meth:`RewardModel.features`."""
        rows = Rows.of(some, self.encoder, self.device, self.forests)
        batch, places = rows.encoded, rows.places
        lengths = torch.tensor([len(answer_ids) for _, _, answer_ids in some], device=self.device)
        hidden = last_states(self.model, batch)
        features = hidden[batch.answer_mask][places[lengths.cumsum(0) - 1]]
        if not self.reward_model.likelihood:
            return features
        before, ids = states_before(hidden, batch), batch.input_ids[batch.answer_mask]
        logprobs = answer_logprobs(self.model.get_output_embeddings(), before, ids, 1.0, ())[0]
        mask = torch.arange(int(lengths.max()), device=self.device) < lengths[:, None]
        table = torch.zeros(mask.shape, device=self.device).masked_scatter(mask, logprobs[places])
        total = table.sum(1)
        likelihoods = torch.stack([total, total / lengths, table.min(1).values], dim=1)
        likelihoods *= torch.tensor(LIKELIHOOD_SCALES, device=self.device)
        return torch.cat([features, likelihoods.to(features.dtype)], dim=1)


@dataclass(slots=True)
class _Body:
    """The reward model's body as it is tried."""

    model: Any
    device: torch.device
    collective: bool = False

    @torch.no_grad()
    def score(self, rows: EncodedBatch) -> torch.Tensor:
        """float32 [M, H]: the last states of the answer tokens, each of mean square 1."""
        states = last_states(self.model, rows)[rows.answer_mask].float()
        return torch.nn.functional.rms_norm(states, states.shape[-1:])

    def reduce(self, values: torch.Tensor, operation: Literal["sum", "max"]) -> torch.Tensor:
        return values


def _rope_types(config: Any) -> set[str]:
    """Types of rotary positions of the language model's layers; empty if it has none."""
    parameters = getattr(config.get_text_config(), "rope_parameters", None) or {}
    by_layer = [part for part in parameters.values() if isinstance(part, dict)]  # Gemma's layers have two types
    return {str(part.get("rope_type")) for part in [parameters, *by_layer]}
