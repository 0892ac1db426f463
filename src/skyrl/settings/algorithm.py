"""Settings of the algorithm: GRPO, MPO, thresholds, the Selective Sample Buffer.

What the paper leaves open is a setting here; docs/algorithm.md maps its equations to the code.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class Std(Enum):
    """Divisor of the group advantage."""

    population = "population"
    sample = "sample"
    none = "none"
    """No division (Dr. GRPO)."""


class Aggregation(Enum):
    """How token terms become one loss."""

    sample = "sample"
    """Mean over a sample's tokens, then over samples (Eq. 8)."""
    token = "token"
    """Mean over all tokens of the step."""
    fixed = "fixed"
    """Sum over a sample's tokens divided by ``rollout.max_new_tokens``, then the mean over samples (Dr. GRPO)."""


class GrpoFilter(Enum):
    """Which fresh samples the GRPO term sees."""

    effective = "effective"
    """Those whose rule advantage is not 0."""
    all = "all"
    """Every scored sample: in groups that are all right or all wrong the reward model alone speaks."""


class Ratio(Enum):
    """What the importance ratio is taken over."""

    token = "token"
    """One ratio a token (Eq. 8)."""
    sequence = "sequence"
    """The geometric mean of a sample's token ratios, the same for each of its tokens (GSPO)."""


class Surrogate(Enum):
    """What bounds the policy update."""

    clip = "clip"
    """The smaller of plain and clipped ratio times advantage (Eq. 8)."""
    cispo = "cispo"
    """The clipped ratio as a constant weight of the log-probability (CISPO): no token loses its gradient."""


class KlEstimator(Enum):
    """Estimator of KL(policy ‖ reference) on one token, with d = log π_ref − log π."""

    k1 = "k1"
    """−d."""
    k2 = "k2"
    """d² / 2."""
    k3 = "k3"
    """e^d − d − 1."""


class KlPlace(Enum):
    """Where the penalty acts."""

    loss = "loss"
    """Added to the loss, with its own gradient."""
    reward = "reward"
    """Subtracted from the token's advantage as a constant."""


class Mismatch(Enum):
    """Correction of what rollout engine (and age) and learner disagree about: w = π_start / π_behaviour, where π_start
    is the learner's policy at the start of the step."""

    none = "none"
    """No separate correction: the surrogate's ratio is π_θ / π_behaviour."""
    token_truncate = "token_truncate"
    """Each token is weighted by min(w, cap) (truncated importance sampling)."""
    token_mask = "token_mask"
    """Tokens with w outside [1/cap, cap] are left out; the others are weighted by w."""
    sequence_mask = "sequence_mask"
    """Samples whose product of w is outside [1/cap, cap] are left out; the others are not weighted."""


class DeltaKind(Enum):
    """Moving average behind δ of the quality term."""

    cumulative = "cumulative"
    """Mean of all steps so far."""
    exponential = "exponential"
    """δ ← decay · δ + (1 − decay) · step's mean; the first step's mean starts it."""


class PairSource(Enum):
    """Where preference pairs come from."""

    reward_margin = "reward_margin"
    """The reward model's best against its worst answer of a group."""
    rule = "rule"
    """A right against a wrong answer by the rule; the reward model chooses which of each."""
    dropout_ntp = "dropout_ntp"
    """The reward model's best answer against its own first half, continued without the picture (DropoutNTP). Such a
    pair has no margin: ``mpo.threshold`` does not act on it, the gate does."""


class Stage(Enum):
    """Which terms are trained."""

    joint = "joint"
    """MPO and GRPO in every step."""
    grpo = "grpo"
    mpo = "mpo"
    mpo_then_grpo = "mpo_then_grpo"
    """MPO for ``mpo_steps`` steps, GRPO from then on."""


class ThresholdKind(Enum):
    """How a threshold τ on a reward-model score or margin is set."""

    off = "off"
    """Everything passes."""
    fixed = "fixed"
    """τ is ``value``."""
    quantile = "quantile"
    """τ is that quantile of the scores seen lately."""
    risk_controlled = "risk_controlled"
    """The smallest τ at which the share of hallucinating answers among those that pass is, with the stated confidence,
    at most ``target_risk``."""


class Unit(Enum):
    """What the buffer draws."""

    sample = "sample"
    group = "group"
    """All kept samples of one prompt together."""


class Eviction(Enum):
    """What makes room when the buffer is full."""

    oldest = "oldest"
    smallest = "smallest"
    """The smallest priority; among equals the oldest."""


class ThresholdFallback(Enum):
    """What passes while ``risk_controlled`` finds no threshold that keeps the risk under its target."""

    safest = "safest"
    """What lies above the threshold whose upper bound on the risk is lowest: it is not under control, but nothing is
    known to be better."""
    strictest = "strictest"
    """The tenth of the candidates with the highest scores."""
    nothing = "nothing"
    """Nothing. If the policy learns from nothing else, its risk never changes either."""


@dataclass
class ThresholdConfig:
    kind: ThresholdKind = ThresholdKind.fixed
    """``off``, ``fixed``, ``quantile`` or ``risk_controlled``."""
    value: float = 0.0
    """τ of ``fixed``; the others start from it until they have seen enough. Raw reward-model units."""
    quantile: float = 0.5
    """Of the window's scores (``quantile``)."""
    target_risk: float = 0.1
    """Largest share of hallucinating answers among those that pass (``risk_controlled``)."""
    confidence: float = 0.9
    """Probability with which the bound on that share holds (``risk_controlled``)."""
    fallback: ThresholdFallback = ThresholdFallback.safest
    """What passes while no τ keeps the risk under ``target_risk`` (``risk_controlled``)."""
    every: int = 5
    """Steps between recalibrations."""
    window: int = 512
    """Newest candidates that a calibration looks at (``risk_controlled``: newest with known facts)."""
    min_labelled: int = 32
    """Candidates below which nothing is calibrated."""


@dataclass
class GrpoConfig:
    weight: float = 1.0
    """0 turns the GRPO term off."""
    clip_low: float = 0.2
    """ε below 1: the ratio is clipped at 1 - clip_low."""
    clip_high: float = 0.2
    """ε above 1: the ratio is clipped at 1 + clip_high."""
    dual_clip: float | None = None
    """c > 1: with a negative advantage the objective is at least c times it. Null turns it off."""
    ratio: Ratio = Ratio.token
    """``token`` (Eq. 8) or ``sequence`` (GSPO)."""
    surrogate: Surrogate = Surrogate.clip
    """``clip`` (Eq. 8) or ``cispo``."""
    std: Std = Std.population
    """Divisor of the advantage."""
    aggregation: Aggregation = Aggregation.sample
    """From token terms to one loss."""
    filter: GrpoFilter = GrpoFilter.effective
    """Fresh samples that the term sees."""
    kl_weight: float = 0.0
    """Weight of the penalty to the reference policy; Eq. 8 has none."""
    kl_estimator: KlEstimator = KlEstimator.k3
    """``k1``, ``k2`` or ``k3``."""
    kl_place: KlPlace = KlPlace.loss
    """``loss`` or ``reward``."""
    mismatch: Mismatch = Mismatch.none
    """Correction of rollout and learner mismatch."""
    mismatch_cap: float = 2.0
    """Its cap, above 1."""


@dataclass
class MpoConfig:
    weight: float = 0.25
    """Multiplies the whole MPO term; 0 turns it off."""
    preference_weight: float = 0.8
    """w1, DPO."""
    quality_weight: float = 0.2
    """w2, BCO."""
    generation_weight: float = 1.0
    """w3, negative log-likelihood of the chosen answer."""
    preference_weight_end: float | None = None
    """w1 at the last step, reached linearly; null keeps it constant."""
    quality_weight_end: float | None = None
    """w2 at the last step."""
    generation_weight_end: float | None = None
    """w3 at the last step."""
    beta: float = 0.1
    """β of DPO and BCO."""
    label_smoothing: float = 0.0
    """Probability that a pair's labels are the wrong way round (conservative DPO)."""
    reference_free: bool = False
    """DPO and BCO without the reference: h = log π_θ."""
    delta: DeltaKind = DeltaKind.cumulative
    """Moving average behind BCO's δ."""
    delta_decay: float = 0.9
    """Decay of the exponential one."""
    pairs: PairSource = PairSource.reward_margin
    """``reward_margin``, ``rule`` or ``dropout_ntp``."""
    threshold: ThresholdConfig = field(
        default_factory=lambda: ThresholdConfig(kind=ThresholdKind.risk_controlled, value=2.0)
    )
    """On r_θ(chosen) − r_θ(rejected). ``risk_controlled`` needs answers that can be checked; without any the run ends
    at the first calibration."""
    pairs_per_prompt: int = 1
    """Most pairs formed in one group; a sample is in one pair at most."""
    reference_every: int = 0
    """Steps after which the reference becomes the current policy (iterated MPO); 0 is never."""
    reference_kl: float | None = None
    """The same as soon as KL(policy ‖ reference), nats a token of the pairs, exceeds this; null is never."""


@dataclass
class AlgorithmConfig:
    stage: Stage = Stage.joint
    """``joint``, ``grpo``, ``mpo`` or ``mpo_then_grpo``."""
    mpo_steps: int = 20
    """Steps of the first stage of ``mpo_then_grpo``."""
    grpo: GrpoConfig = field(default_factory=GrpoConfig)
    mpo: MpoConfig = field(default_factory=MpoConfig)
    gate: ThresholdConfig = field(default_factory=lambda: ThresholdConfig(kind=ThresholdKind.off))
    """On r_θ of answers that are right by the rule: below it their reinforcement is withheld."""

    def weights(self, step: int) -> tuple[float, float]:
        """``(grpo weight, mpo weight)`` at step 1, 2, …: 0 for a term that the stage does not train then."""
        mpo_now = self.stage in (Stage.joint, Stage.mpo)
        grpo_now = self.stage in (Stage.joint, Stage.grpo)
        if self.stage is Stage.mpo_then_grpo:
            mpo_now = step <= self.mpo_steps
            grpo_now = not mpo_now
        return (self.grpo.weight if grpo_now else 0.0, self.mpo.weight if mpo_now else 0.0)

    @property
    def uses_mpo(self) -> bool:
        """True if any step trains the MPO term."""
        return self.stage is not Stage.grpo and self.mpo.weight > 0

    @property
    def uses_grpo(self) -> bool:
        """True if any step may train the GRPO term."""
        return self.stage is not Stage.mpo and self.grpo.weight > 0


@dataclass
class BufferConfig:
    enabled: bool = True
    """False turns the Selective Sample Buffer off: only fresh samples are trained on."""
    capacity: int = 4096
    """Samples kept."""
    eviction: Eviction = Eviction.oldest
    """What goes when it is full: ``oldest`` or ``smallest``."""
    max_age: int = 8
    """Policy versions after which a sample is no longer drawn and is dropped."""
    unit: Unit = Unit.sample
    """``sample``, or ``group``: all kept samples of a prompt are drawn together, by their mean priority."""
    alpha: float = 1.0
    """Priority of a sample: |A|^alpha."""
    recency: float = 1.0
    """Priority is multiplied by this for each version of age: below 1 prefers young samples."""
    uniform_share: float = 0.0
    """Share u of uniform draws: P = (1 − u) · priority / Σ priority + u / N."""
    mix: float = 0.25
    """Largest share of the rollout batch that replayed samples may fill; they only take places that
    ineffective fresh samples leave free."""
    fill_target: float | None = None
    """Replay only until this share of the rollout batch is effective; null fills up to ``mix``."""
    importance_correction: bool = False
    """Weight a drawn sample by 1/(N·P), normalised to mean 1."""
