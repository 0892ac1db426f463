"""Settings of the loss: MPO, stages, terms of your own (GRPO: grpo.py); and what must fit together.

What the paper leaves open is a setting here; docs/algorithm.md maps its equations to the code.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat

from skyrl.schema import Count, DottedPath, Problem, Settings, ShareBelowOne
from skyrl.settings.grpo import GrpoConfig, GrpoFilter, Mismatch, Ratio, Surrogate
from skyrl.settings.thresholds import ThresholdConfig, ThresholdKind

if TYPE_CHECKING:
    from skyrl.settings.run import Config


class DeltaKind(Enum):
    cumulative = "cumulative"
    """Mean of all steps so far."""
    exponential = "exponential"
    """δ ← decay · δ + (1 − decay) · step's mean; the first step's mean starts it."""


class PairSource(Enum):
    reward_margin = "reward_margin"
    """The reward model's best against its worst answer of a group."""
    rule = "rule"
    """A right against a wrong answer by the rule; the reward model chooses which of each."""
    dropout_ntp = "dropout_ntp"
    """The reward model's best answer against its own first half, continued without the picture (DropoutNTP). Such a
    pair has no margin: ``mpo.threshold`` does not act on it, the gate does."""


class Stage(Enum):
    joint = "joint"
    """MPO and GRPO in every step."""
    grpo = "grpo"
    mpo = "mpo"
    mpo_then_grpo = "mpo_then_grpo"
    """MPO for ``mpo_steps`` steps, GRPO from then on."""


class OwnTerm(Settings):
    """A term of the loss that you wrote yourself: docs/architecture.md shows one."""

    path: DottedPath
    """The term's class, ``package.module:Name``."""
    weight: NonNegativeFloat = 1.0
    """Multiplies the term, in every step."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """The term's own settings; its own class checks them."""


class MpoConfig(Settings):
    weight: NonNegativeFloat = 0.25
    """Multiplies the whole MPO term; 0 turns it off."""
    preference_weight: NonNegativeFloat = 0.8
    """w1, DPO."""
    quality_weight: NonNegativeFloat = 0.2
    """w2, BCO."""
    generation_weight: NonNegativeFloat = 1.0
    """w3, negative log-likelihood of the chosen answer."""
    preference_weight_end: NonNegativeFloat | None = None
    """w1 at the last step, reached linearly; null keeps it constant."""
    quality_weight_end: NonNegativeFloat | None = None
    """w2 at the last step."""
    generation_weight_end: NonNegativeFloat | None = None
    """w3 at the last step."""
    beta: PositiveFloat = 0.1
    """β of DPO and BCO."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Probability that a pair's labels are the wrong way round (conservative DPO)."""
    reference_free: bool = False
    """DPO and BCO without the reference: h = log π_θ."""
    delta: DeltaKind = DeltaKind.cumulative
    """Moving average behind BCO's δ."""
    delta_decay: ShareBelowOne = 0.9
    """Decay of the exponential one."""
    pairs: PairSource = PairSource.reward_margin
    """Where preference pairs come from."""
    threshold: ThresholdConfig = Field(
        default_factory=lambda: ThresholdConfig(kind=ThresholdKind.risk_controlled, value=2.0)
    )
    """On r_θ(chosen) − r_θ(rejected). ``risk_controlled`` needs answers that can be checked; without any the run ends
    at the first calibration."""
    pairs_per_prompt: Count = 1
    """Most pairs formed in one group; a sample is in one pair at most."""
    reference_every: NonNegativeInt = 0
    """Steps after which the reference becomes the current policy (iterated MPO); 0 is never."""
    reference_kl: PositiveFloat | None = None
    """The same as soon as KL(policy ‖ reference), nats a token of the pairs, exceeds this; null is never."""


class AlgorithmConfig(Settings):
    stage: Stage = Stage.joint
    """Which terms are trained."""
    mpo_steps: NonNegativeInt = 20
    """Steps of the first stage of ``mpo_then_grpo``."""
    grpo: GrpoConfig = GrpoConfig()
    mpo: MpoConfig = MpoConfig()
    gate: ThresholdConfig = Field(default_factory=lambda: ThresholdConfig(kind=ThresholdKind.off))
    """On r_θ of answers that are right by the rule: below it their reinforcement is withheld."""
    terms: list[OwnTerm] = Field(default_factory=list)
    """Terms of the loss that you wrote yourself, each ``{path: package.module:Name, weight: 1.0, settings: {…}}``."""

    def weights(self, step: int) -> dict[str, float]:
        """Weight of each term of the loss at step 1, 2, …: ``grpo``, ``mpo`` (0 for one that the stage does not train
        then) and the paths of your own terms."""
        mpo_now = self.stage in (Stage.joint, Stage.mpo)
        grpo_now = self.stage in (Stage.joint, Stage.grpo)
        if self.stage is Stage.mpo_then_grpo:
            mpo_now = step <= self.mpo_steps
            grpo_now = not mpo_now
        own = {term.path: term.weight for term in self.terms}
        return {"grpo": self.grpo.weight * grpo_now, "mpo": self.mpo.weight * mpo_now} | own

    @property
    def uses_mpo(self) -> bool:
        """True if any step trains the MPO term."""
        return self.stage is not Stage.grpo and self.mpo.weight > 0

    @property
    def uses_grpo(self) -> bool:
        """True if any step may train the GRPO term."""
        return self.stage is not Stage.mpo and self.grpo.weight > 0


def algorithm_problems(cfg: Config) -> Iterator[Problem]:
    """What does not fit together here."""
    yield from _stages(cfg)
    if cfg.algorithm.uses_grpo:
        yield from _objective(cfg)
    yield from _pairs(cfg)
    if cfg.model.reward is None:
        yield from _without_reward_model(cfg)
    yield from cfg.algorithm.mpo.threshold.problems("algorithm.mpo.threshold")
    yield from cfg.algorithm.gate.problems("algorithm.gate")


def _stages(cfg: Config) -> Iterator[Problem]:
    algorithm, grpo, mpo = cfg.algorithm, cfg.algorithm.grpo, cfg.algorithm.mpo
    keys = "algorithm.stage algorithm.grpo.weight algorithm.mpo.weight"
    if not any((algorithm.uses_grpo, algorithm.uses_mpo, *(term.weight for term in algorithm.terms))):
        yield keys, "nothing would be trained; set a weight above 0"
    paths = [term.path for term in algorithm.terms]
    if len(set(paths)) < len(paths):
        yield "algorithm.terms", f"each term must be there once; their paths are {', '.join(paths)}"
    if algorithm.stage is Stage.mpo_then_grpo:
        if not (grpo.weight > 0 and mpo.weight > 0):
            yield keys, "one of the stages would train nothing; both weights must be above 0"
        if not 1 <= algorithm.mpo_steps < cfg.controller.steps:
            keys = "algorithm.stage algorithm.mpo_steps controller.steps"
            yield keys, "mpo_steps must be 1 or more and below steps, so that both stages run"


def _objective(cfg: Config) -> Iterator[Problem]:
    grpo, top_p, clip = cfg.algorithm.grpo, cfg.rollout.top_p, cfg.algorithm.grpo.surrogate is Surrogate.clip
    if clip and grpo.clip_low is None:
        yield "algorithm.grpo.clip_low algorithm.grpo.surrogate", "must be a number, 0 or more and below 1"
    elif clip and grpo.mismatch is Mismatch.none and top_p < 1 - (grpo.clip_low or 0):
        yield (
            "rollout.top_p algorithm.grpo.clip_low",
            "a fresh token's ratio starts between top_p and 1, so tokens of wrong answers could lie outside the clip "
            "from the start and teach nothing; top_p must be at least 1 - clip_low, or set algorithm.grpo.mismatch, "
            "which takes the cut out of the ratio",
        )
    if not clip and grpo.dual_clip is not None:
        yield "algorithm.grpo.dual_clip algorithm.grpo.surrogate", "CISPO has no clipped objective; set dual_clip=null"
    if grpo.mismatch is not Mismatch.none and grpo.dual_clip is not None:
        mend = "the ratio of the step is 1 then, and nothing is clipped; set dual_clip=null or mismatch=none"
        yield "algorithm.grpo.dual_clip algorithm.grpo.mismatch", mend
    if grpo.ratio is Ratio.sequence and grpo.mismatch in (Mismatch.token_truncate, Mismatch.token_mask):
        mend = "the one corrects single tokens, the other takes whole samples; use mismatch=sequence_mask or none"
        yield "algorithm.grpo.mismatch algorithm.grpo.ratio", mend


def _pairs(cfg: Config) -> Iterator[Problem]:
    mpo, path = cfg.algorithm.mpo, cfg.data.pairs_path
    if path is not None and cfg.algorithm.stage is not Stage.mpo:
        yield "data.pairs_path algorithm.stage", "offline pairs train MPO alone; set algorithm.stage=mpo"
    if path is not None and not Path(path).is_file():
        yield "data.pairs_path", "must be a Parquet file of pairs; no such file exists"
    if path is not None and cfg.controller.lag:
        yield "controller.lag data.pairs_path", "nothing is sampled for offline pairs; lag must be 0"
    if mpo.reference_every or mpo.reference_kl is not None:
        keys = "algorithm.mpo.reference_every algorithm.mpo.reference_kl"
        if mpo.reference_free:
            yield f"{keys} algorithm.mpo.reference_free", "there is no reference to refresh; set them to 0 and null"
        elif not (cfg.algorithm.uses_mpo and (mpo.preference_weight > 0 or mpo.quality_weight > 0)):
            none = "only steps whose MPO term compares with the reference refresh it, and this run has none"
            yield keys, f"{none}; set them to 0 and null"
    if mpo.pairs_per_prompt > 1 and mpo.pairs is PairSource.dropout_ntp:
        yield "algorithm.mpo.pairs_per_prompt algorithm.mpo.pairs", "such pairs come one a prompt; must be 1"
    if mpo.pairs_per_prompt > 1 and mpo.threshold.kind is ThresholdKind.risk_controlled:
        mend = "its bound holds for the first pair of a prompt only; use 1, or another kind of threshold"
        yield "algorithm.mpo.pairs_per_prompt algorithm.mpo.threshold.kind", mend


def _without_reward_model(cfg: Config) -> Iterator[Problem]:
    uses_mpo, mpo, rule = cfg.algorithm.uses_mpo, cfg.algorithm.mpo, cfg.algorithm.mpo.pairs is PairSource.rule
    if uses_mpo and cfg.data.pairs_path is None and not rule:
        mend = "a reward model chooses such pairs; set model.reward, algorithm.mpo.pairs=rule or algorithm.stage=grpo"
        yield "model.reward algorithm.mpo.weight algorithm.mpo.pairs", mend
    if cfg.algorithm.gate.kind is not ThresholdKind.off:
        yield "model.reward algorithm.gate.kind", "needs a reward model; set kind=off"
    if uses_mpo and rule and mpo.threshold.kind is not ThresholdKind.off:
        yield "model.reward algorithm.mpo.threshold.kind", "needs a reward model; set kind=off"
    if cfg.reward.model_weight != 0:
        yield "model.reward reward.model_weight", "there is no score to weigh; set model_weight=0"
    if cfg.algorithm.grpo.filter is GrpoFilter.all:
        yield "model.reward algorithm.grpo.filter", "tied groups have no signal; use filter=effective"
