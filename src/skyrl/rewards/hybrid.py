"""The hybrid reward of a group's answers and their advantages: pure functions of one group of G answers."""

from __future__ import annotations

import numpy as np

from skyrl.records import ConfigError, DataError
from skyrl.settings import RewardConfig, Squash, Std

FLOAT32_NOISE = 1e-6
"""Reward models compute in float32: scores of equal answers differ by up to about eight units in the last place, this
share of their size."""
_ROUNDING = 4 * float(np.finfo(np.float64).eps)
_UNDERFLOW = 1e-150


def hybrid_reward(
    rule: np.ndarray,
    model: np.ndarray | None,
    format: np.ndarray,
    cfg: RewardConfig,
    length: np.ndarray | None = None,
    fitted: tuple[float, float] | None = None,
) -> tuple[np.ndarray, float]:
    """Total reward of the scored samples of one group (Skywork R1V2, Eq. 7, with weights):

    r = r_rule + w_f · r_format + w · squash(r_θ) + r_length

    ``Squash.none`` with both weights 1 and no length penalty is the paper's raw sum.

    Args:
        rule: [G], the verifier's scores in [0, 1].
        model: [G], raw reward-model scores, or ``None`` if no reward model is configured; it then adds nothing.
        format: [G], 0 or 1.
        cfg: Gives ``model_weight`` w, ``format_weight`` w_f, ``squash`` and ``squash_scale``.
        length: [G], of :func:`length_penalty`, or ``None`` without one.
        fitted: Centre and scale of the raw scores; ``None`` takes 0 and ``squash_scale``.

    Returns:
        Total, float64 [G], and how much of its spread may be rounding: the sum of the parts' :func:`float32_noise`, at
        least a millionth of what a right answer earns.

    Raises:
        DataError: if a part isn't finite (``nan`` is a broken reward model, ``None`` says that there is none), or the
            shapes differ.
        ConfigError: as in :func:`squash`.
    """
    given = {"rule": rule, "format": format, "model": model, "length": length}
    parts = {name: np.asarray(part, dtype=np.float64) for name, part in given.items() if part is not None}
    for name, part in parts.items():
        if part.shape != parts["rule"].shape:
            raise DataError(f"the {name} rewards have shape {part.shape}, the rule rewards {parts['rule'].shape}")
        if not np.isfinite(part).all():
            raise DataError(f"the {name} rewards of a group must be finite, got {part.tolist()}")
    parts["format"] = cfg.format_weight * parts["format"]
    if model is not None:
        centre, scale = fitted or (0.0, cfg.squash_scale)
        parts["model"] = cfg.model_weight * squash(parts["model"] - centre, cfg.squash, scale)
    noise = sum(float32_noise(part) for part in parts.values())
    return np.sum(list(parts.values()), axis=0), max(FLOAT32_NOISE, noise)


def squash(scores: np.ndarray, how: Squash, scale: float | None) -> np.ndarray:
    """Bring raw reward-model scores of one group to a common size.

    Args:
        scores: [G], finite, in the reward model's raw units.
        how: See :class:`skyrl.settings.Squash`.
        scale: Divides the score inside ``sigmoid`` and ``tanh``. One that isn't above 0 is a :class:`ConfigError`; the
            other two need none.

    Returns:
        float64 [G]. ``group_standardise`` uses the population's standard deviation and gives exact zeros where the
        scores tie within float32 rounding.
    """
    values = np.asarray(scores, dtype=np.float64)
    if scale is not None and not scale > 0:
        raise ConfigError(f"reward.squash_scale is {scale}; it must be above 0")
    if how is Squash.none or values.size == 0:
        return values.copy()
    if how in (Squash.sigmoid, Squash.tanh):
        if scale is None:
            raise ConfigError("reward.squash_scale is null and nothing was fitted; give it a number above 0")
        # The sigmoid is 1 / (1 + exp(-x)), written so that no score, however large, overflows.
        return np.tanh(values / scale) if how is Squash.tanh else 0.5 * (1.0 + np.tanh(0.5 * values / scale))
    if tied(values, float32_noise(values)):
        return np.zeros_like(values)
    return (values - values.mean()) / (values.std() + 1e-6)


def length_penalty(lengths: np.ndarray, longest: int, margin: int) -> np.ndarray:
    """Soft overlong punishment (DAPO, arXiv 2503.14476, Eq. 13): 0 up to ``longest - margin`` tokens, from there
    linear down to -1 at ``longest``.

    Args:
        lengths: [G], tokens of each answer.
        longest: L_max, tokens at which an answer is cut off.
        margin: L_cache, 1 … ``longest``; another one is a :class:`ConfigError`.

    Returns:
        float64 [G] in [-1, 0].
    """
    if not 1 <= margin <= longest:
        allowed = f"1 … rollout.max_new_tokens, which is {longest}"
        raise ConfigError(f"reward.soft_penalty_tokens is {margin}; allowed: {allowed}")
    return np.clip((longest - margin - np.asarray(lengths, dtype=np.float64)) / margin, -1.0, 0.0)


def group_advantages(rewards: np.ndarray, std: Std, noise: float = FLOAT32_NOISE) -> np.ndarray:
    """Advantages of one group (Skywork R1V2, Eq. 6): A_i = (r_i - mean(r)) / std(r).

    Nothing is added to the divisor, so A doesn't change when every reward is shifted, or when rewards and ``noise`` are
    multiplied by a positive number. A group whose rewards tie gets exact zeros instead.

    Args:
        rewards: [G], the rewards of the answers to one prompt. Read only; may be an integer array.
        std: Divisor: the population's (divides by G) or the sample's (by G - 1) standard deviation, or none.
        noise: Rewards that differ by no more than this tie, see :func:`tied`. The default is for values in 0 … 1.

    Returns:
        float64 [G]. Sums to 0; its squares sum to G (population) or G - 1 (sample) unless the group ties.

    Raises:
        ValueError: for fewer than 2 rewards, another shape than [G], or a reward that isn't finite.
    """
    values = np.asarray(rewards, dtype=np.float64)
    if values.ndim != 1 or values.size < 2:
        raise ValueError(f"rewards has shape {values.shape}; a group advantage needs one axis of at least 2 values")
    if not np.isfinite(values).all():
        raise ValueError(f"rewards must be finite, got {values.tolist()}")
    if tied(values, noise):
        return np.zeros_like(values)
    centred = values - values.mean()
    if std is Std.none:
        return centred
    return centred / centred.std(ddof=1 if std is Std.sample else 0)


def tied(values: np.ndarray, noise: float) -> bool:
    """Whether the spread (largest minus smallest) of [G] values is at most ``noise``: dividing by such a spread would
    blow rounding up to advantages of size 1. What float64 itself rounds off the values counts as noise too, and a
    spread whose square is 0."""
    return bool(np.ptp(values) <= noise + max(_ROUNDING * np.abs(values).max(), _UNDERFLOW))


def float32_noise(part: np.ndarray) -> float:
    """How much of the spread of one part [G] of the rewards may be rounding: :data:`FLOAT32_NOISE` times the largest
    absolute value, but never more than the spread. So a large value that is the same for all answers adds no noise: it
    must not make a tie of what another part says."""
    return float(min(np.ptp(part), FLOAT32_NOISE * np.abs(part).max())) if part.size else 0.0
