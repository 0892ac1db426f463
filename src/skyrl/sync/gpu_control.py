"""Control plane of a GPU weight transfer: the four calls that vLLM's trainer side makes, sent to all rollout actors."""

from __future__ import annotations

import base64
import pickle
from typing import Any

import ray


class RolloutControl:
    """Implements vLLM's ``VLLMWeightSyncClient`` protocol over rollout actors.

    Args:
        rollouts: Handles of the rollout actors.
    """

    def __init__(self, rollouts: list[Any]) -> None:
        self.rollouts = rollouts

    def _all(self, method: str, kwargs: dict[str, Any]) -> None:
        ray.get([rollout.transfer_rpc.remote(method, kwargs) for rollout in self.rollouts])

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """``rank_offset`` differs per engine: engines follow each other in the NCCL group."""
        calls = []
        offset = int(init_info.get("rank_offset", 1))
        per_engine = (int(init_info["world_size"]) - 1) // len(self.rollouts) if "world_size" in init_info else 1
        for i, rollout in enumerate(self.rollouts):
            info = dict(init_info)
            if "rank_offset" in info:
                info["rank_offset"] = offset + i * per_engine
            calls.append(rollout.transfer_rpc.remote("init_weight_transfer_engine", {"init_info": info}))
        ray.get(calls)

    def start_weight_update(self) -> None:
        self._all("start_weight_update", {})

    def update_weights(self, update_info: dict[str, Any]) -> None:
        if update_info.get("ipc_handles") is not None:
            # vLLM's engine core takes plain values only, or this field, which it unpickles itself.
            handles = base64.b64encode(pickle.dumps(update_info["ipc_handles"])).decode()
            update_info = update_info | {"ipc_handles": None, "ipc_handles_pickled": handles}
        self._all("update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._all("finish_weight_update", {})
