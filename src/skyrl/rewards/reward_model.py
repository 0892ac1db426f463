"""The reward model: a vision-language body with a scalar head, r_θ(prompt, answer)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from skyrl.objective.reductions import token_logprobs
from skyrl.policy.encode import EncodedBatch, PromptEncoder
from skyrl.records import SkyrlError
from skyrl.settings.reward_model import HEAD_FILE

LIKELIHOOD_SCALES = (0.1, 1.0, 0.2)
"""Bring sum, mean and minimum of an answer's token log-probabilities to about the same size."""


class RewardModel(nn.Module):
    """Scores whole answers; higher is better, the scale is free (Bradley-Terry).

    Args:
        model: Hugging Face causal or image-text-to-text model.
        encoder: Chat template and processor of that model.
        likelihood: Also give the head what the body's own language head thinks of the answer: sum, mean and minimum of
            its token log-probabilities. A small body learns from few pairs to judge by them; large reward models
            usually have this off.
    """

    def __init__(self, model: Any, encoder: PromptEncoder, likelihood: bool = False) -> None:
        super().__init__()
        self.model = model
        self.encoder = encoder
        self.likelihood = likelihood
        hidden = model.get_input_embeddings().embedding_dim
        self.head = nn.Linear(hidden + (len(LIKELIHOOD_SCALES) if likelihood else 0), 1)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        if likelihood:
            # A likelier answer starts as a better one; training decides how much that counts.
            nn.init.ones_(self.head.weight[:, hidden:])

    def forward(self, batch: EncodedBatch) -> torch.Tensor:
        """float32 [B]: the head applied to the last real token of each row (and the likelihoods)."""
        return self.judge(self.features(self.states(batch), batch))

    def states(self, batch: EncodedBatch) -> torch.Tensor:
        """[B, L, H]: the body's last hidden states."""
        return self.model.base_model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, **batch.pictures
        ).last_hidden_state

    def features(self, hidden: torch.Tensor, batch: EncodedBatch) -> torch.Tensor:
        """[B, H or H + 3]: what the head reads of states [B, L, H]. Columns before the last one ahead of an answer are
        not looked at, so ``batch`` may be whole rows or rows that begin with the prompt's last token."""
        last = batch.attention_mask.sum(1) - 1
        pooled = hidden[torch.arange(len(last), device=hidden.device), last]
        if self.likelihood:
            pooled = torch.cat([pooled, self._likelihoods(hidden, batch).to(pooled.dtype)], dim=1)
        return pooled

    def judge(self, features: torch.Tensor) -> torch.Tensor:
        """float32 [B]: the head applied to :meth:`features`."""
        return self.head(features.to(self.head.weight.dtype)).squeeze(-1).float()

    def _likelihoods(self, hidden: torch.Tensor, batch: EncodedBatch) -> torch.Tensor:
        """[B, 3]: scaled sum, mean and minimum of the answer's token log-probabilities."""
        mask = batch.answer_mask[:, 1:]
        logits = self.model.get_output_embeddings()(hidden[:, :-1][mask])
        flat = token_logprobs(logits, batch.input_ids[:, 1:][mask])[0]
        table = torch.zeros(mask.shape, device=flat.device).masked_scatter(mask, flat)
        total = table.sum(1)
        features = torch.stack([total, total / mask.sum(1), table.min(1).values], dim=1)
        return features * torch.tensor(LIKELIHOOD_SCALES, device=flat.device)

    def save(self, folder: Path) -> None:
        """The body as a Hugging Face folder, the head beside it."""
        self.model.save_pretrained(folder)
        self.encoder.processor.save_pretrained(folder)
        save_file({name: t.contiguous() for name, t in self.head.state_dict().items()}, folder / HEAD_FILE)

    @classmethod
    def load(cls, folder: str, dtype: str = "float32") -> RewardModel:
        """Read what :meth:`save` wrote; a folder without a head is a :class:`SkyrlError`."""
        from skyrl.policy.module import load_policy

        head = Path(folder) / HEAD_FILE
        if not head.is_file():
            raise SkyrlError(f"model.reward={folder} is no reward model: {HEAD_FILE} is missing there")
        weights = load_file(head)
        model = load_policy(folder, dtype)
        likelihood = weights["weight"].shape[1] > model.get_input_embeddings().embedding_dim
        reward_model = cls(model, PromptEncoder.from_pretrained(folder), likelihood)
        reward_model.head.load_state_dict(weights)
        return reward_model.eval()
