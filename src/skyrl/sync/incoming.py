"""What a rollout member makes of a weight snapshot: the tensors that its engine loads."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from skyrl.policy.lora import merged, plain_name, weight_of
from skyrl.records import SyncError, WeightSnapshot
from skyrl.settings.system import LoraConfig, LoraSync
from skyrl.sync.snapshot import parameters_of, with_neighbours

Named = Iterator[tuple[str, torch.Tensor]]


class Incoming:
    """Knows which version the member's engine holds and, where LoRA's factors travel, the weights that they belong to.

    Args:
        lora: ``learner.lora``.
    """

    def __init__(self, lora: LoraConfig) -> None:
        self._lora, self._apart = lora, lora.rank > 0 and lora.sync is LoraSync.adapter
        self.version: int | None = None
        """What the last complete load brought; None before one, and while one is under way."""
        self._kept: dict[str, torch.Tensor | None] = {}
        """Of the layers with factors and their neighbours, in order: the weights, and None for each factor. Views of
        the snapshot that brought them."""

    def tensors(self, snapshot: WeightSnapshot) -> Named:
        """What the engine must load, as a checkpoint has it. Until it has, and ``version`` is set, this member holds no
        version.

        Raises:
            SyncError: for a partial snapshot that belongs to other weights than the member has, or lacks factors.
        """
        if snapshot.base is not None and snapshot.base != self.version:
            raise SyncError(
                f"weight snapshot {snapshot.version} changes version {snapshot.base}, but this rollout worker holds "
                f"{'none' if self.version is None else self.version}; it needs all weights"
            )
        self.version = None
        if not self._apart:
            return parameters_of(snapshot)
        sent = dict(parameters_of(snapshot))
        if snapshot.base is None:
            factors = {name for name in sent if plain_name(name) is None}
            kept = with_neighbours({weight_of(name) for name in sent}, {weight_of(name) for name in factors})
            self._kept = {n: None if n in factors else tensor for n, tensor in sent.items() if weight_of(n) in kept}
            return merged(iter(sent.items()), self._lora)
        if sent.keys() != {name for name, tensor in self._kept.items() if tensor is None}:
            raise SyncError(f"weight snapshot {snapshot.version} has other factors than this rollout worker's policy")
        whole = ((name, sent[name] if tensor is None else tensor) for name, tensor in self._kept.items())
        return merged(whole, self._lora)
