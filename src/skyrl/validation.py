"""Checks of a configuration before anything heavy is imported. Each message names the key and the mend."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from operator import attrgetter
from pathlib import Path

from skyrl.config import (
    Config,
    GrpoFilter,
    Mismatch,
    PairSource,
    Ratio,
    Stage,
    Surrogate,
    ThresholdKind,
    Unit,
    WeightSync,
)
from skyrl.config.ranges import (
    AT_LEAST_ONE,
    DEVICES,
    DTYPES,
    EMBEDDED_POSITIONS,
    MAX_DECAY_BITS,
    MIN_CONFIDENCE,
    NOT_NEGATIVE,
    OPEN_SHARES,
    OPTIONAL_NOT_NEGATIVE,
    PICTURE_KINDS,
    POSITIVE,
    SHARES,
    fewest_candidates,
)
from skyrl.types import ConfigError


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
        (OPEN_SHARES, lambda value: 0 < value < 1, "above 0 and below 1"),
        (OPTIONAL_NOT_NEGATIVE, lambda value: value is None or value >= 0, "null, or 0 or more"),
        (("rollout.top_p", "buffer.recency"), lambda value: 0 < value <= 1, "above 0 and at most 1"),
        (("buffer.fill_target",), lambda value: value is None or 0 <= value <= 1, "null, or in 0 … 1"),
        (("algorithm.grpo.dual_clip",), lambda value: value is None or value > 1, "null, or above 1"),
        (("algorithm.grpo.mismatch_cap",), lambda value: value > 1, "above 1"),
        (("algorithm.mpo.label_smoothing",), lambda value: 0 <= value < 0.5, "0 or more and below 0.5"),
        (("algorithm.mpo.delta_decay",), lambda value: 0 <= value < 1, "0 or more and below 1"),
        (("algorithm.mpo.reference_kl",), lambda value: value is None or value > 0, "null, or above 0"),
        (("filter.rows",), lambda value: value is None or value >= 1, "null, or 1 or more"),
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
    algorithm = cfg.algorithm
    if not algorithm.uses_grpo and not algorithm.uses_mpo:
        yield (
            f"algorithm.stage={algorithm.stage.value} with algorithm.grpo.weight={grpo.weight:g} and "
            f"algorithm.mpo.weight={mpo.weight:g}: nothing would be trained; set a weight above 0"
        )
    if algorithm.stage is Stage.mpo_then_grpo and not 1 <= algorithm.mpo_steps < cfg.controller.steps:
        yield (
            f"algorithm.mpo_steps={algorithm.mpo_steps}: with algorithm.stage=mpo_then_grpo it must be 1 or more and "
            f"below controller.steps={cfg.controller.steps}, so that both stages run"
        )
    if not 0 <= grpo.clip_low < 1 or grpo.clip_high < 0:
        yield (
            f"algorithm.grpo.clip_low={grpo.clip_low}, clip_high={grpo.clip_high}: "
            "clip_low must be in 0 … 1 and clip_high 0 or more"
        )
    yield from _reward_combinations(cfg)
    yield from _objective_combinations(cfg)
    yield from _buffer_combinations(cfg)
    yield from _thresholds(cfg)
    yield from _data_combinations(cfg)
    yield from _device_combinations(cfg)


def _reward_combinations(cfg: Config) -> Iterator[str]:
    grpo, mpo = cfg.algorithm.grpo, cfg.algorithm.mpo
    if cfg.model.reward is None:
        if cfg.algorithm.uses_mpo and cfg.data.pairs_path is None and mpo.pairs is not PairSource.rule:
            yield (
                f"model.reward=null with algorithm.mpo.weight={mpo.weight:g}: a reward model chooses the pairs of "
                f"pairs={mpo.pairs.value}; set model.reward, algorithm.mpo.pairs=rule, or algorithm.stage=grpo"
            )
        thresholds = {"algorithm.gate": cfg.algorithm.gate}
        if cfg.algorithm.uses_mpo and mpo.pairs is PairSource.rule:
            thresholds["algorithm.mpo.threshold"] = mpo.threshold
        for key, threshold in thresholds.items():
            if threshold.kind is not ThresholdKind.off:
                yield f"model.reward=null with {key}.kind={threshold.kind.value}: needs a reward model; use off"
        if cfg.reward.model_weight != 0:
            yield f"model.reward=null with reward.model_weight={cfg.reward.model_weight}; set reward.model_weight=0"
        if grpo.filter is GrpoFilter.all:
            yield "model.reward=null with algorithm.grpo.filter=all: tied groups have no signal; use effective"
    if cfg.model.policy != "digits" and cfg.model.reward == "digits":
        yield (
            "model.reward=digits only judges digit scenes; with your own model.policy set model.reward to a folder "
            "or null"
        )


def _objective_combinations(cfg: Config) -> Iterator[str]:
    grpo, mpo, stage = cfg.algorithm.grpo, cfg.algorithm.mpo, cfg.algorithm.stage
    if grpo.surrogate is Surrogate.cispo and grpo.dual_clip is not None:
        yield (
            f"algorithm.grpo.dual_clip={grpo.dual_clip} with surrogate=cispo, which has no clipped objective; set "
            "dual_clip=null or surrogate=clip"
        )
    if grpo.ratio is Ratio.sequence and grpo.mismatch in (Mismatch.token_truncate, Mismatch.token_mask):
        yield (
            f"algorithm.grpo.mismatch={grpo.mismatch.value} corrects single tokens, algorithm.grpo.ratio=sequence "
            "whole samples; use mismatch=sequence_mask or none"
        )
    if mpo.reference_free and (mpo.reference_every or mpo.reference_kl is not None):
        yield "algorithm.mpo.reference_free=true with reference_every or reference_kl: there is no reference to refresh"
    if cfg.data.pairs_path is not None and stage is not Stage.mpo:
        yield f"data.pairs_path with algorithm.stage={stage.value}: offline pairs train MPO alone; set stage=mpo"
    if cfg.data.pairs_path is not None and not Path(cfg.data.pairs_path).is_file():
        yield f"data.pairs_path={cfg.data.pairs_path}: no such file; it must be a Parquet file of pairs"


def _buffer_combinations(cfg: Config) -> Iterator[str]:
    buffer = cfg.buffer
    if 0 < buffer.recency <= 1 and -math.log2(buffer.recency) * buffer.max_age > MAX_DECAY_BITS:
        yield (
            f"buffer.recency={buffer.recency} with buffer.max_age={buffer.max_age}: the oldest sample would never be "
            f"drawn (recency^max_age is below 2^-{MAX_DECAY_BITS}); raise recency or lower max_age"
        )
    if buffer.unit is Unit.group and buffer.capacity < cfg.rollout.samples_per_prompt:
        yield (
            f"buffer.capacity={buffer.capacity} with buffer.unit=group: a group of rollout.samples_per_prompt="
            f"{cfg.rollout.samples_per_prompt} would not fit; raise the capacity"
        )


def _thresholds(cfg: Config) -> Iterator[str]:
    for key, threshold in (
        ("algorithm.mpo.threshold", cfg.algorithm.mpo.threshold),
        ("algorithm.gate", cfg.algorithm.gate),
    ):
        in_range = 0 < threshold.target_risk < 1 and 0 < threshold.confidence < 1
        if threshold.kind is not ThresholdKind.risk_controlled or not in_range:
            continue
        if threshold.confidence < MIN_CONFIDENCE:
            yield (
                f"{key}.confidence={threshold.confidence}: with kind=risk_controlled it must be {MIN_CONFIDENCE} or "
                "more, or its bound does not hold"
            )
        # With fewer, even a spotless sample can't show that the risk is under its target.
        need = fewest_candidates(threshold.target_risk, threshold.confidence)
        if threshold.min_labelled < need:
            yield (
                f"{key}.min_labelled={threshold.min_labelled}: target_risk={threshold.target_risk} with confidence="
                f"{threshold.confidence} can't be shown with fewer than {need} labelled candidates; use {need} or more"
            )


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
