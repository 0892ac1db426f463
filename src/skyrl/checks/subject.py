"""What a check is, and what it looks at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np

from skyrl.data.datasets import PromptDataset, build_datasets
from skyrl.data.overlap import Overlap, overlap
from skyrl.records import Prompt
from skyrl.settings import Config

if TYPE_CHECKING:
    from skyrl.policy.encode import PromptEncoder

ROWS = 256
"""Rows of a split that are looked at, spread over all of it."""


@dataclass(slots=True, frozen=True)
class Finding:
    """What came of a check."""

    name: str
    status: Literal["pass", "fail", "skip"]
    said: str
    remedy: str = ""
    """Of a failure: what helps."""
    seconds: float = 0.0


class Skip(Exception):
    """Says why a check does not apply here."""


@dataclass
class Subject:
    """What is checked. Parts that cost time are made when a check asks for them."""

    cfg: Config
    policy: str
    """Hugging Face folder."""
    reward: str | None = None
    """Folder of the reward model."""
    rows: int = ROWS

    @cached_property
    def datasets(self) -> dict[str, PromptDataset]:
        return build_datasets(self.cfg)

    @cached_property
    def overlap(self) -> Overlap | None:
        """Prompts to evaluate on that are also trained on; None too if the prompts that are trained on are pairs."""
        return None if self.cfg.data.pairs_path is not None else overlap(self.datasets["eval"], self.datasets["train"])

    @cached_property
    def encoder(self) -> PromptEncoder:
        from skyrl.policy.encode import PromptEncoder

        return PromptEncoder.configured(self.policy, self.cfg)

    @cached_property
    def prompts(self) -> dict[str, list[tuple[int, Prompt]]]:
        """Some rows of each split, spread over it."""
        found = {}
        for split, dataset in self.datasets.items():
            rows = np.unique(np.linspace(0, len(dataset) - 1, self.rows).astype(int)).tolist()
            found[split] = [(row, dataset[row]) for row in rows]
        return found


@dataclass(slots=True, frozen=True)
class Check:
    """``look`` returns what it found, raises :class:`Skip`, or an error that says what is wrong."""

    name: str
    look: Callable[[Subject], str]
    remedy: str
    needs: str = ""
    """A check that must have passed: what is wrong there would be told again here, with a remedy that does not help."""
    cheap: bool = False
    """Takes less than two seconds, and imports neither torch nor transformers."""
