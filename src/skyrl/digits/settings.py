"""Settings of the embedded default: digit scenes, and the models that are made for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from pydantic import Field, NonNegativeInt

from skyrl.schema import Count, Problem, Settings, Share

if TYPE_CHECKING:
    from skyrl.settings import Config

PictureKind = Literal["sum", "max", "min", "count", "row_difference"]
MAX_POSITIONS = 512
"""Longest prompt and answer of the embedded policy together, tokens."""
PICTURE_KINDS: tuple[PictureKind, ...] = ("sum", "max", "min", "count", "row_difference")


class DigitsConfig(Settings):
    train_size: Count = 20_000
    """Scenes generated for training."""
    text_share: Share = 0.15
    """Share of prompts that are arithmetic without a picture."""
    kinds: list[PictureKind] = Field(default=list(PICTURE_KINDS), min_length=1)
    """Questions about pictures. With ``max``, ``min`` and ``count`` alone a right answer does not need every digit
    read right, so a reward for the answer alone leaves room to hallucinate."""
    cache_dir: str | None = None
    """Where the models are kept; null means ``~/.cache/skyrl`` (or ``$SKYRL_CACHE``)."""
    warm_start_steps: Count = 320
    """Supervised steps of the policy."""
    reward_body_steps: Count = 100
    """Further supervised steps of the reward model's body."""
    reward_steps: Count = 40
    """Bradley-Terry steps of the reward model."""
    model_seed: NonNegativeInt = 0
    """Seed of both models."""


def digits_problems(cfg: Config) -> Iterator[Problem]:
    """What does not fit together where the embedded data or models are used."""
    rollout, data = cfg.rollout, cfg.data
    if data.source == "digits":
        if rollout.prompts_per_step > cfg.digits.train_size:
            yield "rollout.prompts_per_step digits.train_size", "a step must not ask for more scenes than there are"
        for key, path in (("data.train_path", data.train_path), ("data.eval_path", data.eval_path)):
            if path is not None:
                yield f"{key} data.source", "it would not be read; say data=files"
    if cfg.model.policy == "digits" and rollout.max_prompt_tokens + rollout.max_new_tokens > MAX_POSITIONS:
        most = f"their sum must be at most {MAX_POSITIONS}, the positions of the embedded policy"
        yield "rollout.max_prompt_tokens rollout.max_new_tokens", most
    if cfg.model.policy != "digits" and cfg.model.reward == "digits":
        advice = "with your own policy it must be a folder or null, as model=huggingface has it"
        yield "model.reward model.policy", f"it only judges digit scenes; {advice}"
