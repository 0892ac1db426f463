"""The parts of a run: four crews and the weight sync, started side by side and taken down together."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from skyrl.batch.batcher import Batcher
from skyrl.crew.crew import Crew
from skyrl.crew.executor import Executor, MemberSpec
from skyrl.crew.hosts import Hosts, hosts_of
from skyrl.crew.local_executor import LocalExecutor
from skyrl.crew.placement import Placement, check_resources, wait_for_room
from skyrl.learner.step import LearnerStep
from skyrl.records import Begun, ConfigError, DataError, RolloutRequest, SampleGroup
from skyrl.rewards.rewarder import Rewarder
from skyrl.rollout.engine import rollout_environment
from skyrl.rollout.sampler import Sampler, Unfit
from skyrl.settings import Config, Overlong
from skyrl.sync.syncer import Syncer

R = TypeVar("R")
MEASURED_TOGETHER = 2048
"""Rows that a rollout member measures in one call."""
MEASURING_SHOWN = 10
"""Seconds between two lines about it."""
NAMED_ROWS = 10
"""Rows that a message names."""


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
    hosts: Hosts = field(default_factory=lambda: Hosts(None, {}, 0.0))
    """The other hosts that members are on."""

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

    def ask_enough(
        self, requests: Sequence[RolloutRequest], begun: Sequence[list[Begun]], enough: int
    ) -> tuple[list[list[SampleGroup]], list[list[SampleGroup]], list[list[Begun]]]:
        """As :meth:`ask`, with a request for each rollout member, and the groups that it goes on with; each ends when
        ``enough`` of its groups are complete. The third promises are the groups that are not."""
        pieces = -(-len(self.rewards) // len(self.rollouts))
        fresh, left = list[Any](), list[Any]()
        for place, (request, earlier) in enumerate(zip(requests, begun, strict=True)):
            *made, rest = self.rollouts.deal(
                Sampler.generate_enough, [request], earlier, enough, pieces, pieces=pieces + 1, first=place
            )
            fresh, left = [*fresh, *made], [*left, rest]
        return fresh, self.rewards.deal(Rewarder.score, fresh), left

    def join(self) -> list[None]:
        """Let the learner ranks meet and build the starting policy; promises."""
        port = self.learners.one(LearnerStep.free_port)
        return self.learners.ask(LearnerStep.join, self.learners.host(), port)

    def restart_learners(self) -> None:
        """Build all ranks anew: they hold the starting policy afterwards."""
        for place in range(len(self.learners)):
            self.learners.rebuild(place)
        self.learners.find_place()
        self.learners.fetch(self.join())
        self.syncer.forget()

    def sizes(self) -> dict[str, int]:
        """Prompts per split, as the rollout members see them; waits until one is up."""
        return self.rollouts.one(Sampler.sizes)


def fitting_rows(cfg: Config, system: System, split: str, rows: Sequence[int], console: Console) -> Sequence[int]:
    """Those of the rows of a split whose prompts can be asked: all of them, unless ``data.overlong=drop`` leaves some
    out. The rollout members measure them side by side, before the first step.

    Raises:
        DataError: naming the rows that are too long (``data.overlong=error``) or that the model's processor or chat
            template refuses, or if none is left.
    """
    parts = [rows[start : start + MEASURED_TOGETHER] for start in range(0, len(rows), MEASURED_TOGETHER)]
    promises, found = system.rollouts.deal(Sampler.unfit, parts, split), list[Unfit]()
    started = reported = time.monotonic()
    for done, promise in enumerate(promises):
        found += system.rollouts.fetch([promise])[0]
        if time.monotonic() - reported > MEASURING_SHOWN:
            reported = time.monotonic()
            console.print(f"measuring {split} prompts: {done + 1} of {len(parts)} parts, {reported - started:.0f} s")
    dropped, limit = cfg.data.overlong is Overlong.drop, cfg.rollout.max_prompt_tokens
    if wrong := [one for one in found if not (one.too_long and dropped)]:
        named = "\n".join(f"row {one.row}: {one.problem}" for one in wrong[:NAMED_ROWS])
        more = f"\n… and {len(wrong) - NAMED_ROWS} more" if len(wrong) > NAMED_ROWS else ""
        mend = ""
        if any(one.too_long for one in wrong):
            mend = (
                f" (rollout.max_prompt_tokens={limit}; data.overlong=drop leaves those out that are too long, "
                "cut shortens them)"
            )
        raise DataError(f"{len(wrong)} of {len(rows)} {split} prompts can't be asked{mend}:\n{named}{more}")
    if not found:
        return rows
    console.print(f"data.overlong=drop: {len(found)} of {len(rows)} {split} prompts are left out (over {limit} tokens)")
    if len(found) == len(rows):
        raise DataError(f"data.overlong=drop leaves no {split} prompt; raise rollout.max_prompt_tokens")
    left_out = {one.row for one in found}
    return [row for row in rows if row not in left_out]


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

        nodes = [node for node in ray.nodes() if node["Alive"]]
        check_resources(cfg, nodes, train)
        wait_for_room(cfg, train)
        hosts = hosts_of(cfg, policy, reward, train)
        hosts.prepare()
        home = hosts.home()
        folder = Path(cfg.run_dir) if cfg.run_dir else None
        executor = RayExecutor(cfg.controller.restarts, prepare=hosts.prepare, folder=folder)
    else:
        hosts, home = Hosts(None, {}, 0.0), "DEFAULT"
        nodes = [{"Resources": {"CPU": os.cpu_count() or 1}}]
        if isinstance(executor, LocalExecutor) and cfg.learner.num_workers > 1:
            raise ConfigError(f"learner.num_workers={cfg.learner.num_workers}: must be 1 where all runs in one process")
    placement = Placement(cfg, nodes, train)
    with ExitStack() as stack:

        def started(specs: list[MemberSpec[R]]) -> Crew[R]:
            crew = Crew(executor, specs, cfg.controller.timeout)
            stack.callback(crew.stop)
            return crew

        stack.callback(placement.release)  # also if only a part of it comes in time
        placement.reserve()
        gpu = 1 if cfg.reward.device == "cuda" and reward is not None else 0
        judges = placement.specs(
            "reward", Rewarder, cfg.reward, lambda _, threads: (cfg, policy, reward, threads), gpus=gpu,
        )  # fmt: skip
        system = System(rollouts or started(rollout_specs(cfg, placement, policy)), started(judges), hosts=hosts)
        # What they were built with is all that they need, as long as nothing is trained.
        system.rollouts.revive = system.rewards.revive = lambda place: None
        up = [*system.rollouts.ask(Sampler.sizes), *system.rewards.ask(Rewarder.ready)]
        if train:
            # Beside this process, where the run's folder is; a head may have no CPU to give away.
            system.buffer = started([MemberSpec("sample-buffer", Batcher, (cfg, policy), strategy=home)])
            device = cfg.learner.device
            ranks = placement.specs(
                "learner", LearnerStep, cfg.learner, lambda rank, threads: (cfg, policy, rank, threads),
                lambda threads: {"OMP_NUM_THREADS": str(threads), "DS_ACCELERATOR": device},
                gpus=1 if device == "cuda" else 0, shares_gpu=True,
            )  # fmt: skip
            system.learners = started(ranks)
            if placement.shares_gpus:  # an engine measures its memory, and must be alone on its GPU meanwhile
                system.rollouts.each(Sampler.sizes)
            up += [*system.buffer.ask(Batcher.ready), *system.join()]
            system.syncer = Syncer(system.learners, system.rollouts, cfg)
        for crew in system.crews:
            crew.find_place()
        system.rollouts.fetch(up)
        yield system


def rollout_specs(cfg: Config, placement: Placement, policy: str) -> list[MemberSpec[Sampler]]:
    """How the members that sample are built."""
    env = partial(rollout_environment, cfg.rollout)
    gpus = cfg.rollout.tensor_parallel_size if cfg.rollout.device == "cuda" else 0
    return placement.specs("rollout", Sampler, cfg.rollout, lambda *_: (cfg, policy), env, gpus, shares_gpu=True)
