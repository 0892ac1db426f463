"""The hybrid reward, a pure function of its parts."""

from __future__ import annotations

import numpy as np

from skyrl.records import ConfigError, DataError
from skyrl.rewards.advantages import FLOAT32_NOISE, float32_noise, tied
from skyrl.settings import RewardConfig, Squash


def squash(scores: np.ndarray, how: Squash, scale: float) -> np.ndarray:
    """Bring raw reward-model scores of one group to a common size.

    Args:
        scores: [G], finite, in the reward model's raw units.
        how: See :class:`skyrl.settings.Squash`.
        scale: Divides the score inside ``sigmoid`` and ``tanh``; the other two ignore it.

    Returns:
        float64 [G]. ``group_standardise`` uses the population's standard deviation and gives exact zeros where the
        scores tie within float32 rounding.

    Raises:
        ConfigError: if ``scale`` isn't above 0.
    """
    values = np.asarray(scores, dtype=np.float64)
    if not scale > 0:
        raise ConfigError(f"reward.squash_scale is {scale}; it must be above 0")
    if how is Squash.none or values.size == 0:
        return values.copy()
    if how is Squash.sigmoid:
        # 1 / (1 + exp(-x)), written so that no score, however large, overflows.
        return 0.5 * (1.0 + np.tanh(0.5 * values / scale))
    if how is Squash.tanh:
        return np.tanh(values / scale)
    if tied(values, float32_noise(values)):
        return np.zeros_like(values)
    return (values - values.mean()) / (values.std() + 1e-6)


def length_penalty(lengths: np.ndarray, longest: int, margin: int) -> np.ndarray:
    """Soft overlong punishment (DAPO, arXiv 2503.14476, Eq. 13): 0 up to ``longest - margin`` tokens, from there
    linear down to -1 at ``longest``.

    Args:
        lengths: [G], tokens of each answer.
        longest: L_max, tokens at which an answer is cut off.
        margin: L_cache, 1 … ``longest``.

    Returns:
        float64 [G] in [-1, 0].

    Raises:
        ConfigError: for another ``margin``.
    """
    if not 1 <= margin <= longest:
        raise ConfigError(
            f"reward.soft_penalty_tokens is {margin}; allowed: 1 … rollout.max_new_tokens, which is {longest}"
        )
    return np.clip((longest - margin - np.asarray(lengths, dtype=np.float64)) / margin, -1.0, 0.0)


def hybrid_reward(
    rule: np.ndarray, model: np.ndarray | None, format: np.ndarray, cfg: RewardConfig, length: np.ndarray | None = None
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

    Returns:
        Total, float64 [G], and how much of its spread may be rounding: the sum of the parts'
        :func:`~skyrl.rewards.advantages.float32_noise`, at least a millionth of what a right answer earns.

    Raises:
        DataError: if a part isn't finite or the shapes differ. A reward model that answers ``nan`` is broken;
            only ``None`` says that there is none.
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
        parts["model"] = cfg.model_weight * squash(parts["model"], cfg.squash, cfg.squash_scale)
    noise = sum(float32_noise(part) for part in parts.values())
    return np.sum(list(parts.values()), axis=0), max(FLOAT32_NOISE, noise)
