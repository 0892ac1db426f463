"""Which member lands on which node, by the order in which a run starts them."""

from __future__ import annotations

from dataclasses import dataclass, field

from skyrl.crew.placement import BUFFER_CPUS
from skyrl.plan.machines import Machines
from skyrl.settings import Config, WeightSync


@dataclass(slots=True)
class Node:
    """What is free on it, and who is there."""

    cpus: float
    gpus: float
    members: list[str] = field(default_factory=list)


@dataclass(slots=True, frozen=True)
class Need:
    member: str
    cpus: float
    gpus: float
    """Of one node: an actor is not cut over nodes."""


def needs(cfg: Config) -> list[Need]:
    """What each member reserves, in the order in which a run starts them. With ``rollout.weight_sync=ipc`` a rollout
    member and the learner rank of the same number are one: they share a GPU."""
    rollout, reward, learner = cfg.rollout, cfg.reward, cfg.learner
    shared = rollout.weight_sync is WeightSync.ipc
    found = []
    for place in range(rollout.num_workers):
        if shared:
            name = f"rollout-{place} + learner-{place}"
            found.append(Need(name, rollout.num_cpus + learner.num_cpus, 1))
        else:
            gpus = rollout.tensor_parallel_size if rollout.device == "cuda" else 0
            found.append(Need(f"rollout-{place}", rollout.num_cpus, gpus))
    judged = 1 if reward.device == "cuda" and cfg.model.reward is not None else 0
    found += [Need(f"reward-{place}", reward.num_cpus, judged) for place in range(reward.num_workers)]
    found.append(Need("buffer-0", BUFFER_CPUS, 0))
    if not shared:
        gpus = 1 if learner.device == "cuda" else 0
        found += [Need(f"learner-{place}", learner.num_cpus, gpus) for place in range(learner.num_workers)]
    return found


def place(cfg: Config, machines: Machines) -> tuple[list[Node], list[Need]]:
    """The nodes with their members, and those that find no place.

    Ray spreads the members of a kind (``cluster.spread``), or fills one node after the other. It may number nodes in
    another order.
    """
    nodes = [Node(machines.node_cpus, machines.gpus) for _ in range(machines.nodes)]
    left, kinds = [], dict[tuple[str, int], int]()
    spread = cfg.cluster.spread and len(nodes) > 1
    for need in needs(cfg):
        kind = need.member.partition("-")[0]
        fitting = [
            number for number, node in enumerate(nodes) if node.cpus >= need.cpus - 1e-9 and node.gpus >= need.gpus
        ]
        if not fitting:
            left.append(need)
            continue
        at = min(fitting, key=lambda number: (kinds.get((kind, number), 0), number)) if spread else fitting[0]
        nodes[at].cpus -= need.cpus
        nodes[at].gpus -= need.gpus
        nodes[at].members.append(need.member)
        kinds[kind, at] = kinds.get((kind, at), 0) + 1
    return nodes, left
