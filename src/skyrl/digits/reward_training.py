"""Training of the embedded reward model on the warm-started policy's own samples.

Two answers to one scene make a pair when one reasons more faithfully than the other: fewer of its statements differ
from what the scene's own digits give. The label is exact. The loss is Bradley-Terry:
−log σ(r_θ(more faithful) − r_θ(less faithful)).
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from skyrl.digits.scenes import DigitScenes
from skyrl.digits.warm_start import Show, fit, sample_answers
from skyrl.policy.encode import PromptEncoder
from skyrl.records import Prompt, SkyrlError
from skyrl.rewards.reward_model import RewardModel

PROMPTS_PER_STEP = 12
ANSWERS = 4
SAMPLED_TOGETHER = 120
PAIRS_PER_STEP = 32
PEAK_LR = 3e-4
CLEAR = 3
"""Errors by which two unfaithful answers must differ to make a pair."""
STATEMENT = re.compile(r"[^,.<>]+")


def reasoning_errors(faithful: str, text: str) -> int:
    """How many statements of an answer ``text`` are not those of the ``faithful`` answer to the same scene.

    Both are cut into statements (what is seen, each step of the computation, the result). What is seen counts
    once per digit. Missing and surplus statements count too.

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
    """Build and train the reward model.

    Args:
        policy: Whose samples are judged, on the first scenes of the ``reward`` split.
        body: Where the reward model starts; it is trained in place, by ``steps`` batches of 32 pairs.
        encoder: Of both.
        seed: Of sampling and batches.
        show: Called after each step.

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

    fit(model, loss, PEAK_LR, (0.9, 0.999), steps, show)
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
