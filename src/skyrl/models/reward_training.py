"""Training of the embedded reward model on the warm-started policy's own samples.

Two answers to one scene make a pair when one reasons more faithfully than the other: fewer of its statements
about the picture and of its equations are false. Both the scene's digits and arithmetic are known, so the label
is exact. The loss is Bradley-Terry: −log σ(r_θ(more faithful) − r_θ(less faithful)).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from skyrl.algorithms.hallucination import check_claims
from skyrl.data.encode import PromptEncoder
from skyrl.data.scenes import GRID, DigitScenes
from skyrl.models.reward_model import RewardModel
from skyrl.models.warm_start import learning_rate_factor, sample_answers
from skyrl.types import Prompt

PROMPTS = 640
ANSWERS = 4
PAIRS_PER_STEP = 32
PEAK_LR = 1e-3
EQUATION = re.compile(r"(\d{1,3})([+-])(\d{1,3})=(\d{1,3})")


def reasoning_errors(prompt: Prompt, text: str) -> int:
    """False or missing statements in an answer: digits misread or not named, wrong equations, no answer.

    Example: digits 31/41 read as ``31/47`` and ``3+1=5`` make 2 errors.
    """
    errors = sum(not _holds(*match) for match in EQUATION.findall(text))
    if prompt.images:
        claims = check_claims(text, prompt.facts)
        true = sum(claim.true for claim in claims)
        errors += max(len(claims) - true, GRID * GRID - true)
    return errors + ("</answer>" not in text)


def _holds(left: str, sign: str, right: str, result: str) -> bool:
    a, b = int(left), int(right)
    return (a + b if sign == "+" else a - b) == int(result)


def build_pairs(
    policy: Any, encoder: PromptEncoder, scenes: DigitScenes, seed: int
) -> list[tuple[Prompt, str, str]]:
    """(prompt, more faithful answer, less faithful answer) from the policy's own samples."""
    prompts = [scenes[row] for row in range(PROMPTS)]
    answers = [
        text
        for start in range(0, PROMPTS, 160)
        for text in sample_answers(
            policy, encoder, [p for p in prompts[start : start + 160] for _ in range(ANSWERS)], 1.0, 48, seed + start
        )
    ]
    pairs = []
    for i, prompt in enumerate(prompts):
        own = answers[i * ANSWERS : (i + 1) * ANSWERS]
        ranked = sorted(own, key=lambda text: reasoning_errors(prompt, text))
        for better, worse in ((ranked[0], ranked[-1]), (ranked[0], ranked[1]), (ranked[1], ranked[-1])):
            if reasoning_errors(prompt, better) < reasoning_errors(prompt, worse):
                pairs.append((prompt, better, worse))
    return pairs


def train_reward_model(
    policy: Any,
    encoder: PromptEncoder,
    scenes: DigitScenes,
    steps: int,
    seed: int,
    progress: Callable[[int, int, float], None],
) -> tuple[RewardModel, float]:
    """Build and train the reward model; the body starts from the policy.

    Returns:
        The model and its share of rightly ordered pairs on a tenth of the pairs that it was not trained on.
    """
    pairs = build_pairs(policy, encoder, scenes, seed)
    held_out = max(1, len(pairs) // 10)
    train, test = pairs[held_out:], pairs[:held_out]
    model = RewardModel(copy.deepcopy(policy), encoder)
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
