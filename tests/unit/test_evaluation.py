"""The numbers of one evaluation, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from skyrl.evaluation.monitors import build_monitors
from skyrl.evaluation.summary import evaluation_metrics, summarise
from skyrl.monitoring.metrics import check_names
from skyrl.records import DataError, Prompt, RewardParts, Sample, SampleGroup
from skyrl.settings import HallucinationConfig

PICTURE = np.zeros((4, 4, 3), dtype=np.uint8)
MONITORS = build_monitors(HallucinationConfig(), None)


def group(
    name: str,
    kind: str,
    rule: float | None,
    *,
    claims: tuple[int, int] = (0, 0),
    pictured: bool = True,
    tokens: int = 2,
    truncated: bool = False,
    well_formed: float = 1.0,
    model: float = 0.0,
    seen: str = "1",
) -> SampleGroup:
    """A group of one greedy sample; ``rule`` None means that it could not be scored."""
    images, facts = ((PICTURE,), {"grid": [[1]]}) if pictured else ((), {})
    sample = Sample(
        index=0,
        token_ids=np.zeros(tokens, dtype=np.int32),
        logprobs=np.zeros(tokens, dtype=np.float32),
        text=f"<think>I see {seen}.</think><answer>1</answer>",
        truncated=truncated,
        policy_version=0,
        reward=None if rule is None else RewardParts(rule, well_formed, model, rule),
        claims=claims[0],
        false_claims=claims[1],
        error="the verifier was killed" if rule is None else None,
    )
    prompt = Prompt(name, "?", images, "1", "numeric", kind, facts)
    return SampleGroup(prompt, np.zeros(3, np.int32), [sample], checkable=pictured)


def groups() -> list[SampleGroup]:
    return [
        group("e/0", "sum", 1.0, claims=(4, 0), model=2.0),
        group("e/1", "sum", 0.0, claims=(4, 3), tokens=6, model=-1.0),
        group("e/2", "sum", None, claims=(2, 1), tokens=4),
        group("e/3", "max", 1.0, claims=(0, 0), truncated=True, tokens=8, well_formed=0.0, model=2.0),
        group("e/4", "text_arithmetic", 0.0, pictured=False, tokens=5, model=1.0),
        group("e/5", "min", None, claims=(4, 0), tokens=5),
    ]


def test_every_number_by_hand() -> None:
    metrics = evaluation_metrics(groups(), MONITORS)
    assert metrics == pytest.approx(
        {
            "eval/accuracy": 2 / 4,  # of the four that were scored
            "eval/format": 3 / 4,
            "eval/reward_model": (2 - 1 + 2 + 1) / 4,
            "eval/errors": 2,
            "eval/length_mean": (2 + 6 + 4 + 8 + 5 + 5) / 6,  # of all
            "eval/truncated_share": 1 / 6,
            "eval/repetition": (0 + 2 / 3 + 0 + 4 / 5 + 1 / 2 + 1 / 2) / 6,  # all tokens are the same
            "eval/hallucination": 2 / 5,  # of the five with a picture; the failed ones did say something too
            "eval/false_claim_share": 4 / 14,
            "eval/coverage": 4 / 5,
            "eval/accuracy/sum": 1 / 2,
            "eval/accuracy/max": 1.0,
            "eval/accuracy/text_arithmetic": 0.0,
            "eval/hallucination/sum": 2 / 3,
            "eval/hallucination/max": 0.0,
            "eval/hallucination/min": 0.0,  # accuracy is unknown, but it did say something
            "eval/gate_rejected": 0.0,  # of e/0 and e/3, both right and scored 2
            "eval/gate_hallucination_accepted": 0.0,
            "eval/denial": 0.0,
        }
    )
    check_names(metrics)


def test_without_pictures_nothing_is_said_about_hallucination() -> None:
    metrics = evaluation_metrics([group("e/0", "text_arithmetic", 1.0, pictured=False)], MONITORS)
    assert metrics["eval/accuracy"] == 1.0
    assert all(math.isnan(metrics[f"eval/{name}"]) for name in ("hallucination", "false_claim_share", "coverage"))


def test_when_nothing_could_be_scored_there_is_no_accuracy() -> None:
    metrics = evaluation_metrics([group("e/0", "sum", None)], MONITORS)
    assert math.isnan(metrics["eval/accuracy"])
    assert metrics["eval/errors"] == 1
    assert not [name for name in metrics if name.startswith("eval/accuracy/")]


def test_summarise_chooses_a_gallery_once_and_fills_in_its_other_side_later() -> None:
    before = [group("e/0", "sum", 1.0), group("e/1", "sum", 0.0), group("e/2", "sum", 0.0, seen="7")]
    metrics, gallery = summarise(before, [], None, 2, MONITORS)
    assert metrics["eval/accuracy"] == pytest.approx(1 / 3)
    # Half of the places go to the first prompts, half to the next ones with a false claim: e/1 sees rightly.
    assert [entry["id"] for entry in gallery] == ["e/0", "e/2"]
    assert [(entry["before"]["correct"], entry["after"]) for entry in gallery] == [(True, None), (False, None)]
    after = [group("e/0", "sum", 0.0), group("e/1", "sum", 0.0), group("e/2", "sum", 1.0)]
    metrics, filled = summarise(after, [], gallery, 2, MONITORS)
    assert metrics["eval/accuracy"] == pytest.approx(1 / 3)
    assert [(e["id"], e["before"]["correct"], e["after"]["correct"]) for e in filled] == [
        ("e/0", True, False),
        ("e/2", False, True),
    ]


def test_summarise_compares_with_what_was_said_without_the_picture() -> None:
    seen = [group("e/0", "sum", 1.0), group("e/1", "sum", 1.0), group("e/2", "sum", 1.0)]
    blind = [group("e/0#blind", "sum", 0.0, pictured=False), group("e/2#blind", "sum", 1.0, pictured=False)]
    metrics, _ = summarise(seen, blind, None, 0, [])
    assert {name: value for name, value in metrics.items() if "blind" in name} == {
        "eval/blind_prompts": 2.0,
        "eval/blind_agreement": 1.0,
        "eval/blind_accuracy": 0.5,
        "eval/blind_accuracy_drop": 0.5,
    }
    assert metrics["eval/accuracy"] == 1.0  # of those with the picture alone
    assert not [name for name in summarise(seen, [], None, 0, MONITORS)[0] if "blind" in name]


def test_monitors_may_not_speak_over_each_other() -> None:
    with pytest.raises(DataError, match="eval/accuracy once more"):
        evaluation_metrics([group("e/0", "sum", 1.0)], [lambda groups: {"eval/accuracy": 1.0}])
