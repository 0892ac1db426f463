"""Training of the embedded reward model on the warm-started policy's own samples.

Two answers to one scene make a pair when one reasons more faithfully than the other: fewer of its statements differ
from what the scene's own digits give. The label is exact. The loss is Bradley-Terry:
−log σ(r_θ(more faithful) − r_θ(less faithful)).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from skyrl.digits.scenes import DigitScenes
from skyrl.digits.warm_start import learning_rate_factor, sample_answers
from skyrl.policy.encode import PromptEncoder
from skyrl.records import Prompt
from skyrl.rewards.reward_model import RewardModel

PROMPTS = 480
ANSWERS = 4
PAIRS_PER_STEP = 32
PEAK_LR = 3e-4
CLEAR = 3
"""Errors by which two unfaithful answers must differ to make a pair."""
STATEMENT = re.compile(r"[^,.<>]+")


def reasoning_errors(faithful: str, text: str) -> int:
    """How many statements of an answer are not those of the faithful answer to the same scene.

    Both are cut into statements (what is seen, each step of the computation, the result). What is seen counts
    once per digit. Missing and surplus statements count too.

    Args:
        faithful: From ``DigitScenes.with_reasoning``.
        text: A policy's answer.

    Example: ``I see 31/41. 3+1=4`` against ``I see 31/47. 3+1=5`` gives 2.
    """
    want, got = STATEMENT.findall(faithful), STATEMENT.findall(text)
    errors = abs(len(want) - len(got))
    for a, b in zip(want, got, strict=False):
        if a.startswith("I see "):
            errors += abs(len(a) - len(b)) + sum(x != y for x, y in zip(a, b, strict=False))
        else:
            errors += a.strip() != b.strip()
    return errors


def build_pairs(policy: Any, encoder: PromptEncoder, scenes: DigitScenes, seed: int) -> list[tuple[Prompt, str, str]]:
    """(prompt, more faithful answer, less faithful answer) from the policy's own samples."""
    scenes_read = [scenes.with_reasoning(row) for row in range(PROMPTS)]
    prompts = [prompt for prompt, _ in scenes_read]
    answers = [
        text
        for start in range(0, PROMPTS, 120)
        for text in sample_answers(
            policy, encoder, [p for p in prompts[start : start + 120] for _ in range(ANSWERS)], 1.0, 48, seed + start
        )
    ]
    pairs = []
    for i, (prompt, faithful) in enumerate(scenes_read):
        own = [(reasoning_errors(faithful, text), text) for text in answers[i * ANSWERS : (i + 1) * ANSWERS]]
        ranked = sorted(own, key=lambda pair: pair[0])
        for (few, better), (many, worse) in ((ranked[0], ranked[-1]), (ranked[0], ranked[1]), (ranked[1], ranked[-1])):
            # Two answers that are both wrong in nearly as many places teach little but noise.
            if few < many and (few == 0 or many - few >= CLEAR):
                pairs.append((prompt, better, worse))
    return pairs


def train_reward_model(
    policy: Any,
    body: Any,
    encoder: PromptEncoder,
    scenes: DigitScenes,
    steps: int,
    seed: int,
    progress: Callable[[int, int, float], None],
) -> tuple[RewardModel, float]:
    """Build and train the reward model.

    Args:
        policy: Whose samples are judged.
        body: Where the reward model starts; it is trained in place.
        encoder: Of both.
        scenes: The ``reward`` split.
        steps: Batches of 32 pairs.
        seed: Of sampling and batches.
        progress: Called with (step, steps, loss).

    Returns:
        The model and its share of rightly ordered pairs on a tenth of the pairs that it was not trained on.
    """
    pairs = build_pairs(policy, encoder, scenes, seed)
    held_out = max(1, len(pairs) // 10)
    train, test = pairs[held_out:], pairs[:held_out]
    model = RewardModel(body, encoder, likelihood=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, weight_decay=0.01)
    rng = np.random.default_rng(seed)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LR * learning_rate_factor(step, steps)
        chosen = rng.integers(0, len(train), PAIRS_PER_STEP)
        loss = -F.logsigmoid(_margins(model, [train[i] for i in chosen])).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        progress(step + 1, steps, loss.item())
    model.eval()
    with torch.no_grad():
        margins = torch.cat([_margins(model, test[i : i + 64]) for i in range(0, len(test), 64)])
    return model, float((margins > 0).float().mean())


def _margins(model: RewardModel, pairs: list[tuple[Prompt, str, str]]) -> torch.Tensor:
    """r_θ(better) − r_θ(worse), [len(pairs)]."""
    encoder = model.encoder
    eos = encoder.tokenizer.eos_token_id
    rows = []
    for prompt, better, worse in pairs:
        for text in (better, worse):
            ids = [*encoder.tokenizer(text, add_special_tokens=False)["input_ids"], eos]
            rows.append((prompt, encoder.encode(prompt)[0], np.asarray(ids, dtype=np.int32)))
    scores = model(encoder.collate(rows))
    return scores[0::2] - scores[1::2]
