"""Where members run: what they reserve, their threads, and the GPUs that two of them share."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, TypeVar

from skyrl.crew.executor import MemberSpec
from skyrl.records import ConfigError, SkyrlError
from skyrl.settings import Config, WeightSync, WorkerConfig

BUFFER_CPUS = 0.1
ENDING_SECONDS = 10.0
"""After which the actors of a run that has ended hold nothing any more."""
R = TypeVar("R")


class Placement:
    """What a run's members reserve.

    With ``rollout.weight_sync=ipc`` rollout worker i and learner rank i share one GPU: CUDA hands memory from process
    to process on one device only.

    Args:
        cfg: The whole configuration.
        nodes: What ``ray.nodes()`` says of those alive; without Ray, one with this machine's cores.
        with_learner: False if only rollout and reward workers start.
    """

    def __init__(self, cfg: Config, nodes: list[dict[str, Any]], with_learner: bool = True) -> None:
        cores = [node["Resources"]["CPU"] for node in nodes if node["Resources"].get("CPU", 0) > 0]
        self.cfg = cfg
        self.spread = cfg.cluster.spread and len(cores) > 1
        self.nodes = len(cores)
        self.cores = int(min(cores))  # on uneven nodes the smallest must not be oversubscribed
        self.shares_gpus = with_learner and cfg.rollout.weight_sync is WeightSync.ipc
        self._group: Any = None

    def reserve(self) -> None:
        """Take the GPUs that two actors share; nothing without ``ipc``.

        Raises:
            SkyrlError: if the cluster does not give them within ``controller.timeout``.
        """
        if not self.shares_gpus:
            return
        from ray.util import placement_group

        rollout, learner = self.cfg.rollout, self.cfg.learner
        bundle = {"GPU": 1.0, "CPU": rollout.num_cpus + learner.num_cpus}
        strategy = "SPREAD" if self.spread else "PACK"
        self._group = placement_group([bundle] * learner.num_workers, strategy=strategy)
        if not self._group.wait(self.cfg.controller.timeout):
            raise SkyrlError(
                f"the cluster did not give {learner.num_workers} times one GPU with {bundle['CPU']:g} CPUs on one node "
                f"within controller.timeout={self.cfg.controller.timeout:g} s"
            )

    def release(self) -> None:
        """Give back what :meth:`reserve` took."""
        if self._group is not None:
            from ray.util import remove_placement_group

            remove_placement_group(self._group)

    def specs(
        self,
        name: str,
        role: Callable[..., R],
        worker: WorkerConfig,
        args: Callable[[int, int], tuple[Any, ...]],
        env: Callable[[int], dict[str, str]] = lambda threads: {"OMP_NUM_THREADS": str(threads)},
        gpus: float = 0,
        shares_gpu: bool = False,
    ) -> list[MemberSpec[R]]:
        """How and where each member of a crew is built.

        Args:
            args: Of a member's number and its threads: what the role is built with.
            env: Of the threads: variables that its process needs.
            shares_gpu: Member i gets half of the shared GPU i, where GPUs are shared.
        """
        # A node's cores are shared by the members of one kind that it holds.
        per_node = math.ceil(worker.num_workers / self.nodes) if self.spread else worker.num_workers
        # With a lag sampling and learning go on at once, and what waits for a thread that others keep from running
        # spins: with two threads each on two cores a step takes twice as long as without a lag.
        at_once = 2 if self.cfg.controller.lag else 1
        threads = worker.threads or max(1, self.cores // (per_node * at_once))
        found = []
        for place in range(worker.num_workers):
            strategy: Any = "SPREAD" if self.spread else "DEFAULT"
            if self._group is not None and shares_gpu:
                from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

                strategy, gpus = PlacementGroupSchedulingStrategy(self._group, place), 0.5
            own = f"{name}-{place}", role, args(place, threads)
            found.append(MemberSpec(*own, worker.num_cpus, gpus, env(threads), strategy))
        return found


def check_resources(cfg: Config, nodes: list[dict[str, Any]], with_learner: bool) -> None:
    """Raises:
    ConfigError: if these nodes can never hold the run's actors, which Ray would wait for without a word.
    """
    for place, kind in enumerate(("CPU", "GPU")):
        needs = [need[place] for need in _needs(cfg, with_learner)]
        have = [node["Resources"].get(kind, 0) for node in nodes]
        if sum(needs) > sum(have):
            raise ConfigError(
                f"the actors need {sum(needs):g} {kind}s, the Ray cluster has {sum(have):g}: lower "
                f"rollout/reward/learner.num_workers{' or .num_cpus' if kind == 'CPU' else ''}, or join more nodes"
            )
        if max(needs) > max(have):
            raise ConfigError(
                f"one actor needs {max(needs):g} {kind}s, the largest node of the cluster has {max(have):g}"
            )


def check_free(cfg: Config, free: list[dict[str, float]], with_learner: bool) -> None:
    """After :func:`check_resources`, with what is free on each node.

    Raises:
        ConfigError: if other runs hold so much that this run's actors find no place beside them.
    """
    left = [[node.get("CPU", 0.0), node.get("GPU", 0.0)] for node in free]
    needs = sorted(_needs(cfg, with_learner), key=lambda need: need[::-1], reverse=True)  # the large ones first
    for cpus, gpus in needs:
        node = next((node for node in left if node[0] >= cpus - 1e-6 and node[1] >= gpus - 1e-6), None)
        if node is None:
            asked = [f"{sum(need[place] for need in needs):g} {kind}s" for place, kind in enumerate(("CPU", "GPU"))]
            there = [", ".join(f"{one.get(kind, 0.0):g}" for one in free) for kind in ("CPU", "GPU")]
            raise ConfigError(
                f"the actors need {' and '.join(asked)}; other runs hold the rest of the Ray cluster, whose nodes have "
                f"{there[0]} CPUs and {there[1]} GPUs free: wait until one has ended, lower "
                "rollout/reward/learner.num_workers or .num_cpus, or join more nodes"
            )
        node[0], node[1] = node[0] - cpus, node[1] - gpus


def wait_for_room(cfg: Config, with_learner: bool) -> None:
    """Ask Ray what is free, until a run that has just ended is out. Errors as :func:`check_free`."""
    from ray._private.state import available_resources_per_node

    end = time.monotonic() + ENDING_SECONDS
    while True:
        try:
            check_free(cfg, list(available_resources_per_node().values()), with_learner)
            return
        except ConfigError:
            if time.monotonic() > end:
                raise
            time.sleep(0.5)


def _needs(cfg: Config, with_learner: bool) -> list[tuple[float, float]]:
    """CPUs and GPUs of each actor; of two that share a GPU together."""
    rollout, reward, learner = cfg.rollout, cfg.reward, cfg.learner
    shared = with_learner and rollout.weight_sync is WeightSync.ipc  # each pair on one node
    sampling = rollout.tensor_parallel_size if rollout.device == "cuda" else 0
    judging = 1 if reward.device == "cuda" and cfg.model.reward is not None else 0
    found = [(rollout.num_cpus + learner.num_cpus * shared, float(sampling))] * rollout.num_workers
    found += [(reward.num_cpus, float(judging))] * reward.num_workers
    if with_learner:
        found += [(BUFFER_CPUS, 0.0)]
        found += [(learner.num_cpus, float(learner.device == "cuda"))] * (learner.num_workers * (not shared))
    return found
