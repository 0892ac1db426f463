"""The data sets of a run, by split."""

from __future__ import annotations

from pathlib import Path

from skyrl.data.parquet import ParquetPrompts
from skyrl.digits.scenes import DigitScenes
from skyrl.interfaces import PromptDataset
from skyrl.records import DataError
from skyrl.settings import DataConfig


def build_datasets(cfg: DataConfig) -> dict[str, PromptDataset]:
    """Training and evaluation prompts: ``{"train": …, "eval": …}``.

    ``digits`` makes ``train_size`` and ``eval_size`` scenes. ``parquet`` reads all of ``train_path`` and the first
    ``eval_size`` rows of ``eval_path``. Cheap enough for every worker to call: no picture is decoded here.

    Raises:
        DataError: for an unknown source, a missing path, a broken file, or an id that is in both splits.
    """
    if cfg.source == "digits":
        return {
            "train": DigitScenes("train", cfg.train_size, cfg.text_share, cfg.seed, cfg.kinds),
            "eval": DigitScenes("eval", cfg.eval_size, cfg.text_share, cfg.seed, cfg.kinds),
        }
    if cfg.source != "parquet":
        raise DataError(f"data.source={cfg.source}: allowed are digits and parquet")
    for key in ("train_path", "eval_path"):
        if getattr(cfg, key) is None:
            raise DataError(f"data.source=parquet needs data.{key}: a parquet file; got null")
    train_path, eval_path = Path(str(cfg.train_path)), Path(str(cfg.eval_path))
    train, held_out = ParquetPrompts(train_path), ParquetPrompts(eval_path, limit=cfg.eval_size)
    # Caches and seeds go by id, so one id may not mean two prompts. The same file twice is allowed: it is how one
    # checks that a model can learn its data by heart.
    if train_path.resolve() != eval_path.resolve():
        shared = sorted(set(train.ids()) & set(held_out.ids()))
        if shared:
            raise DataError(
                f"{len(shared)} id(s) stand both in {train_path} and in {eval_path}, first {shared[0]!r}; allowed: ids "
                "that are unique over both (without an id column the file's name is part of it: rename one file)"
            )
    return {"train": train, "eval": held_out}
