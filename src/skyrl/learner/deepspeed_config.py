"""DeepSpeed's own configuration."""

from __future__ import annotations

from typing import Any

from skyrl.settings import LearnerConfig, Offload


def deepspeed_config(cfg: LearnerConfig, dtype: str) -> dict[str, Any]:
    """What ``deepspeed.initialize`` takes, for a model of ``dtype`` (a torch name).

    Losses come normalised over the whole step, so accumulation steps stay at 1 here and the learner sets
    the accumulation boundary itself.
    """
    zero: dict[str, Any] = {"stage": cfg.zero_stage}
    if cfg.offload is not Offload.none:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if cfg.offload is Offload.all:
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": cfg.max_grad_norm,
        "zero_optimization": zero,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": cfg.lr,
                "betas": list(cfg.betas),
                "weight_decay": cfg.weight_decay,
                # DeepSpeed's own Adams would be compiled at the first start, which needs a compiler or nvcc. Torch's
                # fused one runs on both devices.
                "torch_adam": True,
                "fused": True,
            },
        },
        "steps_per_print": 10**9,
    }
    if dtype != "float32":
        config[{"bfloat16": "bf16", "float16": "fp16"}[dtype]] = {"enabled": True}
        if cfg.zero_stage > 0:  # stage 0 can accumulate in the model's type only
            config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config
