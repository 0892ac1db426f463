"""The hallucination monitors, by hand."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from skyrl.evaluation import monitors
from skyrl.evaluation.monitors import blind_metrics, build_monitors, claims, denials, gated
from skyrl.records import DataError, Prompt, RewardParts, Sample, SampleGroup
from skyrl.rewards import claims as hallucination
from skyrl.settings import Config, HallucinationConfig, ThresholdKind

PICTURE = np.zeros((4, 4, 3), dtype=np.uint8)


def sample(
    text: str = "<answer>1</answer>",
    rule: float | None = 1.0,
    model: float | None = None,
    claimed: tuple[int, int] = (0, 0),
) -> Sample:
    return Sample(
        index=0,
        token_ids=np.zeros(2, dtype=np.int32),
        logprobs=np.zeros(2, dtype=np.float32),
        text=text,
        truncated=False,
        policy_version=0,
        reward=None if rule is None else RewardParts(rule, 1.0, model, rule),
        claims=claimed[0],
        false_claims=claimed[1],
        error="the verifier was killed" if rule is None else None,
    )


def group(name: str, *samples: Sample, kind: str = "sum", picture: bool = True, facts: bool = True) -> SampleGroup:
    known = {"grid": [[1]]} if facts else {}
    prompt = Prompt(name, "?", (PICTURE,) if picture else (), "1", "numeric", kind, known)
    return SampleGroup(prompt, np.zeros(3, dtype=np.int32), list(samples), checkable=picture and facts)


def test_claims_overall_and_by_kind() -> None:
    found = claims(
        [
            group("e/0", sample(claimed=(4, 0)), kind="sum"),
            group("e/1", sample(claimed=(4, 2)), kind="sum"),
            group("e/2", sample(rule=None, claimed=(2, 2)), kind="max"),  # not scored, but it did say something
            group("e/3", sample(), kind="text", picture=False),  # facts without a picture, a picture without facts
            group("e/4", sample(), kind="photo", facts=False),
        ]
    )
    assert found == pytest.approx(
        {
            "eval/hallucination": 2 / 3,
            "eval/false_claim_share": 4 / 10,
            "eval/coverage": 1.0,
            "eval/hallucination/sum": 1 / 2,
            "eval/hallucination/max": 1.0,
        }
    )
    assert claims([group("e/3", sample(), picture=False), group("e/5")]) == {}
    silent = {"eval/hallucination": 0.0, "eval/coverage": 0.0, "eval/hallucination/sum": 0.0}
    assert claims([group("e/6", sample())]) == silent  # no claim is false: of none there is no share


def test_gate() -> None:
    groups = [
        group("e/0", sample(model=-1.0, claimed=(4, 1))),
        group("e/1", sample(model=-0.5, claimed=(4, 0))),
        group("e/2", sample(model=0.0, claimed=(4, 4))),  # at the gate is accepted
        group("e/3", sample(model=2.0, claimed=(4, 0)), sample(model=3.0)),
        group("e/4", sample(model=-9.0), picture=False),  # right and rejected, but nothing is known about it
        group("e/5", sample(rule=0.0, model=-9.0, claimed=(4, 4))),  # wrong, not scored, without a score: no part
        group("e/6", sample(rule=None, claimed=(4, 4))),
        group("e/7", sample(claimed=(4, 4))),
    ]
    assert gated(groups, 0.0) == pytest.approx(
        {
            "eval/gate_rejected": 3 / 6,
            "eval/gate_hallucination_rejected": 1 / 2,
            "eval/gate_hallucination_accepted": 1 / 3,
        }
    )
    everything = gated(groups, -math.inf)
    assert everything == pytest.approx({"eval/gate_rejected": 0.0, "eval/gate_hallucination_accepted": 2 / 5})
    assert gated(groups[4:5], 0.0) == {"eval/gate_rejected": 1.0}
    assert gated(groups[5:], 0.0) == {}


@pytest.mark.parametrize(
    ("text", "denies"),
    [
        ("I cannot see the image.", True),
        ("<think>Sadly I CAN'T view any Photo</think>", True),
        ("As no image was provided, I guess 4.", True),
        ("I am unable to access images", True),
        ("I see 31/41.", False),
        ("I can see the image.", False),
        ("The picture cannot be simplified", False),
    ],
)
def test_default_phrases(text: str, denies: bool) -> None:
    found = denials([group("e/0", sample(text))], HallucinationConfig().phrases)
    assert found == {"eval/denial": float(denies)}


def test_phrases_are_counted_once_an_answer_and_only_with_pictures() -> None:
    phrases = ["blind", "dark"]
    groups = [group("e/0", sample("Blind, it is dark."), sample("light")), group("e/1", sample("blind"), picture=False)]
    assert denials(groups, phrases) == {"eval/denial": 0.5}
    assert denials(groups[1:], phrases) == denials(groups, []) == {}


def answered(answer: str | None, rule: float | None) -> Sample:
    return replace(sample(rule=rule), answer=answer)


def asked_blind(name: str, *samples: Sample) -> SampleGroup:
    made = group(name, *samples, picture=False)
    return replace(made, prompt=replace(made.prompt, variant="blind"))


def test_blind() -> None:
    groups = [
        group("e/0", answered("red ball", 1.0)),
        group("e/1", answered("2", 1.0)),
        group("e/2", answered(None, 0.0)),
        group("e/3", answered("4", 1.0)),
        group("e/4", answered(" ", 0.0)),
        group("e/5", answered("7", 1.0)),  # not asked again: its accuracy doesn't count
        group("e/6", answered("12", 0.0)),
    ]
    blind = [
        asked_blind("e/4", answered("", 0.0)),
        asked_blind("e/0", answered(" Red  Ball", 1.0)),
        asked_blind("e/1", answered("3", 0.0)),
        asked_blind("e/2", answered(None, 0.0)),
        asked_blind("e/3", answered("4", None)),  # agrees, but could not be scored
        asked_blind("e/6", answered("1 2", 0.0)),
    ]
    assert blind_metrics(groups, blind) == pytest.approx(
        {
            "eval/blind_prompts": 6.0,
            "eval/blind_agreement": 2 / 6,
            "eval/blind_accuracy": 1 / 5,
            "eval/blind_accuracy_drop": 2 / 5 - 1 / 5,
        }
    )
    assert blind_metrics(groups, blind[4:5]) == {"eval/blind_prompts": 1.0, "eval/blind_agreement": 1.0}
    assert blind_metrics(groups, []) == {}


@pytest.mark.parametrize(
    ("blind", "message"),
    [
        (group("e/0", sample()), "'e/0' of variant ''"),
        (asked_blind("e/9", sample()), "'e/9' of variant 'blind'"),
        (asked_blind("e/0"), "'e/0': 0 samples"),
    ],
)
def test_blind_without_counterpart(blind: SampleGroup, message: str) -> None:
    with pytest.raises(DataError, match=message):
        blind_metrics([group("e/0", sample())], [blind])


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict]:
    own = dict(monitors.MONITORS)
    monkeypatch.setattr(monitors, "MONITORS", own)
    yield own


def names(found: list[monitors.Monitor]) -> list[str]:
    scored = [group("e/0", sample("no image provided", model=0.5, claimed=(4, 1)))]
    return [name for monitor in found for name in monitor(scored)]


def test_built_from_the_settings(registry: dict) -> None:
    scored = [group("e/0", sample("dark", model=0.5))]
    cfg = Config(hallucination=HallucinationConfig(gate_score=1.0, phrases=["dark"]))
    cfg.algorithm.gate.value = 0.5

    def merged() -> dict[str, float]:
        return {name: value for monitor in build_monitors(cfg) for name, value in monitor(scored).items()}

    assert (merged()["eval/gate_rejected"], merged()["eval/denial"]) == (1.0, 1.0)
    cfg.algorithm.gate.kind = ThresholdKind.quantile  # its value is only where it starts
    assert merged()["eval/gate_rejected"] == 1.0
    cfg.algorithm.gate.kind = ThresholdKind.fixed
    assert merged()["eval/gate_rejected"] == 0.0  # the gate's own threshold


def test_own_monitors(registry: dict) -> None:
    cfg = Config(hallucination=HallucinationConfig(gate_score=0.5))
    monitors.register_monitor("mine", lambda cfg, gate: lambda groups: {"eval/own/mine": len(groups) + gate})
    (own,) = [m for m in build_monitors(cfg) if "eval/own/mine" in m([])]
    assert own([]) == {"eval/own/mine": 0.5}
    assert "eval/hallucination" in names(build_monitors(cfg))
    monitors.register_monitor("claims", lambda cfg, gate: lambda groups: {})
    assert "eval/hallucination" not in names(build_monitors(cfg))


def test_the_example_of_the_documentation_runs(registry: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hallucination, "CHECKERS", dict(hallucination.CHECKERS))
    text = (Path(__file__).parents[2] / "docs" / "hallucination.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    exec(compile(block, "docs/hallucination.md", "exec"), {})
    found = hallucination.check_claims("A red and a Blue ball", {"colours": ["red"]})
    assert [(claim.text, claim.true) for claim in found] == [("red", True), ("Blue", False)]
    groups = [group("e/0", sample("red"), sample("a long, long answer about colours"))]
    assert [m(groups) for m in build_monitors(Config())][-1] == {"eval/own/short": 0.5}
