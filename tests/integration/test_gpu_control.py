"""What a GPU run does apart from the GPUs, with real Ray actors: who shares a GPU, and what a failed transfer says.

Ray counts GPUs as it is told to, so that no device is needed here. CUDA itself is not run by any test.
"""

from __future__ import annotations

import base64
import pickle
import time
from collections.abc import Iterator
from typing import Any

import pytest
import ray

from skyrl.crew.placement import Placement, check_resources
from skyrl.crew.pools import RayWeightSyncer
from skyrl.records import ConfigError, SkyrlError, SyncError
from skyrl.settings import Config, WeightSync
from skyrl.sync.gpu_control import RolloutControl


@pytest.fixture(scope="module", autouse=True)
def two_gpus() -> Iterator[None]:
    ray.init(num_cpus=4, num_gpus=2, include_dashboard=False, log_to_driver=False, namespace="gpu-control")
    yield
    ray.shutdown()


class Here:
    """Says which GPUs Ray gave it."""

    def gpus(self) -> list[int]:
        return [int(gpu) for gpu in ray.get_gpu_ids()]


class Rollout:
    """Remembers the control calls; receiving fails if it is told to."""

    def __init__(self, failure: str | None = None) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.failure = failure

    def transfer_rpc(self, method: str, kwargs: dict[str, Any]) -> None:
        self.calls.append((method, kwargs))

    def seen(self) -> list[tuple[str, dict[str, Any]]]:
        return self.calls

    def transfer_failure(self) -> str | None:
        return self.failure

    def finish_transfer(self, version: int) -> None:
        self.calls.append(("finish_transfer", {"version": version}))


class Learner:
    """A sender that takes ``seconds``, as one does that waits for an engine inside NCCL."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def send_weights(self, rollouts: list[Any], version: int) -> None:
        if self.seconds < 0:
            raise SyncError("nothing to gather")
        time.sleep(self.seconds)


def ipc() -> Config:
    cfg = Config()
    cfg.rollout.weight_sync, cfg.rollout.device, cfg.learner.device = WeightSync.ipc, "cuda", "cuda"
    cfg.rollout.num_workers = cfg.learner.num_workers = 2
    cfg.controller.timeout = 30.0
    return cfg


def test_ipc_puts_each_learner_rank_on_the_gpu_of_its_rollout_worker() -> None:
    cfg = ipc()
    check_resources(cfg, ray.nodes(), with_learner=True)  # two GPUs are enough
    placement = Placement(cfg, ray.nodes())
    placement.reserve()
    try:
        made = {
            (kind, i): placement.actor(Here, f"{kind}-{i}", 0.25, {}, gpus=1, shared=i).remote()
            for kind in ("rollout", "learner")
            for i in (0, 1)
        }
        gpus = {key: ray.get(actor.gpus.remote(), timeout=60) for key, actor in made.items()}
        assert gpus["rollout", 0] == gpus["learner", 0] and gpus["rollout", 1] == gpus["learner", 1]
        assert {gpus["rollout", 0][0], gpus["rollout", 1][0]} == {0, 1}
        for actor in made.values():
            ray.kill(actor)
    finally:
        placement.release()


def test_a_pair_needs_its_cores_on_one_node() -> None:
    cfg = ipc()
    cfg.rollout.num_cpus = cfg.learner.num_cpus = 2.0
    nodes = [{"Resources": {"CPU": 5.0, "GPU": 1.0}}] * 2
    check_resources(cfg, nodes, with_learner=True)
    with pytest.raises(ConfigError, match="one actor needs 4 CPUs, the largest node of the cluster has 3"):
        check_resources(cfg, [{"Resources": {"CPU": 3.0, "GPU": 1.0}}] * 4, with_learner=True)


def test_nccl_needs_a_gpu_for_each() -> None:
    cfg = ipc()
    cfg.rollout.weight_sync = WeightSync.nccl
    with pytest.raises(ConfigError, match="the actors need 4 GPUs, the Ray cluster has 2"):
        check_resources(cfg, ray.nodes(), with_learner=True)


def test_engines_follow_each_other_in_the_nccl_group() -> None:
    rollouts = [ray.remote(Rollout).remote() for _ in range(2)]
    RolloutControl(rollouts).init_weight_transfer_engine({"rank_offset": 1, "world_size": 1 + 2 * 4, "packed": True})
    offsets = [ray.get(rollout.seen.remote())[0][1]["init_info"]["rank_offset"] for rollout in rollouts]
    assert offsets == [1, 5]  # four GPUs an engine, after the one sender


def test_memory_handles_travel_in_the_field_that_vllm_unpickles() -> None:
    from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferUpdateInfo

    rollouts = [ray.remote(Rollout).remote() for _ in range(2)]
    handles = {"GPU-1": (float, (2, 3), b"handle")}
    info = {"names": ["w"], "dtype_names": ["float32"], "shapes": [[2, 3]], "ipc_handles": handles}
    RolloutControl(rollouts).update_weights(info | {"ipc_handles_pickled": None, "tensor_sizes": [24]})
    for rollout in rollouts:
        ((method, kwargs),) = ray.get(rollout.seen.remote())
        sent = kwargs["update_info"]
        assert method == "update_weights" and sent["ipc_handles"] is None
        assert pickle.loads(base64.b64decode(sent["ipc_handles_pickled"])) == handles
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
            assert IPCWeightTransferUpdateInfo(**sent).ipc_handles == handles


def syncer(
    monkeypatch: pytest.MonkeyPatch, *seconds: float, failure: str | None = None, timeout: float = 30.0
) -> RayWeightSyncer:
    monkeypatch.setattr("skyrl.crew.pools.POLL_SECONDS", 0.2)
    cfg = ipc()
    cfg.controller.timeout = timeout
    learners = [ray.remote(Learner).options(num_cpus=0.1).remote(one) for one in seconds]
    rollouts = [ray.remote(Rollout).options(num_cpus=0.1).remote(one) for one in (None, failure)]
    return RayWeightSyncer(learners, rollouts, cfg)


def test_a_failed_receiver_ends_the_sync_though_the_sender_still_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    started = time.monotonic()
    with pytest.raises(SyncError, match="could not take the new weights: update_weights: KeyError: 'x'"):
        syncer(monkeypatch, 60.0, failure="update_weights: KeyError: 'x'")._send(1)
    assert time.monotonic() - started < 30


def test_a_failed_learner_ends_the_sync_though_another_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ray.exceptions.RayTaskError, match="nothing to gather"):
        syncer(monkeypatch, -1.0, 60.0)._send(1)


def test_a_sync_that_hangs_ends_at_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SkyrlError, match=r"the weight sync took longer than controller\.timeout=1 s"):
        syncer(monkeypatch, 60.0, timeout=1.0)._send(1)


def test_a_slow_but_good_transfer_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    made = syncer(monkeypatch, 1.0)
    made._send(4)
    assert [ray.get(rollout.seen.remote()) for rollout in made.rollouts] == [[("finish_transfer", {"version": 4})]] * 2
