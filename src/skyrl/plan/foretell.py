"""The whole plan of a run: what each member holds, where it lands, what does not fit and which change would mend it,
and what a step would take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from skyrl.objective.hybrid import run_terms
from skyrl.plan import memory, places, speed
from skyrl.plan.machines import GIB, Machines
from skyrl.plan.memory import Bill, Cache, total
from skyrl.plan.sizes import Shape, shape
from skyrl.records import ConfigError
from skyrl.settings import Config, Offload, WeightSync
from skyrl.settings.reward_model import is_endpoint
from skyrl.settings.run import checked
from skyrl.simulate.cost import CostModel
from skyrl.simulate.lengths import Lengths
from skyrl.simulate.world import Result

MOST_CHANGES = 6
"""Changes that are advised together."""


@dataclass(slots=True)
class Models:
    policy: Shape
    judge: Shape | None
    """What each reward member holds; None if it holds no model."""
    compares: bool
    """There is a reference policy."""


@dataclass(slots=True)
class Foretold:
    """What comes of a plan."""

    models: Models
    bills: dict[str, Bill]
    """Of one member of each kind."""
    cache: Cache
    nodes: list[places.Node]
    problems: list[str]
    """What does not fit; empty if the run could start."""
    advice: list[str]
    """Changes, each with what it would mend."""
    rates: list[speed.Rate]
    step: Result | None
    """None if the run does not fit, or nothing is known of the machines' speed."""


def models_of(cfg: Config) -> Models:
    """Sizes of the policy and of the reward model; only their ``config.json`` are read.

    Raises:
        ConfigError: as :func:`skyrl.plan.sizes.configuration`.
    """
    policy, judge = cfg.model.policy, cfg.model.reward
    if "digits" in (policy, judge):
        from skyrl.run import model_folders

        policy, judge = model_folders(cfg)
    return Models(
        shape(policy, "model.policy", cfg.name, cfg.learner),
        None if judge is None or is_endpoint(judge) else shape(judge, "model.reward", f"{cfg.name}_reward", None),
        any(term.uses_reference for term in run_terms(cfg.algorithm)),
    )


def foretell(
    cfg: Config, machines: Machines, lengths: Lengths, costs: CostModel | None = None, models: Models | None = None
) -> Foretold:
    """The plan.

    Args:
        lengths: Of answers, before they are cut at ``rollout.max_new_tokens``.
        costs: Measured ones; None means by the card's published figures.
        models: As :func:`models_of`, if they are known.
    """
    models = models or models_of(cfg)
    bills, cache = bills_of(cfg, machines, models)
    nodes, problems = judged(cfg, machines, bills, cache)
    found = Foretold(models, bills, cache, nodes, [one.said for one in problems], [], [], None)
    if problems:
        found.advice = _advice(cfg, machines, models, problems)
        return found
    if costs is None and not (machines.gpus and cfg.rollout.device == cfg.learner.device == "cuda"):
        return found
    own = speed.lengths_for(cfg, lengths)
    if costs is None:
        costs, found.rates = speed.costs_on(cfg, models.policy, models.judge, machines, cache, own)
    found.step = speed.simulated(cfg, costs, own)
    return found


def bills_of(cfg: Config, machines: Machines, models: Models) -> tuple[dict[str, Bill], Cache]:
    """What a member of each kind holds."""
    card = machines.card if machines.gpus else None
    engine, cache = memory.rollout(cfg, models.policy, card)
    bills = {"rollout": engine, "learner": memory.learner(cfg, models.policy, models.compares)}
    if models.judge is not None:
        bills["reward"] = memory.reward(cfg, models.judge)
    return bills, cache


class Problem(NamedTuple):
    """Something that does not fit."""

    said: str
    excess: float
    """How far it is from fitting: members without a place, or the share of what there is that is missing."""


def judged(
    cfg: Config, machines: Machines, bills: dict[str, Bill], cache: Cache
) -> tuple[list[places.Node], list[Problem]]:
    """Where the members land, and what does not fit."""
    nodes, left = places.place(cfg, machines)
    problems = []
    if left:
        most = max(node.gpus for node in nodes), max(node.cpus for node in nodes)
        said = (
            f"{len(left)} members find no place, the first is {left[0].member}, which needs {left[0].gpus:g} GPUs and "
            f"{left[0].cpus:g} CPUs of one node; at most {most[0]:g} and {most[1]:g} are free"
        )
        problems.append(Problem(said, len(left)))
    if machines.gpus:
        problems += _on_gpus(cfg, machines, bills, cache)
    if cache.tokens < cache.longest:
        said = (
            f"rollout: the key-value cache holds {max(0.0, cache.tokens):,.0f} tokens, the longest prompt and answer "
            f"take {cache.longest:,}"
        )
        problems.append(Problem(said, 1 - cache.tokens / cache.longest))
    need, number = max((host_bytes(node, bills), number) for number, node in enumerate(nodes))
    if need > machines.node_memory:
        said = f"node {number}: its members hold {need / GIB:,.0f} GiB of host memory, it has "
        problems.append(Problem(said + f"{machines.node_memory / GIB:,.0f}", need / machines.node_memory - 1))
    return nodes, problems


def host_bytes(node: places.Node, bills: dict[str, Bill]) -> float:
    """Host memory of a node's members."""
    kinds = [part.partition("-")[0] for member in node.members for part in member.split(" + ")]
    return sum(total(bills[kind].host) for kind in kinds if kind in bills)


def _on_gpus(cfg: Config, machines: Machines, bills: dict[str, Bill], cache: Cache) -> Iterator[Problem]:
    have = machines.card.memory_gib * GIB
    shared = cfg.rollout.weight_sync is WeightSync.ipc
    for kind, bill in bills.items():
        need, limit, beside = total(bill.device), have, ""
        if shared and kind == "learner":
            limit, beside = have * (1 - cfg.rollout.gpu_memory_utilization), " beside the engine"
        if kind != "rollout" and need > limit:
            said = f"{kind}: {need / GIB:.1f} GiB on a GPU{beside}, there are {limit / GIB:.1f}"
            yield Problem(said, need / limit - 1)
    if cache.bytes <= 0 and cfg.rollout.device == "cuda":
        share = cfg.rollout.gpu_memory_utilization * have / GIB
        said = f"rollout: weights and work are {-cache.bytes / GIB:.1f} GiB above the {share:.1f} of an engine's GPU"
        yield Problem(said, 1 - cache.bytes / have)


# ------------------------------------------------------------------ advice

Change = tuple[str, Callable[[Config], None]]


def _changes(cfg: Config) -> Iterator[Change]:
    """What could be tried, the cheapest first."""
    yield from _learner_changes(cfg)
    rollout, reward = cfg.rollout, cfg.reward
    if rollout.device == "cuda":
        yield _set("rollout.tensor_parallel_size", 2 * rollout.tensor_parallel_size)
        if rollout.gpu_memory_utilization < 0.92 and rollout.weight_sync is not WeightSync.ipc:
            yield _set("rollout.gpu_memory_utilization", 0.92)
    else:
        yield _set("rollout.kv_cache_gib", 2 * rollout.kv_cache_gib)
    if reward.model_batch > 1:
        yield _set("reward.model_batch", max(1, reward.model_batch // 4))
    for key in ("rollout", "reward", "learner"):
        if (count := getattr(cfg, key).num_workers) > 1:
            yield _set(f"{key}.num_workers", count // 2)
    yield _set("learner.num_workers", 2 * cfg.learner.num_workers)


def _learner_changes(cfg: Config) -> Iterator[Change]:
    learner, rollout, gpu = cfg.learner, cfg.rollout, cfg.learner.device == "cuda"
    if not learner.gradient_checkpointing:
        yield _set("learner.gradient_checkpointing", True)
    least = rollout.max_prompt_tokens + rollout.max_new_tokens
    if learner.micro_batch_tokens // 2 >= least:
        yield _set("learner.micro_batch_tokens", max(least, learner.micro_batch_tokens // 4))
    if learner.num_workers > 1:
        for stage in range(learner.zero_stage + 1, 4):
            yield _set("learner.zero_stage", stage)
    if gpu and learner.offload is Offload.none:
        yield _set("learner.offload", "optimizer")
    if gpu and learner.offload is not Offload.all:
        yield _set("learner.offload", "all")


def _set(key: str, value: object) -> Change:
    def change(cfg: Config) -> None:
        group, name = key.split(".")
        setattr(getattr(cfg, group), name, value)

    return f"{key}={str(value).lower() if isinstance(value, bool) else value}", change


def _advice(cfg: Config, machines: Machines, models: Models, problems: list[Problem]) -> list[str]:
    """Each single change that makes the run fit; if there is none, the changes that do together, each time the one that
    brings it nearest."""

    def excess(tried: Config) -> float:
        return sum(one.excess for one in judged(tried, machines, *bills_of(tried, machines, models))[1])

    single = [words for words, tried in _tried(cfg) if excess(tried) == 0]
    if single:
        return [f"{words}: then it fits" for words in single]
    at, chosen, missing = cfg, list[str](), sum(one.excess for one in problems)
    while missing > 0 and len(chosen) < MOST_CHANGES:
        best = min(((excess(tried), words, tried) for words, tried in _tried(at)), key=lambda one: one[0], default=None)
        if best is None or best[0] >= missing:
            break
        missing, words, at = best
        chosen = [one for one in chosen if one.partition("=")[0] != words.partition("=")[0]] + [words]
    if missing > 0:
        return [f"no change that was tried makes it fit; nearest: {' '.join(chosen) or 'none'}"]
    return [f"{' '.join(chosen)}: together, then it fits"]


def _tried(cfg: Config) -> Iterator[tuple[str, Config]]:
    """The changes that other settings do not forbid, each made."""
    for words, change in _changes(cfg):
        tried = cfg.model_copy(deep=True)
        try:
            change(tried)
            checked(tried.model_dump(), with_files=False)
        except (ConfigError, ValueError):
            continue
        yield words, tried
