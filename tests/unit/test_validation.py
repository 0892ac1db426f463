"""Every rule of the configuration: what is allowed passes, what is not is named with its key."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path

import pytest

from skyrl.config import Config, GrpoFilter, WeightSync
from skyrl.types import ConfigError
from skyrl.validation import AT_LEAST_ONE, NOT_NEGATIVE, POSITIVE, SHARES, validate


def put(cfg: Config, key: str, value: object) -> Config:
    *sections, name = key.split(".")
    holder = attrgetter(".".join(sections))(cfg) if sections else cfg
    assert hasattr(holder, name), key
    setattr(holder, name, value)
    return cfg


def problems(cfg: Config) -> list[str]:
    try:
        validate(cfg)
    except ConfigError as error:
        return str(error).splitlines()
    return []


def test_defaults_are_valid() -> None:
    assert problems(Config()) == []


BAD = [
    *[(key, value) for key in AT_LEAST_ONE for value in (0, -1)],
    *[(key, -1) for key in NOT_NEGATIVE],
    *[(key, value) for key in POSITIVE for value in (0, -1.0, math.nan)],
    *[(key, value) for key in SHARES for value in (-0.1, 1.1, math.nan)],
    *[("rollout.top_p", value) for value in (0.0, 1.1, math.nan)],
    *[("rollout.samples_per_prompt", value) for value in (0, 1)],
    ("model.dtype", "int8"),
    ("rollout.device", "tpu"),
    ("learner.device", "tpu"),
    ("reward.device", "tpu"),
    ("learner.zero_stage", 4),
    ("learner.zero_stage", -1),
    ("data.source", "csv"),
    ("resume", "/no/such/folder"),
    ("model.policy", "/no/such/folder"),
    ("model.reward", "/no/such/folder"),
    ("algorithm.grpo.clip_low", 1.0),
    ("algorithm.grpo.clip_low", -0.1),
]


@pytest.mark.parametrize(("key", "value"), BAD)
def test_the_message_names_key_and_value(key: str, value: object) -> None:
    found = problems(put(Config(), key, value))
    assert any(line.startswith(f"{key}={value}") and "must be" in line for line in found), found


EDGE = [
    *[(key, 1) for key in AT_LEAST_ONE if key not in ("data.train_size", "rollout.num_workers")],
    *[(key, 0) for key in NOT_NEGATIVE],
    *[(key, 1e-9) for key in POSITIVE],
    *[(key, value) for key in SHARES for value in (0, 1)],
    ("rollout.top_p", 1.0),
    ("rollout.samples_per_prompt", 2),
    *[("learner.zero_stage", stage) for stage in range(4)],
    ("model.dtype", "bfloat16"),
    ("resume", "auto"),
    ("resume", "/"),
    ("algorithm.grpo.clip_low", 0.0),
    ("algorithm.grpo.clip_high", 5.0),
]


@pytest.mark.parametrize(("key", "value"), EDGE)
def test_the_ends_of_each_range_are_allowed(key: str, value: object) -> None:
    assert problems(put(Config(), key, value)) == []


def no_reward_model(cfg: Config) -> None:
    cfg.model.reward, cfg.reward.model_weight, cfg.algorithm.mpo.weight = None, 0.0, 0.0


def uneven(cfg: Config) -> None:
    cfg.rollout.prompts_per_step, cfg.rollout.num_workers = 10, 3


def too_few_scenes(cfg: Config) -> None:
    cfg.data.train_size = 10


def nothing_trained(cfg: Config) -> None:
    cfg.algorithm.grpo.weight = cfg.algorithm.mpo.weight = 0.0


def negative_clip(cfg: Config) -> None:
    cfg.algorithm.grpo.clip_high = -0.1


def pairs_without_reward_model(cfg: Config) -> None:
    no_reward_model(cfg)
    cfg.algorithm.mpo.weight = 0.5


def weight_without_reward_model(cfg: Config) -> None:
    no_reward_model(cfg)
    cfg.reward.model_weight = 0.5


def ties_without_reward_model(cfg: Config) -> None:
    no_reward_model(cfg)
    cfg.algorithm.grpo.filter = GrpoFilter.all


def own_policy(cfg: Config) -> None:
    cfg.model.policy = "/"


def parquet(cfg: Config) -> None:
    cfg.data.source = "parquet"


def too_long(cfg: Config) -> None:
    cfg.rollout.max_prompt_tokens, cfg.rollout.max_new_tokens = 400, 113


def shared_memory_across_gpus(cfg: Config) -> None:
    cfg.rollout.tensor_parallel_size = 2


def nccl_on_cpu(cfg: Config) -> None:
    cfg.rollout.weight_sync = WeightSync.nccl


def nccl_with_a_cpu_learner(cfg: Config) -> None:
    cfg.rollout.weight_sync, cfg.rollout.device = WeightSync.nccl, "cuda"


def half_on_cpu(cfg: Config) -> None:
    cfg.model.dtype = "float16"


def shared_memory_on_gpus(cfg: Config) -> None:
    cfg.rollout.device = "cuda"


@pytest.mark.parametrize(
    ("change", "keys"),
    [
        (uneven, ["rollout.prompts_per_step=10", "rollout.num_workers=3"]),
        (too_few_scenes, ["rollout.prompts_per_step=64", "data.train_size=10"]),
        (nothing_trained, ["algorithm.grpo.weight=0", "algorithm.mpo.weight=0"]),
        (negative_clip, ["algorithm.grpo.clip_low=0.2", "clip_high=-0.1"]),
        (pairs_without_reward_model, ["model.reward=null", "algorithm.mpo.weight=0.5"]),
        (weight_without_reward_model, ["model.reward=null", "reward.model_weight=0.5"]),
        (ties_without_reward_model, ["model.reward=null", "algorithm.grpo.filter=all"]),
        (own_policy, ["model.reward=digits", "model.policy"]),
        (too_long, ["rollout.max_prompt_tokens + rollout.max_new_tokens is 513", "512"]),
        (shared_memory_across_gpus, ["rollout.tensor_parallel_size=2", "rollout.weight_sync=shm"]),
        (nccl_on_cpu, ["rollout.weight_sync=nccl", "rollout.device=cuda", "learner.device=cuda"]),
        (nccl_with_a_cpu_learner, ["rollout.weight_sync=nccl", "learner.device=cuda"]),
        (half_on_cpu, ["model.dtype=float16"]),
        (shared_memory_on_gpus, ["rollout.weight_sync=shm", "rollout.device=cuda", "nccl"]),
    ],
)
def test_impossible_combinations(change: Callable[[Config], None], keys: list[str]) -> None:
    cfg = Config()
    change(cfg)
    (message,) = problems(cfg)
    assert all(key in message for key in keys), message


def test_parquet_needs_both_files(tmp_path: Path) -> None:
    cfg = Config()
    parquet(cfg)
    assert [line.split(":")[0] for line in problems(cfg)] == [
        "data.source=parquet needs data.train_path",
        "data.source=parquet needs data.eval_path",
    ]
    file = tmp_path / "rows.parquet"
    file.touch()
    cfg.data.train_path = str(file)
    assert len(problems(cfg)) == 1
    cfg.data.eval_path = str(file)
    assert problems(cfg) == []


def test_combinations_that_are_possible() -> None:
    cfg = Config()
    no_reward_model(cfg)
    assert problems(cfg) == []
    own_policy(cfg)
    cfg.rollout.max_prompt_tokens = 4096  # the 512 positions are the embedded policy's
    assert problems(cfg) == []
    cfg.rollout.device = cfg.learner.device = "cuda"
    cfg.rollout.weight_sync, cfg.rollout.tensor_parallel_size, cfg.model.dtype = WeightSync.nccl, 8, "float16"
    assert problems(cfg) == []


def test_all_problems_come_at_once() -> None:
    cfg = put(put(put(Config(), "learner.lr", 0), "buffer.mix", 2.0), "model.dtype", "int4")
    found = problems(cfg)
    assert [line.split("=")[0] for line in found] == ["learner.lr", "buffer.mix", "model.dtype"]


def test_it_loads_no_heavy_library() -> None:
    code = (
        "import sys, skyrl.config, skyrl.validation as v; v.validate(skyrl.config.Config()); "
        "print([m for m in ('torch', 'ray', 'vllm', 'transformers', 'deepspeed') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
