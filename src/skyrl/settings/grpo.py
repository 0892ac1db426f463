"""Settings of GRPO and its relatives."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

from pydantic import Field, NonNegativeFloat

from skyrl.schema import Settings, ShareBelowOne


class Std(Enum):
    population = "population"
    sample = "sample"
    none = "none"
    """No division (Dr. GRPO)."""


class Aggregation(Enum):
    sample = "sample"
    """Mean over a sample's tokens, then over samples (Eq. 8)."""
    token = "token"
    """Mean over all tokens of the step."""
    fixed = "fixed"
    """Sum over a sample's tokens divided by ``rollout.max_new_tokens``, then the mean over samples (Dr. GRPO)."""


class GrpoFilter(Enum):
    effective = "effective"
    """Those whose rule advantage is not 0."""
    all = "all"
    """Every scored sample: in groups that are all right or all wrong the reward model alone speaks."""


class Ratio(Enum):
    token = "token"
    """One ratio a token (Eq. 8)."""
    sequence = "sequence"
    """The geometric mean of a sample's token ratios, the same for each of its tokens (GSPO)."""


class Surrogate(Enum):
    clip = "clip"
    """The smaller of plain and clipped ratio times advantage (Eq. 8)."""
    cispo = "cispo"
    """The clipped ratio as a constant weight of the log-probability (CISPO): no token loses its gradient."""


class KlEstimator(Enum):
    k1 = "k1"
    """−d."""
    k2 = "k2"
    """d² / 2."""
    k3 = "k3"
    """e^d − d − 1."""


class KlPlace(Enum):
    loss = "loss"
    """Added to the loss, with its own gradient."""
    reward = "reward"
    """Subtracted from the token's advantage as a constant."""


class Mismatch(Enum):
    none = "none"
    """No separate correction: the surrogate's ratio is π_θ / π_behaviour."""
    token_truncate = "token_truncate"
    """Each token is weighted by min(w, cap) (truncated importance sampling)."""
    token_mask = "token_mask"
    """Tokens with w outside [1/cap, cap] are left out; the others are weighted by w."""
    sequence_mask = "sequence_mask"
    """Samples whose product of w is outside [1/cap, cap] are left out; the others are not weighted."""


class GrpoConfig(Settings):
    weight: NonNegativeFloat = 1.0
    """0 turns the GRPO term off."""
    clip_low: ShareBelowOne | None = 0.2
    """ε below 1: the ratio is clipped at 1 - clip_low. Null, for ``surrogate=cispo`` only, is no lower bound: the
    published CISPO has none."""
    clip_high: NonNegativeFloat = 0.2
    """ε above 1: the ratio is clipped at 1 + clip_high."""
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """c > 1: with a negative advantage the objective is at least c times it. Null turns it off."""
    ratio: Ratio = Ratio.token
    """What the importance ratio is taken over."""
    surrogate: Surrogate = Surrogate.clip
    """What bounds the policy update."""
    std: Std = Std.population
    """Divisor of the group advantage."""
    aggregation: Aggregation = Aggregation.sample
    """How token terms become one loss."""
    filter: GrpoFilter = GrpoFilter.effective
    """Which fresh samples the term sees."""
    kl_weight: NonNegativeFloat = 0.0
    """Weight of the penalty to the reference policy; Eq. 8 has none."""
    kl_estimator: KlEstimator = KlEstimator.k3
    """Estimator of KL(policy ‖ reference) on one token, with d = log π_ref − log π."""
    kl_place: KlPlace = KlPlace.loss
    """Where the penalty acts."""
    mismatch: Mismatch = Mismatch.none
    """Correction of what rollout engine (and age) and learner disagree about: w = π_start / π_behaviour, where π_start
    is the learner's policy at the start of the step."""
    mismatch_cap: Annotated[float, Field(gt=1, allow_inf_nan=True)] = 2.0
    """Its cap; infinity leaves w uncapped."""
