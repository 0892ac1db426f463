"""Per-token log-probabilities from logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_ELEMENTS = 2**26
"""Logits turned to float32 at one time by :func:`token_logprobs` (256 MiB)."""


def token_logprobs(
    logits: Tensor, ids: Tensor, temperature: float = 1.0, forbidden_ids: Sequence[int] = ()
) -> tuple[Tensor, Tensor]:
    """Log-probability of each token and entropy of the distribution it was drawn from.

    The distribution is softmax(logits / temperature) without the forbidden tokens, in float32: the same as
    the rollout engine samples from (without top-p). Large inputs are worked through in chunks which are
    computed again in the backward pass, so beside ``logits`` itself no second array of its size stays.

    Args:
        logits: [..., V], any float type.
        ids: int64 [...], the token at each position.
        temperature: of sampling, above 0.
        forbidden_ids: tokens that the sampler can't choose; each must be in 0 … V-1.

    Returns:
        ``(logprobs, entropy)``, float32 [...] each, entropy in nats and without gradient. The
        log-probability of a forbidden token is -inf (with a zero, not nan, gradient once it is masked).

    Raises:
        ValueError: for a temperature that is not above 0, shapes that do not fit, or a forbidden id
            outside the vocabulary.
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; allowed: above 0")
    if logits.shape[:-1] != ids.shape:
        raise ValueError(
            f"logits have shape {tuple(logits.shape)}, ids {tuple(ids.shape)}; allowed: [..., V] and [...]"
        )
    vocabulary = logits.shape[-1]
    outside = [token for token in forbidden_ids if not 0 <= token < vocabulary]
    if outside:
        raise ValueError(f"forbidden ids {outside} are outside the vocabulary; allowed: 0 … {vocabulary - 1}")
    forbidden = torch.tensor(list(forbidden_ids), dtype=torch.int64, device=logits.device)

    flat, flat_ids = logits.reshape(-1, vocabulary), ids.reshape(-1)
    rows = max(1, CHUNK_ELEMENTS // vocabulary)
    if flat.shape[0] <= rows:
        logprobs, entropy = _rows_logprobs(flat, flat_ids, temperature, forbidden)
    else:
        parts = [
            checkpoint(_rows_logprobs, some, some_ids, temperature, forbidden, use_reentrant=False)
            for some, some_ids in zip(flat.split(rows), flat_ids.split(rows), strict=True)
        ]
        logprobs = torch.cat([part[0] for part in parts])
        entropy = torch.cat([part[1] for part in parts])
    return logprobs.view(ids.shape), entropy.view(ids.shape)


def _rows_logprobs(logits: Tensor, ids: Tensor, temperature: float, forbidden: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`token_logprobs` for [N, V] and [N]."""
    # The division makes a copy, so filling in place leaves the caller's logits alone.
    scaled = (logits.float() / temperature).index_fill_(-1, forbidden, -torch.inf)
    # Gather minus logsumexp keeps one array for the backward pass where log_softmax would keep two.
    logprobs = scaled.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - scaled.logsumexp(-1)
    with torch.no_grad():
        entropy = torch.special.entr(scaled.softmax(-1)).sum(-1)
    return logprobs, entropy
