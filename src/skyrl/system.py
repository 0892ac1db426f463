"""The parts of a run: four crews and the weight sync, started side by side and taken down together."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from skyrl.batch.batcher import Batcher
from skyrl.crew.crew import Crew, Executor, LocalExecutor
from skyrl.crew.placement import BUFFER_CPUS, Placement, check_resources
from skyrl.learner.step import LearnerStep
from skyrl.records import ConfigError, RolloutRequest, SampleGroup
from skyrl.rewards.rewarder import Rewarder
from skyrl.rollout.engine import rollout_environment
from skyrl.rollout.sampler import Sampler
from skyrl.settings import Config
from skyrl.sync.syncer import Syncer

R = TypeVar("R")
REWARD_RESTARTS = 3
"""A reward member has no state, so Ray may start it again; any other loss ends the run, which a checkpoint resumes."""


@dataclass(slots=True)
class System:
    """Everything that the loop gives orders to. A system that only samples and scores lacks the last three."""

    rollouts: Crew[Sampler]
    rewards: Crew[Rewarder]
    buffer: Crew[Batcher] = None  # type: ignore[assignment]
    """One member: the Selective Sample Buffer and what makes the train batches."""
    learners: Crew[LearnerStep] = None  # type: ignore[assignment]
    """Each call goes to all of its ranks."""
    syncer: Syncer = None  # type: ignore[assignment]

    @property
    def crews(self) -> list[Crew[Any]]:
        """Those that there are."""
        return [crew for crew in (self.rollouts, self.rewards, self.buffer, self.learners) if crew is not None]

    def ask(self, request: RolloutRequest) -> tuple[list[list[SampleGroup]], list[list[SampleGroup]]]:
        """Let the rollout members answer a request, and the reward members score each part as it is ready. Returns at
        once: promises of the parts in the order of the rows, as sampled and as scored. There are several parts for a
        rollout member where that gives every reward member a share."""
        pieces = -(-len(self.rewards) // len(self.rollouts))
        fresh = self.rollouts.deal(Sampler.generate, request.shared_by(len(self.rollouts)), pieces=pieces)
        return fresh, self.rewards.deal(Rewarder.score, fresh)

    def sizes(self) -> dict[str, int]:
        """Prompts per split, as the rollout members see them; waits until one is up."""
        return self.rollouts.one(Sampler.sizes)


@contextmanager
def start_system(
    cfg: Config,
    policy: str,
    reward: str | None,
    executor: Executor | None = None,
    train: bool = True,
    rollouts: Crew[Sampler] | None = None,
) -> Iterator[System]:
    """Start every member side by side, wait until all are up, and end them afterwards.

    Args:
        policy, reward: Hugging Face folder of the starting policy, and folder of the reward model if there is one.
        executor: Where the members run; None means the Ray session of this process.
        train: False starts rollout and reward members only.
        rollouts: A crew that is up already, to be used and left running; None starts one.

    Raises:
        ConfigError: if the cluster can never place them, or for several learner ranks in one process.
        SkyrlError: if they are not up within ``controller.timeout``.
    """
    if executor is None:
        import ray

        from skyrl.crew.ray_executor import RayExecutor

        executor, nodes = RayExecutor(), [node for node in ray.nodes() if node["Alive"]]
        check_resources(cfg, nodes, train)
    else:
        nodes = [{"Resources": {"CPU": os.cpu_count() or 1}}]
        if isinstance(executor, LocalExecutor) and cfg.learner.num_workers > 1:
            raise ConfigError(f"learner.num_workers={cfg.learner.num_workers}: must be 1 where all runs in one process")
    placement, crews = Placement(cfg, nodes, train), list[Crew[Any]]()
    try:
        placement.reserve()
        system = System(
            rollouts or _keep(crews, rollout_crew(cfg, placement, policy, executor)),
            _keep(crews, _rewards(cfg, placement, policy, reward, executor)),
        )
        up = [*system.rollouts.ask(Sampler.sizes), *system.rewards.ask(Rewarder.ready)]
        if train:
            spec = placement.spec("sample-buffer", Batcher, (cfg, policy), BUFFER_CPUS, {})
            system.buffer = _keep(crews, Crew(executor, [spec], cfg.controller.timeout))
            system.learners = _keep(crews, _learners(cfg, placement, policy, executor))
            port = system.learners.one(LearnerStep.free_port)
            if placement.shares_gpus:  # an engine measures its memory, and must be alone on its GPU meanwhile
                system.rollouts.each(Sampler.sizes)
            up += system.buffer.ask(Batcher.ready)
            up += system.learners.ask(LearnerStep.join, system.learners.hosts()[0], port)
            system.syncer = Syncer(system.learners, system.rollouts, cfg)
        system.rollouts.fetch(up)
        yield system
    finally:
        for crew in crews:
            crew.stop()
        placement.release()


def _keep(crews: list[Crew[Any]], crew: Crew[R]) -> Crew[R]:
    """Note a crew that must be stopped, also if a later one fails to start."""
    crews.append(crew)
    return crew


def rollout_crew(cfg: Config, placement: Placement, policy: str, executor: Executor) -> Crew[Sampler]:
    """The members that sample, not waited for."""
    rollout = cfg.rollout
    env = rollout_environment(rollout, placement.threads(rollout.threads, rollout.num_workers))
    gpus = rollout.tensor_parallel_size if rollout.device == "cuda" else 0
    specs = [
        placement.spec(f"rollout-{i}", Sampler, (cfg, policy), rollout.num_cpus, env, gpus, shared=i)
        for i in range(rollout.num_workers)
    ]
    return Crew(executor, specs, cfg.controller.timeout)


def _rewards(cfg: Config, placement: Placement, policy: str, folder: str | None, executor: Executor) -> Crew[Rewarder]:
    reward = cfg.reward
    threads = placement.threads(reward.threads, reward.num_workers)
    gpus = 1 if reward.device == "cuda" and folder is not None else 0
    env, args = {"OMP_NUM_THREADS": str(threads)}, (cfg, policy, folder, threads)
    specs = [
        placement.spec(f"reward-{i}", Rewarder, args, reward.num_cpus, env, gpus, restarts=REWARD_RESTARTS)
        for i in range(reward.num_workers)
    ]
    return Crew(executor, specs, cfg.controller.timeout)


def _learners(cfg: Config, placement: Placement, policy: str, executor: Executor) -> Crew[LearnerStep]:
    learner = cfg.learner
    threads = placement.threads(learner.threads, learner.num_workers)
    gpus = 1 if learner.device == "cuda" else 0
    env = {"OMP_NUM_THREADS": str(threads), "DS_ACCELERATOR": learner.device}
    specs = [
        placement.spec(
            f"learner-{rank}", LearnerStep, (cfg, policy, rank, threads), learner.num_cpus, env, gpus, shared=rank
        )
        for rank in range(learner.num_workers)
    ]
    return Crew(executor, specs, cfg.controller.timeout)
