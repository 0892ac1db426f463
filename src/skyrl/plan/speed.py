"""What a step would take: costs worked out from a card's published figures, and the real loop simulated with them.

The efficiencies below are assumed: nothing here was measured on a GPU. ``--costs`` names a file of measured ones.
"""

from __future__ import annotations

from typing import NamedTuple

from skyrl.checks.machine import DTYPE_BYTES
from skyrl.plan.machines import Card, Machines
from skyrl.plan.memory import Cache, Source, kv_bytes
from skyrl.plan.sizes import Shape
from skyrl.settings import Config, WeightSync
from skyrl.simulate.cost import CostModel, EngineCost, LearnerCost
from skyrl.simulate.lengths import Lengths
from skyrl.simulate.world import Plan, Result, simulate

READING, DECODING, TRAINING = 0.8, 0.6, 0.4
"""Assumed: shares of a card's bandwidth and arithmetic that decoding reaches, and of its arithmetic in long passes."""
HOST_SECONDS, HOP_SECONDS = 2e-3, 1e-5
"""Assumed: host work of a decoding step; latency of one all-reduce between the GPUs of an engine (two a layer)."""
PROBE_SECONDS, UPDATE_SECONDS = 2.0, 1.0
"""Assumed: proof of a weight sync; optimizer and plan of a step."""
BUFFER_SECONDS = 36e-6
"""Measured, an answer of 2,900 tokens on a CPU core (docs/results/simulation.md)."""
STEPS = 10


class Rate(NamedTuple):
    """A number that the time of a step is worked out from."""

    name: str
    value: str
    source: Source
    how: str


def lengths_for(cfg: Config, lengths: Lengths) -> Lengths:
    """The distribution, cut at ``rollout.max_new_tokens`` and ``rollout.max_prompt_tokens``."""
    cut = lengths.scaled(1.0, cfg.rollout.max_new_tokens)
    return cut.model_copy(update={"prompt_tokens": min(lengths.prompt_tokens, cfg.rollout.max_prompt_tokens)})


def costs_on(
    cfg: Config, policy: Shape, judge: Shape | None, machines: Machines, cache: Cache, lengths: Lengths
) -> tuple[CostModel, list[Rate]]:
    """The cost model of this run on these machines, and the numbers in it.

    Args:
        judge: The reward model, if reward members hold one.
        cache: Of one engine.
        lengths: Of this run's prompts and answers.
    """
    card, told = machines.card, list[Rate]()
    engine = _engine(cfg, policy, card, cache, lengths, told)
    learner = _learner(cfg, policy, machines, lengths, told)
    length = lengths.prompt_tokens + lengths.mean
    reward = 0.0
    if judge is not None and cfg.reward.device == "cuda":
        reward = 2 * judge.active * length / (card.tflops * 1e12 * TRAINING)
        told.append(Rate("reward model", f"{reward * 1e3:.1f} ms an answer", "assumed", f"{TRAINING:.0%} of the card"))
    model = CostModel(
        about="by the card's published figures",
        engines=[engine],
        learner=learner,
        reward_seconds=reward,
        buffer_seconds=BUFFER_SECONDS * cfg.rollout.prompts_per_step * cfg.rollout.samples_per_prompt,
        sync_seconds=_sync(cfg, policy, machines, told),
    )
    return model, told


def _engine(cfg: Config, policy: Shape, card: Card, cache: Cache, lengths: Lengths, told: list[Rate]) -> EngineCost:
    """Decoding: the language model's weights are read once a step, each sequence adds arithmetic, each token of context
    its keys and values. The vision tower only reads prompts and is left out."""
    tp, w, rollout = cfg.rollout.tensor_parallel_size, DTYPE_BYTES[cfg.model.dtype], cfg.rollout
    bandwidth, arithmetic = card.bandwidth * 1e9 * READING, card.tflops * 1e12
    base = HOST_SECONDS + policy.language * w / tp / bandwidth + (2 * policy.layers * HOP_SECONDS if tp > 1 else 0.0)
    one = 2 * policy.active / tp / (arithmetic * DECODING)
    room = int(cache.tokens / (lengths.prompt_tokens + lengths.mean))
    running = max(1, min(rollout.max_num_seqs, room))
    known = sorted({1, *(n for n in (8, 64, 256) if n < running), running})
    rates = [n / (base + n * one) for n in known]
    prefill = tp * arithmetic * TRAINING / (2 * policy.active)
    told += [
        Rate("decoding step", f"{base * 1e3:.1f} ms + {one * 1e6:.0f} us a sequence", "assumed",
             f"{READING:.0%} of bandwidth, {DECODING:.0%} of arithmetic, {HOST_SECONDS * 1e3:g} ms of the host"),
        Rate("sequences together", f"{running}", "computed",
             f"key-value cache for {cache.tokens:,.0f} tokens, rollout.max_num_seqs={rollout.max_num_seqs}"),
        Rate("new tokens", f"{rates[-1]:,.0f} a second and engine", "assumed", "with so many, at short contexts"),
    ]  # fmt: skip
    return EngineCost(
        gpus=tp, running=known, tokens_per_second=rates, max_running=running, prefill_tokens_per_second=prefill,
        context_seconds=kv_bytes(policy, w, tp) / bandwidth,
    )  # fmt: skip


def token_passes(cfg: Config, policy: Shape) -> tuple[float, float]:
    """Operations of a trained token with all passes; and how often the weights are read for a micro-batch.

    A pass over the language model takes two operations a weight. Backward: as much for the states, and as much again
    for weights that are trained. With checkpointing forward runs twice. The reference policy scores the members of
    pairs, and so does the policy where answers are not of its own version.
    """
    learner, algorithm, rollout = cfg.learner, cfg.algorithm, cfg.rollout
    forward = 2.0 * policy.active
    again = forward if learner.gradient_checkpointing else 0.0
    trained = 2.0 * min(policy.trained, policy.active)
    compared = 0.0
    if algorithm.uses_mpo and not algorithm.mpo.reference_free:
        compared = min(1.0, 2 * algorithm.mpo.pairs_per_prompt / rollout.samples_per_prompt)
    older = compared if cfg.controller.lag or rollout.oversample or rollout.top_p < 1 else 0.0
    operations = 2 * forward + trained + again + (compared + older) * forward
    return operations, 2 + (again > 0) + (compared > 0) + (older > 0)


def _learner(cfg: Config, policy: Shape, machines: Machines, lengths: Lengths, told: list[Rate]) -> LearnerCost:
    learner, card = cfg.learner, machines.card
    operations, reads = token_passes(cfg, policy)
    tokens = learner.micro_batch_tokens
    computing = tokens * operations / (card.tflops * 1e12 * TRAINING)
    moving, how = 0.0, ""
    if learner.zero_stage == 3 and learner.num_workers > 1:
        one_node = learner.num_workers <= machines.gpus
        speed = card.link * 1e9 if one_node else min(card.link, machines.network_gbit / 8) * 1e9
        moving = reads * policy.bytes(cfg.model.dtype) / speed
        how = f"; beside it {reads:g} times all weights over {speed / 1e9:g} GB/s, {moving:.1f} s"
    rate = tokens / max(computing, moving)
    if learner.shared_rows:  # the simulated batch has the prompt beside every answer
        group = cfg.rollout.samples_per_prompt
        rate *= group * (lengths.prompt_tokens + lengths.mean) / (lengths.prompt_tokens + group * lengths.mean)
    told.append(
        Rate(
            "training", f"{rate:,.0f} tokens a second and GPU", "assumed",
            f"{TRAINING:.0%} of the arithmetic: {computing:.1f} s a micro-batch{how}",
        )
    )  # fmt: skip
    return LearnerCost(
        tokens_per_second=rate,
        attention_tokens=policy.active / (policy.queries * policy.layers),
        fixed_seconds=UPDATE_SECONDS,
    )


def _sync(cfg: Config, policy: Shape, machines: Machines, told: list[Rate]) -> float:
    speed = machines.card.link if machines.nodes == 1 else min(machines.card.link, machines.network_gbit / 8)
    sent = policy.bytes(cfg.model.dtype) / (speed * 1e9) * (2 if cfg.learner.zero_stage == 3 else 1)
    told.append(
        Rate("weight sync", f"{sent + PROBE_SECONDS:.1f} s", "assumed", f"all weights at {speed:g} GB/s, and the proof")
    )
    return sent + PROBE_SECONDS


def simulated(cfg: Config, costs: CostModel, lengths: Lengths) -> Result:
    """Mean step of the real loop with these costs."""
    plan = Plan(
        cfg.rollout.prompts_per_step, cfg.rollout.samples_per_prompt, cfg.rollout.num_workers, cfg.learner.num_workers,
        cfg.controller.lag, STEPS, cfg.rollout.oversample, cfg.rollout.weight_sync is WeightSync.ipc,
        cfg.reward.num_workers, replay=False,
    )  # fmt: skip
    return simulate(plan, costs, lengths)[0]
