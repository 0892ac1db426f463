"""What the members of a run hold: bytes on a GPU, or in host memory, part by part.

Formulas, with P parameters, T trained ones, w bytes of ``model.dtype``, n ranks and ZeRO stage s; what a stage cuts is
divided by n:

=====================  ======================================================================
weights                w · P, cut by stage 3
gradients              4 · T (w · T at stage 0), cut by stage 2; at stages 1 and 2 a flat copy of 4 · T / n
master weights         4 · T, cut, at stages 1 and 2; at stage 3 in 16 bits only; none at stage 0
AdamW                  8 · T, cut by stage 1
reference policy       w · P, cut by stage 3
=====================  ======================================================================

They are those of DeepSpeed's own classes for these settings (deepspeed/runtime/zero, bf16_optimizer.py), and tests work
them out by hand.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from skyrl.checks.machine import DTYPE_BYTES
from skyrl.plan.machines import GIB, Card
from skyrl.plan.sizes import Shape
from skyrl.settings import Config, LearnerConfig, Offload

Source = Literal["measured", "computed", "assumed"]
BUCKET, LIVE = 500_000_000, 1_050_000_000
"""DeepSpeed's ``reduce_bucket_size``; and ``stage3_max_live_parameters`` with its prefetch: numbers."""
BLOCKS = 4
"""Assumed: blocks of logits (``skyrl.policy.output_layer``) that lie side by side while one is worked on."""
CONTEXT = 1.5 * GIB
"""Assumed: of a GPU, what the driver, CUDA's context, cuBLAS and NCCL take."""
GRAPHS = 1.0 * GIB
"""Assumed: vLLM's CUDA graphs."""
BATCHED_TOKENS = 8192
"""Assumed: tokens that vLLM puts through the model at once on a GPU."""
LIBRARIES = 0.46 * GIB
"""Measured on a CPU (docs/results/plan.md): a process with torch, transformers and DeepSpeed and no model."""
ENGINE_HOST = 6.0 * GIB
"""Assumed: host memory of an engine's processes on a GPU, its picture cache included."""


class Figure(NamedTuple):
    """One part of what a member holds."""

    part: str
    bytes: float
    source: Source
    how: str


def total(figures: list[Figure]) -> float:
    """Bytes."""
    return sum(one.bytes for one in figures)


class Bill(NamedTuple):
    """What one member holds."""

    device: list[Figure]
    """On its GPU; empty without one."""
    host: list[Figure]


# ------------------------------------------------------------------ learner


def learner(cfg: Config, shape: Shape, compares: bool) -> Bill:
    """One rank.

    Args:
        compares: A term of the loss compares with a reference policy.
    """
    gpu = cfg.learner.device == "cuda"
    states, moved = learner_states(cfg.learner, shape, cfg.model.dtype, compares, gpu)
    held = [*states, *activations(cfg, shape), *_transient(cfg, shape)]
    if not gpu:
        return Bill([], [_libraries(), *held, *moved])
    device = [Figure("CUDA", CONTEXT, "assumed", "driver, context, NCCL"), *held]
    load = cfg.learner.zero_stage < 3
    loading = Figure(
        "loading", shape.bytes(cfg.model.dtype) if load else 0.0, "computed",
        "the whole model, before it goes to the GPU" if load else "read through the page cache, which can be reclaimed",
    )  # fmt: skip
    return Bill(device, [_libraries(), *moved, loading])


def learner_states(
    learner: LearnerConfig, shape: Shape, dtype: str, compares: bool, gpu: bool = True
) -> tuple[list[Figure], list[Figure]]:
    """Weights, gradients, optimizer, reference and buffers of one rank: what stays on its device, and what
    ``learner.offload`` moves to the host."""
    stage, n, w = learner.zero_stage, learner.num_workers, DTYPE_BYTES[dtype]
    whole, trained = shape.parameters + (shape.trained if shape.lora else 0), shape.trained

    def cut(least: int) -> int:
        return n if stage >= least else 1

    def by(least: int) -> str:
        return f", over {n} ranks" if cut(least) > 1 else ""

    kept = [Figure("weights", w * whole / cut(3), "computed", f"{whole:,} x {w} bytes{by(3)}")]
    width = 4 if stage else w
    flat = 4 * trained / n if stage in (1, 2) else 0.0
    optimizer = [
        Figure("gradients", width * trained / cut(2) + flat, "computed", f"{trained:,} trained x {width} bytes{by(2)}")
    ]
    if stage in (1, 2) or (stage == 3 and (w < 4 or learner.offload is not Offload.none)):
        optimizer.append(Figure("master weights", 4 * trained / cut(1), "computed", f"float32{by(1)}"))
    optimizer.append(Figure("AdamW", 8 * trained / cut(1), "computed", f"two float32 moments{by(1)}"))
    rest = []
    if compares:
        rest.append(Figure("reference policy", w * whole / cut(3), "computed", f"as the weights{by(3)}"))
    if buffers := _buffers(stage, w, whole, trained, gpu):
        rest.append(Figure("DeepSpeed's buffers", buffers, "computed", "its default bucket sizes"))
    if learner.offload is Offload.none:
        return [*kept, *optimizer, *rest], []
    if learner.offload is Offload.optimizer:
        return [*kept, *rest], optimizer
    return rest, [*kept, *optimizer]


def _buffers(stage: int, w: int, whole: int, trained: int, gpu: bool) -> float:
    """Bytes of communication buffers. A GPU gives a buffer all its bytes, a host those that are written to."""
    bucket = {0: 0, 1: min(BUCKET, trained), 2: BUCKET, 3: BUCKET}[stage]
    live = min(LIVE, whole) if stage == 3 else 0
    return float(w * ((bucket if gpu else min(bucket, trained)) + live))


# ------------------------------------------------------------------ activations


def activations(cfg: Config, shape: Shape) -> list[Figure]:
    """What a forward pass of one micro-batch keeps for the backward pass. The vision tower's own are not counted: it is
    run without gradients where it is frozen."""
    from skyrl.policy.output_layer import BLOCK_BYTES

    learner, w, tokens = cfg.learner, DTYPE_BYTES[cfg.model.dtype], micro_batch(cfg)
    path = min(tokens, cfg.rollout.max_prompt_tokens + cfg.rollout.max_new_tokens)
    one = tokens * layer_bytes(shape, w, path, learner.shared_rows, learner.device == "cuda")
    if learner.gradient_checkpointing:
        kept, how = tokens * w * shape.hidden * shape.layers + one, "inputs of the layers, and one layer's own"
    else:
        kept, how = one * shape.layers, f"{shape.layers} layers"
    held = Figure("activations", kept, "computed", f"{tokens:,} tokens, {how}")
    hidden = tokens * (w + 4) * shape.hidden + BLOCKS * min(BLOCK_BYTES, 4 * tokens * shape.vocabulary)
    hidden += 0 if shape.frozen else w * shape.hidden * shape.vocabulary
    return [held, Figure("output layer", hidden, "assumed", "four blocks of logits, hidden states, gradient")]


def micro_batch(cfg: Config) -> int:
    """Tokens of the largest micro-batch: a pair of answers is not cut, and may be larger than the budget."""
    prompt, answer = cfg.rollout.max_prompt_tokens, cfg.rollout.max_new_tokens
    members = 2 if cfg.algorithm.uses_mpo else 1
    largest = prompt + members * answer if cfg.learner.shared_rows else members * (prompt + answer)
    return max(cfg.learner.micro_batch_tokens, largest)


def layer_bytes(shape: Shape, w: int, path: int, shared_rows: bool, gpu: bool) -> float:
    """Bytes that a decoder layer (two RMS norms, attention, gated MLP) keeps for one token of a micro-batch.

    Args:
        w: Bytes of a number.
        path: Tokens of the longest way from a prompt's first to an answer's last token.
        shared_rows: Answers share their prompt's row (:mod:`skyrl.policy.attention`): keys and values are gathered for
            each chunk, and each has a mask.
        gpu: There keys are repeated for every head of queries.
    """
    h, q, f = shape.hidden, shape.queries, shape.inner
    kept = 2 * h * 4 + w * (2 * q + 3 * f)  # what the norms read, in float32; queries and attention's output; the MLP
    if not shape.frozen or shape.lora:
        kept += w * (2 * h + q + f)  # inputs of linear layers
    if not shape.frozen:
        kept += w * 2 * h  # normed, for the norms' own weights
    if not shared_rows:
        return float(kept + w * 2 * shape.keys)
    keys, mask = gathered(path)
    return float(kept + w * (q + 2 * shape.keys + keys * 2 * (q if gpu else shape.keys) + mask))


def gathered(path: int) -> tuple[float, float]:
    """For one token of a row that is a single path of so many: keys gathered, and entries of masks."""
    from skyrl.policy.attention import CHUNK, SHARE

    start = keys = mask = 0
    while start < path:
        own = min(max(CHUNK, start // SHARE), path - start)
        keys += start + own
        mask += own * (start + own)
        start += own
    return keys / path, mask / path


def _transient(cfg: Config, shape: Shape) -> list[Figure]:
    """The backward pass of one layer works on gradients of what it kept; the sync sends a parameter at a time."""
    w = DTYPE_BYTES[cfg.model.dtype]
    work = micro_batch(cfg) * w * (3 * shape.inner + 4 * shape.hidden)
    return [Figure("backward pass", work, "assumed", "gradients of one layer's activations")]


def _libraries() -> Figure:
    return Figure("libraries", LIBRARIES, "measured", "a process without a model, on a CPU")


# ------------------------------------------------------------------ engines and reward models


class Cache(NamedTuple):
    """The key-value cache of one engine."""

    bytes: float
    """On each of its GPUs; below 0 if there is no room."""
    tokens: float
    """That it holds."""
    longest: int
    """Tokens of the longest prompt and answer together."""


def rollout(cfg: Config, shape: Shape, card: Card | None) -> tuple[Bill, Cache]:
    """One engine; on a GPU what it holds on each of its GPUs. vLLM takes ``gpu_memory_utilization`` of a GPU whatever
    it needs; what the weights and its work leave is its key-value cache."""
    rollout, w = cfg.rollout, DTYPE_BYTES[cfg.model.dtype]
    longest = rollout.max_prompt_tokens + rollout.max_new_tokens
    tp = rollout.tensor_parallel_size
    token = kv_bytes(shape, w, tp)
    if card is None or rollout.device != "cuda":
        cache = rollout.kv_cache_gib * GIB
        weights = Figure("weights", shape.bytes(cfg.model.dtype), "computed", f"{shape.parameters:,} x {w} bytes")
        held = Figure("key-value cache", cache, "computed", "rollout.kv_cache_gib; resident as it fills")
        return Bill([], [_libraries(), weights, held]), Cache(cache, cache / token, longest)
    weights = Figure("weights", shape.bytes(cfg.model.dtype) / tp, "computed", f"over {tp} GPUs" if tp > 1 else "")
    batched = max(BATCHED_TOKENS, longest)
    work = batched * w * (4 * shape.hidden + 2 * shape.inner / tp) + rollout.max_num_seqs * 8 * shape.vocabulary
    parts = [
        weights,
        Figure(
            "activations", work, "assumed", f"{batched:,} tokens at once, logits of {rollout.max_num_seqs} sequences"
        ),
        Figure("CUDA graphs", GRAPHS, "assumed", ""),
    ]
    room = rollout.gpu_memory_utilization * card.memory_gib * GIB - total(parts)
    parts.append(Figure("key-value cache", max(0.0, room), "computed", "the rest of rollout.gpu_memory_utilization"))
    parts.append(Figure("CUDA", CONTEXT, "assumed", "driver, context, NCCL"))
    host = [Figure("engine", ENGINE_HOST, "assumed", "its processes, and pictures")]
    return Bill(parts, host), Cache(room, room / token, longest)


def kv_bytes(shape: Shape, w: int, tp: int) -> float:
    """Of one token, on each GPU of an engine (whose GPUs are no more than there are heads of keys)."""
    return 2 * shape.layers * shape.keys * w / tp


def reward(cfg: Config, shape: Shape) -> Bill:
    """One reward member with a model of its own."""
    w, gpu = DTYPE_BYTES[cfg.model.dtype], cfg.reward.device == "cuda"
    length = cfg.rollout.max_prompt_tokens + cfg.rollout.max_new_tokens
    tokens = cfg.reward.model_batch * length
    held = [
        Figure("weights", shape.bytes(cfg.model.dtype), "computed", f"{shape.parameters:,} x {w} bytes"),
        Figure(
            "activations", tokens * w * (4 * shape.hidden + 3 * shape.inner), "assumed",
            f"reward.model_batch x {length:,} tokens, one layer",
        ),
    ]  # fmt: skip
    if not gpu:
        return Bill([], [_libraries(), *held])
    loading = Figure("loading", shape.bytes(cfg.model.dtype), "computed", "before it goes to the GPU")
    return Bill([Figure("CUDA", CONTEXT, "assumed", ""), *held], [_libraries(), loading])
