"""From prompts and answers to the tensors of one forward pass.

Blind to the architecture: whatever picture tensors the model's own processor returns are handed to the
model's own forward. The only assumption is that they can be joined along the picture axis.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from skyrl.policy.chat import ChatTemplate, misplaced
from skyrl.policy.processor import configured_ends, load_processor
from skyrl.records import ConfigError, DataError, Prompt, Turn
from skyrl.settings import Config

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
"""Can be sampled, and stay in texts, even if a tokenizer calls them special; the first opens the reasoning."""
TEXT_KEYS = frozenset({"input_ids", "attention_mask", "labels"})
"""What the learner makes itself; PaliGemma's processor gives labels too."""
TYPE_KEYS = frozenset({"token_type_ids", "mm_token_type_ids"})
"""[1, P]: which prompt tokens are a picture's. Qwen's positions and Gemma's attention mask are made from them."""
PICTURE_ROLES = ("image_token", "video_token", "audio_token")
CACHED_PROMPTS, CACHED_BYTES = 2048, 256 * 2**20
"""Prompts that an encoder keeps encoded: at most so many, and (but for the last) of so many bytes together."""
Encoded = tuple[np.ndarray, dict[str, torch.Tensor]]


@dataclass(slots=True)
class EncodedBatch:
    """Right-padded rows ``prompt + answer``; B rows, L columns. Or one row of all of them: see
    :mod:`skyrl.policy.forest`."""

    input_ids: torch.Tensor
    """int64 [B, L]."""
    attention_mask: torch.Tensor
    """int64 [B, L]: 1 on prompt and answer, 0 on padding. Of a forest the ``ends`` [1, 1, 1, L]."""
    answer_mask: torch.Tensor
    """bool [B, L]: True on the answer's tokens."""
    pictures: dict[str, torch.Tensor]
    """The processor's picture tensors of all rows, joined in row order, and the token types [B, L] if it makes any
    (0 on answers and padding); ``{}`` without pictures."""
    depths: torch.Tensor | None = None
    """int64 [1, L] of a forest; None of plain rows."""
    parents: torch.Tensor | None = None
    """int64 [L] of a forest; None of plain rows."""

    def to(self, device: torch.device | str) -> EncodedBatch:
        ids, attention, answers = (t.to(device) for t in (self.input_ids, self.attention_mask, self.answer_mask))
        pictures = {name: t.to(device) for name, t in self.pictures.items()}
        depths, parents = (None if t is None else t.to(device) for t in (self.depths, self.parents))
        return EncodedBatch(ids, attention, answers, pictures, depths, parents)


class PromptEncoder:
    """Renders prompts with the policy's chat template and encodes them with its processor.

    Args:
        processor: What ``AutoProcessor.from_pretrained`` returns for the policy: of a text model a plain tokenizer.
        chat_template_kwargs: Further variables of the chat template.
        stop_ids: Tokens that may end an answer, beside the tokenizer's end of sequence.
        tags: Those of ``reward.answer``, which open and close the reasoning and the answer.

    Raises:
        ConfigError: if the chat template is missing or of no use, or if nothing can end an answer.
    """

    def __init__(
        self,
        processor: Any,
        chat_template_kwargs: dict[str, Any] | None = None,
        stop_ids: Sequence[int] = (),
        tags: Sequence[str] = TAGS,
    ) -> None:
        self.processor = processor
        self.tokenizer = tokenizer = getattr(processor, "tokenizer", processor)
        self.image_token: str | None = getattr(processor, "image_token", None)
        self.image_token_id: int | None = getattr(processor, "image_token_id", None)
        self.pad_id = int(tokenizer.pad_token_id or 0)
        """Fills rows up; 0 where the tokenizer has no such token: the attention mask hides it."""
        self._chat = ChatTemplate(processor, chat_template_kwargs or {}, in_parts=self.image_token is not None)
        # The former lists named roles only; `<global-img>`, for example, has none.
        added = {int(i): token for i, token in tokenizer.added_tokens_decoder.items()}
        special = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
        special |= {i: str(token) for i, token in added.items() if token.special}
        special.pop(None, None)  # a role may be given to a token that does not exist
        ends = [i for i in (tokenizer.eos_token_id, *stop_ids) if i is not None]
        self.turn_end_id = self._turn_end(special.keys(), ends)
        """The token with which an answer ends by the chat template."""
        self.stop_token_ids = tuple(sorted({self.turn_end_id, *ends}))
        """All tokens that may end an answer."""
        spelled = special | {i: tokenizer.convert_ids_to_tokens(i) for i in self.stop_token_ids}
        self.special_tags = {text: i for i, text in spelled.items() if text in tags}
        """Tags that are special or stop tokens → ids. Engines leave these out of their texts: see ``decode_answer``."""
        self._end_tags = {*self.special_tags.values()} & {*self.stop_token_ids}
        self._hidden = special.keys() - self.special_tags.values()
        opening = self._chat.opening
        self.answer_prefix = tags[0] if opening.rstrip().endswith(tags[0]) else ""
        """``<think>`` if the chat template itself writes it where the answer begins: no answer's text has it then."""
        self._opening = opening[opening.rfind(tags[0]) :] if self.answer_prefix else ""
        roles = [getattr(part, role, None) for part in (processor, tokenizer) for role in PICTURE_ROLES]
        self._placeholders = {token for token in roles if token}
        control = {*special.values(), *(str(added[i]) for i in self.stop_token_ids if i in added)}
        self._control = sorted(self._placeholders | control - {"", *self.special_tags})
        self._cache: dict[tuple[str, str], Encoded] = {}
        self._cached_bytes = 0

    @classmethod
    def from_pretrained(
        cls,
        folder: str,
        chat_template_kwargs: dict[str, Any] | None = None,
        trust_remote_code: bool = False,
        tags: Sequence[str] = TAGS,
    ) -> PromptEncoder:
        """Of a Hugging Face folder, with the stop tokens that its configurations name. Errors: as the class."""
        processor = load_processor(folder, trust_remote_code)
        return cls(processor, chat_template_kwargs, configured_ends(Path(folder), processor), tags)

    @classmethod
    def configured(cls, folder: str, cfg: Config) -> PromptEncoder:
        """Of the policy's folder, as the settings of a run have it. Errors: as the class."""
        model = cfg.model
        return cls.from_pretrained(folder, model.chat_template_kwargs, model.trust_remote_code, cfg.reward.answer.tags)

    def _turn_end(self, special: Set[int], ends: list[int]) -> int:
        """First special or stop token behind an answer, a stop token that begins the next turn, or any of ``ends``."""
        behind, between = self._ids(self._chat.end), self._ids(self._chat.between)
        found = [i for i in behind if i in special or i in ends] + [i for i in between if i in ends] + ends
        if not found:
            raise ConfigError(
                "nothing can end an answer of model.policy or model.reward: its chat template writes no special token "
                "behind one, its tokenizer has no eos_token, and its configurations no eos_token_id"
            )
        return found[0]

    # ------------------------------------------------------------ answers

    def forbidden_token_ids(self) -> list[int]:
        """Tokens that the policy must never sample, ascending: picture placeholders (the learner's forward pass would
        fail), padding and other special tokens, but no stop token and no tag. Some may lie beyond the output layer."""
        ids = {self.image_token_id, self.tokenizer.pad_token_id, *self._hidden}
        ids |= {self.tokenizer.convert_tokens_to_ids(token) for token in self._placeholders}
        return sorted(int(i) for i in ids - {None, *self.stop_token_ids})

    def spoken(self, ids: Sequence[int] | np.ndarray) -> list[int]:
        """An answer's tokens without the stop token at its end; a tag stays, though it may be what ended it."""
        ended = len(ids) > 0 and ids[-1] in self.stop_token_ids and ids[-1] not in self._end_tags
        return [int(i) for i in (ids[:-1] if ended else ids)]

    def decode_answer(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of an answer's tokens with its tags, but without the stop token at its end and other special tokens."""
        shown = [i for i in self.spoken(ids) if i not in self._hidden]
        return str(self.tokenizer.decode(shown, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def ended(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """int32 [T]: :meth:`spoken` tokens and the end of the turn, unless a tag that is a stop token ends them."""
        end = [] if len(ids) and ids[-1] in self._end_tags else [self.turn_end_id]
        return np.asarray([*ids, *end], dtype=np.int32)

    def answer_ids(self, texts: Sequence[str], truncated: Sequence[bool] | None = None) -> list[np.ndarray]:
        """int32 [T] of each whole answer as the policy would have sampled it: without a ``<think>`` that the chat
        template has written already, and with the end of its turn, unless it is ``truncated``."""
        bare = [t.removeprefix(self._opening if t.startswith(self._opening) else self.answer_prefix) for t in texts]
        rows = self.tokenizer(bare, add_special_tokens=False)["input_ids"] if bare else []
        cut = truncated or [False] * len(rows)
        return [np.asarray(ids, np.int32) if no_end else self.ended(ids) for ids, no_end in zip(rows, cut, strict=True)]

    # ------------------------------------------------------------ prompts

    @property
    def opening(self) -> str:
        """What the chat template writes between a question and its answer."""
        return self._chat.opening

    def check_question(self, prompt: Prompt) -> None:
        """Look for what can't be asked, without opening a picture or encoding a word.

        Raises:
            DataError: if one of its texts spells out a special token or a picture placeholder, which the model would
                take for a real one, or if there are pictures and the model takes none.
        """
        if prompt.images and self.image_token is None:
            raise DataError(f"prompt {prompt.id!r} has {len(prompt.images)} picture(s), but the policy takes text only")
        usual = ["<image>"] if prompt.images else []  # many data sets write it, whatever the model's own placeholder is
        for turn in prompt.turns or (Turn("user", (prompt.question,)),):
            text = "".join(part or "" for part in turn.parts)
            found = next((token for token in usual + self._control if token in text), None)
            if found is not None:
                kind = "picture placeholder" if found in {*usual, *self._placeholders} else "special token"
                place = f"{turn.role} turn" if prompt.turns else "question"
                raise DataError(f"prompt {prompt.id!r}: the {place} contains the {kind} {found!r}; remove it")

    def chat_text(self, prompt: Prompt) -> str:
        """The prompt as text, one placeholder per picture, up to where the answer begins.

        Raises:
            DataError: as :meth:`check_question`.
            ConfigError: if the chat template does not write as many placeholders as there are pictures, or can't write
                the conversation as it is.
        """
        self.check_question(prompt)
        pictures, turns = len(prompt.images), prompt.conversation
        try:
            text = self._chat.prompt(turns)
        except ConfigError as error:
            raise ConfigError(f"prompt {prompt.id!r}: {error}") from error
        if self.image_token and (written := text.count(self.image_token)) != pictures:
            what = f"{written} placeholders {self.image_token!r} for {pictures} picture(s)"
            raise ConfigError(f"prompt {prompt.id!r}: the chat template wrote {what}")
        if prompt.turns and (lost := misplaced(text, turns, self.image_token)) is not None:
            where = f"left out or moved past a picture: {lost[:60]!r}"
            raise ConfigError(f"prompt {prompt.id!r}: the chat template changes the conversation; {where}")
        return text

    def answered_text(self, prompt: Prompt, answer: str) -> str:
        """The prompt and an answer to it as the chat template writes a conversation that has ended. Errors: as
        :meth:`chat_text`, also for an answer that spells out a special token."""
        answered = replace(prompt, turns=(*prompt.conversation, Turn("assistant", (answer,))))
        self.check_question(answered)
        return self._chat.prompt(answered.turns, answer_next=False)

    def text_ids(self, prompt: Prompt) -> list[int]:
        """Token ids of :meth:`chat_text` with each placeholder still a single token, as vLLM wants them."""
        return self._ids(self.chat_text(prompt))

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def encode(self, prompt: Prompt) -> Encoded:
        """Prompt ids int32 [P], placeholders expanded, and the processor's picture tensors."""
        found = self._cache.pop(prompt.key, None)
        if found is None:
            found = self.encode_anew(prompt)
            self._cached_bytes += _bytes_of(found)
        self._cache[prompt.key] = found  # behind those that were used longer ago
        while len(self._cache) > 1 and (len(self._cache) > CACHED_PROMPTS or self._cached_bytes > CACHED_BYTES):
            self._cached_bytes -= _bytes_of(self._cache.pop(next(iter(self._cache))))
        return found

    def encode_anew(self, prompt: Prompt) -> Encoded:
        """As :meth:`encode`, past its memory."""
        if not prompt.images:
            return np.asarray(self.text_ids(prompt), dtype=np.int32), {}
        from PIL import Image

        out = self.processor(
            text=self.chat_text(prompt),
            images=[Image.fromarray(picture) for picture in prompt.images],
            add_special_tokens=False,  # the chat template has written them already, as in text_ids
            return_tensors="pt",
        )
        # Some tokenizers add types that are always 0; their models take none.
        useless = {name for name in TYPE_KEYS & set(out) if not out[name].any()}
        pictures = {name: tensor for name, tensor in out.items() if name not in TEXT_KEYS | useless}
        # Idefics and SmolVLM processors return [1, pictures, …]. As [pictures, 1, …] rows with different numbers of
        # pictures can be joined; other processors put pictures or patches first already.
        if "pixel_attention_mask" in pictures and pictures["pixel_values"].ndim == 5:
            pictures = {name: t.transpose(0, 1) if t.ndim >= 4 else t for name, t in pictures.items()}
        return out["input_ids"][0].numpy().astype(np.int32), pictures

    def collate(self, rows: Sequence[tuple[Prompt, np.ndarray, np.ndarray]], length: int | None = None) -> EncodedBatch:
        """Join B rows of (prompt, prompt ids [P] as the rollout saw them, answer ids [T]) in ``length`` columns, by
        default those of the longest row.

        Raises:
            DataError: if the rollout's prompt ids are not the processor's, if an answer holds a picture placeholder, or
                if the pictures of two rows can't be joined.
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
            image = self.image_token_id
            if image is not None and (answer_ids == image).any():
                raise DataError(f"prompt {prompt.id!r}: an answer contains picture placeholders (id {image})")
            p, end = len(prompt_ids), len(prompt_ids) + len(answer_ids)
            ids[i, :p], ids[i, p:end] = prompt_ids, answer_ids
            attention[i, :end], answers[i, p:end] = 1, True
            for name, tensor in own_pictures.items():
                if name in TYPE_KEYS:
                    types.setdefault(name, torch.zeros(ids.shape, dtype=tensor.dtype))[i, :p] = tensor[0]
                else:
                    pictures.setdefault(name, []).append(tensor)
        return EncodedBatch(
            torch.from_numpy(ids), torch.from_numpy(attention), torch.from_numpy(answers), _join(pictures) | types
        )


def _join(pictures: dict[str, list[torch.Tensor]]) -> dict[str, torch.Tensor]:
    joined = {}
    for name, tensors in pictures.items():
        shapes = {tuple(t.shape[1:]) for t in tensors}
        if len(shapes) > 1:
            raise DataError(f"picture tensors {name!r} of one micro-batch have different shapes: {sorted(shapes)}")
        joined[name] = torch.cat(tensors)
    return joined


def _bytes_of(encoded: Encoded) -> int:
    ids, pictures = encoded
    return ids.nbytes + sum(tensor.nbytes for tensor in pictures.values())
