"""The numbers of one evaluation, by hand."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from skyrl.data.pictures import mask_picture
from skyrl.evaluation.monitors import build_monitors
from skyrl.evaluation.picture_drop import masked_group, picture_drop
from skyrl.evaluation.summary import evaluate, evaluation_metrics, remarks
from skyrl.monitoring.metrics import check_names
from skyrl.records import DataError, Prompt, RewardParts, Sample, SampleGroup, SkyrlError
from skyrl.rewards.answers import AnswerForm
from skyrl.settings import AnswerConfig, Config, EvaluationConfig, HallucinationConfig

PICTURE = np.zeros((4, 4, 3), dtype=np.uint8)
MONITORS = build_monitors(Config())


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
        answer="1",
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
            "eval/scored": 4,
            "eval/format": 3 / 4,
            "eval/format_of_right": 1 / 2,
            "eval/answer_share": 1.0,
            "eval/reward_model": (2 - 1 + 2 + 1) / 4,
            "eval/reward_model_std": 1.5**0.5,
            "eval/reward_model_largest": 2.0,
            "eval/model_agreement": 1.0,  # of 2 and 2 against -1 and 1
            "eval/model_agreement_sd": (4 * 5 / 12) ** 0.5 / 4,
            "eval/reward_model_median": (1 + 2) / 2,
            "eval/reward_model_iqr": 2 - 0.5,  # a quarter of -1, 1, 2, 2 lies below (-1 + 3 · 1) / 4
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
    assert not [name for name in metrics if "hallucination" in name or "claim" in name or "coverage" in name]


def test_when_nothing_could_be_scored_there_is_no_accuracy() -> None:
    metrics = evaluation_metrics([group("e/0", "sum", None)], MONITORS)
    assert metrics["eval/errors"] == 1
    assert not [name for name in metrics if name.startswith("eval/accuracy")]


def rewarder(gallery: int) -> Any:
    return SimpleNamespace(cfg=Config(evaluation=EvaluationConfig(gallery=gallery)))


def test_the_gallery_is_chosen_once_and_gets_its_other_side_later() -> None:
    before = [group("e/0", "sum", 1.0), group("e/1", "sum", 0.0), group("e/2", "sum", 0.0, seen="7")]
    metrics, gallery = evaluate(rewarder(2), None, 2, before[:1], before[1:])
    assert metrics["eval/accuracy"] == pytest.approx(1 / 3)
    # Half of the places go to the first prompts, half to the next ones with a false claim: e/1 sees rightly.
    assert [entry["id"] for entry in gallery] == ["e/0", "e/2"]
    assert [(entry["before"]["right"], entry["after"]) for entry in gallery] == [(True, None), (False, None)]
    after = [group("e/0", "sum", 0.0), group("e/1", "sum", 0.0), group("e/2", "sum", 1.0)]
    metrics, filled = evaluate(rewarder(2), gallery, 1, after)
    assert metrics["eval/accuracy"] == pytest.approx(1 / 3)
    assert [(e["id"], e["before"]["right"], e["after"]["right"]) for e in filled] == [
        ("e/0", True, False),
        ("e/2", False, True),
    ]


def blind(name: str, rule: float) -> SampleGroup:
    made = group(name, "sum", rule, pictured=False)
    return replace(made, prompt=replace(made.prompt, variant="blind"))


def test_answers_are_compared_with_what_was_said_without_the_picture() -> None:
    seen = [group("e/0", "sum", 1.0), group("e/1", "sum", 1.0), group("e/2", "sum", 1.0)]
    metrics, _ = evaluate(rewarder(0), None, 2, seen[:2], seen[2:], [blind("e/0", 0.0)], [], [blind("e/2", 1.0)])
    assert {name: value for name, value in metrics.items() if "blind" in name} == {
        "eval/blind_prompts": 2.0,
        "eval/blind_agreement": 1.0,
        "eval/blind_accuracy": 0.5,
        "eval/blind_accuracy_drop": 0.5,
    }
    assert metrics["eval/accuracy"] == 1.0  # of those with the picture alone
    check_names(metrics)
    assert not [name for name in evaluate(rewarder(0), None, 1, seen)[0] if "blind" in name]


def test_remarks_on_the_first_evaluation() -> None:
    reads = SimpleNamespace(read_answers=lambda groups: True)
    asked = SimpleNamespace(cfg=Config(), form=AnswerForm(AnswerConfig(at="boxed")), checks=reads)
    right, wrong, failed = group("e/0", "sum", 1.0, model=1), group("e/1", "sum", 0.0), group("e/2", "sum", None)
    assert remarks(asked, [right, wrong]) == remarks(asked, []) == []
    (failure,) = remarks(asked, [right], [failed, wrong])
    assert failure.startswith("first evaluation: answers that could not be scored: 1 of 3 by numeric. ")
    assert failure.endswith("The first of each: the verifier was killed")
    for one in (right, wrong):
        one.samples[0].answer = None
    wrong.samples[0].text = "a" * 1000 + "b" * 1000
    (silence,) = remarks(asked, [wrong])
    assert r"looked for the content of the last \boxed{…} behind </think> (reward.answer.at=" in silence
    assert silence.endswith("The first text: '" + "a" * 150 + " … " + "b" * 150 + "'")
    reads.read_answers = lambda groups: False  # all that judges here is given the whole text
    assert remarks(asked, [wrong]) == []


def test_an_evaluation_of_which_nothing_could_be_scored_ends_the_run() -> None:
    with pytest.raises(SkyrlError, match=r"^evaluation: none of the 2 answers could be scored"):
        evaluate(rewarder(2), None, 1, [group("e/0", "sum", None), group("e/1", "sum", None)], [blind("e/0", 1.0)])


class Learner:
    """Log-probabilities by hand: -1 a token, and for a blackened picture less by its share of black and the row."""

    def __init__(self, probe_prompts: int, mask_share: float = 0.6) -> None:
        settings = HallucinationConfig(probe_prompts=probe_prompts, mask_share=mask_share, mask_patch=2)
        self.cfg = Config(hallucination=settings)
        self.asked: list[list[SampleGroup]] = []

    def logprobs(self, groups: list[SampleGroup]) -> list[np.ndarray]:
        self.asked.append(groups)
        return [
            np.arange(len(sample.token_ids), dtype=np.float32) - float(group.prompt.variant == "masked") * place
            for place, group in enumerate(groups, start=1)
            for sample in group.samples
        ]


def test_picture_drop_by_hand() -> None:
    white = np.full((4, 6, 3), 255, dtype=np.uint8)
    groups = [group(f"e/{i}", "sum", 1.0, tokens=i + 1) for i in range(4)]
    groups = [replace(one, prompt=replace(one.prompt, images=(white, PICTURE))) for one in groups]
    groups.insert(1, group("e/text", "sum", 1.0, pictured=False))
    learner: Any = Learner(probe_prompts=3)
    # One drop for each of 1 token, 2 for each of 2, 3 for each of 3; the fourth picture is one too many.
    found = picture_drop(learner, groups[:2], [], groups[2:])
    assert found == {"eval/picture_drop": pytest.approx((1 * 1 + 2 * 2 + 3 * 3) / 6)}
    true, masked = learner.asked
    assert [g.prompt.key for g in true] == [("e/0", ""), ("e/1", ""), ("e/2", "")]
    assert [g.prompt.key for g in masked] == [("e/0", "masked"), ("e/1", "masked"), ("e/2", "masked")]
    for a, b in zip(true, masked, strict=True):
        assert b.samples is a.samples and b.prompt_ids is a.prompt_ids
        # The same patches as ever: seeded by the id of the data set and the picture's place.
        want = [mask_picture(image, f"{a.prompt.id}/{place}", 0.6, 2) for place, image in enumerate(a.prompt.images)]
        assert all((x == y).all() for x, y in zip(b.prompt.images, want, strict=True))
    assert picture_drop(learner, [groups[1]]) == picture_drop(learner) == {}


def test_masking_leaves_the_group_itself_alone() -> None:
    white = np.full((4, 6, 3), 255, dtype=np.uint8)
    one = group("e/0", "sum", 1.0)
    one = replace(one, prompt=replace(one.prompt, images=(white,)))
    black = masked_group(one, HallucinationConfig(mask_share=1.0, mask_patch=2))
    assert not black.prompt.images[0].any() and one.prompt.images[0].all() and one.prompt.variant == ""


def test_monitors_may_not_speak_over_each_other() -> None:
    with pytest.raises(DataError, match="eval/accuracy once more"):
        evaluation_metrics([group("e/0", "sum", 1.0)], [lambda groups: {"eval/accuracy": 1.0}])
