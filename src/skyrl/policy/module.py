"""The policy as the learner sees it: a vision-language model that returns log-probabilities of given answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from skyrl.objective.reductions import token_logprobs
from skyrl.policy.encode import EncodedBatch
from skyrl.records import ConfigError

LOGIT_TRANSFORMS = ("final_logit_softcapping", "logit_scale", "logits_scaling")
"""Settings of architectures that change logits after the output layer, which :class:`PolicyModule` would leave out."""


def load_policy(folder: str, dtype: str) -> Any:
    """The Hugging Face model in ``folder``: vision-language if its configuration says so, else causal.

    Args:
        folder: What ``save_pretrained`` wrote.
        dtype: Torch name of the type of its parameters.

    Raises:
        ConfigError: if there is no ``config.json`` in the folder.
        OSError: if its weights are missing (transformers' own message names them).
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    if not (Path(folder) / "config.json").is_file():
        raise ConfigError(f"{folder} is not a Hugging Face model folder: it has no config.json")
    config = AutoConfig.from_pretrained(folder)
    kind = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    return kind.from_pretrained(folder, dtype=getattr(torch, dtype))


class PolicyModule(nn.Module):
    """A Hugging Face model whose forward is what training needs, so that DeepSpeed can wrap it.

    Logits are computed at answer positions only: with a vocabulary of 150,000 they would otherwise be most of
    the memory.

    Args:
        model: A Hugging Face causal or image-text-to-text model.
        forbidden_ids: Tokens that the rollout can't sample; they get probability 0 here too, so that both
            sides mean the same distribution. Those beyond the output layer, which nobody could sample, are ignored.
        temperature: The rollout's sampling temperature, for the same reason.

    Raises:
        ConfigError: for an architecture that changes its logits after the output layer (soft-capping, scaling).
    """

    def __init__(self, model: Any, forbidden_ids: Sequence[int], temperature: float = 1.0) -> None:
        super().__init__()
        text_config = model.config.get_text_config()
        for name in LOGIT_TRANSFORMS:
            if getattr(text_config, name, None) is not None:
                raise ConfigError(
                    f"model.policy: {type(model).__name__} changes its logits ({name}={getattr(text_config, name)}); "
                    "such architectures are not supported"
                )
        self.model = model
        self.temperature = temperature
        self.forbidden_ids = tuple(forbidden_ids)

    def forward(self, batch: EncodedBatch, with_entropy: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Log-probabilities float32 [N] of the N answer tokens of the batch, row after row.

        Returns:
            ``(logprobs, entropy)``: entropy float32 [N] in nats, without gradient; None unless ``with_entropy``.
            A forbidden token has log-probability -inf.
        """
        hidden = self.model.base_model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, **batch.pictures
        ).last_hidden_state
        # The token at column j is predicted from the hidden state at column j - 1.
        predicted = hidden[:, :-1][batch.answer_mask[:, 1:]]
        logits = self.model.get_output_embeddings()(predicted)
        targets = batch.input_ids[:, 1:][batch.answer_mask[:, 1:]]
        forbidden = [i for i in self.forbidden_ids if i < logits.shape[-1]]
        logprobs, entropy = token_logprobs(logits, targets, self.temperature, forbidden)
        return logprobs, entropy if with_entropy else None
