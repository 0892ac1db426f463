"""What the rest of skyrl may ask of the embedded default: its prompts and its models."""

from __future__ import annotations

from pathlib import Path

from skyrl.data.datasets import PromptDataset
from skyrl.digits.scenes import DigitScenes
from skyrl.settings import Config


def datasets(cfg: Config) -> dict[str, PromptDataset]:
    """``data.source=digits``: ``digits.train_size`` scenes to train on, ``data.eval_size`` held-out ones."""
    digits, sizes = cfg.digits, {"train": cfg.digits.train_size, "eval": cfg.data.eval_size}
    return {
        name: DigitScenes(name, size, digits.text_share, cfg.data.seed, digits.kinds) for name, size in sizes.items()
    }


def models(cfg: Config) -> tuple[Path, Path]:
    """Folders of policy and reward model, ``model.policy=digits`` and ``model.reward=digits``. The first call for
    these settings trains both, for minutes; later ones find them in ``digits.cache_dir``."""
    from skyrl.digits.embedded import embedded_models

    return embedded_models(cfg.digits)
