"""The policy as the learner sees it: the model of a folder, which of its modules are trained (the paper's Table 4), and
the log-probabilities that it gives to answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from skyrl.policy.attention import last_states, states_before
from skyrl.policy.encode import EncodedBatch
from skyrl.policy.hub import refuse_pickled
from skyrl.policy.output_layer import answer_logprobs
from skyrl.policy.processor import remedy
from skyrl.records import ConfigError
from skyrl.settings import Trainable

LOGIT_TRANSFORMS = ("final_logit_softcapping", "logit_scale", "logits_scaling")
"""Settings of architectures that change logits after the output layer, which :class:`PolicyModule` would leave out."""
VISION = ("vision_model.", "vision_tower.", "visual.", "image_encoder.", "vision_encoder.")
ADAPTER = (
    *("connector.", "modality_projection.", "projector.", "mlp1.", "resampler", "aligner.", "vision_adapter."),
    *("vision_projection.", "embed_vision.", "visual_embeddings_table.", "image_newline"),
    *("visual.merger.", "visual.deepstack_merger_list.", "visual.downsample."),
)
TRAINED = {
    Trainable.all: {"vision", "adapter", "language"},
    Trainable.adapter: {"adapter"},
    Trainable.language_and_adapter: {"language", "adapter"},
    Trainable.adapter_and_vision: {"adapter", "vision"},
}


def load_policy(folder: str, dtype: str, trust_remote_code: bool = False) -> Any:
    """The Hugging Face model in ``folder``, parameters of torch type ``dtype``: vision-language if its configuration
    says so, else causal.

    Args:
        trust_remote_code: Run Python files of the folder.

    Raises:
        ConfigError: if there is no ``config.json`` in the folder, it has code of its own that may not run, or its
            weights are pickled.
        OSError: if its weights are missing (transformers' own message names them).
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    if not (Path(folder) / "config.json").is_file():
        raise ConfigError(f"{folder} is not a Hugging Face model folder: it has no config.json")
    refuse_pickled(folder)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except ValueError as error:  # also for an architecture that transformers does not know
        raise ConfigError(f"{folder}: its config.json can't be read: {remedy(error)}") from error
    kind = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    return kind.from_pretrained(folder, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code)


def module_of(name: str) -> str:
    """``vision``, ``adapter`` or ``language`` for a parameter name. Adapters come first: some architectures keep theirs
    inside the vision module."""
    if any(part in name for part in ADAPTER):
        return "adapter"
    return "vision" if any(part in name for part in VISION) else "language"


def freeze(parameters: Iterable[tuple[str, nn.Parameter]], trainable: Trainable) -> dict[str, int]:
    """Set ``requires_grad`` of every parameter and count the trained ones per module.

    Raises:
        ConfigError: if some modules shall be trained and others not, but one of the three has no parameters: the policy
            is a text-only model, or its modules have names that are not known here.
    """
    counts = dict.fromkeys(("adapter", "language", "vision"), 0)
    for name, parameter in parameters:
        part = module_of(name)
        parameter.requires_grad_(part in TRAINED[trainable])
        counts[part] += getattr(parameter, "ds_numel", parameter.numel())
    empty = [part for part, count in counts.items() if count == 0]
    if empty and trainable is not Trainable.all:
        raise ConfigError(
            f"learner.trainable={trainable.value}: the policy has no {' and no '.join(empty)} parameters; "
            "use learner.trainable=all"
        )
    return {part: counts[part] for part in TRAINED[trainable]}


class PolicyModule(nn.Module):
    """A Hugging Face model whose forward is what training needs, so that DeepSpeed can wrap it. Logits are computed at
    answer positions only, and a block of the vocabulary at a time (:mod:`skyrl.policy.output_layer`): they would
    otherwise be most of the memory.

    Args:
        forbidden_ids: Tokens that the rollout can't sample: they get probability 0 here too, so that both sides mean
            the same distribution. Those beyond the output layer are ignored.
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
        """Log-probabilities float32 [N] of the N answer tokens, row after row, -inf for forbidden ones; and entropy
        float32 [N] in nats, without gradient, or None unless ``with_entropy``."""
        predicted = states_before(last_states(self.model, batch), batch)
        targets = batch.input_ids[:, 1:][batch.answer_mask[:, 1:]]
        head = self.model.get_output_embeddings()
        logprobs, entropy = answer_logprobs(head, predicted, targets, self.temperature, self.forbidden_ids)
        return logprobs, entropy if with_entropy else None
