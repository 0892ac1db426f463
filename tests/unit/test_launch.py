"""Settings on the command line: composition, and refusals that name the key, fast and before heavy imports."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from hydra.core.config_store import ConfigStore

from skyrl.launch import CONF, _resume_command, compose_config
from skyrl.records import ConfigError
from skyrl.settings import Config, Squash, Trainable
from skyrl.settings.validation import validate


@pytest.fixture(autouse=True)
def schema() -> None:
    ConfigStore.instance().store(name="config_schema", node=Config)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "skyrl.launch", *arguments], capture_output=True, text=True, timeout=60, check=False
    )


def test_the_default_is_valid_and_equals_the_dataclass_but_for_the_run_folder() -> None:
    cfg = compose_config([])
    validate(cfg)
    assert cfg.run_dir.startswith("outputs/digits/")
    cfg.run_dir = ""
    assert cfg == Config()


def test_overrides_groups_and_enums() -> None:
    cfg = compose_config(["reward=paper_sum", "learner.trainable=adapter", "buffer=off", "controller.steps=3"])
    assert cfg.reward.squash is Squash.none and cfg.reward.model_weight == 1.0
    assert cfg.learner.trainable is Trainable.adapter
    assert not cfg.buffer.enabled and cfg.controller.steps == 3


@pytest.mark.parametrize("option", sorted(p for p in CONF.rglob("*.yaml") if p.parent != CONF))
def test_every_option_composes(option: Path) -> None:
    extra = ["model.policy=/m"] if option.stem == "huggingface" else []
    if option.stem == "r1v2_38b":
        extra = ["model.policy=/m", "model.reward=/r"]
    compose_config([f"{option.parent.name}={option.stem}", *extra])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "algorithm.grpo.wieght=1",
            "algorithm.grpo.wieght: there is no such setting; did you mean algorithm.grpo.weight",
        ),
        ("learner.lr=fast", "learner.lr: Value 'fast'"),
        ("reward.squash=foo", "reward.squash: Invalid value 'foo', expected one of"),
        ("buffer=foo", "Could not find 'buffer/foo'"),
        ("+rollout.max_promt_tokens=9", "rollout.max_promt_tokens: there is no such setting; did you mean rollout."),
        ("run_dir=", "run_dir is empty"),
    ],
)
def test_a_mistake_is_named_with_its_mend(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose_config([override])
    assert message in str(caught.value)


def test_a_refusal_is_quick_and_imports_nothing_heavy() -> None:
    started = time.monotonic()
    done = run("rollout.samples_per_prompt=1")
    seconds = time.monotonic() - started
    assert done.returncode == 2
    assert done.stderr.startswith("wrong settings:\nrollout.samples_per_prompt=1: must be 2 or more")
    assert "Traceback" not in done.stderr
    assert seconds < 20  # about 1.5 s on an idle machine; this only notices a heavy import on a busy one
    code = "import sys, skyrl.launch; print([m for m in ('torch', 'ray', 'vllm', 'deepspeed') if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_help_and_cfg_job_are_readable() -> None:
    shown = run("--help")
    assert shown.returncode == 0
    assert "buffer: off, ssb" in shown.stdout and "resume=auto" in shown.stdout
    settings = run("--cfg", "job", "controller.steps=7")
    assert settings.returncode == 0
    assert "  steps: 7" in settings.stdout


def test_the_command_that_goes_on_repeats_all_settings() -> None:
    assert _resume_command(["name=x", "resume=no", "algorithm=grpo", "data.kinds=[max,min]"]) == (
        f"{sys.executable} -m skyrl.launch name=x algorithm=grpo 'data.kinds=[max,min]' resume=auto"
    )
