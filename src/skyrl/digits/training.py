"""Training of the embedded models: a supervised warm start on demonstrations; the reward model on the policy's samples.

Two answers to one scene make a pair when one reasons more faithfully than the other: fewer of its statements differ
from what the scene's own digits give. The label is exact. The loss is Bradley-Terry:
−log σ(r_θ(more faithful) − r_θ(less faithful)).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from skyrl.digits.scenes import DigitScenes
from skyrl.policy.encode import PromptEncoder
from skyrl.records import Prompt, SkyrlError
from skyrl.rewards.reward_model import RewardModel

BATCH = 64
WARM_START_LR, REWARD_LR = 2e-3, 3e-4
"""Peak learning rates."""
PROMPTS_PER_STEP = 12
ANSWERS = 4
SAMPLED_TOGETHER = 120
PAIRS_PER_STEP = 32
CLEAR = 3
"""Errors by which two unfaithful answers must differ to make a pair."""
STATEMENT = re.compile(r"[^,.<>]+")
Show = Callable[[int, float], object]
"""Called with (step from 1, loss) after each step."""


def warm_start(
    model: Any, encoder: PromptEncoder, scenes: DigitScenes, steps: int, show: Show, careless: bool = False
) -> None:
    """Train an fp32 Idefics3 ``model`` in place on demonstrations of the scenes; step ``i`` takes rows ``i·64 …``.

    Args:
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

    fit(model, loss, WARM_START_LR, (0.9, 0.98), steps, show)


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
        show(step + 1, value.item())
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
    """One answer per prompt with transformers alone (no rollout engine); a ``temperature`` of 0 is greedy."""
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


def reasoning_errors(faithful: str, text: str) -> int:
    """How many statements of an answer (what is seen, each step of the computation, the result) are not those of the
    ``faithful`` answer to the same scene. What is seen counts once per digit; missing and surplus ones count too.

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


def build_pairs(
    policy: Any, encoder: PromptEncoder, scenes: DigitScenes, prompts: int, seed: int
) -> list[tuple[Prompt, str, str]]:
    """(prompt, more faithful answer, less faithful answer) from the policy's own samples on the first scenes."""
    scenes_read = [scenes.with_reasoning(row) for row in range(prompts)]
    asked = [prompt for prompt, _ in scenes_read for _ in range(ANSWERS)]
    answers: list[str] = []
    for start in range(0, prompts, SAMPLED_TOGETHER):
        part = asked[start * ANSWERS : (start + SAMPLED_TOGETHER) * ANSWERS]
        answers += sample_answers(policy, encoder, part, 1.0, 48, seed + start)
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
    policy: Any, body: Any, encoder: PromptEncoder, scenes: DigitScenes, steps: int, seed: int, show: Show
) -> tuple[RewardModel, float]:
    """Train a reward model that starts as ``body`` on ``policy``'s samples on the first scenes, in ``steps`` batches.

    Returns:
        The model and its share of rightly ordered pairs on a tenth of the pairs that it was not trained on.

    Raises:
        SkyrlError: if the policy's answers make fewer than two pairs.
    """
    prompts = min(PROMPTS_PER_STEP * steps, len(scenes))
    pairs = build_pairs(policy, encoder, scenes, prompts, seed)
    if len(pairs) < 2:
        raise SkyrlError(
            f"the answers of the embedded policy to {prompts} prompts make {len(pairs)} pairs for the reward model; "
            "allowed: 2 or more: raise digits.warm_start_steps or digits.reward_steps"
        )
    held_out = max(1, len(pairs) // 10)
    train, test = pairs[held_out:], pairs[:held_out]
    model = RewardModel(body, encoder, likelihood=True)
    rng = np.random.default_rng(seed)

    def loss(_step: int) -> torch.Tensor:
        chosen = rng.integers(0, len(train), PAIRS_PER_STEP)
        return -F.logsigmoid(_margins(model, [train[i] for i in chosen])).mean()

    fit(model, loss, REWARD_LR, (0.9, 0.999), steps, show)
    with torch.no_grad():
        margins = torch.cat([_margins(model, test[i : i + 64]) for i in range(0, len(test), 64)])
    return model, float((margins > 0).float().mean())


def _margins(model: RewardModel, pairs: list[tuple[Prompt, str, str]]) -> torch.Tensor:
    """r_θ(better) − r_θ(worse), [len(pairs)]."""
    encoder = model.encoder
    answers = encoder.answer_ids([text for _, better, worse in pairs for text in (better, worse)])
    prompts = [(prompt, encoder.encode(prompt)[0]) for prompt, _, _ in pairs for _ in range(2)]
    scores = model(encoder.collate([(*prompt, ids) for prompt, ids in zip(prompts, answers, strict=True)]))
    return scores[0::2] - scores[1::2]
