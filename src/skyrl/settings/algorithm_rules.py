"""Checks of the algorithm's settings: stages, objective, buffer and thresholds, alone and together."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from skyrl.settings import Config, GrpoFilter, Mismatch, PairSource, Ratio, Stage, Surrogate, ThresholdKind, Unit
from skyrl.settings.ranges import MAX_DECAY_BITS, MIN_CONFIDENCE, fewest_candidates


def algorithm_problems(cfg: Config) -> Iterator[str]:
    """One sentence a problem; see :func:`skyrl.settings.validation.validate`."""
    yield from _stages(cfg)
    yield from _reward_combinations(cfg)
    yield from _objective_combinations(cfg)
    yield from _references_and_pairs(cfg)
    yield from _buffer_combinations(cfg)
    yield from _thresholds(cfg)


def _stages(cfg: Config) -> Iterator[str]:
    algorithm, grpo, mpo = cfg.algorithm, cfg.algorithm.grpo, cfg.algorithm.mpo
    if not algorithm.uses_grpo and not algorithm.uses_mpo:
        yield (
            f"algorithm.stage={algorithm.stage.value} with algorithm.grpo.weight={grpo.weight:g} and "
            f"algorithm.mpo.weight={mpo.weight:g}: nothing would be trained; set a weight above 0"
        )
    if algorithm.stage is Stage.mpo_then_grpo and not (grpo.weight > 0 and mpo.weight > 0):
        yield (
            f"algorithm.stage=mpo_then_grpo with algorithm.mpo.weight={mpo.weight:g} and algorithm.grpo.weight="
            f"{grpo.weight:g}: one of the stages would train nothing; both must be above 0"
        )
    if algorithm.stage is Stage.mpo_then_grpo and not 1 <= algorithm.mpo_steps < cfg.controller.steps:
        yield (
            f"algorithm.mpo_steps={algorithm.mpo_steps}: with algorithm.stage=mpo_then_grpo it must be 1 or more and "
            f"below controller.steps={cfg.controller.steps}, so that both stages run"
        )


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
    grpo, stage = cfg.algorithm.grpo, cfg.algorithm.stage
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
    if grpo.mismatch is not Mismatch.none and grpo.dual_clip is not None:
        yield (
            f"algorithm.grpo.dual_clip={grpo.dual_clip} with mismatch={grpo.mismatch.value}: the ratio of the step is "
            "1 then, and nothing is clipped; set dual_clip=null or mismatch=none"
        )
    if cfg.data.pairs_path is not None and stage is not Stage.mpo:
        yield f"data.pairs_path with algorithm.stage={stage.value}: offline pairs train MPO alone; set stage=mpo"
    if cfg.data.pairs_path is not None and not Path(cfg.data.pairs_path).is_file():
        yield f"data.pairs_path={cfg.data.pairs_path}: no such file; it must be a Parquet file of pairs"


def _references_and_pairs(cfg: Config) -> Iterator[str]:
    mpo = cfg.algorithm.mpo
    if mpo.reference_every or mpo.reference_kl is not None:
        if mpo.reference_free:
            yield (
                "algorithm.mpo.reference_free=true with reference_every or reference_kl: there is no reference to "
                "refresh"
            )
        elif not (cfg.algorithm.uses_mpo and (mpo.preference_weight > 0 or mpo.quality_weight > 0)):
            yield (
                f"algorithm.mpo.reference_every={mpo.reference_every}, reference_kl={mpo.reference_kl}: only steps "
                "whose MPO term compares with the reference refresh it, and this run has none; set both to 0 and null"
            )
    if mpo.pairs_per_prompt > 1 and mpo.pairs is PairSource.dropout_ntp:
        yield f"algorithm.mpo.pairs_per_prompt={mpo.pairs_per_prompt} with pairs=dropout_ntp, which forms one; set 1"
    if mpo.pairs_per_prompt > 1 and mpo.threshold.kind is ThresholdKind.risk_controlled:
        yield (
            f"algorithm.mpo.pairs_per_prompt={mpo.pairs_per_prompt} with threshold.kind=risk_controlled: its bound "
            "holds for the first pair of a prompt only; use 1, or another kind of threshold"
        )


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
        calibrated = threshold.kind in (ThresholdKind.quantile, ThresholdKind.risk_controlled)
        if calibrated and threshold.window < threshold.min_labelled:
            yield (
                f"{key}.window={threshold.window} with min_labelled={threshold.min_labelled}: the window could never "
                f"hold enough candidates to calibrate; raise window to {threshold.min_labelled} or more"
            )
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
