"""The MPO term: Mixed Preference Optimization (Skywork R1V2, Eqs. 2-5).

With h = log π_θ(y|x) − log π_0(y|x), summed over the answer's tokens, c the chosen and r the rejected answer, and
m = β h_c − β h_r::

    L = w1 · L_preference + w2 · L_quality + w3 · L_generation
    L_preference = −(1 − ε) log σ(m) − ε log σ(−m)                     (DPO; conservative DPO where ε > 0)
    L_quality    = −log σ(β h_c − δ) − log σ(−(β h_r − δ))             (BCO)
    L_generation = −log π_θ(y_c|x) / |y_c|                             (NLL)

ε, ``label_smoothing``, is the probability that a pair's labels are the wrong way round (Mitchell, 2023); the paper has
0. Without a reference (``reference_free``, or nothing but L_generation is trained) h = log π_θ, in the statistics too.

The sums of :func:`mpo_loss`, over pairs, with the convention of :mod:`skyrl.objective.grpo`: ``mpo_loss`` (before the
division), ``mpo_preference``, ``mpo_quality``, ``mpo_generation`` (each without its weight), ``mpo_margin`` (m),
``mpo_correct`` (pairs with h_c > h_r; a tie, as at θ = π_0, does not count), ``mpo_chosen_reward`` (β h_c),
``mpo_rejected_reward`` (β h_r), ``mpo_pairs``.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from torch.nn.functional import softplus

from skyrl.objective.grpo import Stats
from skyrl.settings import DeltaKind, MpoConfig


def loss_weights(cfg: MpoConfig, progress: float) -> tuple[float, float, float]:
    """``(w1, w2, w3)`` at a point of the run: linear from ``X_weight`` to ``X_weight_end``, constant if that is null.

    Args:
        progress: 0 at the first step of the run, 1 at its last.

    Raises:
        ValueError: for progress outside 0 … 1.
    """
    if not 0 <= progress <= 1:
        raise ValueError(f"progress is {progress}; allowed: 0 … 1")

    def at(start: float, end: float | None) -> float:
        return start if end is None else start + (end - start) * progress

    return (
        at(cfg.preference_weight, cfg.preference_weight_end),
        at(cfg.quality_weight, cfg.quality_weight_end),
        at(cfg.generation_weight, cfg.generation_weight_end),
    )


def uses_delta(cfg: MpoConfig) -> bool:
    """True if the quality term, which alone reads δ, has a weight at any step."""
    return cfg.quality_weight > 0 or (cfg.quality_weight_end or 0.0) > 0


def compares_with_reference(cfg: MpoConfig) -> bool:
    """True if the preference or the quality term has a weight at any step and is relative to π_0."""
    preference = cfg.preference_weight > 0 or (cfg.preference_weight_end or 0.0) > 0
    return not cfg.reference_free and (preference or uses_delta(cfg))


def mpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen: Tensor | None,
    ref_rejected: Tensor | None,
    chosen_lengths: Tensor,
    delta: float,
    cfg: MpoConfig,
    denominator: int,
    weights: tuple[float, float, float],
) -> tuple[Tensor, Stats]:
    """Mixed preference loss (Skywork R1V2, Eqs. 2-5) of some pairs of a step, to be minimised.

    The sum over the given pairs is divided by the pairs of the whole step, so the losses of all micro-batches
    and ranks add up to the loss of the step.

    Args:
        chosen_logps, rejected_logps: [pairs] log π_θ of the answers, summed over their tokens, with gradient.
        ref_chosen, ref_rejected: [pairs], the same under the reference π_0; no gradient flows into them. Not read with
            ``cfg.reference_free``; both None where nothing compares with a reference.
        chosen_lengths: [pairs] answer tokens |y_c|, at least 1.
        delta: δ of :class:`RunningDelta`, already updated with this step.
        cfg: β and ε; ``cfg.weight`` is not applied here (see ``objective``).
        denominator: pairs in the whole step; 0 if it has none.
        weights: w1 … w3 of :func:`loss_weights`.

    Returns:
        ``(loss, sums)``: a scalar and the sums that the module describes.

    Raises:
        ValueError: for shapes that differ, a negative denominator, or a missing reference where ``cfg`` has terms that
            compare with one.
    """
    if cfg.reference_free:
        ref_chosen = ref_rejected = None
    elif ref_chosen is None and compares_with_reference(cfg):
        raise ValueError("the reference is None; allowed: [pairs], or algorithm.mpo.reference_free")
    if chosen_lengths.shape != chosen_logps.shape:
        raise ValueError(
            f"chosen_lengths has shape {tuple(chosen_lengths.shape)}; allowed: {tuple(chosen_logps.shape)}"
        )
    if denominator < 0:
        raise ValueError(f"denominator is {denominator}; allowed: 0 or more")
    chosen_shift, rejected_shift = _shifts(chosen_logps, rejected_logps, ref_chosen, ref_rejected)
    chosen_reward, rejected_reward = cfg.beta * chosen_shift, cfg.beta * rejected_shift
    margin = chosen_reward - rejected_reward
    # −log σ(x) = softplus(−x), which does not overflow.
    preference = (1 - cfg.label_smoothing) * softplus(-margin) + cfg.label_smoothing * softplus(margin)
    quality = softplus(delta - chosen_reward) + softplus(rejected_reward - delta)
    generation = -chosen_logps / chosen_lengths.clamp(min=1)
    w1, w2, w3 = weights
    total = (w1 * preference + w2 * quality + w3 * generation).sum()
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
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen: Tensor | None,
    ref_rejected: Tensor | None,
    beta: float,
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
    chosen_shift, rejected_shift = _shifts(chosen_logps, rejected_logps, ref_chosen, ref_rejected)
    return beta * (chosen_shift + rejected_shift).detach().double().sum()


class RunningDelta:
    """δ of the quality term: a moving average, over steps, of each step's mean of concat(β h_c, β h_r).

    Every step counts the same, whatever its number of pairs. ``update`` comes before the use in a step's loss,
    so at the first step δ is that step's own mean. δ is state: it belongs into a checkpoint.

    When the reference is refreshed (iterated MPO), h falls back to 0 but δ goes on from where it is: a cumulative mean
    then forgets the old reference slowly, an exponential one at the pace of its decay.

    Args:
        kind: ``cumulative``, the mean of all steps, or ``exponential``: δ ← decay · δ + (1 − decay) · mean, started by
            the first step's mean.
        decay: of the exponential one, 0 or more and below 1.

    Raises:
        ValueError: for another decay.
    """

    def __init__(self, kind: DeltaKind, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay of delta is {decay}; allowed: 0 or more and below 1")
        self.kind, self.decay = kind, decay
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
        cumulative = self.kind is DeltaKind.cumulative or self.updates == 1
        share = 1 / self.updates if cumulative else 1 - self.decay
        self.value += (batch_mean - self.value) * share
        return self.value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = float(state["value"])
        self.updates = int(state["updates"])


def _shifts(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor | None, ref_rejected: Tensor | None
) -> tuple[Tensor, Tensor]:
    """h_c and h_r, [pairs] each; h = log π_θ without a reference."""
    given = [chosen, rejected] + [reference for reference in (ref_chosen, ref_rejected) if reference is not None]
    shapes = [tuple(tensor.shape) for tensor in given]
    if len(set(shapes)) != 1 or len(shapes[0]) != 1 or len(given) == 3:
        raise ValueError(
            f"chosen, rejected and their references have shapes {shapes}; allowed: [pairs] four times, or twice "
            "without a reference"
        )
    if ref_chosen is None or ref_rejected is None:
        return chosen, rejected
    return chosen - ref_chosen.detach(), rejected - ref_rejected.detach()
