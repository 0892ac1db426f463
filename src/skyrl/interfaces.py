"""The vocabulary: the roles of the system and the calls between them.

Two layers. *Parts* are plain classes that do the work in one process (vLLM, verifiers, buffer, DeepSpeed);
they know nothing of Ray. *Pools* are what the controller talks to: they spread a call over the actors that
hold the parts and return opaque handles, so that the controller moves references, never tensors or pictures.
``crew/pools.py`` implements the pools with Ray; the tests implement them with parts in the same process.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np

from skyrl.records import Prompt, RolloutRequest, Sample, SampleGroup, TrainBatch, WeightSnapshot

Handle = Any
"""A promise of a value somewhere in the cluster (a Ray ObjectRef; in tests the value itself)."""

Metrics = dict[str, float]
"""Metric name (docs/metrics.md defines each) → value."""


# ---------------------------------------------------------------- parts: plain classes, one process


class PromptDataset(Protocol):
    """Random access to prompts. Every worker holds one, so that requests are row numbers."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> Prompt: ...


class RolloutEngine(Protocol):
    """Samples groups of answers from the current policy."""

    def generate(self, request: RolloutRequest) -> list[SampleGroup]: ...

    def continue_blind(self, groups: list[SampleGroup], step: int) -> list[SampleGroup]:
        """Fill ``SampleGroup.blind`` (DropoutNTP) of scored groups with pictures, in place."""
        ...

    def load_weights(self, snapshot: WeightSnapshot) -> None: ...

    def probe(self) -> list[SampleGroup]:
        """Short seeded answers to fixed prompts, with log-probabilities, to prove a weight sync."""
        ...


class Rewarder(Protocol):
    """Fills ``Sample.reward``, advantages, claims and errors of whole groups."""

    def score(self, groups: list[SampleGroup]) -> list[SampleGroup]: ...


class SampleBuffer(Protocol):
    """Keeps effective samples and hands out the ones to train on."""

    def exchange(self, groups: list[SampleGroup], step: int, version: int) -> tuple[TrainBatch, Metrics]: ...

    def offline(self, step: int) -> tuple[TrainBatch, Metrics]:
        """The batch of one step of offline MPO: the next ``data.pairs_per_step`` pairs of ``data.pairs_path``."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Learner(Protocol):
    """One rank of the optimiser."""

    def train_step(self, batch: TrainBatch) -> Metrics: ...

    def logprobs(self, groups: list[SampleGroup]) -> list[np.ndarray]:
        """float32 [T] for every sample in order, under the sampling distribution (for the sync probe)."""
        ...

    def picture_drop(self, groups: list[SampleGroup]) -> Metrics:
        """How much less likely the answers become when most of the picture is blackened (masked-picture probe)."""
        ...

    def snapshot(self, version: int) -> WeightSnapshot: ...

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...

    def export(self, folder: Path) -> None:
        """Write the policy as a Hugging Face folder."""
        ...


class Verifier(Protocol):
    """A rule: how right is this answer? Raises on broken input, never guesses."""

    def __call__(self, answer: str, truth: str) -> float: ...


# ---------------------------------------------------------------- pools: what the controller sees


class RolloutPool(Protocol):
    def generate(self, request: RolloutRequest) -> list[Handle]:
        """Handles of ``list[SampleGroup]`` that together hold the rows in order. Returns at once."""
        ...

    def continue_blind(self, groups: list[Handle], step: int) -> list[Handle]:
        """Handles of the scored groups with ``SampleGroup.blind`` filled. Returns at once."""
        ...

    def wait(self, handles: list[Handle]) -> None: ...


class RewardPool(Protocol):
    def score(self, groups: list[Handle]) -> list[Handle]:
        """Handles of the scored groups. Returns at once; scoring starts as each input is ready."""
        ...

    def wait(self, handles: list[Handle]) -> None: ...

    def evaluate(
        self, groups: list[Handle], blind: list[Handle], gallery: list[dict[str, Any]] | None
    ) -> tuple[Metrics, list[dict[str, Any]]]:
        """Metrics of evaluated groups (``blind``: some of them asked again without the picture) and the report's
        gallery; see ``skyrl.evaluation.summary.summarise``."""
        ...


class BufferService(Protocol):
    def exchange(self, groups: list[Handle], step: int, version: int) -> tuple[Handle, Metrics]:
        """Add what is effective, draw, and assemble the handle of a ``TrainBatch``. The metrics also hold
        ``rollout_samples`` and ``rollout_tokens``, the counts from which the controller computes throughput."""
        ...

    def offline(self, step: int) -> tuple[Handle, Metrics]:
        """The handle of the batch of one step of offline MPO."""
        ...

    def save(self, path: Path) -> None: ...

    def load(self, path: Path) -> None: ...


class LearnerPool(Protocol):
    def train_step(self, batch: Handle) -> Metrics: ...

    def picture_drop(self, groups: list[Handle]) -> Metrics:
        """The masked-picture probe on the first ``hallucination.probe_prompts`` groups with a picture."""
        ...

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...

    def export(self, folder: Path) -> None: ...


class WeightSyncer(Protocol):
    def sync(self, version: int) -> Metrics:
        """Send the learner's weights to every rollout worker and prove it.

        Raises:
            SyncError: if the largest log-probability gap on the probe is above its limit.
        """
        ...


class MetricSink(Protocol):
    """Where numbers go: console, file, wandb, Ray."""

    def log(self, step: int, metrics: Metrics) -> None: ...

    def close(self) -> None: ...


def flatten(groups: list[SampleGroup]) -> list[Sample]:
    """All samples of ``groups`` in order."""
    return [sample for group in groups for sample in group.samples]
