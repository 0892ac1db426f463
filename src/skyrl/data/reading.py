"""How files of prompts are read: the settings that decide it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from skyrl.data.pictures import MAX_PIXELS
from skyrl.settings import Config, Layout


@dataclass(slots=True, frozen=True)
class Reading:
    """How files are read: the settings that decide it."""

    layout: Layout = Layout.auto
    system_prompt: str | None = None
    suffix: str | None = None
    picture_root: str | None = None
    max_pixels: int = MAX_PIXELS
    verifier: str | None = None
    """That of rows that name none."""
    verifiers: Mapping[str, str] = field(default_factory=dict)
    """``reward.verifiers``: names that rows may give besides the built-in ones."""

    @classmethod
    def of(cls, cfg: Config) -> Reading:
        """Those of a configuration."""
        data, reward = cfg.data, cfg.reward
        given = (data.layout, data.system_prompt, data.suffix, data.picture_root, data.max_pixels)
        return cls(*given, reward.verifier, reward.verifiers)


USUAL = Reading()
"""With no setting changed."""
