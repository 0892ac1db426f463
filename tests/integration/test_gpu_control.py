"""What a GPU run does apart from the GPUs, with real Ray actors: who shares a GPU, and what a failed transfer says.

Ray counts GPUs as it is told to, so that no device is needed here. CUDA itself is not run by any test.
"""

from __future__ import annotations

import base64
import pickle
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from skyrl.crew.crew import Crew
from skyrl.crew.executor import MemberSpec
from skyrl.crew.local_executor import LocalExecutor
from skyrl.crew.placement import Placement, check_resources
from skyrl.crew.ray_executor import RayExecutor
from skyrl.records import ConfigError, SkyrlError, SyncError
from skyrl.rollout.sampler import Sampler
from skyrl.settings import Config, WeightSync
from skyrl.sync.gpu_control import RolloutControl
from skyrl.sync.syncer import Syncer
from skyrl.system import start_system

pytestmark = pytest.mark.integration
EXECUTOR = RayExecutor()


@pytest.fixture(scope="module", autouse=True)
def two_gpus() -> Iterator[None]:
    ray.init(num_cpus=4, num_gpus=2, include_dashboard=False, log_to_driver=False, namespace="gpu-control")
    yield
    ray.shutdown()


def gpu_config(sync: WeightSync) -> Config:
    cfg = Config()
    cfg.rollout.weight_sync, cfg.rollout.device, cfg.learner.device = sync, "cuda", "cuda"
    cfg.rollout.num_workers = cfg.learner.num_workers = 2
    cfg.controller.timeout = 300.0
    return cfg


# ---------------------------------------------------------------- who gets which GPU


class Here:
    """Says which GPUs Ray gave it."""

    def gpus(self) -> list[int]:
        return [int(gpu) for gpu in ray.get_gpu_ids()]


def test_ipc_puts_each_learner_rank_on_the_gpu_of_its_rollout_worker() -> None:
    cfg = gpu_config(WeightSync.ipc)
    check_resources(cfg, ray.nodes(), with_learner=True)  # two GPUs are enough
    placement = Placement(cfg, ray.nodes())
    placement.reserve()
    specs = [
        placement.specs(name, Here, worker, lambda *_: (), gpus=1, shares_gpu=True)
        for name, worker in (("rollout", cfg.rollout), ("learner", cfg.learner))
    ]
    crews = [Crew(EXECUTOR, own, cfg.controller.timeout) for own in specs]
    try:
        rollouts, learners = (crew.each(Here.gpus) for crew in crews)
        assert rollouts == learners and sorted(rollouts) == [[0], [1]]
    finally:
        for crew in crews:
            crew.stop()
        placement.release()


class Recorder:
    """An executor that builds nothing: notes what is asked of it, in order."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def start(self, spec: MemberSpec[Any], lost: Any) -> MemberSpec[Any]:
        return spec

    def stop(self, member: MemberSpec[Any]) -> None:
        """There is nothing to end."""

    def call(self, member: MemberSpec[Any], function: Any, pieces: int, args: Any, kwargs: Any) -> str:
        self.calls.append(f"{member.name} {function.__name__}")
        return self.calls[-1]

    def placed(self, member: MemberSpec[Any], seconds: float) -> bool:
        return True

    def fetch(self, promises: list[str], timeout: float) -> list[str]:
        self.calls += [f"{promise} done" for promise in promises]
        return promises

    def host(self, member: MemberSpec[Any]) -> str:
        return "here"


@pytest.mark.parametrize("sync", [WeightSync.ipc, WeightSync.nccl])
def test_a_system_pairs_its_members_and_lets_engines_start_alone_on_a_gpu_that_they_share(sync: WeightSync) -> None:
    made = Recorder()
    with start_system(gpu_config(sync), "policy", None, made) as system:
        both = [*system.rollouts.specs, *system.learners.specs]
        shared = sync is WeightSync.ipc
        assert [spec.gpus for spec in both] == ([0.5] * 4 if shared else [1] * 4)
        places = [getattr(spec.strategy, "placement_group_bundle_index", None) for spec in both]
        assert places == ([0, 1, 0, 1] if shared else [None] * 4)
        assert [spec.gpus for spec in system.rewards.specs + system.buffer.specs] == [0, 0]
        # Only they may be replaced, as long as there is no loop that knows what the buffer must come back to.
        assert [crew.revive is not None for crew in system.crews] == [True, True, False, False]
    joins = made.calls.index("learner-0 join")
    up = [f"rollout-{i} sizes done" in made.calls[:joins] for i in (0, 1)]
    assert up == [shared, shared]  # else all start side by side


def test_a_pair_needs_its_cores_on_one_node() -> None:
    cfg = gpu_config(WeightSync.ipc)
    cfg.rollout.num_cpus = cfg.learner.num_cpus = 2.0
    nodes = [{"Resources": {"CPU": 5.0, "GPU": 1.0}}] * 2
    check_resources(cfg, nodes, with_learner=True)
    with pytest.raises(ConfigError, match="one actor needs 4 CPUs, the largest node of the cluster has 3"):
        check_resources(cfg, [{"Resources": {"CPU": 3.0, "GPU": 1.0}}] * 4, with_learner=True)


def test_nccl_needs_a_gpu_for_each() -> None:
    with pytest.raises(ConfigError, match="the actors need 4 GPUs, the Ray cluster has 2"):
        check_resources(gpu_config(WeightSync.nccl), ray.nodes(), with_learner=True)


# ---------------------------------------------------------------- the four calls


class Engine:
    """Remembers the control calls; one of them may fail."""

    broken = ""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def transfer(self, method: str, kwargs: dict[str, Any]) -> None:
        if method == self.broken:
            raise KeyError("x")
        self.calls.append((method, kwargs))


class Rollout(Sampler):
    """A sampler over that engine, without data and model: the calls of a transfer are the sampler's own."""

    def __init__(self) -> None:
        self.engine: Any = Engine()
        self.version, self._failure = 0, None

    def seen(self) -> tuple[int, list[tuple[str, dict[str, Any]]]]:
        return self.version, self.engine.calls

    def begin(self, broken: str) -> None:
        self.__init__()
        self.engine.broken = broken


def specs(count: int) -> list[MemberSpec[Rollout]]:
    return [MemberSpec(f"rollout-{i}", Rollout, (), 0.1) for i in range(count)]


def test_engines_follow_each_other_in_the_nccl_group() -> None:
    rollouts = Crew(LocalExecutor(), specs(2), 30.0)
    RolloutControl(rollouts).init_weight_transfer_engine({"rank_offset": 1, "world_size": 1 + 2 * 4, "packed": True})
    told = [calls for _, calls in rollouts.each(Rollout.seen)]
    common = {"world_size": 9, "packed": True}
    assert told == [  # four GPUs an engine, after the one sender
        [("init_weight_transfer_engine", {"init_info": common | {"rank_offset": offset}})] for offset in (1, 5)
    ]


def test_memory_handles_travel_in_the_field_that_vllm_unpickles() -> None:
    from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferUpdateInfo

    rollouts = Crew(LocalExecutor(), specs(2), 30.0)
    handles = {"GPU-1": (float, (2, 3), b"handle")}
    info = {"names": ["w"], "dtype_names": ["float32"], "shapes": [[2, 3]], "ipc_handles": handles}
    RolloutControl(rollouts).update_weights(info | {"ipc_handles_pickled": None, "tensor_sizes": [24]})
    for _, ((method, kwargs),) in rollouts.each(Rollout.seen):
        sent = kwargs["update_info"]
        assert method == "update_weights" and sent["ipc_handles"] is None
        assert pickle.loads(base64.b64decode(sent["ipc_handles_pickled"])) == handles
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
            assert IPCWeightTransferUpdateInfo(**sent).ipc_handles == handles


# ---------------------------------------------------------------- a transfer over Ray


class Learner:
    """What ``send_weights`` asks of a learner rank; its sender is :class:`Sender`.

    In the test's hands: ``weight``, what is sent; ``error``; and ``inside_nccl``, a file that the sender waits for when
    it has begun, as one does whose engine does not come to the NCCL call.
    """

    def __init__(self, cfg: Config, rank: int) -> None:
        from skyrl.sync import gpu_transfer

        gpu_transfer.vllm_trainer = partial(Sender, self)
        self.cfg, self.rank = cfg, rank

    def begin(self, weight: float, errors: dict[int, str], inside_nccl: dict[int, Path]) -> None:
        self.weight, self.error, self.inside_nccl = weight, errors.get(self.rank), inside_nccl.get(self.rank)

    def policy_parameters(self) -> Iterator[tuple[str, Any]]:
        yield "w", np.float32(self.weight)

    def policy_layout(self) -> list[Any]:
        return [("w", np.dtype("float32"), ())]


class Sender:
    """In place of ``vllm_trainer``: makes the calls of vLLM's trainer side, in its order. All ranks go through the
    parameters; rank 0 reaches the engines, with ``update_weights`` from a thread while it sends."""

    def __init__(self, learner: Learner, cfg: Config, control: RolloutControl, source: Any, rank: int, host: str):
        self.learner, self.control, self.source, self.rank = learner, control, source, rank
        if rank == 0:
            info = {"master_address": host, "rank_offset": 1, "world_size": 1 + cfg.rollout.num_workers}
            control.init_weight_transfer_engine(info)

    def send_weights(self) -> None:
        if self.learner.error:
            raise SyncError(self.learner.error)
        values = {name: float(value) for name, value in self.source}
        if self.rank:
            return self._broadcast()
        self.control.start_weight_update()
        with ThreadPoolExecutor(1) as beside:
            received = beside.submit(self.control.update_weights, {"values": values})
            self._broadcast()
            received.result()
        self.control.finish_weight_update()

    def _broadcast(self) -> None:
        deadline = time.monotonic() + 60
        while self.learner.inside_nccl is not None and time.monotonic() < deadline:
            if self.learner.inside_nccl.exists():
                return
            time.sleep(0.02)


@pytest.fixture(scope="module")
def crews(two_gpus: None) -> Iterator[tuple[Crew[Learner], Crew[Rollout]]]:
    cfg = gpu_config(WeightSync.nccl)
    learners = Crew(EXECUTOR, [MemberSpec(f"learner-{i}", Learner, (cfg, i), 0.1) for i in (0, 1)], 300.0)
    rollouts = Crew(EXECUTOR, specs(2), 300.0)
    yield learners, rollouts
    for crew in (learners, rollouts):
        crew.stop()


class Transfer:
    """Two learner ranks and two engines that have met at most once before.

    Args:
        go: File that ends the waiting inside NCCL.
    """

    def __init__(self, learners: Crew[Learner], rollouts: Crew[Rollout], go: Path) -> None:
        self.learners, self.rollouts, self.go = learners, rollouts, go

    def begin(
        self,
        weight: float = 0.0,
        broken: str = "",
        errors: dict[int, str] | None = None,
        waiting: tuple[int, ...] = (),
        timeout: float = 120.0,
    ) -> Syncer:
        """A syncer, and what will happen: the weight that is sent; the call that the second engine fails at; what each
        learner rank raises; the ranks that wait for ``go``."""
        self.learners.each(Learner.begin, weight, errors or {}, dict.fromkeys(waiting, self.go))
        self.rollouts.fetch(self.rollouts.deal(Rollout.begin, ["", broken]))
        cfg = gpu_config(WeightSync.nccl)
        cfg.controller.timeout = timeout
        return Syncer(self.learners, self.rollouts, cfg)


@pytest.fixture
def transfer(
    crews: tuple[Crew[Learner], Crew[Rollout]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Transfer]:
    monkeypatch.setattr("skyrl.sync.syncer.POLL_SECONDS", 0.2)
    yield Transfer(*crews, tmp_path / "go")
    (tmp_path / "go").touch()


def test_every_sync_sends_the_weights_of_then_and_a_slow_one_is_waited_for(transfer: Transfer) -> None:
    methods = []
    for version, weight in ((4, 0.25), (5, -3.0)):
        syncer = transfer.begin(weight, waiting=(1,))
        with ThreadPoolExecutor(1) as beside:
            sent = beside.submit(syncer._send, version, None)
            time.sleep(1.0)  # several polls
            assert not sent.done()
            transfer.go.touch()
            assert sent.result(timeout=30)[0] == 0.0
        transfer.go.unlink()
        (version_0, calls), (version_1, others) = transfer.rollouts.each(Rollout.seen)
        assert (version_0, version_1) == (version, version)
        assert ("update_weights", {"update_info": {"values": {"w": weight}}}) in calls
        methods.append([method for method, _ in calls])
        assert methods[-1] == [method for method, _ in others]
    update = ["start_weight_update", "update_weights", "finish_weight_update"]
    assert methods == [["init_weight_transfer_engine", *update], update]  # they meet once


def test_a_failed_receiver_ends_the_sync_though_the_sender_still_waits(transfer: Transfer) -> None:
    started = time.monotonic()
    with pytest.raises(SyncError, match=r"^a rollout worker could not take the new weights: update_weights: KeyError"):
        transfer.begin(broken="update_weights", waiting=(0, 1))._send(1, None)
    assert time.monotonic() - started < 20


def test_a_failed_learner_ends_the_sync_though_another_waits_for_it(transfer: Transfer) -> None:
    with pytest.raises(SyncError, match=r"^nothing to gather$"):
        transfer.begin(errors={0: "nothing to gather"}, waiting=(1,))._send(1, None)
    assert [version for version, _ in transfer.rollouts.each(Rollout.seen)] == [0, 0]


def test_a_sync_that_hangs_ends_at_its_limit(transfer: Transfer) -> None:
    with pytest.raises(SkyrlError, match=r"the weight sync took longer than controller\.timeout=1 s"):
        transfer.begin(waiting=(0, 1), timeout=1.0)._send(1, None)


def test_a_receiver_says_what_ended_its_last_transfer_only() -> None:
    rollouts = Crew(LocalExecutor(), specs(1), 30.0)
    rollouts.one(Rollout.begin, "update_weights")
    with pytest.raises(KeyError):
        rollouts.one(Sampler.transfer, "update_weights", {})
    assert rollouts.one(Sampler.transfer_failure) == "update_weights: KeyError: 'x'"
    rollouts.one(Sampler.transfer, "start_weight_update", {})
    assert rollouts.one(Sampler.transfer_failure) is None
