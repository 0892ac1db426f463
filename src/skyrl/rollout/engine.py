"""What the sampler asks of an engine, and the environment of its process. A second engine writes three calls:
``tests/plain_engine.py`` is one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from skyrl.records import WeightSnapshot
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

    def load(self, snapshot: WeightSnapshot) -> None:
        """Replace all weights and forget every cache that the old ones filled.

        Raises:
            SyncError: if the snapshot does not cover the policy.
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
