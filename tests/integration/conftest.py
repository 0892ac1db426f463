"""Tiny embedded models and settings, shared by the tests that start the real libraries."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from skyrl.digits.settings import DigitsConfig
from skyrl.settings import Config, WandbMode

TINY = {"warm_start_steps": 60, "reward_body_steps": 10, "reward_steps": 4}
"""Settings of the small models, those of the quick grid of benchmarks/ablations: with them and the fixture's cache
other processes find the models and build none."""


@pytest.fixture(scope="session")
def model_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder of embedded models that were trained for seconds only, on batches of 24 instead of 64: they keep
    the form in most answers, and are right in some."""
    from skyrl.digits import embedded, training

    folder = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as small:
        small.setattr(training, "BATCH", 24)
        embedded.embedded_models(Config(digits=DigitsConfig(cache_dir=str(folder), **TINY)))
    return folder


@pytest.fixture(scope="session")
def make_config(model_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Config]:
    """Builds small configurations; every run gets a folder of its own."""

    def make(name: str, run_dir: Path | None = None) -> Config:
        cfg = Config(name=name, run_dir=str(run_dir or tmp_path_factory.mktemp(name)))
        cfg.digits = DigitsConfig(cache_dir=str(model_cache), text_share=0.3, **TINY)
        cfg.data.eval_size = 16
        cfg.rollout.prompts_per_step, cfg.rollout.samples_per_prompt, cfg.rollout.max_new_tokens = 6, 4, 40
        cfg.learner.lr = 1e-3  # a step must be visible in the weights
        cfg.controller.steps = 2
        cfg.controller.timeout = 300.0
        cfg.cluster.dashboard = False
        cfg.monitoring.wandb, cfg.monitoring.console = WandbMode.off, False
        return cfg

    return make
