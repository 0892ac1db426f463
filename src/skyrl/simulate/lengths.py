"""How long answers are: a distribution, read from a JSON file in ``skyrl/simulate/lengths`` or of your own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from pydantic import Field, ValidationError, model_validator
from scipy.special import ndtr, ndtri
from scipy.stats import rankdata

from skyrl.records import ConfigError
from skyrl.schema import Count, Settings, Share
from skyrl.simulate.cost import problems

FOLDER = Path(__file__).parent / "lengths"


class Lengths(Settings):
    """Tokens of an answer, by its quantiles. Between two of them the distribution is uniform."""

    about: str
    """Where the numbers come from."""
    quantiles: list[float] = Field(min_length=2)
    """Tokens at evenly spaced shares 0 … 1 of the answers, ascending: the shortest answer first, the longest last."""
    prompt_share: Share = 0.0
    """Correlation of the answers to one prompt: 0 says that the prompt says nothing about the length, 1 that it says
    all. (A Gaussian copula: both have a normal score; the scores' correlation is this.)"""
    prompt_tokens: Count = 256
    """Tokens of every prompt."""

    @model_validator(mode="after")
    def _ascending(self) -> Lengths:
        if self.quantiles[0] < 1 or any(b < a for a, b in zip(self.quantiles, self.quantiles[1:], strict=False)):
            raise ValueError("quantiles must ascend from 1 or more tokens")
        return self

    def draw(self, rng: np.random.Generator, prompts: int, samples: int) -> np.ndarray:
        """int64 [prompts, samples]: tokens of each answer."""
        of_prompt, own = rng.standard_normal((prompts, 1)), rng.standard_normal((prompts, samples))
        shares = ndtr(self.prompt_share**0.5 * of_prompt + (1 - self.prompt_share) ** 0.5 * own)
        grid = np.linspace(0, 1, len(self.quantiles))
        return np.rint(np.interp(shares, grid, self.quantiles)).astype(np.int64)

    @property
    def mean(self) -> float:
        """Of the distribution, tokens."""
        return float(np.mean((np.array(self.quantiles[1:]) + np.array(self.quantiles[:-1])) / 2))

    def scaled(self, factor: float, most: float) -> Lengths:
        """The same shape, ``factor`` times as long, cut at ``most`` tokens."""
        cut = [min(most, max(1.0, one * factor)) for one in self.quantiles]
        return self.model_copy(update={"quantiles": cut})


def read_lengths(name: str) -> Lengths:
    """A distribution by its name in ``skyrl/simulate/lengths``, or of a JSON file.

    Raises:
        ConfigError: naming the file and what is wrong with it.
    """
    path = Path(name) if name.endswith(".json") else FOLDER / f"{name}.json"
    if not path.is_file():
        known = ", ".join(sorted(one.stem for one in FOLDER.glob("*.json")))
        raise ConfigError(f"--lengths {name}: no such file; allowed: a JSON file, or one of {known}")
    try:
        return Lengths.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        raise ConfigError(f"{path}: {problems(error)}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error


def measured(tokens: np.ndarray, about: str, prompt_tokens: int) -> Lengths:
    """The distribution of measured answers.

    Args:
        tokens: [prompts, samples], 2 samples or more: tokens of each answer.
    """
    quantiles = np.quantile(tokens, np.linspace(0, 1, 101))
    normal = ndtri((rankdata(tokens, axis=None).reshape(tokens.shape) - 0.5) / tokens.size)
    within = normal.var(axis=1, ddof=1).mean()
    share = float(np.clip(1 - within / normal.var(), 0, 1))
    return Lengths(
        about=about, quantiles=quantiles.round(1).tolist(), prompt_share=round(share, 2), prompt_tokens=prompt_tokens
    )
