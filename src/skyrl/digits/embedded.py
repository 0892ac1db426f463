"""The embedded default models: built once from seeds, cached under a key of everything that shapes them."""

from __future__ import annotations

import ast
import copy
import hashlib
import json
import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from skyrl.settings import ModelConfig

RECIPE_FILES = (
    "digits/scenes.py",
    "policy/encode.py",
    "digits/architecture.py",
    "digits/warm_start.py",
    "rewards/reward_model.py",
    "digits/reward_training.py",
    "digits/embedded.py",
    "objective/reductions.py",
)
"""A change in any of these makes other models, so their code is part of the key."""
SCENES = 20_000
TEXT_SHARE = 0.15
DONE = "recipe.json"


def cache_folder(cfg: ModelConfig) -> Path:
    """Where embedded models are kept: ``model.cache_dir``, ``$SKYRL_CACHE`` or ``~/.cache/skyrl``."""
    return Path(cfg.cache_dir or os.environ.get("SKYRL_CACHE") or Path.home() / ".cache" / "skyrl").expanduser()


def recipe(cfg: ModelConfig) -> dict[str, object]:
    """Everything that decides what the built models are."""
    root = Path(__file__).parents[1]
    sources = {name: _code_digest(root / name) for name in RECIPE_FILES}
    return {
        "warm_start_steps": cfg.warm_start_steps,
        "reward_body_steps": cfg.reward_body_steps,
        "reward_steps": cfg.reward_steps,
        "seed": cfg.seed,
        "sources": sources,
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers", "scikit-learn")},
    }


def _code_digest(path: Path) -> str:
    """Digest of what a file does: comments, docstrings and layout don't count."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [  # type: ignore[attr-defined]
                part for part in body if not (isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant))
            ]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


def embedded_models(cfg: ModelConfig) -> tuple[Path, Path]:
    """Folders of the embedded policy and reward model, built now if the cache has none for this recipe.

    A half-built model is never seen: the build happens in a temporary folder that is renamed when complete.
    """
    text = json.dumps(recipe(cfg), sort_keys=True, indent=2)
    folder = cache_folder(cfg) / f"digits-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    if not (folder / DONE).is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        build = Path(tempfile.mkdtemp(prefix="building-", dir=folder.parent))
        try:
            _build(cfg, build)
            (build / DONE).write_text(text)
            if folder.exists() and not (folder / DONE).is_file():
                shutil.rmtree(folder)  # somebody took files out of it
            try:
                build.rename(folder)
            except OSError:
                if not (folder / DONE).is_file():  # another process may have finished the same build first
                    raise
        finally:
            shutil.rmtree(build, ignore_errors=True)
    return folder / "policy", folder / "reward"


def _build(cfg: ModelConfig, folder: Path) -> None:
    import torch
    from transformers import Idefics3ForConditionalGeneration
    from transformers.utils import logging

    from skyrl.digits.architecture import build_config, build_processor
    from skyrl.digits.reward_training import train_reward_model
    from skyrl.digits.scenes import DigitScenes
    from skyrl.digits.warm_start import warm_start
    from skyrl.policy.encode import PromptEncoder

    logging.disable_progress_bar()
    torch.manual_seed(cfg.seed)
    encoder = PromptEncoder(build_processor())
    policy = Idefics3ForConditionalGeneration(build_config(encoder.tokenizer))
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, refresh_per_second=2) as bar:
        first = bar.add_task("embedded policy: supervised warm start", total=cfg.warm_start_steps)
        second = bar.add_task("embedded reward model: body", total=cfg.reward_body_steps)
        third = bar.add_task("embedded reward model: Bradley-Terry", total=cfg.reward_steps)

        scenes = DigitScenes("train", SCENES, TEXT_SHARE, cfg.seed)
        show = lambda task: lambda step, _steps, _loss: bar.update(task, completed=step)  # noqa: E731
        warm_start(policy, encoder, scenes, cfg.warm_start_steps, show(first), careless=True)
        policy.save_pretrained(folder / "policy")
        encoder.processor.save_pretrained(folder / "policy")

        scenes = DigitScenes("reward", SCENES, TEXT_SHARE, cfg.seed)
        # The judge must see better than the judged: its body is the policy's, taught on by the faithful teacher.
        body = copy.deepcopy(policy)
        warm_start(body, encoder, scenes, cfg.reward_body_steps, show(second))
        reward_model, accuracy = train_reward_model(
            policy, body, encoder, scenes, cfg.reward_steps, cfg.seed, show(third)
        )
        reward_model.save(folder / "reward")
    (folder / "reward" / "pair_accuracy.json").write_text(json.dumps({"held_out_pair_accuracy": accuracy}))
