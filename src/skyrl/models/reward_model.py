"""The reward model: a vision-language body with a scalar head, r_θ(prompt, answer)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from skyrl.data.encode import EncodedBatch, PromptEncoder
from skyrl.types import SampleGroup, SkyrlError

HEAD_FILE = "reward_head.safetensors"


class RewardModel(nn.Module):
    """Scores whole answers; higher is better, the scale is free (Bradley-Terry).

    Args:
        model: Hugging Face causal or image-text-to-text model; its language head is not used.
        encoder: Chat template and processor of that model.
    """

    def __init__(self, model: Any, encoder: PromptEncoder) -> None:
        super().__init__()
        self.model = model
        self.encoder = encoder
        self.head = nn.Linear(model.get_input_embeddings().embedding_dim, 1)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, batch: EncodedBatch) -> torch.Tensor:
        """float32 [B]: the head applied to the last real token of each row."""
        hidden = self.model.base_model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, **batch.pictures
        ).last_hidden_state
        last = batch.attention_mask.sum(1) - 1
        pooled = hidden[torch.arange(len(last), device=hidden.device), last]
        return self.head(pooled.to(self.head.weight.dtype)).squeeze(-1).float()

    def save(self, folder: Path) -> None:
        """The body as a Hugging Face folder, the head beside it."""
        self.model.save_pretrained(folder)
        self.encoder.processor.save_pretrained(folder)
        save_file({name: t.contiguous() for name, t in self.head.state_dict().items()}, folder / HEAD_FILE)

    @classmethod
    def load(cls, folder: str, dtype: str = "float32") -> RewardModel:
        """Read what :meth:`save` wrote.

        Raises:
            SkyrlError: if the folder has no head.
        """
        from skyrl.models.policy import load_policy

        head = Path(folder) / HEAD_FILE
        if not head.is_file():
            raise SkyrlError(f"model.reward={folder} is no reward model: {HEAD_FILE} is missing there")
        reward_model = cls(load_policy(folder, dtype), PromptEncoder.from_pretrained(folder))
        reward_model.head.load_state_dict(load_file(head))
        return reward_model.eval()


class GroupScorer:
    """Scores all samples of groups in length-sorted batches; what the reward worker calls.

    Args:
        reward_model: Model on its device.
        batch_size: Samples per forward pass.
        policy_encoder: Encoder of the policy, whose token ids the samples carry. If the reward model's tokenizer
            is another one, the answers are encoded again from their text.
    """

    def __init__(self, reward_model: RewardModel, batch_size: int, policy_encoder: PromptEncoder) -> None:
        self.reward_model = reward_model
        self.batch_size = batch_size
        own, policy = reward_model.encoder.tokenizer.get_vocab(), policy_encoder.tokenizer.get_vocab()
        self.same_tokens = own == policy
        self.device = next(reward_model.parameters()).device

    @torch.no_grad()
    def score(self, groups: list[SampleGroup]) -> list[np.ndarray]:
        """Raw scores, one float64 array [G] per group."""
        rows = [self._row(group, i) for group in groups for i in range(len(group.samples))]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i][1]) + len(rows[i][2]))
        scores = np.empty(len(rows))
        for start in range(0, len(order), self.batch_size):
            part = order[start : start + self.batch_size]
            batch = self.reward_model.encoder.collate([rows[i] for i in part]).to(self.device)
            scores[part] = self.reward_model(batch).cpu().numpy()
        ends = np.cumsum([len(group.samples) for group in groups])
        return [scores[end - len(group.samples) : end] for group, end in zip(groups, ends, strict=True)]

    def _row(self, group: SampleGroup, index: int) -> Any:
        sample = group.samples[index]
        if self.same_tokens:
            return group.prompt, group.prompt_ids, sample.token_ids
        encoder = self.reward_model.encoder
        ids = encoder.tokenizer(sample.text, add_special_tokens=False)["input_ids"] + [encoder.tokenizer.eos_token_id]
        return group.prompt, encoder.encode(group.prompt)[0], np.asarray(ids, dtype=np.int32)
