"""Runs without a fault, in which nothing may be said: many settings, each with several seeds."""

from __future__ import annotations

STEPS = 5
RUNS = 100
VARIANTS: tuple[tuple[str, ...], ...] = (
    (),
    ("algorithm=grpo",),
    ("algorithm=grpo", "buffer=off"),
    ("algorithm=mpo",),
    ("algorithm=mpo_then_grpo", "algorithm.mpo_steps=2"),
    ("controller.lag=1",),
    ("controller.lag=2", "algorithm.grpo.mismatch=token_truncate"),
    ("rollout.oversample=0.5",),
    ("rollout.prompts_per_step=6", "rollout.samples_per_prompt=4"),
    ("rollout.temperature=0.8",),
    ("rollout.top_p=0.9",),
    ("algorithm.grpo.ratio=sequence", "algorithm.grpo.clip_low=3e-4", "algorithm.grpo.clip_high=4e-4"),
    ("algorithm.grpo.aggregation=token", "algorithm.grpo.std=none"),
    ("algorithm.grpo.kl_weight=0.05",),
    ("algorithm.mpo.pairs=dropout_ntp",),
    ("buffer.unit=group", "buffer.recency=0.8", "buffer.importance_correction=true"),
    ("learner.lora.rank=4", "learner.lr=2e-3"),
    ("learner.lora.rank=4", "learner.lora.sync=adapter"),
    ("learner.trainable=adapter",),
    ("learner.trainable=language_and_adapter",),
    ("learner.micro_batch_tokens=1000", "learner.schedule=cosine"),
    ("learner.lr=1e-6", "learner.weight_decay=0.1"),
    ("digits.text_share=1.0", "hallucination.probe_prompts=0"),
    ("reward=rule_only", "model.reward=null", "algorithm.mpo.pairs=rule", "algorithm.mpo.threshold.kind=off"),
    ("checkpoint.every=2", "evaluation.every=2"),
)


def settings_of(run: int) -> tuple[str, ...]:
    """Of clean run 0 … ``RUNS`` - 1."""
    seed = run // len(VARIANTS)
    fixed = (f"controller.steps={STEPS}", f"controller.seed={seed}", f"data.seed={seed}")
    return (*fixed, *VARIANTS[run % len(VARIANTS)])
