"""The output layer: from hidden states to the log-probabilities of answers, without holding the logits of a large
vocabulary whole. They are worked through in blocks of tokens of the vocabulary, once more in the backward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from skyrl.objective.reductions import token_logprobs

BLOCK_BYTES = 2**26
"""Float32 logits of one block."""
NEVER = -1e30
"""Logit of a forbidden token: its exponential is 0, but other than with -inf, 0 times it is 0 too."""


def answer_logprobs(
    head: Any, hidden: Tensor, ids: Tensor, temperature: float, forbidden_ids: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """As :func:`token_logprobs` of ``head(hidden)``, equal to rounding, gradients too.

    An output layer that is not a plain ``nn.Linear`` (wrapped by LoRA, quantised, …) computes its logits whole.

    Args:
        head: The output layer, with V tokens. Also one whose weight is cut over ranks, and gathered when it is called.
        hidden: [N, H], any float type.
        ids: int64 [N], the token at each position.
        temperature: of sampling, above 0.
        forbidden_ids: Tokens that the sampler can't choose; those beyond the output layer are ignored.

    Returns:
        ``(logprobs, entropy)``, float32 [N] each.

    Raises:
        ValueError: for a token that the output layer does not have.
    """
    if type(head) is not nn.Linear or "forward" in vars(head):
        logits = head(hidden)
        return token_logprobs(logits, ids, temperature, [i for i in forbidden_ids if i < logits.shape[-1]])
    # As a call of the module itself, so that its hooks run: ZeRO-3 gathers the weight in them, for both passes.
    head.forward = partial(_call_in_blocks, head, ids=ids, temperature=temperature, forbidden_ids=forbidden_ids)
    try:
        logprobs, entropy = head(hidden)
    finally:
        del head.forward
    return logprobs, entropy


def _call_in_blocks(head: nn.Linear, hidden: Tensor, ids: Tensor, temperature: float, forbidden_ids: Any) -> Any:
    vocabulary = head.weight.shape[0]
    if len(ids) and int(ids.max()) >= vocabulary:
        raise ValueError(f"token {int(ids.max())} is beyond the output layer; allowed: 0 … {vocabulary - 1}")
    forbidden = sorted(i for i in set(forbidden_ids) if i < vocabulary)
    return _InBlocks.apply(hidden, head.weight, head.bias, ids, temperature, forbidden)


class _InBlocks(torch.autograd.Function):
    """Log-probabilities and entropy [N] of ``hidden`` [N, H], ``weight`` [V, H] and ``bias`` [V]."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        temperature: float,
        forbidden: list[int],
    ) -> tuple[Tensor, Tensor]:
        banned = torch.isin(ids, torch.tensor(forbidden, dtype=ids.dtype, device=ids.device))
        # Over the blocks: the largest logit, Σ e^(z - top), Σ e^(z - top)·(z - top), and the answer's own logit.
        top = torch.full(ids.shape, NEVER, dtype=torch.float32, device=hidden.device)
        total, moment, own = torch.zeros_like(top), torch.zeros_like(top), torch.zeros_like(top)
        # With a frozen layer the gradient of a hidden state is known here but for a factor: no second time is needed.
        frozen = ctx.needs_input_grad[0] and not any(ctx.needs_input_grad[1:3])
        slope = torch.zeros(hidden.shape if frozen else 0, dtype=torch.float32, device=hidden.device)
        for block, logits in _blocks(hidden, weight, bias, temperature, forbidden):
            inside, place = _place(ids, block)
            own = torch.where(inside, logits.gather(1, place).squeeze(1), own)
            higher = torch.maximum(top, logits.amax(-1))
            step = top - higher
            shrink = step.exp()
            moment = shrink * (moment + step * total)
            top, powers = higher, logits.sub_(higher.unsqueeze(1)).exp()
            total = shrink * total + powers.sum(-1)
            if frozen:
                slope.mul_(shrink.unsqueeze(1)).add_(powers.to(hidden.dtype) @ weight[block])
            moment += powers.mul_(logits).sum(-1)
        scale = top + total.log()
        if frozen:
            slope.div_(-total.unsqueeze(1)).add_(weight[ids].masked_fill(banned.unsqueeze(1), 0)).div_(temperature)
            ctx.save_for_backward(slope)
        else:
            ctx.save_for_backward(hidden, weight, bias, ids, banned, scale)
        ctx.frozen, ctx.temperature, ctx.forbidden, ctx.dtype = frozen, temperature, forbidden, hidden.dtype
        entropy = total.log() - moment / total
        ctx.mark_non_differentiable(entropy)
        return (own - scale).masked_fill(banned, -torch.inf), entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.frozen:
            (slope,) = ctx.saved_tensors
            return (slope * grad.unsqueeze(1)).to(ctx.dtype), None, None, None, None, None
        hidden, weight, bias, ids, banned, scale = ctx.saved_tensors
        to_hidden, to_weight, to_bias = ctx.needs_input_grad[:3]
        grad = grad / ctx.temperature
        of_answer = grad.masked_fill(banned, 0)
        # What blocks add up to is kept in float32; of the weight each block has rows of its own.
        d_hidden = torch.zeros_like(hidden, dtype=torch.float32) if to_hidden else None
        d_weight = torch.empty_like(weight) if to_weight else None
        d_bias = torch.empty_like(bias) if to_bias and bias is not None else None
        for block, logits in _blocks(hidden, weight, bias, ctx.temperature, ctx.forbidden):
            inside, place = _place(ids, block)
            d_logits = logits.sub_(scale.unsqueeze(1)).exp_().mul_(-grad.unsqueeze(1))
            d_logits.scatter_add_(1, place, torch.where(inside, of_answer, 0).unsqueeze(1))
            rounded = d_logits.to(hidden.dtype)
            if d_hidden is not None:
                d_hidden += rounded @ weight[block]
            if d_weight is not None:
                torch.mm(rounded.T, hidden, out=d_weight[block])
            if d_bias is not None:
                d_bias[block] = d_logits.sum(0)
        return None if d_hidden is None else d_hidden.to(hidden.dtype), d_weight, d_bias, None, None, None


def _blocks(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, forbidden: list[int]
) -> Iterator[tuple[slice, Tensor]]:
    """Each block of the vocabulary and its logits / temperature, float32 [N, C], which the caller may overwrite."""
    columns = max(256, BLOCK_BYTES // (4 * max(1, len(hidden))))
    for start in range(0, weight.shape[0], columns):
        block = slice(start, min(start + columns, weight.shape[0]))
        own_bias = None if bias is None else bias[block]
        logits = nn.functional.linear(hidden, weight[block], own_bias).float()
        if temperature != 1:
            logits /= temperature
        if inside := [i - start for i in forbidden if start <= i < block.stop]:
            logits[:, inside] = NEVER
        yield block, logits


def _place(ids: Tensor, block: slice) -> tuple[Tensor, Tensor]:
    """bool [N]: the token is in the block; int64 [N, 1]: its column there, any one if it isn't."""
    inside = (ids >= block.start) & (ids < block.stop)
    return inside, (ids - block.start).clamp(0, block.stop - block.start - 1).unsqueeze(1)
