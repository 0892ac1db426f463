"""What the sampler asks of an engine. A second engine writes these three calls: ``tests/plain_engine.py`` is one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from skyrl.records import WeightSnapshot


@dataclass(slots=True)
class EngineRequest:
    """``n`` answers to one prompt."""

    prompt_ids: list[int]
    """One placeholder token for each picture; the engine expands them."""
    pictures: tuple[np.ndarray, ...]
    """uint8 [height, width, 3] each."""
    n: int
    temperature: float
    """0 means the likeliest token each time; ``n`` is 1 then."""
    top_p: float
    max_tokens: int
    seed: int | None
    """Answer ``i`` draws with a generator of its own, seeded with this plus ``i``. ``None`` if nothing is drawn."""
    stop_ids: tuple[int, ...]
    """These tokens and no others end an answer."""
    forbidden_ids: tuple[int, ...]
    """Tokens of probability 0."""


@dataclass(slots=True)
class Completion:
    """One answer."""

    prompt_ids: np.ndarray
    """int32 [P]: the request's, placeholders expanded."""
    token_ids: np.ndarray
    """int32 [T], with the stop token if it was reached."""
    logprobs: np.ndarray
    """float32 [T], under the distribution drawn from: after temperature, ``top_p`` and forbidden tokens."""
    text: str
    """Decoded without the stop token and without special tokens."""
    truncated: bool
    """The length ended it."""


class Engine(Protocol):
    """Built as ``Engine(cfg, policy_folder)`` in the process that samples."""

    vocabulary: int
    """Size of the output layer: all ids of a request are below it."""

    def generate(self, requests: list[EngineRequest]) -> list[list[Completion]]:
        """In the order of the requests.

        Raises:
            ValueError: for one that can't be met; the engine stays usable.
        """
        ...

    def load(self, snapshot: WeightSnapshot) -> None:
        """Replace all weights and forget every cache that the old ones filled.

        Raises:
            SyncError: if the snapshot does not cover the policy.
        """
        ...

    def transfer(self, method: str, kwargs: dict[str, Any]) -> None:
        """One call of vLLM's weight-transfer control plane, if ``rollout.weight_sync`` is not ``shm``."""
        ...
