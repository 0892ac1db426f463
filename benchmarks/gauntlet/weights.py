"""Faults of the weights on their way from the learner to the rollout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from benchmarks.gauntlet.fault import Fault, replaced

STALE = "SyncError.*do not hold the learner's weights"


@contextmanager
def never_synced() -> Iterator[None]:
    from skyrl.rollout.sampler import Sampler

    def load(original: Any, sampler: Any, snapshot: Any) -> Any:
        if snapshot.version == 0:
            return original(sampler, snapshot)
        sampler.version = sampler._incoming.version = snapshot.version
        return snapshot.megabytes

    with replaced(Sampler, "load_weights", load):
        yield


@contextmanager
def one_step_late() -> Iterator[None]:
    from skyrl.rollout.sampler import Sampler

    sent: dict[int, Any] = {}

    def load(original: Any, sampler: Any, snapshot: Any) -> Any:
        sent.setdefault(snapshot.version, replace(snapshot, parts=[part.copy() for part in snapshot.parts]))
        old = sent.get(snapshot.version - 1, snapshot)
        return original(sampler, replace(old, version=snapshot.version))

    with replaced(Sampler, "load_weights", load):
        yield


@contextmanager
def _tensors(changed: Any) -> Iterator[None]:
    """``changed(names and tensors)`` is what the engine loads."""
    from skyrl.sync.incoming import Incoming

    with replaced(
        Incoming, "tensors", lambda original, self, snapshot: changed(dict(original(self, snapshot)).items())
    ):
        yield


@contextmanager
def swapped_tensors() -> Iterator[None]:
    """Keys and values of the first layer that has both in one shape change places."""

    def swapped(sent: Any) -> Iterator[Any]:
        tensors = dict(sent)
        key = next(name for name in tensors if "text" in name and name.endswith("k_proj.weight"))
        value = key.replace("k_proj", "v_proj")
        tensors[key], tensors[value] = tensors[value], tensors[key]
        yield from tensors.items()

    with _tensors(swapped):
        yield


@contextmanager
def stale_layer() -> Iterator[None]:
    first: dict[str, Any] = {}

    def stale(sent: Any) -> Iterator[Any]:
        for name, tensor in sent:
            if "text_model.layers.1." in name:
                tensor = first.setdefault(name, tensor.clone())
            yield name, tensor

    with _tensors(stale):
        yield


@contextmanager
def sixteen_bits() -> Iterator[None]:
    import torch

    with _tensors(lambda sent: ((name, tensor.to(torch.bfloat16).to(tensor.dtype)) for name, tensor in sent)):
        yield


@contextmanager
def stale_head() -> Iterator[None]:
    """The packed copy of the tied output layer is not made anew."""
    from vllm.model_executor.layers import utils

    from skyrl.sync.shm_transfer import ShmWeightTransferEngine

    def finish(original: Any, engine: Any) -> None:
        with replaced(utils, "dispatch_cpu_unquantized_gemm", lambda *_, **__: None):
            original(engine)

    with replaced(ShmWeightTransferEngine, "finish_weight_update", finish):
        yield


@contextmanager
def lora_not_sent() -> Iterator[None]:
    """What is sent are the weights without their factors."""
    from skyrl.policy.lora import plain_name
    from skyrl.sync import outgoing

    def bare(original: Any, parameters: Any, cfg: Any) -> Iterator[Any]:
        return ((name, tensor) for long, tensor in parameters if (name := plain_name(long)) is not None)

    with replaced(outgoing, "merged", bare):
        yield


@contextmanager
def lora_wrong_scale() -> Iterator[None]:
    """Merged without alpha / rank, wherever it is merged."""
    from skyrl.policy import lora

    def unscaled(original: Any, weight: Any, a: Any, b: Any, cfg: Any) -> Any:
        return original(weight, a, b, cfg.model_copy(update={"alpha": cfg.rank}))

    with replaced(lora, "_merged", unscaled):
        yield


@contextmanager
def lora_binds_nothing() -> Iterator[None]:
    """The factors are there, are saved and sent, and no forward pass goes through them."""
    from peft.tuners.lora.layer import Linear

    def forward(original: Any, layer: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        return layer.base_layer(x, *args, **kwargs)

    with replaced(Linear, "forward", forward):
        yield


LORA = ("learner.lora.rank=4", "learner.lr=2e-3", "learner.warmup_steps=0")
FAULTS = [
    Fault(
        "weights_never_synced",
        "weights",
        "The engine goes on with its first weights: generate() reloads them from disk over those that were sent.",
        ("huggingface/trl#5312", "huggingface/trl#3679", "NVlabs/Long-RL#29"),
        STALE,
        1,
        never_synced,
    ),
    Fault(
        "tensors_swapped",
        "weights",
        "Two tensors of equal shape are loaded under each other's name: every shape fits.",
        ("NovaSky-AI/SkyRL#1680", "NovaSky-AI/SkyRL#1345"),
        STALE,
        0,
        swapped_tensors,
    ),
    Fault(
        "layer_stale",
        "weights",
        "One layer keeps its old weights, all others are new.",
        ("InternLM/xtuner#1410", "vllm-project/vllm-ascend#16700"),
        STALE,
        1,
        stale_layer,
    ),
    Fault(
        "tied_head_stale",
        "weights",
        "The embedding is new, and the output layer that is tied to it computes from an old packed copy.",
        ("PrimeIntellect-ai/prime-rl#2823", "vllm-project/vllm#51665"),
        STALE,
        1,
        stale_head,
    ),
    Fault(
        "weights_one_step_late",
        "weights",
        "Each sync brings the weights of the one before.",
        ("marin-community/marin#1824",),
        STALE,
        1,
        one_step_late,
    ),
    Fault(
        "lora_not_in_rollouts",
        "weights",
        "The rollout samples from the base weights, and the trained adapter is never applied there.",
        ("radixark/miles#2075", "huggingface/trl#3103"),
        STALE,
        1,
        lora_not_sent,
        LORA,
    ),
    Fault(
        "lora_binds_nothing",
        "weights",
        "The adapter's names fit no layer of the forward pass: it is trained, and changes nothing.",
        ("locuslab/open-unlearning#178", "Goekdeniz-Guelmez/mlx-lm-lora#55"),
        "no_gradient|weights_still",
        1,
        lora_binds_nothing,
        LORA,
    ),
    Fault(
        "weights_in_16_bits",
        "weights",
        "float32 weights are rounded to bfloat16 on their way.",
        (),
        STALE,
        0,
        sixteen_bits,
        further=True,
    ),
    Fault(
        "lora_wrong_scale",
        "weights",
        "Merging leaves alpha / rank out, on both sides of every comparison of merged weights.",
        (),
        "sampling_differs",
        2,
        lora_wrong_scale,
        LORA,
        further=True,
    ),
]
