"""Ray itself: join or start it, place the actors, tie them into pools, and take everything down again."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray

from skyrl.crew.placement import BUFFER_CPUS, Placement, check_resources
from skyrl.crew.pools import (
    RayBufferService,
    RayLearnerPool,
    RayRewardPool,
    RayRolloutPool,
    RayWeightSyncer,
    fetch,
)
from skyrl.crew.workers import BufferActor, LearnerActor, RewardActor, RolloutActor
from skyrl.loop import Pools
from skyrl.records import SkyrlError
from skyrl.settings import Config

REWARD_RESTARTS = 3
"""A reward worker has no state, so Ray may start it again; any other loss ends the run, which a checkpoint resumes."""


@dataclass(slots=True)
class System:
    """All actors of a run, ready."""

    pools: Pools
    rows: dict[str, int]
    """Prompts per split."""
    actors: list[Any]


@contextmanager
def ray_session(cfg: Config, namespace: str) -> Iterator[str]:
    """Join ``cluster.address`` or ``$RAY_ADDRESS``, or start a local Ray; leave or stop it at the end.

    Yields:
        The dashboard's address, or "" if there is none.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = cfg.cluster.address or os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"namespace": namespace, "log_to_driver": False, "logging_level": logging.ERROR}
    if not address:
        options |= {
            "num_cpus": cfg.cluster.num_cpus,
            "include_dashboard": cfg.cluster.dashboard,
            "dashboard_port": cfg.cluster.dashboard_port,
        }
    on_terminate = signal.getsignal(signal.SIGTERM)
    try:
        context = ray.init(address=address or "local", **options)
    except Exception as error:
        # Ray's start-up time-out is a bare Exception.
        if not isinstance(error, (ConnectionError, RuntimeError, ValueError)) and type(error) is not Exception:
            raise
        raise SkyrlError(
            f"Ray could not be {'joined at ' + address if address else 'started here'}: {error}"
        ) from error
    if callable(on_terminate) and threading.current_thread() is threading.main_thread():
        # Ray's own handler would end this process before the actors are taken down.
        signal.signal(signal.SIGTERM, on_terminate)
    try:
        yield context.dashboard_url or ""
    finally:
        ray.shutdown()


@contextmanager
def start_system(cfg: Config, policy_folder: str, reward_folder: str | None, learner: bool = True) -> Iterator[System]:
    """Start every actor side by side, wait until all are up, and kill them at the end.

    Args:
        learner: False starts rollout and reward workers only, to sample and score without training; the pools' buffer,
            learner and syncer are None then.

    Raises:
        ConfigError: if the cluster can never place them.
        SkyrlError: if they are not up within ``controller.timeout``.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    check_resources(cfg, nodes, learner)
    placement = Placement(cfg, nodes, learner)
    actors: list[Any] = []
    try:
        placement.reserve()
        rollouts = _rollouts(cfg, placement, policy_folder, actors)
        rewards = _rewards(cfg, placement, policy_folder, reward_folder, actors)
        learners = _learners(cfg, placement, policy_folder, actors) if learner else []
        starting = [actor.ready.remote() for actor in rewards]
        timeout = cfg.controller.timeout
        pools = Pools(RayRolloutPool(rollouts, cfg), RayRewardPool(rewards, cfg))
        if learner:
            buffer = placement.actor(BufferActor, "sample-buffer", BUFFER_CPUS, {}).remote(cfg, policy_folder)
            actors.append(buffer)
            host, port = fetch(learners[0].address.remote(), timeout, "starting the learner")
            if placement.shares_gpus:  # an engine measures its memory, and must be alone on its GPU meanwhile
                fetch([actor.sizes.remote() for actor in rollouts], timeout, "starting the rollout workers")
            starting += [rank.start.remote(host, port) for rank in learners] + [buffer.ready.remote()]
            pools.buffer = RayBufferService(buffer, cfg)
            pools.learner = RayLearnerPool(learners, cfg)
            pools.syncer = RayWeightSyncer(learners, rollouts, cfg)
        rows, *_ = fetch([*(actor.sizes.remote() for actor in rollouts), *starting], timeout, "starting the actors")
        yield System(pools, rows, actors)
    finally:
        for actor in actors:
            ray.kill(actor)
        placement.release()


def _rollouts(cfg: Config, placement: Placement, policy_folder: str, actors: list[Any]) -> list[Any]:
    from skyrl.rollout.environment import rollout_environment

    rollout = cfg.rollout
    env = rollout_environment(rollout, placement.threads(rollout.threads, rollout.num_workers))
    gpus = rollout.tensor_parallel_size if rollout.device == "cuda" else 0
    made = [
        placement.actor(RolloutActor, f"rollout-{i}", rollout.num_cpus, env, gpus, shared=i).remote(cfg, policy_folder)
        for i in range(rollout.num_workers)
    ]
    actors += made
    return made


def _learners(cfg: Config, placement: Placement, policy_folder: str, actors: list[Any]) -> list[Any]:
    learner = cfg.learner
    threads = placement.threads(learner.threads, learner.num_workers)
    gpus = 1 if learner.device == "cuda" else 0
    env = {"OMP_NUM_THREADS": str(threads), "DS_ACCELERATOR": learner.device}
    made = [
        placement.actor(LearnerActor, f"learner-{rank}", learner.num_cpus, env, gpus, shared=rank).remote(
            cfg, policy_folder, rank, threads
        )
        for rank in range(learner.num_workers)
    ]
    actors += made
    return made


def _rewards(
    cfg: Config, placement: Placement, policy_folder: str, reward_folder: str | None, actors: list[Any]
) -> list[Any]:
    reward = cfg.reward
    threads = placement.threads(reward.threads, reward.num_workers)
    gpus = 1 if reward.device == "cuda" and reward_folder is not None else 0
    env = {"OMP_NUM_THREADS": str(threads)}
    made = [
        placement.actor(RewardActor, f"reward-{i}", reward.num_cpus, env, gpus, restarts=REWARD_RESTARTS).remote(
            cfg, policy_folder, reward_folder, threads
        )
        for i in range(reward.num_workers)
    ]
    actors += made
    return made
