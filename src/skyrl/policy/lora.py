"""LoRA (arXiv 2106.09685), by peft: a frozen weight W gets two small trained factors, W + α/r · B·A. Whoever takes the
policy's parameters gets them merged, under the names of the model's own folder, by the learner or, with
``learner.lora.sync=adapter``, by the rollout member: this module is all that does it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from skyrl.records import ConfigError
from skyrl.settings.system import LoraConfig

BASE, FACTORS = ".base_layer.", (".lora_A.default.", ".lora_B.default.")
"""How peft names what a layer had, and what it gets."""


def add_lora(model: Any, cfg: LoraConfig, trained: Iterable[str]) -> int:
    """Put factors beside the linear layers of the modules ``trained`` (``vision``, ``adapter``, ``language``), or those
    of them whose last name is one of ``cfg.targets``; everything else is frozen. B starts as 0: nothing changes yet.

    Returns:
        The number of layers that got factors.

    Raises:
        ConfigError: if there is no such layer, or a target names none.
    """
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    from skyrl.policy.module import module_of

    head, wanted = model.get_output_embeddings(), set(trained)
    linear = [name for name, part in model.named_modules() if isinstance(part, nn.Linear) and part is not head]
    found = [name for name in linear if module_of(f"{name}.") in wanted]
    last = sorted({name.rpartition(".")[2] for name in found})
    if missing := sorted(set(cfg.targets) - set(last)):
        raise ConfigError(
            f"learner.lora.targets: {', '.join(missing)}: no such trained layer; allowed: {', '.join(last)}"
        )
    chosen = [name for name in found if not cfg.targets or name.rpartition(".")[2] in cfg.targets]
    if not chosen:
        raise ConfigError(f"learner.lora.rank={cfg.rank}: learner.trainable names no module with linear layers")
    peft = PeftConfig(r=cfg.rank, lora_alpha=cfg.alpha, target_modules=chosen, lora_dropout=0.0, bias="none")
    inject_adapter_in_model(peft, model)  # freezes everything but the factors
    return len(chosen)


def plain_name(name: str) -> str | None:
    """The name that a parameter has in the model's own folder; None for a factor."""
    return None if any(part in name for part in FACTORS) else name.replace(BASE, ".")


def weight_of(name: str) -> str:
    """The plain name of the weight that a factor belongs to; of any other parameter its own."""
    for part in (BASE, *FACTORS):
        name = name.replace(part, ".")
    return name


def merged(parameters: Iterable[tuple[str, torch.Tensor]], cfg: LoraConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """The policy's parameters without factors: each weight that has some as W + α/r · B·A, computed in float32 and
    rounded once to W's type. In the model's order, one layer held at a time."""
    held: list[tuple[str, torch.Tensor]] = []  # a weight that waits for its factors, and a bias behind it
    factor: torch.Tensor | None = None
    for name, tensor in parameters:
        if FACTORS[0] in name:
            factor = tensor
        elif FACTORS[1] in name:
            assert held and factor is not None
            yield held[0][0], _merged(held[0][1], factor, tensor, cfg)
            yield from held[1:]
            held = []
        elif BASE in name:
            held.append((name.replace(BASE, "."), tensor))
        else:
            yield name, tensor


def _merged(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, cfg: LoraConfig) -> torch.Tensor:
    return (weight.float() + (cfg.alpha / cfg.rank) * (b.float() @ a.float())).to(weight.dtype)


@contextmanager
def computing_merged(model: Any, cfg: LoraConfig) -> Iterator[None]:
    """Inside, ``model`` computes with the merged weights, as who receives them does. In 16 bits that is another policy
    than factors beside weights: a change smaller than the last place of a weight is rounded away. Makes the weight of
    one layer at a time. Not for weights that are cut over ranks."""
    from peft.tuners.lora import LoraLayer

    layers: list[Any] = [part for part in model.modules() if isinstance(part, LoraLayer)]
    for layer in layers:
        layer.forward = partial(_merged_forward, layer, cfg)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _merged_forward(layer: Any, cfg: LoraConfig, x: torch.Tensor) -> torch.Tensor:
    base, a, b = layer.base_layer, layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return nn.functional.linear(x, _merged(base.weight, a, b, cfg), base.bias)


def save_adapter(folder: Path | None, backend: Any) -> None:
    """Write the factors alone as a folder that peft loads over the starting policy; every rank must call it.

    Args:
        folder: None on ranks that only take part in the gathering.
        backend: The learner's :class:`skyrl.learner.backend.Backend`.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    names = {name for name, _ in backend.model.named_parameters() if plain_name(name) is None}
    whole = {name: tensor.cpu().contiguous() for name, tensor in backend.parameters(names)}
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        factors = get_peft_model_state_dict(backend.model, whole)
        named = {f"base_model.model.{name}": tensor for name, tensor in factors.items()}
        save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        backend.model.peft_config["default"].save_pretrained(str(folder))
