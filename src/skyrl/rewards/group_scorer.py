"""Scores whole groups with the reward model; the G samples of a group share the computation of their prompt.

As ``generate`` of transformers does it: first each prompt once, left-padded, keeping its key-value cache; then only the
answers, each on a copy of its prompt's cache. Not every architecture gives the same that way as in one plain pass, so
the scorer compares both before it relies on it, and again for every row longer than those it has compared.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from skyrl.policy.encode import TYPE_KEYS, EncodedBatch, PromptEncoder
from skyrl.policy.packing import Row, distinct_rows
from skyrl.records import DataError, SampleGroup
from skyrl.rewards.reward_model import RewardModel

logger = logging.getLogger(__name__)

COMPARED_PROMPTS = 8
"""Rows that are scored in both ways for a comparison."""
TOLERANCE = {torch.bfloat16: 0.05, torch.float16: 0.01, torch.float32: 1e-3}
"""Largest relative difference of a row's features that counts as rounding."""
LENGTH_SCALED = frozenset({"dynamic", "longrope"})
"""Types of rotary positions that change with the longest row: a prompt alone is another prompt than with an answer."""
NOT_SUPPORTED = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
"""What an architecture may raise that has no such cache or positions."""


class Prefixes(NamedTuple):
    """What the answers need of n prompts that were run together, left-padded to W columns: their key-value cache; their
    mask int64 [n, W], 0 on the padding; and of the last prompt token, which predicts the answer's first, the positions
    int64 [n, 1], or [axes, n, 1] for a body with positions in several axes, and the hidden states [n, 1, H]."""

    cache: Any
    attention_mask: torch.Tensor
    positions: torch.Tensor
    states: torch.Tensor


class GroupScorer:
    """Scores all samples of groups in batches of similar length; what the reward worker calls.

    Args:
        reward_model: Model on its device, in evaluation mode.
        batch_size: Samples per forward pass, and also prompts per forward pass.
        policy_encoder: Encoder of the policy, whose token ids the samples carry. If the reward model has another
            vocabulary, or only one of the chat templates opens the reasoning, answers are encoded again from their
            text. Either way they end as the reward model's own do.
    """

    def __init__(self, reward_model: RewardModel, batch_size: int, policy_encoder: PromptEncoder) -> None:
        self.reward_model = reward_model
        self.encoder, self.policy_encoder = reward_model.encoder, policy_encoder
        self.batch_size = batch_size
        own, policys = ((one.tokenizer.get_vocab(), one.answer_prefix) for one in (self.encoder, policy_encoder))
        self.same_tokens = own == policys
        self.device = next(reward_model.parameters()).device
        self.shares_prompts = not _rope_types(reward_model.model.config) & LENGTH_SCALED
        """Also becomes False when a comparison shows that the body can't."""
        self._compared: dict[bool, int] = {}  # longest row compared so far, without and with pictures

    @torch.no_grad()
    def score(self, groups: list[SampleGroup]) -> list[np.ndarray]:
        """Raw scores, float64 [G] of each group; :class:`DataError` if an answer holds a picture placeholder, or if the
        pictures of two prompts can't be joined."""
        rows, places = distinct_rows([row for group in groups for row in self._rows(group)])
        self._compare_if_longer(rows)
        scores = np.empty(len(rows))
        for part, features in (self.shared_features if self.shares_prompts else self.plain_features)(rows):
            scores[part] = self.reward_model.judge(features).cpu().numpy()
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
        return [(group.prompt, prompt_ids, answer) for answer in answers]

    def plain_features(self, rows: Sequence[Row]) -> Iterator[tuple[list[int], torch.Tensor]]:
        """What the head reads of each row, every row run whole: indices into ``rows``, and these rows' features
        [len(indices), H or H + 3]."""
        for part in self._batches(range(len(rows)), lambda i: _length(rows[i])):
            batch = self.encoder.collate([rows[i] for i in part]).to(self.device)
            yield part, self.reward_model.features(self.reward_model.states(batch), batch)

    def shared_features(self, rows: Sequence[Row], extra_padding: int = 0) -> Iterator[tuple[list[int], torch.Tensor]]:
        """As :meth:`plain_features`, every prompt run once. ``extra_padding`` widens the batches of prompts."""
        of_prompt: dict[tuple[str, str], list[int]] = {}
        for i, (prompt, _, _) in enumerate(rows):
            of_prompt.setdefault(prompt.key, []).append(i)
        for some in self._batches(of_prompt.values(), lambda same: len(rows[same[0]][1])):
            prefixes = self._run_prompts([rows[same[0]] for same in some], extra_padding)
            place = {i: k for k, same in enumerate(some) for i in same}
            for part in self._batches(place, lambda i: len(rows[i][2])):
                chosen = torch.tensor([place[i] for i in part], device=self.device)
                yield part, self._run_answers(prefixes, chosen, [rows[i] for i in part])

    def _batches(self, items: Any, length: Callable[[Any], int]) -> Iterator[list[Any]]:
        """Sorted by length, so that short items aren't padded to long ones."""
        ordered = sorted(items, key=length)
        for start in range(0, len(ordered), self.batch_size):
            yield ordered[start : start + self.batch_size]

    def _run_prompts(self, rows: list[Row], extra_padding: int) -> Prefixes:
        none = np.empty(0, dtype=np.int32)
        width = max(len(prompt_ids) for _, prompt_ids, _ in rows) + extra_padding
        batch = self.encoder.collate([(prompt, ids, none) for prompt, ids, _ in rows], width)
        batch = _left_padded(batch).to(self.device)
        ids, mask, model = batch.input_ids, batch.attention_mask, self.reward_model.model
        # generate's own positions: most bodies count the real tokens, Qwen-VL's also count along the pictures' axes.
        positions = model._prepare_position_ids_for_generation(ids, {"attention_mask": mask, **batch.pictures})
        out = model.base_model(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, **batch.pictures
        )
        return Prefixes(out.past_key_values, mask, positions[..., -1:], out.last_hidden_state[:, -1:])

    def _run_answers(self, prefixes: Prefixes, chosen: torch.Tensor, rows: list[Row]) -> torch.Tensor:
        """Features of the rows' answers; row i belongs to prompt ``chosen[i]``. Column 0 is its last token."""
        batch = self._answers(rows).to(self.device)
        steps = batch.attention_mask.cumsum(1)[:, 1:] - 1  # 1, 2, …, and no further on the padding
        out = self.reward_model.model.base_model(
            input_ids=batch.input_ids[:, 1:],
            attention_mask=torch.cat([prefixes.attention_mask[chosen], batch.attention_mask[:, 1:]], dim=1),
            position_ids=prefixes.positions[..., chosen, :] + steps,
            past_key_values=_selected(prefixes.cache, chosen),
            use_cache=True,
        )
        hidden = torch.cat([prefixes.states[chosen], out.last_hidden_state], dim=1)
        return self.reward_model.features(hidden, batch)

    def _answers(self, rows: list[Row]) -> EncodedBatch:
        """Right-padded rows: the prompt's last token and the answer."""
        lengths = np.array([len(answer) for _, _, answer in rows])
        columns = np.arange(max(2, 1 + lengths.max()))
        ids = np.full((len(rows), len(columns)), self.encoder.pad_id, dtype=np.int64)
        for i, (_, prompt_ids, answer) in enumerate(rows):
            ids[i, 0], ids[i, 1 : 1 + len(answer)] = prompt_ids[-1], answer
        real = torch.from_numpy(columns <= lengths[:, None])
        return EncodedBatch(torch.from_numpy(ids), real.long(), real & torch.from_numpy(columns > 0), {})

    def _compare_if_longer(self, rows: list[Row]) -> None:
        """Some bodies change their ways with the length: sliding windows, positions scaled by it."""
        for pictured in (False, True):
            mine = sorted((row for row in rows if bool(row[0].images) is pictured), key=_length)
            longest = _length(mine[-1]) if mine else 0
            if self.shares_prompts and longest > self._compared.get(pictured, 0):
                self._compared[pictured] = longest
                one_each = sorted({row[0].key: row for row in mine}.values(), key=_length)  # each prompt's longest
                count = min(len(one_each), self.batch_size, COMPARED_PROMPTS)
                spread = np.linspace(len(one_each) - 1, 0, count).astype(int)
                self._compare([one_each[i] for i in spread])

    def _compare(self, rows: list[Row]) -> None:
        """Gives up sharing, with a warning, if it does not make the same features as the plain passes."""
        plain = _in_order(self.plain_features(rows))
        try:
            # Some padding always, also on the longest row: a body may not know left padding.
            shared = _in_order(self.shared_features(rows, extra_padding=1))
        except torch.OutOfMemoryError:  # a RuntimeError, but no fault of the architecture
            raise
        except NOT_SUPPORTED as error:
            problem = f"{type(error).__name__}: {error}"
        else:
            finite = plain.isfinite().all(1)
            gap = ((shared - plain).float().norm(dim=1) / plain.float().norm(dim=1))[finite]
            tolerance = TOLERANCE[plain.dtype]
            if bool((gap <= tolerance).all()):
                return
            problem = f"it changes the features by up to {float(gap.max()):.2g} of their size; allowed: {tolerance}"
        self.shares_prompts = False
        name = type(self.reward_model.model).__name__
        logger.warning("reward model %s: the samples of a group can't share their prompt's pass (%s)", name, problem)


def _rope_types(config: Any) -> set[str]:
    """Types of rotary positions of the language model's layers; empty if it has none."""
    parameters = getattr(config.get_text_config(), "rope_parameters", None) or {}
    by_layer = [part for part in parameters.values() if isinstance(part, dict)]  # Gemma's layers have two types
    return {str(part.get("rope_type")) for part in [parameters, *by_layer]}


def _length(row: Row) -> int:
    return len(row[1]) + len(row[2])


def _in_order(parts: Iterator[tuple[list[int], torch.Tensor]]) -> torch.Tensor:
    """Features of all rows, [N, F]."""
    found = {i: one for indices, features in parts for i, one in zip(indices, features, strict=True)}
    return torch.stack([found[i] for i in range(len(found))])


def _left_padded(batch: EncodedBatch) -> EncodedBatch:
    """The same right-padded rows with their padding in front."""
    width = batch.input_ids.shape[1]
    padding = width - batch.attention_mask.sum(1, keepdim=True)
    source = (torch.arange(width) - padding) % width
    pictures = {name: t.gather(1, source) if name in TYPE_KEYS else t for name, t in batch.pictures.items()}
    ids, attention, answers = (t.gather(1, source) for t in (batch.input_ids, batch.attention_mask, batch.answer_mask))
    return EncodedBatch(ids, attention, answers, pictures)


def _selected(cache: Any, chosen: torch.Tensor) -> Any:
    """A cache of the chosen rows; ``cache`` itself stays as it is. Layers that are more than keys and values, which may
    be changed in place, are a :class:`TypeError`."""
    for layer in cache.layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise TypeError(f"its cache has layers of type {type(layer).__name__}")
    own = copy.copy(cache)
    own.layers = [copy.copy(layer) for layer in cache.layers]
    own.batch_select_indices(chosen)
    return own
