"""How large a model is: its parameters, counted by building it on torch's meta device, where it takes no memory. Its
``config.json`` is all that is read."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skyrl.checks.machine import DTYPE_BYTES
from skyrl.records import ConfigError
from skyrl.settings import LearnerConfig
from skyrl.settings.system import HUB_NAME

STATED = Path(__file__).parent / "models"
"""Configurations of models that are not here, by public shape numbers."""
EXPERTS = re.compile(r"\.experts\.")


@dataclass(slots=True, frozen=True)
class Shape:
    """A model's sizes. Parameters are numbers, not bytes; a tied weight counts once."""

    name: str
    source: str
    """Where the shape was read."""
    parameters: int
    trained: int
    """That ``learner.trainable`` names; with LoRA the factors."""
    by_part: dict[str, int]
    """Parameters of ``vision``, ``adapter`` and ``language``."""
    active: int
    """Parameters of the language model that work on one token: with experts, those that are chosen."""
    hidden: int
    layers: int
    queries: int
    """Width of all query heads together."""
    keys: int
    """Width of all heads of keys (as of values)."""
    inner: int
    """Width inside of a layer's MLP, of a token (of all its experts together)."""
    vocabulary: int
    lora: int
    """Rank of the factors; 0 without."""
    frozen: bool
    """The language model's own weights are not trained."""

    @property
    def language(self) -> int:
        return self.by_part["language"]

    def bytes(self, dtype: str) -> int:
        """Of all parameters."""
        return self.parameters * DTYPE_BYTES[dtype]


def configuration(given: str, key: str, stated: str) -> tuple[Any, str]:
    """transformers' configuration of a model, and where it was read.

    Args:
        given: Folder with a ``config.json`` (weights are not needed), a name of the hub, or "".
        key: The setting, for messages.
        stated: Name of the file in :data:`STATED` to be taken for "".

    Raises:
        ConfigError: if there is none, or transformers does not know it.
    """
    from transformers import AutoConfig

    from skyrl.policy.processor import remedy

    file = STATED / f"{stated}.json"
    if not given and not file.is_file():
        known = ", ".join(sorted(one.stem for one in STATED.glob("*.json")))
        raise ConfigError(
            f"{key} is empty: name a folder that has a config.json (weights are not needed) or a model of the hub; "
            f"without either, shapes are known for name={known}"
        )
    if (
        given
        and not (Path(given) / "config.json").is_file()
        and (Path(given).is_dir() or not HUB_NAME.fullmatch(given))
    ):
        what = "the folder has no config.json" if Path(given).is_dir() else "no such folder exists"
        raise ConfigError(
            f"{key}={given}: {what}; allowed: a folder with a config.json, or a name of the hub, owner/name"
        )
    try:
        if not given:
            values = json.loads(file.read_text(encoding="utf-8"))
            return AutoConfig.for_model(**values), values["_about"]
        return AutoConfig.from_pretrained(given), f"{given}/config.json"
    except (OSError, ValueError) as error:
        raise ConfigError(f"{key}={given}: its config.json can't be read: {remedy(error)}") from error


def shape(given: str, key: str, stated: str, learner: LearnerConfig | None) -> Shape:
    """The sizes of a model; for the rest see :func:`configuration`.

    Args:
        learner: Says what is trained; None for a model that is only asked.
    """
    config, source = configuration(given, key, stated)
    model = _on_meta(config, key)
    trained = _trained(model, learner)
    text, parts, experts = config.get_text_config(), Counter[str](), 0
    from skyrl.policy.lora import FACTORS
    from skyrl.policy.module import module_of

    for name, parameter in model.named_parameters():
        if any(factor in name for factor in FACTORS):
            continue
        part = module_of(name)
        parts[part] += parameter.numel()
        if part == "language" and EXPERTS.search(name):
            experts += parameter.numel()
    per_token, number = (
        getattr(text, "num_experts_per_tok", None) or 1,
        _first(text, "num_experts", "num_local_experts"),
    )
    share = per_token / number if experts and number else 1.0
    inner = (
        (getattr(text, "moe_intermediate_size", None) or text.intermediate_size) if experts else text.intermediate_size
    )
    heads, head = (
        text.num_attention_heads,
        getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
    )
    lora = learner.lora.rank if learner else 0
    frozen = lora > 0 or not any(
        p.requires_grad for n, p in model.named_parameters() if module_of(n) == "language" and ".layers." in n
    )
    return Shape(
        name=given or stated, source=source,
        parameters=sum(parts.values()), trained=trained,
        by_part={part: parts[part] for part in ("vision", "adapter", "language")},
        active=round(parts["language"] - experts * (1 - share)),
        hidden=text.hidden_size, layers=text.num_hidden_layers, queries=heads * head,
        keys=(getattr(text, "num_key_value_heads", None) or heads) * head,
        inner=inner * (per_token if experts else 1), vocabulary=text.vocab_size, lora=lora, frozen=frozen,
    )  # fmt: skip


def _on_meta(config: Any, key: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    kind = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    try:
        with torch.device("meta"):
            return kind.from_config(config)
    except ValueError as error:
        raise ConfigError(f"{key}: {' '.join(str(error).split())}") from error


def _trained(model: Any, learner: LearnerConfig | None) -> int:
    """Number of the parameters that get a gradient; ``requires_grad`` of all is set."""
    if learner is None:
        model.requires_grad_(False)
        return 0
    import torch

    from skyrl.policy.lora import add_lora
    from skyrl.policy.module import TRAINED, freeze

    freeze(model.named_parameters(), learner.trainable)
    if learner.lora.rank:
        with torch.device("meta"):
            add_lora(model, learner.lora, TRAINED[learner.trainable])
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _first(config: Any, *names: str) -> int | None:
    """The first of these values that a configuration has."""
    return next((int(value) for name in names if (value := getattr(config, name, None))), None)
