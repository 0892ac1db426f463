"""Which runs there are. A method is a list of overrides of the embedded default, so a run with seed 0 can be repeated
with ``python -m skyrl.launch``. With another seed the grid also orders the prompts by it; in ``launch`` only
``data.seed`` does so, which changes the scenes, too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SEEDS = (0, 1, 2, 3, 4)

BASE = (
    "name=ablation",
    "digits.kinds=[max,min,count]",
    "rollout.prompts_per_step=32",
    "controller.steps=30",
    "evaluation.every=10",
    "evaluation.gallery=0",
    "checkpoint.every=0",
    "checkpoint.export=false",
    "monitoring=quiet",
    "learner.lr=2e-4",
    "controller.timeout=600",
)
"""Equal for all runs: 30 steps of 32 prompts x 8 samples = 7,680 rollouts. Only kinds of question that can often be
answered after a false reading, so that the answer alone punishes it less than sums do; twice the default's learning
rate, so that what a method does wrong shows within so few steps."""

QUICK = (
    "digits.warm_start_steps=60",
    "digits.reward_body_steps=10",
    "digits.reward_steps=4",
    "rollout.prompts_per_step=4",
    "rollout.samples_per_prompt=4",
    "controller.steps=2",
    "data.eval_size=16",
    "evaluation.every=1",
    "hallucination.probe_prompts=4",
    "learner.warmup_steps=0",
)

GRPO = ("algorithm=grpo", "buffer=off")
MPO = ("algorithm=mpo", "buffer=off")

SLOW = "learner.lr=1e-4"

METHODS: dict[str, tuple[str, ...]] = {
    # Table 2
    "grpo": GRPO,
    "grpo_ssb": ("algorithm=grpo",),
    # Table 3
    "sft": (*MPO, "algorithm.mpo.preference_weight=0", "algorithm.mpo.quality_weight=0"),
    "dpo": (
        *MPO,
        "algorithm.mpo.preference_weight=1",
        "algorithm.mpo.quality_weight=0",
        "algorithm.mpo.generation_weight=0",
    ),
    "mpo": MPO,
    "grpo_rule": (*GRPO, "reward=rule_only"),
    "mpo_then_grpo": ("algorithm=mpo_then_grpo", "algorithm.mpo_steps=10", "buffer=off"),
    "default": (),
    # Table 4
    "grpo_adapter": (*GRPO, "learner.trainable=adapter"),
    "grpo_language": (*GRPO, "learner.trainable=language_and_adapter"),
    "grpo_vision": (*GRPO, "learner.trainable=adapter_and_vision"),
    "mpo_adapter": (*MPO, "learner.trainable=adapter"),
    "mpo_language": (*MPO, "learner.trainable=language_and_adapter"),
    "mpo_vision": (*MPO, "learner.trainable=adapter_and_vision"),
    # Thresholds
    "mpo_low": (*MPO, "algorithm.mpo.threshold.kind=fixed", "algorithm.mpo.threshold.value=0"),
    "mpo_middle": (*MPO, "algorithm.mpo.threshold.kind=fixed", "algorithm.mpo.threshold.value=2"),
    "mpo_high": (*MPO, "algorithm.mpo.threshold.kind=fixed", "algorithm.mpo.threshold.value=5"),
    "mpo_strictest": (*MPO, "algorithm.mpo.threshold.fallback=strictest"),
    "mpo_quantile": (*MPO, "algorithm.mpo.threshold.kind=quantile"),
    # The default's own learning rate
    "default_slow": (SLOW,),
    "grpo_slow": (*GRPO, SLOW),
    "grpo_rule_slow": (*GRPO, "reward=rule_only", SLOW),
    "default_slow_language": (SLOW, "learner.trainable=language_and_adapter"),
}

VARIANTS: dict[str, tuple[str, ...]] = {
    "dropout_ntp": (*MPO, "algorithm.mpo.pairs=dropout_ntp", "algorithm.mpo.reference_every=1"),
    "sequence_ratio": (
        *("algorithm.grpo.ratio=sequence", "algorithm.grpo.kl_weight=0.01", "algorithm.grpo.kl_estimator=k2"),
        *("buffer.unit=group", "buffer.fill_target=0.9", "algorithm.mpo.delta=exponential"),
        *("algorithm.gate.kind=quantile", "algorithm.gate.min_labelled=2", "algorithm.gate.every=1"),
    ),
    "two_stages": (
        *("algorithm=mpo_then_grpo", "algorithm.mpo_steps=1", "algorithm.mpo.pairs=rule"),
        *(
            "algorithm.grpo.surrogate=cispo",
            "algorithm.grpo.mismatch=token_truncate",
            "algorithm.grpo.aggregation=fixed",
        ),
        *("buffer.recency=0.9", "buffer.uniform_share=0.2", "buffer.eviction=smallest"),
        *("buffer.importance_correction=true", "algorithm.grpo.filter=all"),
    ),
}
"""Settings that no table needs; ``--quick`` runs them, so that each is known to work in the whole loop."""

TABLES: dict[str, tuple[str, ...]] = {
    "Table 2": ("grpo", "grpo_ssb"),
    "Table 3": ("sft", "dpo", "mpo", "grpo_rule", "grpo", "mpo_then_grpo", "default"),
    "Table 4": (
        *("grpo_adapter", "grpo_language", "grpo_vision", "grpo"),
        *("mpo_adapter", "mpo_language", "mpo_vision", "mpo"),
    ),
    "Learning rate": ("default", "default_slow", "grpo", "grpo_slow", "grpo_rule", "grpo_rule_slow"),
    "Recipe": ("default_slow", "default_slow_language", "grpo_slow", "grpo_rule_slow"),
    "Thresholds": ("mpo_low", "mpo_middle", "mpo_high", "mpo_quantile", "mpo_strictest", "mpo"),
}


@dataclass(frozen=True, slots=True)
class Job:
    """One run of the grid."""

    method: str
    seed: int
    quick: bool = False

    @property
    def key(self) -> str:
        return f"{self.method}/{self.seed}"

    def overrides(self) -> list[str]:
        """Hydra overrides. Sampling and replay follow the seed, and so does the order of the prompts (see the worker);
        scenes and models are the same for all."""
        base = [*BASE, *QUICK] if self.quick else [*BASE]
        return [*base, *(METHODS | VARIANTS)[self.method], f"controller.seed={self.seed}"]


def jobs(methods: list[str], seeds: tuple[int, ...], quick: bool) -> list[Job]:
    """Seed by seed, so that an unfinished grid has whole seeds."""
    return [Job(method, seed, quick) for seed in seeds for method in methods]


Row = dict[str, Any]
"""One finished run: ``key``, ``method``, ``seed``, ``overrides``, ``commit``, ``seconds``, ``evaluations`` (a list of
metric dictionaries with ``step``), ``steps`` (a list of small dictionaries per training step)."""
