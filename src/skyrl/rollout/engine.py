"""What the sampler asks of an engine, and the environment of its process. A second engine writes three calls:
``tests/plain_engine.py`` is one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from skyrl.settings import RolloutConfig, WeightSync


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
    begun: tuple[list[int], ...] = ()
    """Tokens that each of the ``n`` answers has already; they count towards ``max_tokens`` and are not drawn again, nor
    returned. ``()``: none has any."""

    @property
    def singly(self) -> list[EngineRequest]:
        """Requests for one answer each that together are this one."""
        seeds = [None if self.seed is None else self.seed + place for place in range(self.n)]
        return [replace(self, n=1, seed=seed, begun=self.begun[at : at + 1]) for at, seed in enumerate(seeds)]


@dataclass(slots=True)
class Completion:
    """One answer."""

    prompt_ids: np.ndarray
    """int32 [P]: the request's, placeholders expanded, without the tokens of ``begun``; [0] if ``stopped`` before it
    was read."""
    token_ids: np.ndarray
    """int32 [T], with the stop token if it was reached."""
    logprobs: np.ndarray
    """float32 [T], under the distribution drawn from: after temperature, ``top_p`` and forbidden tokens."""
    text: str
    """The answer from its first token on, those of ``begun`` too, decoded without the stop token and without special
    tokens; "" if it was stopped."""
    truncated: bool
    """The length ended it."""
    stopped: bool = False
    """Nothing ended it: the engine was told that it has enough."""


Enough = Callable[[Collection[int]], bool]
"""Of the places of the requests whose answers have all ended: whether the others may be stopped now."""


class Engine(Protocol):
    """Built as ``Engine(cfg, policy_folder)`` in the process that samples."""

    vocabulary: int
    """Size of the output layer: all ids of a request are below it."""

    def generate(self, requests: list[EngineRequest], enough: Enough | None = None) -> list[list[Completion]]:
        """In the order of the requests.

        Args:
            enough: Asked whenever a request's answers have all ended; at the first yes the others are returned as far
                as they are. It must depend on nothing but the tokens, so that a run repeats. Only
                ``rollout.oversample`` gives one: an engine without this argument works as long as that is 0.

        Raises:
            ValueError: for one that can't be met; the engine stays usable.
        """

    def load(self, parameters: Iterable[tuple[str, Any]], version: int, whole: bool) -> None:
        """Replace weights by these tensors, which are a checkpoint's by name, and forget every cache that the old ones
        filled. They are shared memory: to be copied, not kept.

        Args:
            version: For messages.
            whole: They are all weights; else the others stay as they are.

        Raises:
            SyncError: if they do not cover the policy, or a layer only in part; the engine then still takes all.
        """

    def transfer(self, method: str, kwargs: dict[str, Any]) -> None:
        """One call of vLLM's weight-transfer control plane, if ``rollout.weight_sync`` is not ``shm``."""


def rollout_environment(cfg: RolloutConfig, threads: int) -> dict[str, str]:
    """Variables of a rollout process that may use ``threads`` cores: set before torch and vLLM are imported there."""
    env = {
        "VLLM_NO_USAGE_STATS": "1",
        # On a GPU a warning is all that vLLM's own transfer says of layers that received nothing.
        "VLLM_LOGGING_LEVEL": "WARNING" if cfg.device == "cuda" else "ERROR",
        "VLLM_CONFIGURE_LOGGING": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if cfg.weight_sync is WeightSync.ipc:
        # CUDA's memory handles reach the engine core pickled. They come from this run's own learner.
        env["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    if cfg.device == "cpu":
        env |= {
            # The engine core in this process: update_weights then gets shared memory itself, not a pickle of it.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": str(cfg.kv_cache_gib),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(threads),
            # Compiling the sampler's small helpers takes 30 s and gains nothing measurable on CPU.
            "TORCH_COMPILE_DISABLE": "1",
        }
    return env
