"""Reward models of other systems. They read whole conversations, written by their own chat template.

A group's samples share no computation here: what a template writes round an answer may differ from what it writes
before one is sampled, and the scores have to be those of the model's own code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from skyrl.policy.encode import PromptEncoder
from skyrl.policy.hub import refuse_pickled
from skyrl.policy.module import load_policy
from skyrl.records import ConfigError, DataError, Prompt, SampleGroup
from skyrl.settings.reward_model import VALUE_HEAD, RewardLayout, tensor_files

Judge = Callable[[dict[str, torch.Tensor]], torch.Tensor]
"""From a batch as the processor makes it to scores [B]."""


class ConversationScorer:
    """Scores all samples of groups in batches of similar length, each text once.

    Args:
        judge: The model.
        encoder: Its chat template and processor.
        batch_size: Conversations per forward pass.
        device: Where the model is.
        policy_encoder: Encoder of the policy: its chat template may have opened the reasoning.
        padding: Text of the padding token; None if the model knows none, and then has one conversation per pass.
    """

    def __init__(
        self,
        judge: Judge,
        encoder: PromptEncoder,
        batch_size: int,
        device: str,
        policy_encoder: PromptEncoder,
        padding: str | None,
    ) -> None:
        self.judge, self.encoder, self.device = judge, encoder, device
        self.batch_size = batch_size if padding is not None else 1
        self.answer_prefix = policy_encoder.answer_prefix
        if padding is not None:
            encoder.tokenizer.pad_token = padding

    @torch.no_grad()
    def score(self, groups: list[SampleGroup]) -> list[np.ndarray]:
        """Raw scores, float64 [G] of each group; nan for an answer that spells out a special token of the reward model,
        which it would take for a real one. A prompt with pictures for a model that takes text only is a
        :class:`DataError`."""
        found: dict[tuple[Any, ...], float] = {}
        keys = [[(*group.prompt.key, sample.text) for sample in group.samples] for group in groups]
        texts = {
            key: (group.prompt, text)
            for group, some in zip(groups, keys, strict=True)
            for key in dict.fromkeys(some)
            if (text := self._text(group.prompt, key[-1])) is not None
        }
        for part in self._batches(texts):
            scores = self.judge(self._inputs([texts[key] for key in part])).float().cpu().numpy()
            found |= dict(zip(part, scores.astype(np.float64).tolist(), strict=True))
        return [np.array([found.get(key, np.nan) for key in some]) for some in keys]

    def _text(self, prompt: Prompt, answer: str) -> str | None:
        if prompt.images and self.encoder.image_token is None:
            raise DataError(f"prompt {prompt.id!r} has pictures, but the reward model of model.reward takes text only")
        self.encoder.check_question(prompt)
        try:
            return self.encoder.answered_text(prompt, self.answer_prefix + answer)
        except DataError:  # the answer's own fault: the prompt was fine
            return None

    def _batches(self, texts: dict[tuple[Any, ...], tuple[Prompt, str]]) -> Iterator[list[tuple[Any, ...]]]:
        """Of equal numbers of pictures, sorted by length, so that short texts aren't padded to long ones."""
        ordered = sorted(texts, key=lambda key: (len(texts[key][0].images), len(texts[key][1])))
        part: list[tuple[Any, ...]] = []
        for key in ordered:
            other = part and len(texts[part[0]][0].images) != len(texts[key][0].images)
            if other or len(part) == self.batch_size:
                yield part
                part = []
            part.append(key)
        if part:
            yield part

    def _inputs(self, rows: list[tuple[Prompt, str]]) -> dict[str, torch.Tensor]:
        texts = [text for _, text in rows]
        how: dict[str, Any] = {"add_special_tokens": False, "return_tensors": "pt"}
        if len(rows) > 1:
            how |= {"padding": True, "padding_side": "right"}
        if not rows[0][0].images:
            out = self.encoder.tokenizer(texts, **how)
            out = {name: out[name] for name in ("input_ids", "attention_mask")}
        else:
            from PIL import Image

            pictures = [[Image.fromarray(picture) for picture in prompt.images] for prompt, _ in rows]
            out = self.encoder.processor(text=texts, images=pictures, **how)
        return {name: tensor.to(self.device) for name, tensor in out.items()}


def load_conversation_scorer(
    folder: str,
    layout: RewardLayout,
    dtype: str,
    device: str,
    batch_size: int,
    policy_encoder: PromptEncoder,
    trust_remote_code: bool = False,
) -> ConversationScorer:
    """A reward model of a foreign layout; weights that are missing or of a wrong shape are a :class:`ConfigError`."""
    encoder = PromptEncoder.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if layout is RewardLayout.value_head:
        judge, padding = _value_head(folder, dtype, device, trust_remote_code), encoder.tokenizer.pad_token
    else:
        judge, pad_id = _classifier(folder, dtype, device, trust_remote_code)
        # Its own code finds the end of a row by this token, whatever the tokenizer pads with.
        padding = None if pad_id is None else encoder.tokenizer.convert_ids_to_tokens(pad_id)
    return ConversationScorer(judge, encoder, batch_size, device, policy_encoder, padding)


def _classifier(folder: str, dtype: str, device: str, trust_remote_code: bool) -> tuple[Judge, int | None]:
    from transformers import AutoModelForSequenceClassification

    refuse_pickled(folder)
    model, info = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=getattr(torch, dtype), output_loading_info=True, trust_remote_code=trust_remote_code
    )
    if missing := sorted(info["missing_keys"]):
        raise ConfigError(f"model.reward={folder}: weights are missing, {', '.join(map(str, missing[:3]))}, …")
    model.to(device).eval()

    def judge(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return model(**inputs).logits[:, 0]

    return judge, model.config.get_text_config().pad_token_id


def _value_head(folder: str, dtype: str, device: str, trust_remote_code: bool) -> Judge:
    files = tensor_files(Path(folder))
    tensors = {}
    for name in VALUE_HEAD:
        if name not in files:
            raise ConfigError(f"model.reward={folder}: no safetensors file there has the tensor {name}")
        with safe_open(files[name], framework="pt") as file:
            tensors[name] = file.get_tensor(name).float().to(device)
    weight, bias = (tensors[name] for name in VALUE_HEAD)
    model = load_policy(folder, dtype, trust_remote_code).to(device).eval()
    hidden = model.get_input_embeddings().embedding_dim
    if tuple(weight.shape) != (1, hidden):
        shape = tuple(weight.shape)
        raise ConfigError(f"model.reward={folder}: {VALUE_HEAD[0]} has shape {shape}; needed: (1, {hidden})")

    def judge(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        states = model.base_model(**inputs, use_cache=False).last_hidden_state
        last = inputs["attention_mask"].sum(1) - 1
        return torch.nn.functional.linear(states[torch.arange(len(last)), last].float(), weight, bias)[:, 0]

    return judge
