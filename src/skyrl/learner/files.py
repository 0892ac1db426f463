"""What a learner writes beside its backend's own files: layout and state, the policy as a Hugging Face folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from skyrl.records import SkyrlError, WeightSnapshot
from skyrl.settings import Config

FILE = "learner.json"
FORMAT = 3
"""Of the whole folder; goes up when older ones can't be loaded any more. 1 and 2 held pickled files."""


def layout(cfg: Config) -> dict[str, object]:
    """What a checkpoint's optimizer states are cut by; another run can only load them with the same settings."""
    return {
        "learner.backend": cfg.learner.backend,
        "learner.num_workers": cfg.learner.num_workers,
        "learner.zero_stage": cfg.learner.zero_stage,
        "learner.offload": cfg.learner.offload.value,
        "learner.trainable": cfg.learner.trainable.value,
        "learner.lora": cfg.learner.lora.model_dump(exclude={"sync"}),
        "model.dtype": cfg.model.dtype,
    }


def write_state(folder: Path, cfg: Config, state: dict[str, Any]) -> None:
    """Write layout and state; ``state`` is plain JSON."""
    content = {"format": FORMAT, "layout": layout(cfg), "state": state}
    (Path(folder) / FILE).write_text(json.dumps(content, indent=2))


def read_state(folder: Path, cfg: Config) -> dict[str, Any]:
    """The state that :func:`write_state` wrote.

    Raises:
        SkyrlError: if ``folder`` holds no learner state, a damaged one, one of another version of skyrl, or one that
            was written with settings that cut it differently.
    """
    file = Path(folder) / FILE
    if not file.is_file():
        raise SkyrlError(f"no learner state in {folder}: it has no {FILE}")
    try:
        saved, own = json.loads(file.read_text()), layout(cfg)
    except (ValueError, RecursionError) as error:
        raise SkyrlError(f"{file} is damaged: {type(error).__name__}: {error}") from error
    if not isinstance(saved, dict):
        raise SkyrlError(f"{file} is damaged: it holds {type(saved).__name__}, no object")
    if saved.get("format") != FORMAT:
        raise SkyrlError(
            f"the learner state in {folder} has format {saved.get('format', 1)}, this version of skyrl reads {FORMAT}: "
            "go on with the version that wrote it, or start anew from the policy that it exported"
        )
    if not all(isinstance(saved.get(name), dict) for name in ("layout", "state")):
        raise SkyrlError(f"{file} is damaged: it has no layout and state")
    other = [f"{key}={value} (here {own.get(key)})" for key, value in saved["layout"].items() if value != own.get(key)]
    if other:
        raise SkyrlError(f"the learner state in {folder} was saved with {', '.join(other)}; use the same to resume")
    return saved["state"]


def export_policy(folder: Path, model: Any, snapshot: WeightSnapshot, processor: Any) -> None:
    """Write ``snapshot`` as a Hugging Face folder that transformers and vLLM load.

    Args:
        model: The model that the parameters are of; under ZeRO-3 its own are in pieces and are not read.
    """
    from skyrl.sync.snapshot import parameters_of

    persistent = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in persistent}
    model.save_pretrained(folder, state_dict=dict(parameters_of(snapshot)) | buffers)
    processor.save_pretrained(folder)
