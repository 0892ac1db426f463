"""What a learner writes beside DeepSpeed's own files: a checkpoint's layout, the policy as a Hugging Face folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from skyrl.records import SkyrlError, WeightSnapshot
from skyrl.settings import Config
from skyrl.sync.snapshot import parameters_of

LAYOUT_FILE = "learner.json"


def layout(cfg: Config) -> dict[str, object]:
    """What a checkpoint's optimizer states are cut by; another run can only load them with the same settings."""
    return {
        "learner.num_workers": cfg.learner.num_workers,
        "learner.zero_stage": cfg.learner.zero_stage,
        "learner.trainable": cfg.learner.trainable.value,
        "model.dtype": cfg.model.dtype,
    }


def write_layout(folder: Path, cfg: Config) -> None:
    (Path(folder) / LAYOUT_FILE).write_text(json.dumps(layout(cfg), indent=2))


def check_layout(folder: Path, cfg: Config) -> None:
    """
    Raises:
        SkyrlError: if ``folder`` holds no learner state, or one that was written with settings that cut it differently.
    """
    file = Path(folder) / LAYOUT_FILE
    if not file.is_file():
        raise SkyrlError(f"no learner state in {folder}: it has no {LAYOUT_FILE}")
    saved, own = json.loads(file.read_text()), layout(cfg)
    other = [f"{key}={value} (here {own[key]})" for key, value in saved.items() if value != own[key]]
    if other:
        raise SkyrlError(f"the learner state in {folder} was saved with {', '.join(other)}; use the same to resume")


def export_policy(folder: Path, model: Any, snapshot: WeightSnapshot, processor: Any) -> None:
    """Write ``snapshot`` as a Hugging Face folder that transformers and vLLM load.

    Args:
        model: The model that the parameters are of; under ZeRO-3 its own are in pieces and are not read.
    """
    persistent = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in persistent}
    model.save_pretrained(folder, state_dict=dict(parameters_of(snapshot)) | buffers)
    processor.save_pretrained(folder)
