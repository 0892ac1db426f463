"""Checks of a configuration before anything heavy is imported. Each message names the key and the mend."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from operator import attrgetter
from pathlib import Path

from skyrl.config import Config, GrpoFilter, WeightSync
from skyrl.types import ConfigError

DTYPES = ("float32", "bfloat16", "float16")
DEVICES = ("cpu", "cuda")
EMBEDDED_POSITIONS = 512
AT_LEAST_ONE = (
    "rollout.num_workers",
    "reward.num_workers",
    "learner.num_workers",
    "rollout.prompts_per_step",
    "rollout.max_prompt_tokens",
    "rollout.max_new_tokens",
    "rollout.tensor_parallel_size",
    "rollout.max_num_seqs",
    "rollout.kv_cache_gib",
    "rollout.probe_prompts",
    "rollout.probe_new_tokens",
    "reward.model_batch",
    "buffer.capacity",
    "buffer.max_age",
    "data.train_size",
    "data.eval_size",
    "learner.micro_batch_tokens",
    "controller.steps",
    "checkpoint.keep",
    "model.warm_start_steps",
    "model.reward_body_steps",
    "model.reward_steps",
    "algorithm.mpo.pairs_per_prompt",
)
NOT_NEGATIVE = (
    "evaluation.every",
    "evaluation.gallery",
    "checkpoint.every",
    "learner.warmup_steps",
    "learner.weight_decay",
    "buffer.alpha",
    "algorithm.grpo.weight",
    "algorithm.grpo.kl_weight",
    "algorithm.mpo.weight",
    "algorithm.mpo.preference_weight",
    "algorithm.mpo.quality_weight",
    "algorithm.mpo.generation_weight",
    "reward.model_weight",
    "reward.format_weight",
    "reward.numeric_tolerance",
    "data.seed",
    "model.seed",
    "controller.seed",
    "rollout.threads",
    "reward.threads",
    "learner.threads",
)
POSITIVE = (
    "rollout.temperature",
    "reward.verifier_timeout",
    "reward.squash_scale",
    "learner.lr",
    "learner.max_grad_norm",
    "algorithm.mpo.beta",
    "controller.timeout",
)
SHARES = (
    "data.text_share",
    "buffer.mix",
    "learner.min_lr_ratio",
)


def validate(cfg: Config) -> None:
    """Raise if any setting is out of range or impossible together with another one.

    Raises:
        ConfigError: naming every problem found, one a line.
    """
    problems = [*_ranges(cfg), *_choices(cfg), *_combinations(cfg)]
    if problems:
        raise ConfigError("\n".join(problems))


def _ranges(cfg: Config) -> Iterator[str]:
    rules: tuple[tuple[tuple[str, ...], Callable[[float], bool], str], ...] = (
        (AT_LEAST_ONE, lambda value: value >= 1, "1 or more"),
        (NOT_NEGATIVE, lambda value: value >= 0, "0 or more"),
        (POSITIVE, lambda value: value > 0, "above 0"),
        (SHARES, lambda value: 0 <= value <= 1, "in 0 … 1"),
        (("rollout.top_p",), lambda value: 0 < value <= 1, "above 0 and at most 1"),
    )
    for keys, allowed, words in rules:
        for key in keys:
            value = attrgetter(key)(cfg)
            if not allowed(value):  # a nan is never allowed
                yield f"{key}={value}: must be {words}"
    if cfg.rollout.samples_per_prompt < 2:
        yield (
            f"rollout.samples_per_prompt={cfg.rollout.samples_per_prompt}: must be 2 or more, "
            "because an advantage is a comparison within the group; 8 is usual"
        )


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
    if cfg.model.policy != "digits" and not Path(cfg.model.policy).is_dir():
        yield f"model.policy={cfg.model.policy}: must be digits or a Hugging Face folder; no such folder exists"
    if cfg.model.reward not in (None, "digits") and not Path(cfg.model.reward).is_dir():
        yield f"model.reward={cfg.model.reward}: must be digits, null or a folder; no such folder exists"


def _combinations(cfg: Config) -> Iterator[str]:
    rollout, grpo, mpo = cfg.rollout, cfg.algorithm.grpo, cfg.algorithm.mpo
    if rollout.prompts_per_step % max(1, rollout.num_workers):
        yield (
            f"rollout.prompts_per_step={rollout.prompts_per_step} is not divisible by rollout.num_workers="
            f"{rollout.num_workers}; every worker must get the same number of prompts"
        )
    if rollout.prompts_per_step > cfg.data.train_size and cfg.data.source == "digits":
        yield f"rollout.prompts_per_step={rollout.prompts_per_step} is more than data.train_size={cfg.data.train_size}"
    if grpo.weight == 0 and mpo.weight == 0:
        yield "algorithm.grpo.weight=0 and algorithm.mpo.weight=0: nothing would be trained; set one above 0"
    if not 0 <= grpo.clip_low < 1 or grpo.clip_high < 0:
        yield (
            f"algorithm.grpo.clip_low={grpo.clip_low}, clip_high={grpo.clip_high}: "
            "clip_low must be in 0 … 1 and clip_high 0 or more"
        )
    yield from _reward_combinations(cfg)
    yield from _data_combinations(cfg)
    yield from _device_combinations(cfg)


def _reward_combinations(cfg: Config) -> Iterator[str]:
    grpo, mpo = cfg.algorithm.grpo, cfg.algorithm.mpo
    if cfg.model.reward is None:
        if mpo.weight > 0:
            yield (
                "model.reward=null with algorithm.mpo.weight="
                f"{mpo.weight}: pairs and their threshold need a reward model; set model.reward, or "
                "algorithm.mpo.weight=0"
            )
        if cfg.reward.model_weight != 0:
            yield f"model.reward=null with reward.model_weight={cfg.reward.model_weight}; set reward.model_weight=0"
        if grpo.filter is GrpoFilter.all:
            yield "model.reward=null with algorithm.grpo.filter=all: tied groups have no signal; use effective"
    if cfg.model.policy != "digits" and cfg.model.reward == "digits":
        yield (
            "model.reward=digits only judges digit scenes; with your own model.policy set model.reward to a folder "
            "or null"
        )


def _data_combinations(cfg: Config) -> Iterator[str]:
    rollout = cfg.rollout
    if cfg.data.source == "parquet":
        for key in ("train_path", "eval_path"):
            path = getattr(cfg.data, key)
            if path is None or not Path(path).is_file():
                yield f"data.source=parquet needs data.{key}: a parquet file; got {path}"
    length = rollout.max_prompt_tokens + rollout.max_new_tokens
    if cfg.model.policy == "digits" and length > EMBEDDED_POSITIONS:
        yield (
            f"rollout.max_prompt_tokens + rollout.max_new_tokens is {length}; "
            f"must be at most {EMBEDDED_POSITIONS}, the positions of the embedded policy"
        )


def _device_combinations(cfg: Config) -> Iterator[str]:
    rollout, learner = cfg.rollout, cfg.learner
    if rollout.weight_sync is WeightSync.shm and rollout.tensor_parallel_size > 1:
        yield (
            f"rollout.tensor_parallel_size={rollout.tensor_parallel_size} with rollout.weight_sync=shm: that backend "
            "hands memory to one process; use nccl or ipc"
        )
    if rollout.weight_sync is WeightSync.shm and rollout.device == "cuda":
        yield "rollout.weight_sync=shm is for CPU rollouts; with rollout.device=cuda use nccl or ipc"
    if rollout.weight_sync is not WeightSync.shm and (rollout.device, learner.device) != ("cuda", "cuda"):
        yield (
            f"rollout.weight_sync={rollout.weight_sync.value} needs rollout.device=cuda and learner.device=cuda; "
            "on CPU use shm"
        )
    if cfg.model.dtype == "float16" and "cpu" in (rollout.device, learner.device):
        yield "model.dtype=float16 is for GPUs; on CPU use float32"
