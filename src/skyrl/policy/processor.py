"""The processor of a model's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from skyrl.policy.torchvision_stand_in import stand_in_for_torchvision
from skyrl.records import ConfigError

PICTURE_FILES = ("preprocessor_config.json", "processor_config.json")


def load_processor(folder: str, trust_remote_code: bool = False) -> Any:
    """What ``AutoProcessor.from_pretrained`` makes of a folder: of a text model its tokenizer.

    Args:
        trust_remote_code: Run Python files of the folder.

    Raises:
        ConfigError: if it can't be made: files or a package are missing, or it has code of its own that may not run.
    """
    if any((Path(folder) / name).is_file() for name in PICTURE_FILES):
        stand_in_for_torchvision()  # before transformers is imported
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ImportError, OSError, ValueError, AttributeError, TypeError, KeyError) as error:
        raise ConfigError(f"{folder}: its processor can't be made: {remedy(error)}") from error


def remedy(error: Exception) -> str:
    """What transformers says, and what helps."""
    text = " ".join(str(error).split())
    if "trust_remote_code" in text:
        return (
            "it has Python code of its own, which would run on this machine; read it, and set "
            "model.trust_remote_code=true if you trust it"
        )
    return f"{type(error).__name__}: {text}"


def configured_ends(folder: Path, processor: Any) -> list[int]:
    """Tokens that end a generation by the folder's ``generation_config.json`` and ``config.json``."""
    tokenizer = getattr(processor, "tokenizer", processor)
    known = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    ends: list[int] = []
    for path in (folder / "generation_config.json", folder / "config.json"):
        try:
            config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        except ValueError as error:
            raise ConfigError(f"{path} is no JSON: {error}") from None
        for part in (config, config.get("text_config") or {}):
            written = part.get("eos_token_id")
            ids = written if isinstance(written, list) else [] if written is None else [written]
            # A config.json often holds its class's default, which may be an ordinary token of this tokenizer.
            ends += [int(i) for i in ids if path.name == "generation_config.json" or i in known]
    return ends
