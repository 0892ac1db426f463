"""A learner step written again from its equations, in float64: one row at a time, no padding, no packing, no ranks.

It shares nothing with ``skyrl.learner``, ``skyrl.objective`` or ``skyrl.policy``; the model is transformers' own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from skyrl.policy.encode import PromptEncoder
from skyrl.records import TrainBatch, TrainItem
from skyrl.settings import Config


def load(folder: str, weights: Mapping[str, np.ndarray] | None = None) -> Any:
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(folder).double().eval()
    if weights is not None:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(torch.from_numpy(weights[name]).double())
    return model


def answer_logprobs(model: Any, encoder: PromptEncoder, item: TrainItem, temperature: float) -> torch.Tensor:
    """float64 [T]: log-softmax over the whole vocabulary of the model's own logits."""
    ids = torch.from_numpy(np.concatenate([item.prompt_ids, item.sample.token_ids]).astype(np.int64))[None]
    pictures = {}
    if item.prompt.images:
        pictures = {
            name: t.double() if t.is_floating_point() else t for name, t in encoder.encode(item.prompt)[1].items()
        }
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **pictures).logits[0] / temperature
    logits[:, encoder.forbidden_token_ids()] = -torch.inf
    first = len(item.prompt_ids)
    table = torch.log_softmax(logits, -1)
    return torch.stack([table[first + t - 1, token] for t, token in enumerate(item.sample.token_ids.tolist())])


def batch_mean_reward(batch: TrainBatch, reference: list[torch.Tensor], beta: float) -> float:
    """What one step adds to δ: the mean of βh over both members of all pairs, at the policy that sampled them."""
    recorded = [torch.from_numpy(item.sample.logprobs).double() for item in batch.items]
    return mean_reward(batch, recorded, reference, beta)


def mean_reward(batch: TrainBatch, start: list[torch.Tensor], reference: list[torch.Tensor], beta: float) -> float:
    """The same, for log-probabilities ``start`` of every item at the start of the step."""
    members = [i for pair in batch.pairs for i in (pair.chosen, pair.rejected)]
    return beta * sum(float(trained(batch, i, start[i] - reference[i]).sum()) for i in members) / len(members)


def trained(batch: TrainBatch, i: int, values: torch.Tensor) -> torch.Tensor:
    """The values [T] of an item's tokens that may be trained on."""
    return values[torch.from_numpy(batch.items[i].sample.mask)]


def kl_of_pairs(batch: TrainBatch, current: list[torch.Tensor], reference: list[torch.Tensor]) -> float:
    """Mean over the tokens of all pair members of e^d − d − 1, d = log π_0 − log π_θ."""
    members = [i for pair in batch.pairs for i in (pair.chosen, pair.rejected)]
    d = torch.cat([trained(batch, i, reference[i] - current[i]) for i in members]).detach()
    return float((torch.exp(d) - d - 1).mean())


def step_loss(
    batch: TrainBatch, current: list[torch.Tensor], reference: list[torch.Tensor], delta: float, cfg: Config
) -> torch.Tensor:
    """grpo.weight · (Eq. 8 + KL) + mpo.weight · (Eqs. 2-5) of a whole step, averaged over samples and pairs.

    Of the settings it knows the label smoothing, ``reference_free`` and the end of the generation term's weight.
    """
    grpo, mpo = cfg.algorithm.grpo, cfg.algorithm.mpo
    total = torch.zeros((), dtype=torch.float64)
    for i, item in enumerate(batch.items):
        if item.grpo_weight == 0 or not item.sample.mask.any():
            continue
        recorded = torch.from_numpy(item.sample.logprobs).double()
        logprobs, behaviour, ref = (trained(batch, i, values) for values in (current[i], recorded, reference[i]))
        ratio = torch.exp(logprobs - behaviour)
        advantage = item.sample.advantage
        gain = torch.minimum(ratio * advantage, ratio.clamp(1 - grpo.clip_low, 1 + grpo.clip_high) * advantage)
        d = ref - logprobs
        token_loss = -gain + grpo.kl_weight * (torch.exp(d) - d - 1)
        total = total + grpo.weight * item.grpo_weight * token_loss.mean() / batch.grpo_samples
    done = (batch.step - 1) / (cfg.controller.steps - 1)
    end = mpo.generation_weight if mpo.generation_weight_end is None else mpo.generation_weight_end
    generation_weight = (1 - done) * mpo.generation_weight + done * end
    for pair in batch.pairs:
        own, ends = zip(
            *(
                (trained(batch, i, current[i]), 0.0 if mpo.reference_free else trained(batch, i, reference[i]).sum())
                for i in (pair.chosen, pair.rejected)
            ),
            strict=True,
        )
        chosen, rejected = mpo.beta * (own[0].sum() - ends[0]), mpo.beta * (own[1].sum() - ends[1])
        right, wrong = torch.sigmoid(chosen - rejected), torch.sigmoid(rejected - chosen)
        preference = -(1 - mpo.label_smoothing) * torch.log(right) - mpo.label_smoothing * torch.log(wrong)
        quality = -torch.log(torch.sigmoid(chosen - delta)) - torch.log(torch.sigmoid(-(rejected - delta)))
        generation = -own[0].mean()
        loss = mpo.preference_weight * preference + mpo.quality_weight * quality + generation_weight * generation
        total = total + mpo.weight * loss / len(batch.pairs)
    return total


def gradients(
    folder: str,
    encoder: PromptEncoder,
    batch: TrainBatch,
    weights: Mapping[str, np.ndarray],
    delta: float,
    cfg: Config,
    reference_weights: Mapping[str, np.ndarray] | None = None,
) -> tuple[float, dict[str, np.ndarray], float]:
    """Loss of a step at ``weights``, its gradient by parameter name, and the KL estimate on its pairs.

    The reference is the policy in ``folder``, or the one of ``reference_weights``.
    """
    model, reference_model = load(folder, weights), load(folder, reference_weights)
    temperature = cfg.rollout.temperature
    current = [answer_logprobs(model, encoder, item, temperature) for item in batch.items]
    reference = [answer_logprobs(reference_model, encoder, item, temperature).detach() for item in batch.items]
    loss = step_loss(batch, current, reference, delta, cfg)
    loss.backward()
    found = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    return loss.item(), found, kl_of_pairs(batch, current, reference)


def adamw(
    start: Mapping[str, np.ndarray], steps: list[dict[str, np.ndarray]], rates: list[float], cfg: Config
) -> dict[str, np.ndarray]:
    """Parameters after clipping and torch's AdamW have applied ``steps`` gradients, float64."""
    learner = cfg.learner
    parameters = {name: torch.from_numpy(value).double().requires_grad_() for name, value in start.items()}
    trained = [parameters[name] for name in steps[0]]
    optimizer = torch.optim.AdamW(trained, lr=0.0, betas=learner.betas, weight_decay=learner.weight_decay)
    for gradient, rate in zip(steps, rates, strict=True):
        norm = float(np.sqrt(sum(np.square(g.astype(np.float64)).sum() for g in gradient.values())))
        for name, g in gradient.items():
            parameters[name].grad = torch.from_numpy(g).double() * min(1.0, learner.max_grad_norm / (norm + 1e-6))
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    return {name: p.detach().numpy() for name, p in parameters.items()}
