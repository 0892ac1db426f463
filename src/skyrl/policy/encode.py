"""From prompts and answers to the tensors of one forward pass.

Blind to the architecture: whatever picture tensors the model's own processor returns are handed to the
model's own forward. The only assumption is that they can be joined along the picture axis.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from skyrl.records import ConfigError, DataError, Prompt

TEXT_KEYS = frozenset({"input_ids", "attention_mask"})
TYPE_KEYS = frozenset({"token_type_ids", "mm_token_type_ids"})
"""[1, P]: which prompt tokens are a picture's. Qwen's positions and Gemma's attention mask are made from them."""
CACHED_PROMPTS = 2048


@dataclass(slots=True)
class EncodedBatch:
    """Right-padded rows ``prompt + answer``; B rows, L columns."""

    input_ids: torch.Tensor
    """int64 [B, L]."""
    attention_mask: torch.Tensor
    """int64 [B, L]: 1 on prompt and answer, 0 on padding."""
    answer_mask: torch.Tensor
    """bool [B, L]: True on the answer's tokens."""
    pictures: dict[str, torch.Tensor]
    """The processor's picture tensors of all rows, joined in row order, and the token types [B, L] if it makes any
    (0 on answers and padding); ``{}`` without pictures."""

    def to(self, device: torch.device | str) -> EncodedBatch:
        return EncodedBatch(
            self.input_ids.to(device),
            self.attention_mask.to(device),
            self.answer_mask.to(device),
            {name: tensor.to(device) for name, tensor in self.pictures.items()},
        )


class PromptEncoder:
    """Renders prompts with the policy's chat template and encodes them with its processor.

    Args:
        processor: What ``AutoProcessor.from_pretrained`` returns for the policy, or a plain tokenizer for a
            text-only model.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.image_token: str | None = getattr(processor, "image_token", None)
        self.image_token_id: int | None = getattr(processor, "image_token_id", None)
        self.pad_id = int(self.tokenizer.pad_token_id or 0)
        """Fills rows up; 0 where the tokenizer has no such token. The attention mask hides it either way."""
        self._cache: OrderedDict[str, tuple[np.ndarray, dict[str, torch.Tensor]]] = OrderedDict()

    @classmethod
    def from_pretrained(cls, folder: str) -> PromptEncoder:
        from transformers import AutoProcessor

        return cls(AutoProcessor.from_pretrained(folder))

    def forbidden_token_ids(self) -> list[int]:
        """Tokens that the policy must never sample: picture placeholders, padding, other special tokens but
        the end of sequence. A sampled placeholder would make the learner's forward pass fail."""
        ids = {int(i) for i in self.tokenizer.all_special_ids}
        # The former lists named roles only; `<global-img>`, for example, has none.
        ids |= {int(i) for i, added in self.tokenizer.added_tokens_decoder.items() if added.special}
        if self.image_token_id is not None:
            ids.add(int(self.image_token_id))
        if self.tokenizer.pad_token_id is not None:
            ids.add(self.pad_id)
        ids.discard(int(self.tokenizer.eos_token_id))
        return sorted(ids)

    def chat_text(self, prompt: Prompt) -> str:
        """The prompt as text, one placeholder per picture, up to where the answer begins.

        Raises:
            DataError: if the question itself spells out a picture placeholder or the model takes no pictures.
            ConfigError: if the processor has no chat template.
        """
        if all(getattr(part, "chat_template", None) is None for part in (self.processor, self.tokenizer)):
            raise ConfigError(
                "the processor of model.policy or model.reward has no chat template, so no prompt can be written for "
                "it; put that of the model's family into chat_template.jinja in its folder"
            )
        if prompt.images and self.image_token is None:
            raise DataError(f"prompt {prompt.id!r} has {len(prompt.images)} picture(s), but the policy takes text only")
        if self.image_token is not None and self.image_token in prompt.question:
            raise DataError(
                f"prompt {prompt.id!r}: the question contains the picture placeholder {self.image_token!r}; remove it"
            )
        content: Any = [{"type": "image"} for _ in prompt.images] + [{"type": "text", "text": prompt.question}]
        if self.image_token is None:
            content = prompt.question
        text = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        return text

    def text_ids(self, prompt: Prompt) -> list[int]:
        """Token ids of :meth:`chat_text` with each placeholder still a single token, as vLLM wants them."""
        return list(self.tokenizer(self.chat_text(prompt), add_special_tokens=False)["input_ids"])

    def encode(self, prompt: Prompt) -> tuple[np.ndarray, dict[str, torch.Tensor]]:
        """Prompt ids int32 [P], placeholders expanded, and the processor's picture tensors."""
        if prompt.id in self._cache:
            self._cache.move_to_end(prompt.id)
            return self._cache[prompt.id]
        if prompt.images:
            from PIL import Image

            out = self.processor(
                text=self.chat_text(prompt),
                images=[Image.fromarray(i) for i in prompt.images],
                add_special_tokens=False,  # the chat template has written them already, as in text_ids
                return_tensors="pt",
            )
            ids = out["input_ids"][0].numpy().astype(np.int32)
            # Some tokenizers add types that are always 0; their models take none.
            useless = {name for name in TYPE_KEYS & set(out) if not out[name].any()}
            pictures = _picture_axis_first({name: t for name, t in out.items() if name not in TEXT_KEYS | useless})
        else:
            ids, pictures = np.asarray(self.text_ids(prompt), dtype=np.int32), {}
        self._cache[prompt.id] = (ids, pictures)
        if len(self._cache) > CACHED_PROMPTS:
            self._cache.popitem(last=False)
        return ids, pictures

    def collate(self, rows: Sequence[tuple[Prompt, np.ndarray, np.ndarray]], length: int | None = None) -> EncodedBatch:
        """Join rows of (prompt, prompt ids [P] as the rollout saw them, answer ids [T]).

        Args:
            rows: B rows.
            length: Columns; default is the longest row.

        Raises:
            DataError: if the rollout's prompt ids are not the processor's, if an answer holds a picture
                placeholder, or if the pictures of two rows can't be joined.
        """
        width = length or max(len(p) + len(a) for _, p, a in rows)
        ids = np.full((len(rows), width), self.pad_id, dtype=np.int64)
        attention, answers = np.zeros_like(ids), np.zeros(ids.shape, dtype=bool)
        pictures: dict[str, list[torch.Tensor]] = {}
        types: dict[str, torch.Tensor] = {}
        for i, (prompt, prompt_ids, answer_ids) in enumerate(rows):
            own_ids, own_pictures = self.encode(prompt)
            if not np.array_equal(own_ids, prompt_ids):
                raise DataError(
                    f"prompt {prompt.id!r}: the rollout saw {len(prompt_ids)} prompt tokens, the learner's processor "
                    f"makes {len(own_ids)} others; policy folder and processor differ between them"
                )
            if self.image_token_id is not None and (answer_ids == self.image_token_id).any():
                raise DataError(
                    f"prompt {prompt.id!r}: an answer contains picture placeholders (id {self.image_token_id})"
                )
            p, t = len(prompt_ids), len(answer_ids)
            ids[i, :p], ids[i, p : p + t] = prompt_ids, answer_ids
            attention[i, : p + t] = 1
            answers[i, p : p + t] = True
            for name, tensor in own_pictures.items():
                if name in TYPE_KEYS:
                    types.setdefault(name, torch.zeros(ids.shape, dtype=tensor.dtype))[i, :p] = tensor[0]
                else:
                    pictures.setdefault(name, []).append(tensor)
        return EncodedBatch(
            torch.from_numpy(ids), torch.from_numpy(attention), torch.from_numpy(answers), _join(pictures) | types
        )


def _picture_axis_first(pictures: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Idefics and SmolVLM processors return [1, pictures, …]: make it [pictures, 1, …], so that rows with different
    numbers of pictures can be joined. Other processors put pictures or patches first already."""
    if "pixel_attention_mask" in pictures and pictures["pixel_values"].ndim == 5:
        return {name: t.transpose(0, 1) if t.ndim >= 4 else t for name, t in pictures.items()}
    return pictures


def _join(pictures: dict[str, list[torch.Tensor]]) -> dict[str, torch.Tensor]:
    joined = {}
    for name, tensors in pictures.items():
        shapes = {tuple(t.shape[1:]) for t in tensors}
        if len(shapes) > 1:
            raise DataError(f"picture tensors {name!r} of one micro-batch have different shapes: {sorted(shapes)}")
        joined[name] = torch.cat(tensors)
    return joined
