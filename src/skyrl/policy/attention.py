"""How a transformers model runs a forest (:mod:`skyrl.policy.forest`): an attention function, and positions.

The model gets the subtree ends as its attention mask: int64 [1, 1, 1, S]. transformers hands a mask of four dimensions
to the attention function as it is; any other mask means plain rows, which go on to transformers' own function.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.weak import WeakTensorKeyDictionary

from skyrl.policy.encode import TYPE_KEYS, EncodedBatch

NAME = "skyrl_forest"
CHUNK, SHARE = 96, 4
"""Columns whose attention is computed together: so many, or this fraction of the tokens before them in their plain row
where that is more. They see but their own trunk and branches, so the cost grows with what is seen, not with the square
of the row; and all keys and values that are gathered for it are a few times those of the row, not of all plain rows."""
Chunks = tuple[Tensor, list[int], list[int], list[Tensor]]
"""Columns of the keys of all chunks, one chunk after the other; each one's number of queries, and of keys; its mask
[queries, keys]."""

_seen: Any = WeakTensorKeyDictionary()
"""Ends → window → chunks: the layers of a model ask for the same."""


def share_prompts(model: Any) -> None:
    """Let the language model of ``model`` run forests beside plain rows, unless it computes attention with something
    else than torch's ``scaled_dot_product_attention``."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, forest_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    for config in _text_configs(model):
        if config._attn_implementation == "sdpa":
            config._attn_implementation = NAME


def attention_of(model: Any) -> set[str]:
    """Names of the attention functions of its language model; ``{NAME}`` if it can run forests."""
    return {config._attn_implementation for config in _text_configs(model)}


def _text_configs(model: Any) -> list[Any]:
    """Of all parts: those of a language model may have a copy of their own."""
    kind = type(model.config.get_text_config())
    return [config for part in model.modules() if type(config := getattr(part, "config", None)) is kind]


def forest_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **rest: Any
) -> tuple[Tensor, None]:
    """An attention function of transformers' ``AttentionInterface``: query [B, heads, S, D], key and value of as many
    heads or fewer; returns [B, S, heads, D].

    Raises:
        NotImplementedError: for a forest and an option that it can't have.
    """
    from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

    if attention_mask is None or attention_mask.dtype != torch.int64:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **rest)
    if rest.get("position_bias") is not None or rest.get("dropout") or rest.get("is_causal") is False:
        raise NotImplementedError("a row of several answers has no position bias, no dropout, and one direction")
    columns, queries, keys, masks = _chunks(attention_mask, rest.get("sliding_window"))
    if query.device.type != "cpu":  # no kernel of a GPU has both a mask and fewer heads of keys
        key, value = (repeat_kv(tensor, query.shape[1] // tensor.shape[1]) for tensor in (key, value))
    fewer = key.shape[1] < query.shape[1]
    # One gather for all chunks: the backward pass of a slice is as large as the whole.
    parts = [tensor.index_select(2, columns).split(keys, 2) for tensor in (key, value)]
    found = [
        scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=rest.get("scaling"), enable_gqa=fewer)
        for q, k, v, mask in zip(query.split(queries, 2), *parts, masks, strict=True)
    ]
    return torch.cat(found, 2).transpose(1, 2).contiguous(), None


def _chunks(ends: Tensor, window: int | None) -> Chunks:
    windows = _seen.setdefault(ends, {})
    if window not in windows:
        columns, queries, keys, masks = _cut(ends.view(-1).cpu(), window)  # its loop would stop a GPU at every chunk
        masks = [mask.to(ends.device) for mask in masks]
        windows[window] = columns.to(ends.device), queries, keys, masks
    return windows[window]


def _cut(ends: Tensor, window: int | None) -> Chunks:
    """Cut S columns into chunks.

    Args:
        ends: int64 [S], on the CPU.
        window: Number of tokens, itself included, that a token sees of its plain row; None for all.
    """
    every = torch.arange(len(ends))
    depths = every - torch.searchsorted(ends.sort().values, every, right=True)
    roots = every[depths == 0]
    columns, queries, keys, masks = [], [], [], []
    start = 0
    while start < len(ends):
        # Whatever a column of the chunk sees before the chunk, its first column sees too: it lies in the same subtree.
        before = every[:start][ends[:start] > start]
        tree_end = int(ends[before[0]]) if len(before) else len(ends)
        stop = max(start + CHUNK, min(start + len(before) // SHARE, tree_end))
        # Sooner, at the end of a tree: the beginning of the next one would be computed against all of this one for
        # nothing. But not so soon that there are many small chunks.
        whole = roots[(roots > start + CHUNK // 4) & (roots <= stop)]
        own = every[start : int(whole[-1]) if len(whole) and stop < len(ends) else stop]
        seen = torch.cat([before, own])
        mask = (seen <= own[:, None]) & (own[:, None] < ends[seen])
        if window is not None:
            mask &= depths[own][:, None] - depths[seen] < window
        columns.append(seen)
        queries.append(len(own))
        keys.append(len(seen))
        masks.append(mask)
        start += len(own)
    return torch.cat(columns), queries, keys, masks


def last_states(model: Any, batch: EncodedBatch) -> Tensor:
    """[B, L, H]: the last hidden states of a language model, of plain rows or of a forest."""
    base, inputs = model.base_model, dict(batch.pictures)
    if batch.depths is not None:
        inputs["position_ids"] = positions(base, batch)
    out = base(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, **inputs)
    hidden: Tensor = out.last_hidden_state
    return hidden


def states_before(hidden: Tensor, batch: EncodedBatch) -> Tensor:
    """[M, H]: of each of the M answer tokens, the state of the token before it, which predicts it."""
    if batch.parents is None:
        return hidden[:, :-1][batch.answer_mask[:, 1:]]
    return hidden[0, batch.parents[batch.answer_mask[0]]]


def positions(base_model: Any, batch: EncodedBatch) -> Tensor:
    """int64 position ids of a forest's columns: [1, S], those of plain rows; or [3, 1, S] where a picture's tokens have
    positions in three dimensions, which the model's own ``get_rope_index`` knows. An answer goes on behind them."""
    assert batch.depths is not None
    counted = getattr(base_model, "get_rope_index", None)
    if counted is None or not batch.pictures:
        return batch.depths
    tree = (batch.depths[0] == 0).cumsum(0) - 1
    columns = torch.nonzero(~batch.answer_mask[0])[:, 0]
    rows, places = tree[columns], batch.depths[0, columns]
    shape = (int(tree[-1]) + 1, int(places.max()) + 1)

    def plain(flat: Tensor) -> Tensor:
        return flat.new_zeros(shape).index_put((rows, places), flat[columns])

    pictures = {n: plain(t[0]) if n in TYPE_KEYS else t for n, t in batch.pictures.items()}
    accepted = inspect.signature(counted).parameters
    pictures = {name: tensor for name, tensor in pictures.items() if name in accepted}
    ids, real = plain(batch.input_ids[0]), plain(torch.ones_like(tree))
    of_prompts, shifts = counted(input_ids=ids, attention_mask=real, **pictures)
    found = (batch.depths + shifts.view(-1)[tree]).repeat(len(of_prompts), 1, 1)
    found[:, 0, columns] = of_prompts[:, rows, places]
    return found
