"""What kind of reward model a folder or an address is, found out without loading it."""

from __future__ import annotations

import json
import struct
from enum import Enum
from pathlib import Path

from skyrl.records import ConfigError

HEAD_FILE = "reward_head.safetensors"
"""The head of skyrl's own layout."""
VALUE_HEAD = ("v_head.summary.weight", "v_head.summary.bias")
"""Tensors of a head in TRL's layout, which Skywork-VL-Reward has too."""


class RewardLayout(Enum):
    own = "own"
    """A body and :data:`HEAD_FILE`, as ``RewardModel.save`` writes them."""
    value_head = "value_head"
    """A causal or image-text-to-text model, and :data:`VALUE_HEAD` among the tensors of its folder."""
    classifier = "classifier"
    """``…ForSequenceClassification`` with one label."""
    endpoint = "endpoint"
    """An address that begins with ``http://`` or ``https://``."""


def is_endpoint(reward: str) -> bool:
    return reward.startswith(("http://", "https://"))


def tensor_files(folder: Path) -> dict[str, Path]:
    """Name of each tensor in the safetensors files of a folder → its file; a broken file is a :class:`ConfigError`."""
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with path.open("rb") as file:
                (size,) = struct.unpack("<Q", file.read(8))
                names = json.loads(file.read(min(size, 1 << 28)))
        except (OSError, struct.error, ValueError) as error:
            raise ConfigError(f"{path} is no safetensors file: {error}") from None
        found |= dict.fromkeys(names, path)
    return found


def reward_layout(reward: str) -> RewardLayout:
    """What ``model.reward`` is.

    Raises:
        ConfigError: if it is none of these, or a classifier with several labels.
    """
    if is_endpoint(reward):
        return RewardLayout.endpoint
    folder = Path(reward)
    if (folder / HEAD_FILE).is_file():
        return RewardLayout.own
    if (folder / "value_head.safetensors").is_file() or set(VALUE_HEAD) <= tensor_files(folder).keys():
        return RewardLayout.value_head
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = {}
    kinds = config.get("architectures") or []
    if not any(str(kind).endswith("ForSequenceClassification") for kind in kinds):
        found = f"its config.json names {', '.join(map(str, kinds))}" if kinds else "no config.json that names one"
        raise ConfigError(
            f"model.reward={reward} is no reward model: it has no {HEAD_FILE}, no tensor {VALUE_HEAD[0]}, {found}; "
            "allowed: what RewardModel.save writes, a model with TRL's value head, a …ForSequenceClassification, http://…"
        )
    labels = len(config["id2label"]) if "id2label" in config else int(config.get("num_labels", 2))
    if labels != 1:
        raise ConfigError(f"model.reward={reward} is a classifier with {labels} labels; a reward model has one")
    return RewardLayout.classifier
