"""Control plane of a GPU weight transfer: the four calls that vLLM's trainer side makes, sent to all rollout members.

Not run on a GPU yet: see docs/architecture.md.
"""

from __future__ import annotations

import base64
import pickle
from typing import Any
from weakref import WeakKeyDictionary

from skyrl.crew.crew import Crew
from skyrl.learner.step import LearnerStep
from skyrl.rollout.sampler import Sampler

_SENDERS: WeakKeyDictionary[LearnerStep, Any] = WeakKeyDictionary()
"""The sender of a learner rank, made at its first sync."""


def send_weights(learner: LearnerStep, rollouts: Crew[Sampler], host: str) -> None:
    """Push weights by vLLM's own trainer side (nccl, ipc). Every learner rank calls it.

    Args:
        rollouts: Receive; called from this process.
        host: Address of the first rank, where the engines meet it (nccl).
    """
    from skyrl.sync.gpu_transfer import LearnerSource, vllm_trainer

    if learner not in _SENDERS:
        source = LearnerSource(learner.policy_parameters, learner.policy_layout())
        _SENDERS[learner] = vllm_trainer(learner.cfg, RolloutControl(rollouts), source, learner.rank, host)
    _SENDERS[learner].send_weights()


class RolloutControl:
    """Implements vLLM's ``VLLMWeightSyncClient`` protocol over the rollout crew."""

    def __init__(self, rollouts: Crew[Sampler]) -> None:
        self.rollouts = rollouts

    def _all(self, method: str, kwargs: dict[str, Any]) -> None:
        self.rollouts.each(Sampler.transfer, method, kwargs)

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """``rank_offset`` differs per engine: engines follow each other in the NCCL group."""
        offset = int(init_info.get("rank_offset", 1))
        per_engine = (int(init_info["world_size"]) - 1) // len(self.rollouts) if "world_size" in init_info else 1
        infos = [dict(init_info) for _ in range(len(self.rollouts))]
        for place, info in enumerate(infos):
            if "rank_offset" in info:
                info["rank_offset"] = offset + place * per_engine
        self.rollouts.fetch(self.rollouts.deal(_begin, infos))

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


def _begin(sampler: Sampler, init_info: dict[str, Any]) -> None:
    sampler.transfer("init_weight_transfer_engine", {"init_info": init_info})
