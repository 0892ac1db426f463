"""Tiny embedded models and settings, shared by the tests that start the real libraries."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from skyrl.settings import Config, ModelConfig, WandbMode

TINY = {"warm_start_steps": 60, "reward_body_steps": 10, "reward_steps": 4}


@pytest.fixture(scope="session")
def model_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder of embedded models that were trained for seconds only."""
    from skyrl.digits.embedded import embedded_models

    folder = tmp_path_factory.mktemp("models")
    embedded_models(ModelConfig(cache_dir=str(folder), **TINY))
    return folder


@pytest.fixture(scope="session")
def make_config(model_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Config]:
    """Builds small configurations; every run gets a folder of its own."""

    def make(name: str, run_dir: Path | None = None) -> Config:
        cfg = Config(name=name, run_dir=str(run_dir or tmp_path_factory.mktemp(name)))
        cfg.model = ModelConfig(cache_dir=str(model_cache), **TINY)
        cfg.data.eval_size, cfg.data.text_share = 16, 0.3
        cfg.rollout.prompts_per_step, cfg.rollout.samples_per_prompt, cfg.rollout.max_new_tokens = 6, 4, 40
        cfg.learner.lr = 1e-3  # a step must be visible in the weights
        cfg.controller.steps = 2
        cfg.controller.timeout = 300.0
        cfg.cluster.dashboard = False
        cfg.monitoring.wandb, cfg.monitoring.console = WandbMode.off, False
        return cfg

    return make
