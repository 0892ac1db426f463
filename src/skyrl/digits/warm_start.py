"""Supervised warm start of the embedded models on demonstrations of training scenes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from skyrl.digits.scenes import DigitScenes
from skyrl.policy.encode import PromptEncoder

BATCH = 64
PEAK_LR = 2e-3
Show = Callable[[int, int, float], None]
"""Called with (step, steps, loss)."""


def warm_start(
    model: Any, encoder: PromptEncoder, scenes: DigitScenes, steps: int, show: Show, careless: bool = False
) -> None:
    """Train ``model`` in place on demonstrations of the scenes. Deterministic.

    Args:
        model: Idefics3 model in training mode, fp32.
        encoder: Its encoder.
        scenes: Training split; batch ``i`` takes rows ``i·64 …``.
        steps: Batches.
        show: Called after each.
        careless: Take the careless teacher's demonstrations instead of the faithful ones.
    """

    def loss(step: int) -> torch.Tensor:
        shown = [scenes.with_reasoning(i % len(scenes), careless) for i in range(step * BATCH, (step + 1) * BATCH)]
        answers = encoder.answer_ids([answer for _, answer in shown])
        rows = [(prompt, encoder.encode(prompt)[0], ids) for (prompt, _), ids in zip(shown, answers, strict=True)]
        batch = encoder.collate(rows)
        labels = batch.input_ids.masked_fill(~batch.answer_mask, -100)
        out = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels, **batch.pictures)
        return out.loss

    fit(model, loss, PEAK_LR, (0.9, 0.98), steps, show)


def fit(
    model: Any, loss: Callable[[int], torch.Tensor], peak_lr: float, betas: tuple[float, float], steps: int, show: Show
) -> None:
    """Train ``model`` in place with AdamW on ``loss(step)``, and leave it in evaluation mode."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_lr, weight_decay=0.01, betas=betas)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = peak_lr * learning_rate_factor(step, steps)
        value = loss(step)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        show(step + 1, steps, value.item())
    model.eval()


def learning_rate_factor(step: int, steps: int, warm_up: int = 20) -> float:
    """Linear warm-up, then a cosine down to 5 %."""
    if step < warm_up:
        return (step + 1) / warm_up
    done = (step - warm_up) / max(1, steps - warm_up)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done))


@torch.no_grad()
def sample_answers(
    model: Any, encoder: PromptEncoder, prompts: list[Any], temperature: float, max_new_tokens: int, seed: int
) -> list[str]:
    """One answer per prompt with transformers alone (no rollout engine), used while building the embedded models.

    Args:
        temperature: 0 is greedy.
    """
    encoded = [encoder.encode(prompt) for prompt in prompts]
    width = max(len(ids) for ids, _ in encoded)
    ids = torch.full((len(prompts), width), encoder.pad_id)
    mask = torch.zeros_like(ids)
    for i, (prompt_ids, _) in enumerate(encoded):  # left-padded: every answer starts at the same column
        ids[i, width - len(prompt_ids) :] = torch.from_numpy(prompt_ids.astype(np.int64))
        mask[i, width - len(prompt_ids) :] = 1
    names = {name for _, pictures in encoded for name in pictures}
    pictures = {name: torch.cat([p[name] for _, p in encoded if name in p]) for name in names}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            **pictures,
            do_sample=temperature > 0,
            **({"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}),
            max_new_tokens=max_new_tokens,
            suppress_tokens=encoder.forbidden_token_ids(),
            pad_token_id=encoder.pad_id,
            eos_token_id=encoder.tokenizer.eos_token_id,
        )
    return list(encoder.tokenizer.batch_decode(out[:, width:], skip_special_tokens=True))
