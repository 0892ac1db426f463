"""What the paper claims, and what the grid says of it.

A verdict is a rule, not a reading: the paired difference over seeds with its 95 % interval. *Seen*: the interval lies
on the claimed side of 0. *Seen otherwise*: on the other side. *Not seen*: it holds 0. *Unfinished*: not all
seeds of the grid have run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.ablations.figures import Figure, Interval, difference, drop_from_best, final, over_steps
from benchmarks.ablations.grid import SEEDS, Row

ACCURACY, HALLUCINATION = final("eval/accuracy"), final("eval/hallucination")
FRESH, FILLED = "buffer/effective_share_fresh", "buffer/effective_share"
EARLY, LATE = slice(0, 10), slice(-10, None)


@dataclass(frozen=True, slots=True)
class Claim:
    """``figure(one) - minus(other)`` has the sign that the paper claims."""

    table: str
    text: str
    paper: str
    """The paper's own figures."""
    one: str
    other: str
    figure: Figure
    sign: int
    minus: Figure | None = None
    unit: str = "points"

    def measure(self, rows: Sequence[Row]) -> Interval:
        return difference(rows, self.one, self.other, self.figure, self.minus)

    def verdict(self, rows: Sequence[Row]) -> str:
        found = self.measure(rows)
        if found.count < len(SEEDS):
            return "unfinished" if found.count else "not measured yet"
        return {self.sign: "seen", 0: "not seen", -self.sign: "seen otherwise"}[found.sign]


CLAIMS = (
    Claim(
        "Table 2", "Effective samples fall during GRPO without the SSB", "about 60 % to under 40 %",
        "grpo", "grpo", over_steps(FRESH, LATE), -1, over_steps(FRESH, EARLY),
    ),
    Claim(
        "Table 2", "The SSB raises the effective share of a batch", "under 40 % to over 60 %",
        "grpo_ssb", "grpo", over_steps(FILLED, LATE), 1, over_steps(FRESH, LATE),
    ),
    Claim(
        "Table 2", "At equal rollouts the SSB raises accuracy", "MMMU 73.4 to 73.6, MathVista 74.0 to 74.0",
        "grpo_ssb", "grpo", ACCURACY, 1,
    ),
    Claim(
        "Table 3", "MPO hallucinates less than supervised fine-tuning", "12.1 to 8.7", "mpo", "sft", HALLUCINATION, -1,
    ),
    Claim(
        "Table 3", "MPO hallucinates less than DPO alone", "12.6 (a draft) to 8.7", "mpo", "dpo", HALLUCINATION, -1,
    ),
    Claim(
        "Table 3", "MPO is more accurate than supervised fine-tuning", "MMMU 71.6 to 73.2", "mpo", "sft", ACCURACY, 1,
    ),
    Claim(
        "Table 3", "GRPO after MPO is more accurate than MPO alone", "MMMU 73.2 to 73.6",
        "mpo_then_grpo", "mpo", ACCURACY, 1,
    ),
    Claim(
        "Table 3", "GRPO after MPO hallucinates somewhat more than MPO alone", "8.7 to 9.1",
        "mpo_then_grpo", "mpo", HALLUCINATION, 1,
    ),
    Claim(
        "Section 3", "Rewarding the answer alone hallucinates more than the hybrid reward", "no figure",
        "grpo_rule", "grpo", HALLUCINATION, 1,
    ),
    Claim(
        "Section 3", "The whole (MPO, GRPO, SSB, calibrated threshold) hallucinates less than GRPO on answers alone",
        "no figure", "default", "grpo_rule", HALLUCINATION, -1,
    ),
    Claim(
        "Section 3", "The whole is more accurate than GRPO on answers alone", "no figure",
        "default", "grpo_rule", ACCURACY, 1,
    ),
    Claim(
        "Section 3", "The whole is more accurate than GRPO with the hybrid reward", "no figure",
        "default", "grpo", ACCURACY, 1,
    ),
    Claim(
        "Section 3", "The same at the default's learning rate: it hallucinates less than GRPO on answers alone",
        "no figure", "default_slow", "grpo_rule_slow", HALLUCINATION, -1,
    ),
    Claim(
        "Section 3", "The same at the default's learning rate: it is more accurate than GRPO with the hybrid reward",
        "no figure", "default_slow", "grpo_slow", ACCURACY, 1,
    ),
    Claim(
        "Section 3", "Excessive reinforcement: a higher learning rate on answers alone hallucinates more", "no figure",
        "grpo_rule", "grpo_rule_slow", HALLUCINATION, 1,
    ),
    Claim(
        "Table 4", "GRPO: the adapter alone beats LLM and adapter", "MMMU 73.6 against 72.1",
        "grpo_adapter", "grpo_language", ACCURACY, 1,
    ),
    Claim(
        "Table 4", "GRPO: the adapter alone beats adapter and vision tower", "MMMU 73.6 against 72.3",
        "grpo_adapter", "grpo_vision", ACCURACY, 1,
    ),
    Claim(
        "Table 4", "MPO: the adapter alone beats LLM and adapter", "MMMU 73.6 against 72.1",
        "mpo_adapter", "mpo_language", ACCURACY, 1,
    ),
    Claim(
        "Thresholds", "A low threshold loses accuracy late in training, a high one does not",
        "τ = 10: MMMU 73.6 at step 750, 68.9 at 2,420", "mpo_low", "mpo_high", drop_from_best("eval/accuracy"), 1,
    ),
    Claim(
        "Thresholds", "A high threshold hallucinates less than a low one", "no figure",
        "mpo_high", "mpo_low", HALLUCINATION, -1,
    ),
)  # fmt: skip
