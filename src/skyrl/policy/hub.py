"""Folders of models: by their name on the Hugging Face hub, and without pickled weights."""

from __future__ import annotations

from pathlib import Path

from skyrl.records import ConfigError
from skyrl.settings.system import HUB_NAME


def model_folder(name: str, key: str) -> str:
    """The folder itself; of a name on the hub the folder of its files, which are downloaded unless they are there.

    Args:
        key: The setting, for messages.

    Raises:
        ConfigError: if it is neither a folder nor can be downloaded, or as :func:`refuse_pickled`.
    """
    if Path(name).is_dir() or not HUB_NAME.fullmatch(name):
        refuse_pickled(name)
        return name
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return str(snapshot_download(name, ignore_patterns=["*.bin", "*.pth", "*.gguf", "*.onnx", "original/*"]))
    except (OSError, HFValidationError) as error:  # HTTP errors, too, and "not in the cache" without a network
        raise ConfigError(
            f"{key}={name}: no such folder exists here, and the Hugging Face hub gives no model of that name "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]}). Where there is a network: "
            f"hf download {name} --local-dir FOLDER; then {key}=FOLDER. A gated model wants HF_TOKEN"
        ) from error


def refuse_pickled(folder: str) -> None:
    """Weights are read from safetensors files alone, here and by vLLM: a pickle may run code.

    Raises:
        ConfigError: if the folder has no such file, and pickled weights instead.
    """
    path = Path(folder)
    pickled = sorted(file.name for ending in ("bin", "pt", "pth") for file in path.glob(f"*.{ending}"))
    if pickled and not any(path.glob("*.safetensors")):
        raise ConfigError(
            f"{folder} has its weights in {pickled[0]}, a pickle, which may run code when it is read; if you trust it, "
            "save it again as safetensors: AutoModel….from_pretrained(folder).save_pretrained(another)"
        )
