"""The DeepSpeed configuration and the learning rate of a step."""

from __future__ import annotations

import math
from typing import Any

from skyrl.settings import LearnerConfig, Schedule


def deepspeed_config(cfg: LearnerConfig, dtype: str) -> dict[str, Any]:
    """What ``deepspeed.initialize`` takes, for a model of ``dtype`` (a torch name).

    Losses come normalised over the whole step, so accumulation steps stay at 1 here and the learner sets
    the accumulation boundary itself.
    """
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": cfg.max_grad_norm,
        "zero_optimization": {"stage": cfg.zero_stage},
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": cfg.lr,
                "betas": list(cfg.betas),
                "weight_decay": cfg.weight_decay,
                # DeepSpeed's own Adams would be compiled at the first start, which needs a compiler or nvcc.
                "torch_adam": True,
            },
        },
        "steps_per_print": 10**9,
    }
    if dtype == "bfloat16":
        config["bf16"] = {"enabled": True}
        if cfg.zero_stage > 0:  # stage 0 can accumulate in the model's type only
            config["data_types"] = {"grad_accum_dtype": "fp32"}
    elif dtype == "float16":
        config["fp16"] = {"enabled": True}
    return config


def learning_rate(cfg: LearnerConfig, step: int, total_steps: int) -> float:
    """Learning rate of step 1, 2, … ``total_steps``: linear warm-up, then constant or a cosine.

    Example: lr 1.0 and two warm-up steps give 0.5 at step 1 and 1.0 at step 2.
    """
    if step <= cfg.warmup_steps:
        return cfg.lr * step / cfg.warmup_steps
    if cfg.schedule is Schedule.constant:
        return cfg.lr
    done = (step - cfg.warmup_steps) / max(1, total_steps - cfg.warmup_steps)
    return cfg.lr * (cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))
