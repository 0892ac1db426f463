"""What each setting allows on its own; ``skyrl.settings.validation`` checks it, and what must fit together."""

import math

DTYPES = ("float32", "bfloat16", "float16")
DEVICES = ("cpu", "cuda")
EMBEDDED_POSITIONS = 512
PICTURE_KINDS = ("sum", "max", "min", "count", "row_difference")
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
    "algorithm.mpo.threshold.every",
    "algorithm.mpo.threshold.window",
    "algorithm.mpo.threshold.min_labelled",
    "algorithm.gate.every",
    "algorithm.gate.window",
    "algorithm.gate.min_labelled",
    "data.pairs_per_step",
    "hallucination.mask_patch",
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
    "algorithm.mpo.reference_every",
    "algorithm.mpo_steps",
    "hallucination.probe_prompts",
    "reward.model_weight",
    "reward.format_weight",
    "reward.numeric_tolerance",
    "data.seed",
    "model.seed",
    "controller.seed",
    "algorithm.grpo.clip_high",
    "rollout.num_cpus",
    "reward.num_cpus",
    "learner.num_cpus",
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
    "buffer.uniform_share",
    "learner.min_lr_ratio",
    "hallucination.mask_share",
    "data.pool_min",
    "data.pool_max",
)
MIN_CONFIDENCE = 0.6
"""Smallest confidence of a risk-controlled threshold: ``batch/thresholds.py`` says why."""
RISK_STARTS = (2, 12)
"""Where the walks of a risk-controlled threshold begin, in twentieths: ``batch/thresholds.py`` says why."""
MAX_DECAY_BITS = 500
"""Largest -log2(recency) · max_age: ``replay/ssb.py`` keeps such powers in range."""
OPEN_SHARES = (
    "algorithm.mpo.threshold.quantile",
    "algorithm.mpo.threshold.target_risk",
    "algorithm.mpo.threshold.confidence",
    "algorithm.gate.quantile",
    "algorithm.gate.target_risk",
    "algorithm.gate.confidence",
)
OPTIONAL_NOT_NEGATIVE = (
    "algorithm.mpo.preference_weight_end",
    "algorithm.mpo.quality_weight_end",
    "algorithm.mpo.generation_weight_end",
)


def fewest_candidates(target_risk: float, confidence: float, walks: int = len(RISK_STARTS)) -> int:
    """Candidates without which no risk-controlled threshold can be found, even if none of them is bad: the first n with
    ((1 − confidence)/walks)^(1/n) > 1 − target_risk. Strictly above, so that no rounding of the bound ends a walk."""
    return math.floor(math.log((1 - confidence) / walks) / math.log1p(-target_risk) + 1e-9) + 1
