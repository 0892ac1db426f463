"""Checks of a configuration before anything heavy is imported. Each message names the key and the mend."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from skyrl.records import ConfigError
from skyrl.settings import Config, WeightSync
from skyrl.settings.algorithm_rules import algorithm_problems
from skyrl.settings.ranges import (
    AT_LEAST_ONE,
    DEVICES,
    DTYPES,
    EMBEDDED_POSITIONS,
    NOT_NEGATIVE,
    OPEN_SHARES,
    OPTIONAL_NOT_NEGATIVE,
    PICTURE_KINDS,
    POSITIVE,
    SHARES,
)

SHARED_GPU_LIMIT = 0.6
MAY_BE_INFINITE = ("learner.max_grad_norm", "rollout.logprob_gap_limit", "algorithm.grpo.mismatch_cap")
"""Limits that infinity turns off."""


def validate(cfg: Config, with_learner: bool = True) -> None:
    """Raise if any setting is out of range or impossible together with another one.

    Args:
        cfg: The whole configuration.
        with_learner: False if no learner will start, whose device and type do not matter then.

    Raises:
        ConfigError: naming every problem found, one a line.
    """
    problems = [*_ranges(cfg), *_choices(cfg), *_combinations(cfg, with_learner)]
    if problems:
        raise ConfigError("\n".join(problems))


def _ranges(cfg: Config) -> Iterator[str]:
    rules: tuple[tuple[tuple[str, ...], Callable[[float], bool], str], ...] = (
        (AT_LEAST_ONE, lambda value: value >= 1, "1 or more"),
        (NOT_NEGATIVE, lambda value: value >= 0, "0 or more"),
        (POSITIVE, lambda value: value > 0, "above 0"),
        (SHARES, lambda value: 0 <= value <= 1, "in 0 … 1"),
        (OPEN_SHARES, lambda value: 0 < value < 1, "above 0 and below 1"),
        (OPTIONAL_NOT_NEGATIVE, lambda value: value is None or value >= 0, "null, or 0 or more"),
        (
            ("rollout.top_p", "buffer.recency", "rollout.gpu_memory_utilization"),
            lambda value: 0 < value <= 1,
            "above 0 and at most 1",
        ),
        (("buffer.fill_target",), lambda value: value is None or 0 <= value <= 1, "null, or in 0 … 1"),
        (("algorithm.grpo.dual_clip",), lambda value: value is None or value > 1, "null, or above 1"),
        (("algorithm.grpo.mismatch_cap",), lambda value: value > 1, "above 1"),
        (("algorithm.mpo.label_smoothing",), lambda value: 0 <= value < 0.5, "0 or more and below 0.5"),
        (("algorithm.mpo.delta_decay",), lambda value: 0 <= value < 1, "0 or more and below 1"),
        (("algorithm.mpo.reference_kl",), lambda value: value is None or value > 0, "null, or above 0"),
        (("filter.rows", "cluster.num_cpus"), lambda value: value is None or value >= 1, "null, or 1 or more"),
        (("rollout.logprob_gap_limit",), lambda value: value is None or value > 0, "null, or above 0"),
        (("algorithm.grpo.clip_low",), lambda value: 0 <= value < 1, "0 or more and below 1"),
        (("cluster.dashboard_port",), lambda value: 0 <= value <= 65535, "0 … 65535"),
        (("name",), lambda value: value != "", "a name that isn't empty"),
    )
    refused = set()
    for keys, allowed, words in rules:
        for key in keys:
            value = attrgetter(key)(cfg)
            if not allowed(value):  # a nan is never allowed
                refused.add(key)
                yield f"{key}={value}: must be {words}"
    for key, value in _numbers(cfg):
        if not math.isfinite(value) and key not in refused and (key not in MAY_BE_INFINITE or value != math.inf):
            yield f"{key}={value}: must be a finite number"
    if not all(0 <= beta < 1 for beta in cfg.learner.betas):
        yield f"learner.betas={list(cfg.learner.betas)}: must be two numbers, each 0 or more and below 1"
    if cfg.rollout.samples_per_prompt < 2:
        yield (
            f"rollout.samples_per_prompt={cfg.rollout.samples_per_prompt}: must be 2 or more, "
            "because an advantage is a comparison within the group; 8 is usual"
        )


def _numbers(owner: Any, prefix: str = "") -> Iterator[tuple[str, float]]:
    """Key and value of every setting below a dataclass that is a float."""
    for field in fields(owner):
        value = getattr(owner, field.name)
        if is_dataclass(value):
            yield from _numbers(value, f"{prefix}{field.name}.")
        elif isinstance(value, float):
            yield f"{prefix}{field.name}", value


def _choices(cfg: Config) -> Iterator[str]:
    if cfg.model.dtype not in DTYPES:
        yield f"model.dtype={cfg.model.dtype}: must be one of {', '.join(DTYPES)}"
    devices = {
        "rollout.device": cfg.rollout.device,
        "learner.device": cfg.learner.device,
        "reward.device": cfg.reward.device,
    }
    for key, value in devices.items():
        if value not in DEVICES:
            yield f"{key}={value}: must be one of {', '.join(DEVICES)}"
    if cfg.learner.zero_stage not in (0, 1, 2, 3):
        yield f"learner.zero_stage={cfg.learner.zero_stage}: must be 0, 1, 2 or 3"
    if cfg.data.source not in ("digits", "parquet"):
        yield f"data.source={cfg.data.source}: must be digits or parquet"
    resume = cfg.resume
    if resume not in ("no", "auto") and not Path(resume).is_dir():
        yield f"resume={resume}: must be no, auto, or the folder of a checkpoint; no such folder exists"
    if cfg.model.policy != "digits" and not _is_folder(cfg.model.policy):
        yield f"model.policy={cfg.model.policy}: must be digits or a Hugging Face folder; no such folder exists"
    if cfg.model.reward not in (None, "digits") and not _is_folder(cfg.model.reward):
        yield f"model.reward={cfg.model.reward}: must be digits, null or a folder; no such folder exists"


def _is_folder(path: str) -> bool:
    return bool(path) and Path(path).is_dir()  # Path("") is the working folder


def _combinations(cfg: Config, with_learner: bool) -> Iterator[str]:
    rollout = cfg.rollout
    if rollout.prompts_per_step % max(1, rollout.num_workers):
        yield (
            f"rollout.prompts_per_step={rollout.prompts_per_step} is not divisible by rollout.num_workers="
            f"{rollout.num_workers}; every worker must get the same number of prompts"
        )
    if rollout.prompts_per_step > cfg.data.train_size and cfg.data.source == "digits":
        yield f"rollout.prompts_per_step={rollout.prompts_per_step} is more than data.train_size={cfg.data.train_size}"
    yield from algorithm_problems(cfg)
    yield from _data_combinations(cfg)
    yield from _device_combinations(cfg, with_learner)


def _data_combinations(cfg: Config) -> Iterator[str]:
    rollout = cfg.rollout
    if cfg.data.pool_path is not None and not Path(cfg.data.pool_path).is_file():
        yield f"data.pool_path={cfg.data.pool_path}: no such file; python -m skyrl.filter_prompts writes one"
    unknown = [kind for kind in cfg.data.kinds if kind not in PICTURE_KINDS]
    if unknown or not cfg.data.kinds:
        yield f"data.kinds={cfg.data.kinds}: must be one or more of {', '.join(PICTURE_KINDS)}"
    if not cfg.data.pool_min < cfg.data.pool_max:
        yield f"data.pool_min={cfg.data.pool_min} must be below data.pool_max={cfg.data.pool_max}"
    for pattern in cfg.hallucination.phrases:
        try:
            re.compile(pattern)
        except re.error as error:
            yield f"hallucination.phrases: {pattern!r} is no regular expression ({error})"
    for key in ("train_path", "eval_path"):
        path = getattr(cfg.data, key)
        if cfg.data.source == "parquet" and (path is None or not Path(path).is_file()):
            yield f"data.source=parquet needs data.{key}: a parquet file; got {path}"
        if cfg.data.source == "digits" and path is not None:
            yield f"data.{key}={path} with data.source=digits, which would not read it; say data=parquet"
    length = rollout.max_prompt_tokens + rollout.max_new_tokens
    if cfg.model.policy == "digits" and length > EMBEDDED_POSITIONS:
        yield (
            f"rollout.max_prompt_tokens + rollout.max_new_tokens is {length}; "
            f"must be at most {EMBEDDED_POSITIONS}, the positions of the embedded policy"
        )


def _device_combinations(cfg: Config, with_learner: bool) -> Iterator[str]:
    rollout, learner = cfg.rollout, cfg.learner
    if rollout.weight_sync is WeightSync.shm and rollout.tensor_parallel_size > 1:
        yield (
            f"rollout.tensor_parallel_size={rollout.tensor_parallel_size} with rollout.weight_sync=shm: that backend "
            "hands memory to one process; use nccl"
        )
    if rollout.weight_sync is WeightSync.shm and rollout.device == "cuda":
        yield "rollout.weight_sync=shm is for CPU rollouts; with rollout.device=cuda use nccl or ipc"
    devices = {rollout.device, learner.device} if with_learner else {rollout.device}
    if rollout.weight_sync is not WeightSync.shm and devices != {"cuda"}:
        yield (
            f"rollout.weight_sync={rollout.weight_sync.value} needs rollout.device=cuda and learner.device=cuda; "
            "on CPU use shm"
        )
    if with_learner and rollout.weight_sync is WeightSync.ipc:
        yield from _ipc_problems(cfg)
    if with_learner and cfg.model.dtype in ("bfloat16", "float16") and learner.zero_stage == 0:
        yield (
            f"learner.zero_stage=0 with model.dtype={cfg.model.dtype}: the gradients of the micro-batches would add up "
            "in 16 bits; use learner.zero_stage=1 or more, also with one worker"
        )
    if cfg.model.dtype == "float16" and "cpu" in devices:
        yield "model.dtype=float16 is for GPUs; on CPU use float32"


def _ipc_problems(cfg: Config) -> Iterator[str]:
    """CUDA hands memory over on one GPU only, so each learner rank shares its own with one rollout worker."""
    rollout, learner = cfg.rollout, cfg.learner
    if rollout.num_workers != learner.num_workers or rollout.tensor_parallel_size > 1:
        yield (
            f"rollout.weight_sync=ipc with rollout.num_workers={rollout.num_workers}, rollout.tensor_parallel_size="
            f"{rollout.tensor_parallel_size} and learner.num_workers={learner.num_workers}: each learner rank shares "
            "its GPU with one rollout worker, so the numbers of workers must be equal and tensor_parallel_size 1; "
            "or use nccl"
        )
    if rollout.gpu_memory_utilization > SHARED_GPU_LIMIT:
        yield (
            f"rollout.gpu_memory_utilization={rollout.gpu_memory_utilization:g} with rollout.weight_sync=ipc: a "
            f"learner rank has the rest of the same GPU; must be at most {SHARED_GPU_LIMIT:g}"
        )
