"""The MPO term: Mixed Preference Optimization (Skywork R1V2, Eqs. 2-5).

With h = log π_θ(y|x) − log π_0(y|x), summed over the answer's tokens, c the chosen and r the rejected answer::

    L = w1 · L_preference + w2 · L_quality + w3 · L_generation
    L_preference = −log σ(β h_c − β h_r)                               (DPO)
    L_quality    = −log σ(β h_c − δ) − log σ(−(β h_r − δ))             (BCO)
    L_generation = −log π_θ(y_c|x) / |y_c|                             (NLL)

The sums of :func:`mpo_loss`, over pairs, with the convention of :mod:`skyrl.algorithms.grpo`: ``mpo_loss`` (before the
division), ``mpo_preference``, ``mpo_quality``, ``mpo_generation`` (each without its weight), ``mpo_margin``
(β h_c − β h_r), ``mpo_correct`` (pairs with h_c > h_r; a tie, as at θ = π_0, does not count), ``mpo_chosen_reward``
(β h_c), ``mpo_rejected_reward`` (β h_r), ``mpo_pairs``.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from torch.nn.functional import softplus

from skyrl.algorithms.grpo import Stats
from skyrl.config import MpoConfig


def mpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    chosen_lengths: Tensor,
    delta: float,
    cfg: MpoConfig,
    denominator: int,
) -> tuple[Tensor, Stats]:
    """Mixed preference loss (Skywork R1V2, Eqs. 2-5) of some pairs of a step, to be minimised.

    The sum over the given pairs is divided by the pairs of the whole step, so the losses of all micro-batches
    and ranks add up to the loss of the step.

    Args:
        chosen_logps, rejected_logps: [pairs] log π_θ of the answers, summed over their tokens, with gradient.
        ref_chosen, ref_rejected: [pairs], the same under the reference π_0; no gradient flows into them.
        chosen_lengths: [pairs] answer tokens |y_c|, at least 1.
        delta: δ of :class:`RunningDelta`, already updated with this step.
        cfg: β and w1 … w3; ``cfg.weight`` is not applied here (see ``objective``).
        denominator: pairs in the whole step; 0 if it has none.

    Returns:
        ``(loss, sums)``: a scalar and the sums that the module describes.

    Raises:
        ValueError: for shapes that differ, or a negative denominator.
    """
    _check_pairs(chosen_logps, rejected_logps, ref_chosen, ref_rejected)
    if chosen_lengths.shape != chosen_logps.shape:
        raise ValueError(
            f"chosen_lengths has shape {tuple(chosen_lengths.shape)}; allowed: {tuple(chosen_logps.shape)}"
        )
    if denominator < 0:
        raise ValueError(f"denominator is {denominator}; allowed: 0 or more")
    chosen_reward = cfg.beta * (chosen_logps - ref_chosen.detach())
    rejected_reward = cfg.beta * (rejected_logps - ref_rejected.detach())
    margin = chosen_reward - rejected_reward
    # −log σ(x) = softplus(−x), which does not overflow.
    preference = softplus(-margin)
    quality = softplus(delta - chosen_reward) + softplus(rejected_reward - delta)
    generation = -chosen_logps / chosen_lengths.clamp(min=1)
    total = (
        cfg.preference_weight * preference + cfg.quality_weight * quality + cfg.generation_weight * generation
    ).sum()
    terms = {
        "mpo_preference": preference,
        "mpo_quality": quality,
        "mpo_generation": generation,
        "mpo_margin": margin,
        "mpo_correct": margin > 0,
        "mpo_chosen_reward": chosen_reward,
        "mpo_rejected_reward": rejected_reward,
    }
    sums = {name: term.detach().double().sum() for name, term in terms.items()}
    sums["mpo_loss"] = total.detach().double()
    sums["mpo_pairs"] = total.new_tensor(margin.numel()).double()
    return total / max(denominator, 1), sums


def implicit_reward_sum(
    chosen_logps: Tensor, rejected_logps: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float
) -> Tensor:
    """Σ (β h_c + β h_r) over some pairs, detached float64: the part of δ that one rank sees.

    δ enters the loss non-linearly, so it must be known before the first backward pass, and it must be the
    same for every micro-batch and rank. A learner therefore runs, once a step: log-probabilities of all pair
    members without gradient; this sum over its own pairs; the sum over ranks; ``delta.update(sum / (2 * pairs))``
    with the pairs of the whole step; and only then the loss, with that δ.

    Args:
        chosen_logps, rejected_logps, ref_chosen, ref_rejected: [pairs], as in :func:`mpo_loss`.
        beta: β.

    Raises:
        ValueError: for shapes that differ.
    """
    _check_pairs(chosen_logps, rejected_logps, ref_chosen, ref_rejected)
    shift = chosen_logps - ref_chosen + rejected_logps - ref_rejected
    return beta * shift.detach().double().sum()


class RunningDelta:
    """δ of the quality term: the cumulative mean, over steps, of each step's mean of concat(β h_c, β h_r).

    Every step counts the same, whatever its number of pairs. ``update`` comes before the use in a step's loss,
    so at the first step δ is that step's own mean. δ is state: it belongs into a checkpoint.
    """

    def __init__(self) -> None:
        self.value = 0.0
        self.updates = 0

    def update(self, batch_mean: float) -> float:
        """Take in the mean implicit reward of one whole step and return the new δ.

        Args:
            batch_mean: Σ (β h_c + β h_r) / (2 · pairs) over the whole step; see :func:`implicit_reward_sum`.

        Raises:
            ValueError: if it is not finite.
        """
        batch_mean = float(batch_mean)
        if not math.isfinite(batch_mean):
            raise ValueError(f"mean implicit reward is {batch_mean}; allowed: finite")
        self.updates += 1
        self.value += (batch_mean - self.value) / self.updates
        return self.value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = float(state["value"])
        self.updates = int(state["updates"])


def _check_pairs(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> None:
    shapes = [tuple(tensor.shape) for tensor in (chosen, rejected, ref_chosen, ref_rejected)]
    if len(set(shapes)) != 1 or len(shapes[0]) != 1:
        raise ValueError(f"chosen, rejected and their references have shapes {shapes}; allowed: [pairs] four times")
