"""Every rule of the configuration: what is allowed passes, what is not is named with its key."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path

import pytest

from skyrl.records import ConfigError
from skyrl.settings import (
    Config,
    GrpoFilter,
    LearnerConfig,
    Mismatch,
    PairSource,
    Ratio,
    Stage,
    Surrogate,
    ThresholdKind,
    Unit,
    WeightSync,
)
from skyrl.settings.ranges import AT_LEAST_ONE, NOT_NEGATIVE, OPEN_SHARES, OPTIONAL_NOT_NEGATIVE, POSITIVE, SHARES
from skyrl.settings.validation import MAY_BE_INFINITE, validate


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
    *[(key, value) for key in OPEN_SHARES for value in (0, 1, math.nan)],
    *[(key, value) for key in OPTIONAL_NOT_NEGATIVE for value in (-0.1, math.nan)],
    *[("buffer.recency", value) for value in (0.0, 1.1, math.nan)],
    *[("buffer.fill_target", value) for value in (-0.1, 1.1)],
    *[("algorithm.grpo.dual_clip", value) for value in (1.0, math.nan)],
    *[("algorithm.grpo.mismatch_cap", value) for value in (1.0, math.nan)],
    *[("algorithm.mpo.label_smoothing", value) for value in (-0.1, 0.5)],
    *[("algorithm.mpo.delta_decay", value) for value in (-0.1, 1.0)],
    ("algorithm.mpo.reference_kl", 0.0),
    ("filter.rows", 0),
    *[("rollout.samples_per_prompt", value) for value in (0, 1)],
    ("model.dtype", "int8"),
    ("rollout.device", "tpu"),
    ("learner.device", "tpu"),
    ("reward.device", "tpu"),
    ("learner.zero_stage", 4),
    ("learner.zero_stage", -1),
    ("data.source", "csv"),
    ("data.kinds", []),
    ("data.kinds", ["product"]),
    ("resume", "/no/such/folder"),
    ("model.policy", "/no/such/folder"),
    ("model.reward", "/no/such/folder"),
    ("algorithm.grpo.clip_low", 1.0),
    ("algorithm.grpo.clip_low", -0.1),
    *[("rollout.gpu_memory_utilization", value) for value in (0.0, 1.1)],
    *[("rollout.logprob_gap_limit", value) for value in (0.0, math.nan)],
    *[("cluster.dashboard_port", value) for value in (-1, 65536)],
    ("cluster.num_cpus", 0),
    ("name", ""),
    ("model.policy", ""),
    ("model.reward", ""),
    *[(key, math.inf) for key in ("learner.lr", "rollout.temperature", "reward.model_weight", "buffer.alpha")],
    *[(key, math.nan) for key in ("algorithm.gate.value", "algorithm.mpo.threshold.value", "hallucination.gate_score")],
]


@pytest.mark.parametrize(("key", "value"), BAD)
def test_the_message_names_key_and_value(key: str, value: object) -> None:
    found = problems(put(Config(), key, value))
    assert any(line.startswith(f"{key}={value}") and "must be" in line for line in found), found


EDGE = [
    *[(key, 1) for key in AT_LEAST_ONE if key not in ("data.train_size", "rollout.num_workers")],
    *[(key, 0) for key in NOT_NEGATIVE],
    *[(key, 1e-9) for key in POSITIVE],
    # The pool's limits must not meet each other.
    *[
        (key, value)
        for key in SHARES
        for value in (0, 1)
        if (key, value) not in (("data.pool_min", 1), ("data.pool_max", 0))
    ],
    *[(key, 1e-9) for key in OPEN_SHARES],
    *[(key, value) for key in OPTIONAL_NOT_NEGATIVE for value in (None, 0)],
    *[("buffer.fill_target", value) for value in (None, 0, 1)],
    ("algorithm.grpo.dual_clip", 1.1),
    ("algorithm.mpo.label_smoothing", 0.49),
    ("algorithm.mpo.reference_kl", 0.01),
    ("filter.rows", 1),
    ("rollout.top_p", 1.0),
    ("rollout.samples_per_prompt", 2),
    *[("learner.zero_stage", stage) for stage in range(4)],
    ("model.dtype", "bfloat16"),
    ("resume", "auto"),
    ("resume", "/"),
    ("algorithm.grpo.clip_low", 0.0),
    ("algorithm.grpo.clip_high", 5.0),
    *[(key, math.inf) for key in MAY_BE_INFINITE],
]


@pytest.mark.parametrize(("key", "value"), EDGE)
def test_the_ends_of_each_range_are_allowed(key: str, value: object) -> None:
    cfg = Config()
    cfg.algorithm.mpo.threshold.kind = ThresholdKind.fixed  # what risk control needs beyond the range has its own test
    cfg.learner.zero_stage = 1  # likewise 16 bits
    assert problems(put(cfg, key, value)) == []


def no_reward_model(cfg: Config) -> None:
    cfg.model.reward, cfg.reward.model_weight, cfg.algorithm.mpo.weight = None, 0.0, 0.0


def uneven(cfg: Config) -> None:
    cfg.rollout.prompts_per_step, cfg.rollout.num_workers = 10, 3


def too_few_scenes(cfg: Config) -> None:
    cfg.data.train_size = 10


def nothing_trained(cfg: Config) -> None:
    cfg.algorithm.grpo.weight = cfg.algorithm.mpo.weight = 0.0


def ipc(cfg: Config) -> None:
    cfg.rollout.weight_sync, cfg.rollout.device, cfg.learner.device = WeightSync.ipc, "cuda", "cuda"
    cfg.rollout.gpu_memory_utilization = 0.5


def ipc_with_uneven_workers(cfg: Config) -> None:
    ipc(cfg)
    cfg.rollout.num_workers = 2


def ipc_across_gpus(cfg: Config) -> None:
    ipc(cfg)
    cfg.rollout.tensor_parallel_size = 2


def ipc_without_room(cfg: Config) -> None:
    ipc(cfg)
    cfg.rollout.gpu_memory_utilization = 0.85


def own_data_not_read(cfg: Config) -> None:
    cfg.data.eval_path = "x.parquet"


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


def stage_without_its_term(cfg: Config) -> None:
    cfg.algorithm.stage, cfg.algorithm.mpo.weight = Stage.mpo, 0.0


def one_stage_only(cfg: Config) -> None:
    cfg.algorithm.stage, cfg.algorithm.mpo_steps, cfg.controller.steps = Stage.mpo_then_grpo, 60, 60


def cispo_with_dual_clip(cfg: Config) -> None:
    cfg.algorithm.grpo.surrogate, cfg.algorithm.grpo.dual_clip = Surrogate.cispo, 3.0


def sequence_ratio_with_token_mask(cfg: Config) -> None:
    cfg.algorithm.grpo.ratio, cfg.algorithm.grpo.mismatch = Ratio.sequence, Mismatch.token_mask


def refresh_of_no_reference(cfg: Config) -> None:
    cfg.algorithm.mpo.reference_free, cfg.algorithm.mpo.reference_every = True, 5


def threshold_without_reward_model(cfg: Config) -> None:
    no_reward_model(cfg)
    cfg.algorithm.mpo.weight, cfg.algorithm.mpo.pairs = 0.5, PairSource.rule


def gate_without_reward_model(cfg: Config) -> None:
    no_reward_model(cfg)
    cfg.algorithm.gate.kind = ThresholdKind.quantile


def offline_and_joint(cfg: Config) -> None:
    cfg.data.pairs_path = __file__


def no_pairs_file(cfg: Config) -> None:
    cfg.data.pairs_path, cfg.algorithm.stage = "/no/such/file", Stage.mpo


def no_pool_file(cfg: Config) -> None:
    cfg.data.pool_path = "/no/such/file"


def empty_pool_range(cfg: Config) -> None:
    cfg.data.pool_min = cfg.data.pool_max = 0.5


def never_drawn(cfg: Config) -> None:
    cfg.buffer.recency, cfg.buffer.max_age = 0.5, 501


def group_that_does_not_fit(cfg: Config) -> None:
    cfg.buffer.unit, cfg.buffer.capacity = Unit.group, 7


def unsure_risk(cfg: Config) -> None:
    cfg.algorithm.gate.kind, cfg.algorithm.gate.confidence = ThresholdKind.risk_controlled, 0.5


def too_few_to_show_the_risk(cfg: Config) -> None:
    cfg.algorithm.gate.kind, cfg.algorithm.gate.min_labelled = ThresholdKind.risk_controlled, 28


def broken_phrase(cfg: Config) -> None:
    cfg.hallucination.phrases = ["(never closed"]


def half_on_cpu(cfg: Config) -> None:
    cfg.model.dtype, cfg.learner.zero_stage = "float16", 1


def half_without_zero(cfg: Config) -> None:
    cfg.model.dtype = "bfloat16"


def stages_of_which_one_is_off(cfg: Config) -> None:
    cfg.algorithm.stage, cfg.algorithm.mpo_steps, cfg.algorithm.grpo.weight = Stage.mpo_then_grpo, 5, 0.0


def mismatch_with_dual_clip(cfg: Config) -> None:
    cfg.algorithm.grpo.mismatch, cfg.algorithm.grpo.dual_clip = Mismatch.sequence_mask, 3.0


def refresh_that_never_comes(cfg: Config) -> None:
    cfg.algorithm.stage, cfg.algorithm.grpo.kl_weight, cfg.algorithm.mpo.reference_every = Stage.grpo, 0.1, 5


def several_pairs_under_risk_control(cfg: Config) -> None:
    cfg.algorithm.mpo.pairs_per_prompt = 2


def several_blind_pairs(cfg: Config) -> None:
    cfg.algorithm.mpo.pairs, cfg.algorithm.mpo.pairs_per_prompt = PairSource.dropout_ntp, 2
    cfg.algorithm.mpo.threshold.kind = ThresholdKind.off


def window_that_is_never_full(cfg: Config) -> None:
    cfg.algorithm.gate.kind, cfg.algorithm.gate.window = ThresholdKind.quantile, 31


def shared_memory_on_gpus(cfg: Config) -> None:
    cfg.rollout.device = "cuda"


@pytest.mark.parametrize(
    ("change", "keys"),
    [
        (uneven, ["rollout.prompts_per_step=10", "rollout.num_workers=3"]),
        (too_few_scenes, ["rollout.prompts_per_step=64", "data.train_size=10"]),
        (nothing_trained, ["algorithm.grpo.weight=0", "algorithm.mpo.weight=0"]),
        (ipc_with_uneven_workers, ["rollout.weight_sync=ipc", "rollout.num_workers=2", "learner.num_workers=1"]),
        (ipc_across_gpus, ["rollout.weight_sync=ipc", "rollout.tensor_parallel_size=2"]),
        (ipc_without_room, ["rollout.gpu_memory_utilization=0.85", "at most 0.6"]),
        (own_data_not_read, ["data.eval_path=x.parquet", "data=parquet"]),
        (pairs_without_reward_model, ["model.reward=null", "algorithm.mpo.weight=0.5"]),
        (weight_without_reward_model, ["model.reward=null", "reward.model_weight=0.5"]),
        (ties_without_reward_model, ["model.reward=null", "algorithm.grpo.filter=all"]),
        (own_policy, ["model.reward=digits", "model.policy"]),
        (too_long, ["rollout.max_prompt_tokens + rollout.max_new_tokens is 513", "512"]),
        (shared_memory_across_gpus, ["rollout.tensor_parallel_size=2", "rollout.weight_sync=shm"]),
        (nccl_on_cpu, ["rollout.weight_sync=nccl", "rollout.device=cuda", "learner.device=cuda"]),
        (nccl_with_a_cpu_learner, ["rollout.weight_sync=nccl", "learner.device=cuda"]),
        (half_on_cpu, ["model.dtype=float16"]),
        (half_without_zero, ["learner.zero_stage=0", "model.dtype=bfloat16"]),
        (stages_of_which_one_is_off, ["algorithm.stage=mpo_then_grpo", "algorithm.grpo.weight=0"]),
        (mismatch_with_dual_clip, ["algorithm.grpo.dual_clip=3.0", "mismatch=sequence_mask"]),
        (refresh_that_never_comes, ["algorithm.mpo.reference_every=5", "set both to 0 and null"]),
        (several_pairs_under_risk_control, ["algorithm.mpo.pairs_per_prompt=2", "risk_controlled"]),
        (several_blind_pairs, ["algorithm.mpo.pairs_per_prompt=2", "dropout_ntp"]),
        (window_that_is_never_full, ["algorithm.gate.window=31", "32 or more"]),
        (stage_without_its_term, ["algorithm.stage=mpo", "algorithm.mpo.weight=0"]),
        (one_stage_only, ["algorithm.mpo_steps=60", "controller.steps=60"]),
        (cispo_with_dual_clip, ["algorithm.grpo.dual_clip=3.0", "surrogate=cispo"]),
        (sequence_ratio_with_token_mask, ["algorithm.grpo.mismatch=token_mask", "ratio=sequence"]),
        (refresh_of_no_reference, ["algorithm.mpo.reference_free=true", "reference_every"]),
        (threshold_without_reward_model, ["model.reward=null", "algorithm.mpo.threshold.kind=risk_controlled", "off"]),
        (gate_without_reward_model, ["model.reward=null", "algorithm.gate.kind=quantile", "off"]),
        (offline_and_joint, ["data.pairs_path", "algorithm.stage=joint"]),
        (no_pairs_file, ["data.pairs_path=/no/such/file"]),
        (no_pool_file, ["data.pool_path=/no/such/file", "filter_prompts"]),
        (empty_pool_range, ["data.pool_min=0.5", "data.pool_max=0.5"]),
        (never_drawn, ["buffer.recency=0.5", "buffer.max_age=501"]),
        (group_that_does_not_fit, ["buffer.capacity=7", "rollout.samples_per_prompt=8"]),
        (unsure_risk, ["algorithm.gate.confidence=0.5", "0.6 or more"]),
        # Two walks with 0.05 each: 0.9^28 = 0.0523 > 0.05 >= 0.9^29
        (too_few_to_show_the_risk, ["algorithm.gate.min_labelled=28", "29 or more"]),
        (broken_phrase, ["hallucination.phrases", "(never closed"]),
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
    cfg.learner.zero_stage = 1
    assert problems(cfg) == []
    ipc(shared := Config())
    assert problems(shared) == []


def test_a_learner_that_will_not_start_needs_no_device() -> None:
    cfg = Config()
    nccl_with_a_cpu_learner(cfg)
    cfg.model.dtype = "float16"
    assert len(problems(cfg)) == 3  # the device, 16 bits on CPU, and without ZeRO
    validate(cfg, with_learner=False)


def test_betas_are_two_numbers_below_1() -> None:
    cfg = Config()
    cfg.learner.betas = (1.0, 0.9)
    assert problems(cfg) == ["learner.betas=[1.0, 0.9]: must be two numbers, each 0 or more and below 1"]
    with pytest.raises(ConfigError, match=r"learner.betas=\[0.9\]: must be two numbers"):
        LearnerConfig(betas=(0.9,))  # type: ignore[arg-type]


def test_all_problems_come_at_once() -> None:
    cfg = put(put(put(Config(), "learner.lr", 0), "buffer.mix", 2.0), "model.dtype", "int4")
    found = problems(cfg)
    assert [line.split("=")[0] for line in found] == ["learner.lr", "buffer.mix", "model.dtype"]


def test_it_loads_no_heavy_library() -> None:
    code = (
        "import sys, skyrl.settings, skyrl.settings.validation as v; v.validate(skyrl.settings.Config()); "
        "print([m for m in ('torch', 'ray', 'vllm', 'transformers', 'deepspeed') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
