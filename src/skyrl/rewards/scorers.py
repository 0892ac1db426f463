"""Opens the reward model of a run, whatever its layout; and fits how its scores are squashed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from skyrl.records import Metrics, SampleGroup, SkyrlError, flatten
from skyrl.rewards.hybrid import float32_noise, squash
from skyrl.settings import Config, RewardConfig, Squash
from skyrl.settings.reward_model import RewardLayout, reward_layout

if TYPE_CHECKING:
    from skyrl.policy.encode import PromptEncoder
    from skyrl.rewards.conversation_scorer import ConversationScorer
    from skyrl.rewards.endpoint import EndpointScorer
    from skyrl.rewards.group_scorer import GroupScorer

SCALE_FILE = "reward_scale.json"
"""In the run's folder: what was fitted where ``reward.squash_scale`` is null."""
IQR_OF_LOGISTIC = 2 * float(np.log(3))
"""Interquartile range of the logistic distribution of scale 1: of scores that are spread like it, dividing by
IQR / 2.197 makes half lie between 0.25 and 0.75 after the sigmoid."""

FAR = 15.0
"""Scales from the centre, from where on squashed scores are 0 or 1 to six digits."""


def open_scorer(
    cfg: Config, reward: str, policy_encoder: PromptEncoder
) -> GroupScorer | ConversationScorer | EndpointScorer:
    """What scores groups. Errors: as :func:`~skyrl.settings.reward_model.reward_layout` and the layout's own loader."""
    layout, batch = reward_layout(reward), cfg.reward.model_batch
    if layout is RewardLayout.endpoint:
        from skyrl.rewards.endpoint import EndpointScorer

        return EndpointScorer(reward, batch, policy_encoder.answer_prefix)
    if layout is RewardLayout.own:
        from skyrl.rewards.group_scorer import GroupScorer
        from skyrl.rewards.reward_model import RewardModel

        body = RewardModel.load(reward, cfg.model.dtype).to(cfg.reward.device)
        return GroupScorer(body, batch, policy_encoder)
    from skyrl.rewards.conversation_scorer import load_conversation_scorer

    trusted = cfg.model.trust_remote_code
    return load_conversation_scorer(reward, layout, cfg.model.dtype, cfg.reward.device, batch, policy_encoder, trusted)


class Scale(NamedTuple):
    """The reward model's score x counts as squash((x − centre) / scale)."""

    centre: float
    scale: float


def configured_scale(cfg: Config) -> Scale | None:
    """The setting's, or what this run's first evaluation gave; None before that."""
    if cfg.reward.squash_scale is not None:
        return Scale(0.0, cfg.reward.squash_scale)
    path = Path(cfg.run_dir) / SCALE_FILE
    return Scale(**json.loads(path.read_text(encoding="utf-8"))) if cfg.run_dir and path.is_file() else None


def fitted_scale(metrics: Metrics) -> Scale:
    """Of the first evaluation's metrics: the median in the middle, the interquartile range as that of a logistic
    distribution. Scores without a spread are a :class:`SkyrlError`."""
    centre, spread = (metrics.get(f"eval/reward_model_{name}") for name in ("median", "iqr"))
    if centre is None or spread is None or not spread > 0:
        raise SkyrlError(
            "reward.squash_scale=null is fitted on the reward model's scores of the first evaluation, but at least "
            f"half of them are equal (interquartile range {spread}); is it the right model? Give squash_scale a number"
        )
    return Scale(float(centre), float(spread) / IQR_OF_LOGISTIC)


def restored_scale(state: Mapping[str, Any], checkpoint: Path) -> Scale:
    """That of a checkpoint; one without is a :class:`SkyrlError`."""
    if "reward_scale" not in state:
        raise SkyrlError(f"{checkpoint} has no fitted reward.squash_scale: its run had a number; give the same one")
    return Scale(**state["reward_scale"])


def score_metrics(groups: list[SampleGroup]) -> Metrics:
    """Median and interquartile range of the reward model's raw scores of evaluated groups; none without scores."""
    scores = _scores(groups)
    if not len(scores):
        return {}
    low, middle, high = np.percentile(scores, [25, 50, 75])
    return {"eval/reward_model_median": float(middle), "eval/reward_model_iqr": float(high - low)}


def score_remark(groups: list[SampleGroup], cfg: RewardConfig) -> str | None:
    """That squashing makes the reward model's scores of evaluated groups all but equal, if it does. What else can be
    wrong with them are alarms (:mod:`skyrl.monitoring.alarms`)."""
    scores = _scores(groups)
    if len(scores) < 2 or np.ptp(scores) <= float32_noise(scores):
        return None
    span = f"{scores.min():.6g} … {scores.max():.6g}"
    if cfg.squash in (Squash.sigmoid, Squash.tanh) and cfg.squash_scale is not None:
        squashed = squash(scores, cfg.squash, cfg.squash_scale)
        if np.ptp(squashed) < 1e-3 or np.mean(np.abs(scores / cfg.squash_scale) > FAR) > 0.9:
            return (
                f"the reward model's scores of the first evaluation ({span}) hardly differ after {cfg.squash.value} "
                f"with reward.squash_scale={cfg.squash_scale:g}, or lie at its ends; set reward.squash_scale=null to "
                "have it fitted, or give it their size"
            )
    return None


def _scores(groups: list[SampleGroup]) -> np.ndarray:
    """float64 [N]: raw scores of the samples that have one."""
    rewards = [sample.reward for sample in flatten(groups)]
    return np.array([one.model for one in rewards if one is not None and one.model is not None], dtype=np.float64)
