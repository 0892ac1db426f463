"""Settings of the Selective Sample Buffer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from enum import Enum
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, NonNegativeFloat

from skyrl.schema import Count, Problem, Settings, Share

if TYPE_CHECKING:
    from skyrl.settings.run import Config

MAX_DECAY_BITS = 500
"""Largest -log2(recency) · max_age: ``replay/ssb.py`` keeps such powers in range."""


class Unit(Enum):
    sample = "sample"
    """Single samples."""
    group = "group"
    """All kept samples of one prompt together, by their mean priority."""


class Eviction(Enum):
    oldest = "oldest"
    """The oldest."""
    smallest = "smallest"
    """The smallest priority; among equals the oldest."""


class BufferConfig(Settings):
    enabled: bool = True
    """False turns the Selective Sample Buffer off: only fresh samples are trained on."""
    capacity: Count = 4096
    """Samples kept."""
    eviction: Eviction = Eviction.oldest
    """What goes when it is full."""
    max_age: Count = 8
    """Policy versions after which a sample is no longer drawn and is dropped."""
    unit: Unit = Unit.sample
    """What is drawn."""
    alpha: NonNegativeFloat = 1.0
    """Priority of a sample: |A|^alpha."""
    recency: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Priority is multiplied by this for each version of age: below 1 prefers young samples."""
    uniform_share: Share = 0.0
    """Share u of uniform draws: P = (1 − u) · priority / Σ priority + u / N."""
    mix: Share = 0.25
    """Largest share of the rollout batch that replayed samples may fill; they only take places that
    ineffective fresh samples leave free."""
    fill_target: Share | None = None
    """Replay only until this share of the rollout batch is effective; null fills up to ``mix``."""
    importance_correction: bool = False
    """Weight a drawn sample by 1/(N·P), normalised to mean 1."""


def buffer_problems(cfg: Config) -> Iterator[Problem]:
    """What does not fit together here."""
    buffer, lag = cfg.buffer, cfg.controller.lag
    if -math.log2(buffer.recency) * buffer.max_age > MAX_DECAY_BITS:
        never = f"the oldest sample would never be drawn, as recency^max_age is below 2^-{MAX_DECAY_BITS}"
        yield "buffer.recency buffer.max_age", f"{never}; raise recency or lower max_age"
    if buffer.unit is Unit.group and buffer.capacity < cfg.rollout.samples_per_prompt:
        yield "buffer.capacity buffer.unit rollout.samples_per_prompt", "a group would not fit; raise the capacity"
    if buffer.enabled and lag and buffer.max_age <= lag:
        old = f"fresh samples are {lag} versions old and would never be drawn again; must be {lag + 1} or more"
        yield "buffer.max_age controller.lag", f"{old}, or set buffer.enabled=false"
