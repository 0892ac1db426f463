"""DeepSpeed's settings, and what changes by plan from step to step."""

from __future__ import annotations

import pytest

from skyrl.learner.deepspeed_config import deepspeed_config
from skyrl.learner.schedule import learning_rate, refresh_due, stage_progress
from skyrl.settings import Config, LearnerConfig, MpoConfig, Offload, Schedule, Stage


def test_every_knob_arrives() -> None:
    cfg = LearnerConfig(zero_stage=2, lr=3e-4, weight_decay=0.1, betas=(0.8, 0.95), max_grad_norm=0.7)
    config = deepspeed_config(cfg, "float32")
    assert config["zero_optimization"]["stage"] == 2
    assert config["gradient_clipping"] == 0.7
    assert config["gradient_accumulation_steps"] == 1
    assert config["optimizer"]["type"] == "AdamW"
    assert config["optimizer"]["params"] == {
        "lr": 3e-4, "betas": [0.8, 0.95], "weight_decay": 0.1, "torch_adam": True, "fused": True
    }  # fmt: skip
    assert not config.keys() & {"bf16", "fp16"}


@pytest.mark.parametrize(("dtype", "section"), [("bfloat16", "bf16"), ("float16", "fp16")])
def test_half_precision(dtype: str, section: str) -> None:
    config = deepspeed_config(LearnerConfig(zero_stage=3), dtype)
    assert config[section] == {"enabled": True}
    assert config.keys() & {"bf16", "fp16"} == {section}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gradients_of_16_bits_add_up_in_float32_where_deepspeed_can(dtype: str) -> None:
    assert deepspeed_config(LearnerConfig(zero_stage=1), dtype)["data_types"] == {"grad_accum_dtype": "fp32"}
    assert "data_types" not in deepspeed_config(LearnerConfig(zero_stage=0), dtype)
    assert "data_types" not in deepspeed_config(LearnerConfig(zero_stage=3), "float32")


def test_what_is_kept_in_host_memory() -> None:
    host = {"device": "cpu", "pin_memory": True}
    kept = {
        offload: deepspeed_config(LearnerConfig(zero_stage=3, offload=offload), "bfloat16")["zero_optimization"]
        for offload in Offload
    }
    assert kept == {
        Offload.none: {"stage": 3},
        Offload.optimizer: {"stage": 3, "offload_optimizer": host},
        Offload.all: {"stage": 3, "offload_optimizer": host, "offload_param": host},
    }


def test_warm_up_is_linear_and_then_constant() -> None:
    cfg = LearnerConfig(lr=1.0, warmup_steps=4)
    assert [learning_rate(cfg, step, 10) for step in range(1, 7)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_no_warm_up() -> None:
    assert learning_rate(LearnerConfig(lr=1.0, warmup_steps=0), 1, 10) == 1.0


def test_cosine_by_hand() -> None:
    cfg = LearnerConfig(lr=2.0, warmup_steps=2, schedule=Schedule.cosine, min_lr_ratio=0.1)
    rates = [learning_rate(cfg, step, 10) for step in (1, 2, 6, 10)]
    # Step 6 is half way between 2 and 10: the mean of both ends.
    assert rates == pytest.approx([1.0, 2.0, 1.1, 0.2])
    falling = [learning_rate(cfg, step, 10) for step in range(2, 11)]
    assert falling == sorted(falling, reverse=True)


def test_cosine_stays_at_its_end_when_a_run_goes_on() -> None:
    cfg = LearnerConfig(lr=2.0, warmup_steps=2, schedule=Schedule.cosine, min_lr_ratio=0.1)
    assert learning_rate(cfg, 25, 10) == pytest.approx(0.2)


def test_a_run_shorter_than_its_warm_up() -> None:
    cfg = LearnerConfig(lr=1.0, warmup_steps=5, schedule=Schedule.cosine)
    assert [learning_rate(cfg, step, 3) for step in (1, 2, 3)] == pytest.approx([0.2, 0.4, 0.6])


@pytest.mark.parametrize(
    ("every", "limit", "age", "kl", "due"),
    [
        (0, None, 100, 9.0, False),
        (3, None, 2, 9.0, False),
        (3, None, 3, None, True),
        (3, None, 4, None, True),  # the step that would have done it trained nothing
        (0, 0.1, 1, 0.11, True),
        (0, 0.1, 1, 0.1, False),
        (0, 0.1, 100, None, False),
        (3, 0.1, 1, 0.2, True),
        (3, 0.1, 3, 0.0, True),
    ],
)
def test_refresh_due(every: int, limit: float | None, age: int, kl: float | None, due: bool) -> None:
    assert refresh_due(MpoConfig(reference_every=every, reference_kl=limit), age, kl) is due


def test_progress_of_a_stage() -> None:
    cfg = Config()
    cfg.controller.steps = 5
    assert [stage_progress(cfg, step) for step in range(1, 7)] == [0, 0.25, 0.5, 0.75, 1, 1]
    cfg.algorithm.stage, cfg.algorithm.mpo_steps = Stage.mpo_then_grpo, 2
    assert [stage_progress(cfg, step) for step in range(1, 6)] == [0, 1, 0, 0.5, 1]
    cfg.algorithm.mpo_steps = 1
    assert [stage_progress(cfg, step) for step in (1, 2)] == [0, 0]
