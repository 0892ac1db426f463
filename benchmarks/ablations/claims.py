"""What the paper claims, and what the grid says of it.

A verdict is a rule, not a reading: the paired difference over seeds with its 95 % interval. *Seen*: the interval lies
on the claimed side of 0. *Seen otherwise*: on the other side. *Not seen*: it holds 0. *Unfinished*, *not measured yet*:
not all seeds of the grid have run. *A seed has no value*: the figure does not exist for one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.ablations.figures import Figure, Interval, at_step, difference, drop_from_best, final, over_steps
from benchmarks.ablations.grid import SEEDS, Row

ACCURACY, HALLUCINATION = final("eval/accuracy"), final("eval/hallucination")
FRESH, FILLED = "buffer/effective_share_fresh", "buffer/effective_share"
EARLY, LATE = slice(0, 10), slice(-10, None)
SWITCH = 10
"""Step after which ``mpo_then_grpo`` goes from MPO to GRPO."""


PAPER, OURS = "paper", "ours"


@dataclass(frozen=True, slots=True)
class Claim:
    """``figure(one) - minus(other)`` has the sign that is claimed."""

    table: str
    text: str
    source: str
    """``paper``, or ``ours``: our reading of the paper's sentences, or a check of our own."""
    paper: str
    """The paper's own figures."""
    one: str
    other: str
    figure: Figure
    sign: int
    minus: Figure | None = None

    def measure(self, rows: Sequence[Row]) -> Interval:
        return difference(rows, self.one, self.other, self.figure, self.minus)

    def verdict(self, rows: Sequence[Row]) -> str:
        one, other = ({row["seed"] for row in rows if row["method"] == name} for name in (self.one, self.other))
        found = self.measure(rows)
        if not one & other:
            return "not measured yet"
        if not set(SEEDS) <= one & other:
            return "unfinished"
        if found.count < len(one & other):
            return "a seed has no value"
        return {self.sign: "seen", 0: "not seen", -self.sign: "seen otherwise"}[found.sign]


NO_FIGURE = "no figure"
CLAIMS = (
    Claim(
        "Table 2", "Effective samples fall during GRPO without the SSB", PAPER, "about 60 % to under 40 %",
        "grpo", "grpo", over_steps(FRESH, LATE), -1, over_steps(FRESH, EARLY),
    ),
    Claim(
        "Table 2", "The SSB raises the effective share of a batch (by construction: replay fills up to a quarter)",
        PAPER, "under 40 % to over 60 %", "grpo_ssb", "grpo", over_steps(FILLED, LATE), 1, over_steps(FRESH, LATE),
    ),
    Claim(
        "Table 2", "At equal rollouts the SSB raises accuracy", PAPER, "MMMU 73.4 to 73.6, MathVista 74.0 to 74.0",
        "grpo_ssb", "grpo", ACCURACY, 1,
    ),
    Claim(
        "Table 3", "MPO hallucinates less than likelihood of the chosen answers alone", PAPER, "12.1 to 8.7",
        "mpo", "sft", HALLUCINATION, -1,
    ),
    Claim(
        "Table 3", "MPO hallucinates less than DPO alone", PAPER, "12.6 (a draft) to 8.7",
        "mpo", "dpo", HALLUCINATION, -1,
    ),
    Claim(
        "Table 3", "MPO is more accurate than likelihood of the chosen answers alone", PAPER, "MMMU 71.6 to 73.2",
        "mpo", "sft", ACCURACY, 1,
    ),
    Claim(
        "Table 3", "GRPO raises the accuracy of a policy that MPO has trained (step 30 against the switch at 10)",
        PAPER, "MMMU 73.2 to 73.6", "mpo_then_grpo", "mpo_then_grpo", ACCURACY, 1, at_step("eval/accuracy", SWITCH),
    ),
    Claim(
        "Table 3", "It also raises its hallucination somewhat", PAPER, "8.7 to 9.1",
        "mpo_then_grpo", "mpo_then_grpo", HALLUCINATION, 1, at_step("eval/hallucination", SWITCH),
    ),
    Claim(
        "Section 3", "GRPO on answers alone hallucinates more than on the hybrid reward", OURS, NO_FIGURE,
        "grpo_rule", "grpo", HALLUCINATION, 1,
    ),
    Claim(
        "Section 3", "The whole (MPO, GRPO, SSB, calibrated threshold) hallucinates less than GRPO on answers alone",
        OURS, NO_FIGURE, "default", "grpo_rule", HALLUCINATION, -1,
    ),
    Claim(
        "Section 3", "The whole is more accurate than GRPO on answers alone", OURS, NO_FIGURE,
        "default", "grpo_rule", ACCURACY, 1,
    ),
    Claim(
        "Section 3", "The whole is more accurate than GRPO on the hybrid reward", OURS, NO_FIGURE,
        "default", "grpo", ACCURACY, 1,
    ),
    Claim(
        "Section 3", "MPO in the same step makes GRPO with the SSB more accurate", OURS, NO_FIGURE,
        "default", "grpo_ssb", ACCURACY, 1,
    ),
    Claim(
        "Section 3", "MPO in the same step makes GRPO with the SSB hallucinate less", OURS, NO_FIGURE,
        "default", "grpo_ssb", HALLUCINATION, -1,
    ),
    Claim(
        "Section 3", "At a learning rate of 1e-4 the whole hallucinates less than GRPO on answers alone", OURS,
        NO_FIGURE, "default_slow", "grpo_rule_slow", HALLUCINATION, -1,
    ),
    Claim(
        "Section 3", "At a learning rate of 1e-4 the whole is more accurate than GRPO on the hybrid reward", OURS,
        NO_FIGURE, "default_slow", "grpo_slow", ACCURACY, 1,
    ),
    Claim(
        "Section 3", "Excessive reinforcement: on answers alone twice the learning rate hallucinates more", OURS,
        NO_FIGURE, "grpo_rule", "grpo_rule_slow", HALLUCINATION, 1,
    ),
    Claim(
        "Table 4", "GRPO: the adapter alone beats LLM and adapter", PAPER, "MMMU 73.6 against 72.1",
        "grpo_adapter", "grpo_language", ACCURACY, 1,
    ),
    Claim(
        "Table 4", "GRPO: the adapter alone beats adapter and vision tower", PAPER, "MMMU 73.6 against 72.3",
        "grpo_adapter", "grpo_vision", ACCURACY, 1,
    ),
    Claim(
        "Table 4", "MPO: the adapter alone beats LLM and adapter", OURS, NO_FIGURE,
        "mpo_adapter", "mpo_language", ACCURACY, 1,
    ),
    Claim(
        "Recipe", "At 1e-4 the whole is more accurate with a frozen vision tower", OURS, NO_FIGURE,
        "default_slow_language", "default_slow", ACCURACY, 1,
    ),
    Claim(
        "Recipe", "At 1e-4 the whole hallucinates less with a frozen vision tower", OURS, NO_FIGURE,
        "default_slow_language", "default_slow", HALLUCINATION, -1,
    ),
    Claim(
        "Thresholds", "At the end accuracy is further below its own best with a low threshold than with a high one",
        PAPER, "τ = 10: MMMU 73.6 at step 750, 68.9 at 2,420",
        "mpo_low", "mpo_high", drop_from_best("eval/accuracy"), 1,
    ),
    Claim(
        "Thresholds", "A high threshold hallucinates less than a low one", OURS, NO_FIGURE,
        "mpo_high", "mpo_low", HALLUCINATION, -1,
    ),
)  # fmt: skip
