"""The processor of a model's folder."""

from __future__ import annotations

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
