"""The hybrid reward, a pure function of its parts."""

from __future__ import annotations

import numpy as np

from skyrl.records import ConfigError, DataError
from skyrl.rewards.advantages import tied
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
    if tied(values):
        return np.zeros_like(values)
    return (values - values.mean()) / (values.std() + 1e-6)


def hybrid_reward(rule: np.ndarray, model: np.ndarray | None, format: np.ndarray, cfg: RewardConfig) -> np.ndarray:
    """Total reward of the scored samples of one group (Skywork R1V2, Eq. 7, with weights):

    r = r_rule + w · squash(r_θ) + w_f · r_format

    ``Squash.none`` with both weights 1 is the paper's raw sum.

    Args:
        rule: [G], the verifier's scores in [0, 1].
        model: [G], raw reward-model scores, or ``None`` if no reward model is configured; it then adds nothing.
        format: [G], 0 or 1.
        cfg: Gives ``model_weight`` w, ``format_weight`` w_f, ``squash`` and ``squash_scale``.

    Returns:
        float64 [G].

    Raises:
        DataError: if a part isn't finite or the shapes differ. A reward model that answers ``nan`` is broken;
            only ``None`` says that there is none.
        ConfigError: as in :func:`squash`.
    """
    parts = {"rule": rule, "format": format} | ({} if model is None else {"model": model})
    values = {name: np.asarray(part, dtype=np.float64) for name, part in parts.items()}
    for name, part in values.items():
        if part.shape != values["rule"].shape:
            raise DataError(f"the {name} rewards have shape {part.shape}, the rule rewards {values['rule'].shape}")
        if not np.isfinite(part).all():
            raise DataError(f"the {name} rewards of a group must be finite, got {part.tolist()}")
    total = values["rule"] + cfg.format_weight * values["format"]
    if model is not None:
        total = total + cfg.model_weight * squash(values["model"], cfg.squash, cfg.squash_scale)
    return total
