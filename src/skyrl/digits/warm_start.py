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
Progress = Callable[[int, int, float], None]
"""Called with (step, steps, loss)."""


def warm_start(
    model: Any,
    encoder: PromptEncoder,
    scenes: DigitScenes,
    steps: int,
    progress: Progress,
    careless: bool = False,
) -> None:
    """Train ``model`` in place on demonstrations of the scenes. Deterministic.

    Args:
        careless: Take the careless teacher's demonstrations instead of the faithful ones.
        model: Idefics3 model in training mode, fp32.
        scenes: Training split; batch ``i`` takes rows ``i·64 …``.
        steps: Batches; about 0.3 s each on two cores.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, weight_decay=0.01, betas=(0.9, 0.98))
    eos = encoder.tokenizer.eos_token_id
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LR * learning_rate_factor(step, steps)
        rows = []
        for i in range(step * BATCH, (step + 1) * BATCH):
            row = i % len(scenes)
            prompt, answer = scenes.with_careless_reasoning(row) if careless else scenes.with_reasoning(row)
            ids = [*encoder.tokenizer(answer, add_special_tokens=False)["input_ids"], eos]
            rows.append((prompt, encoder.encode(prompt)[0], np.asarray(ids, dtype=np.int32)))
        batch = encoder.collate(rows)
        labels = batch.input_ids.masked_fill(~batch.answer_mask, -100)
        loss = model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels, **batch.pictures
        ).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        progress(step + 1, steps, loss.item())
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
    generator_state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    encoded = [encoder.encode(prompt) for prompt in prompts]
    width = max(len(ids) for ids, _ in encoded)
    ids = torch.full((len(prompts), width), encoder.pad_id)
    mask = torch.zeros_like(ids)
    for i, (prompt_ids, _) in enumerate(encoded):  # left-padded: every answer starts at the same column
        ids[i, width - len(prompt_ids) :] = torch.from_numpy(prompt_ids.astype(np.int64))
        mask[i, width - len(prompt_ids) :] = 1
    names = {name for _, pictures in encoded for name in pictures}
    pictures = {name: torch.cat([p[name] for _, p in encoded if name in p]) for name in names}
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
        use_cache=True,
    )
    torch.random.set_rng_state(generator_state)
    return list(encoder.tokenizer.batch_decode(out[:, width:], skip_special_tokens=True))
