"""Whole groups through the scorer, with hand-worked rewards and advantages."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from skyrl.records import DataError, Prompt, Sample, SampleGroup, SkyrlError
from skyrl.rewards.scorer import RewardScorer, refuse_all_failed, reward_metrics
from skyrl.settings import RewardConfig, Squash, Std

PICTURE = np.zeros((4, 4, 3), dtype=np.uint8)
PLAIN = RewardConfig(model_weight=1.0, format_weight=0.1, squash=Squash.none, verifier_timeout=0.5)
RIGHT = "<think>I see 31/41.</think><answer>9</answer>"
WRONG = "<think>I see 38/41.</think><answer>16</answer>"
BARE = "<answer>9</answer>"
CUT = "<think>I see 31/4"


def group(*texts: str, picture: bool = True, **changes: Any) -> SampleGroup:
    fields: dict[str, Any] = {
        "id": "train/17",
        "question": "What is the sum of the digits?",
        "images": (PICTURE,) if picture else (),
        "answer": "9",
        "verifier": "numeric",
        "facts": {"grid": [[3, 1], [4, 1]]} if picture else {},
    }
    prompt = Prompt(**(fields | changes))
    samples = []
    for index, text in enumerate(texts):
        ids, logprobs = np.zeros(4 + index, dtype=np.int32), np.zeros(4 + index, dtype=np.float32)
        ids.flags.writeable = logprobs.flags.writeable = False  # as they come out of Ray's shared memory
        samples.append(Sample(index, ids, logprobs, text, truncated=text == CUT, policy_version=0))
    return SampleGroup(prompt, np.zeros(3, dtype=np.int32), samples)


class FixedModel:
    """A reward model that returns what it was given."""

    def __init__(self, *scores: list[float]) -> None:
        self.scores = [np.array(part, dtype=np.float32) for part in scores]
        for part in self.scores:
            part.flags.writeable = False

    def score(self, groups: list[SampleGroup]) -> list[np.ndarray]:
        return self.scores


@pytest.fixture(scope="module")
def rules() -> Iterator[RewardScorer]:
    scorer = RewardScorer(PLAIN, Std.population, None)
    yield scorer
    scorer.close()


def column(scored: SampleGroup, name: str) -> list[float]:
    return [getattr(sample, name) for sample in scored.samples]


def part(scored: SampleGroup, name: str) -> list[float]:
    return [getattr(sample.reward, name) for sample in scored.samples]


def test_rule_and_form(rules: RewardScorer) -> None:
    groups = [group(RIGHT, WRONG, BARE, CUT)]
    assert rules.score(groups) is groups
    assert part(groups[0], "rule") == [1.0, 0.0, 1.0, 0.0]
    assert part(groups[0], "format") == [1.0, 1.0, 0.0, 0.0]
    assert part(groups[0], "total") == [1.1, 0.1, 1.0, 0.0]
    assert all(math.isnan(score) for score in part(groups[0], "model"))
    assert column(groups[0], "error") == [None] * 4
    # rule: mean 1/2, std 1/2.  total: mean 0.55, deviations ±0.55, ±0.45, std sqrt((0.3025 + 0.2025) / 2) = 0.502494
    assert column(groups[0], "rule_advantage") == [1.0, -1.0, 1.0, -1.0]
    np.testing.assert_allclose(column(groups[0], "advantage"), [1.094540, -0.895533, 0.895533, -1.094540], atol=1e-6)
    assert [sample.effective for sample in groups[0].samples] == [True] * 4


def test_claims_are_checked(rules: RewardScorer) -> None:
    (scored,) = rules.score([group(RIGHT, WRONG, BARE, CUT)])
    assert column(scored, "claims") == [4, 4, 0, 3]
    assert column(scored, "false_claims") == [0, 1, 0, 0]


@pytest.mark.parametrize("changes", [{"images": ()}, {"facts": {}}, {"facts": {"colour": "red"}}])
def test_without_picture_or_facts_with_a_checker_nothing_is_known(rules: RewardScorer, changes: dict) -> None:
    (scored,) = rules.score([group(RIGHT, WRONG, **changes)])
    assert column(scored, "claims") == [0, 0] and not scored.checkable
    rates = reward_metrics([scored])
    assert math.isnan(rates["hallucination/rate"]) and math.isnan(rates["hallucination/coverage"])
    (scored,) = rules.score([group(RIGHT, WRONG, facts={"grid": [[3, 1], [4, 1]], "colour": "red"})])
    assert scored.checkable and reward_metrics([scored])["hallucination/coverage"] == 1.0


def test_answers_that_can_never_be_scored_end_the_run(rules: RewardScorer) -> None:
    failed = rules.score([group(RIGHT, answer="nine"), group(BARE, answer="ten")])
    with pytest.raises(SkyrlError, match=r"^step 3: none of the 2 answers could be scored; the first: .*'nine'"):
        refuse_all_failed(failed, "step 3")
    refuse_all_failed([], "step 3")
    refuse_all_failed([*failed, *rules.score([group(RIGHT)])], "step 3")


def test_verifiers_are_checked_before_they_are_needed(rules: RewardScorer) -> None:
    rules.check_verifiers(["numeric", "math", "hostile_verifiers:right", "numeric"])
    with pytest.raises(DataError, match=r"verifier 'no_such_module:f'.*No module named 'no_such_module'"):
        rules.check_verifiers(["numeric", "no_such_module:f"])
    with pytest.raises(DataError, match=r"verifier 'hostile_verifiers:absent'.*can't be imported"):
        rules.check_verifiers(["hostile_verifiers:absent"])
    with pytest.raises(DataError, match=r"unknown verifier 'nonesuch'"):
        rules.check_verifiers(["nonesuch"])


def test_reward_model_decides_the_total_but_not_the_effective_samples() -> None:
    scorer = RewardScorer(PLAIN, Std.none, FixedModel([3.0, 1.0], [0.5, -0.5]))
    first, second = scorer.score([group(RIGHT, RIGHT), group(WRONG, RIGHT)])
    assert part(first, "model") == [3.0, 1.0]
    assert part(first, "total") == pytest.approx([4.1, 2.1])
    assert column(first, "advantage") == pytest.approx([1.0, -1.0])
    assert column(first, "rule_advantage") == [0.0, 0.0]
    assert not any(sample.effective for sample in first.samples)
    assert part(second, "total") == pytest.approx([0.6, 0.6])
    assert column(second, "advantage") == [0.0, 0.0]
    assert column(second, "rule_advantage") == [-0.5, 0.5]


def test_sample_with_error_takes_no_part() -> None:
    scorer = RewardScorer(PLAIN, Std.none, FixedModel([0.0, math.nan, 0.0]))
    (scored,) = scorer.score([group(RIGHT, RIGHT, WRONG)])
    assert scored.samples[1].reward is None
    assert "train/17" in str(scored.samples[1].error) and "sample 1" in str(scored.samples[1].error)
    # Mean of 1 and 0, not of 1, 1 and 0.
    assert column(scored, "rule_advantage") == [0.5, 0.0, -0.5]
    assert column(scored, "advantage") == pytest.approx([0.5, 0.0, -0.5])


def test_verifier_that_crashes_is_an_error_not_a_zero(rules: RewardScorer) -> None:
    (scored,) = rules.score([group(RIGHT, CUT, CUT, verifier="hostile_verifiers:crash")])
    assert scored.samples[0].reward is None and "exit status 3" in str(scored.samples[0].error)
    assert part(SampleGroup(scored.prompt, scored.prompt_ids, scored.samples[1:]), "rule") == [0.0, 0.0]
    assert reward_metrics([scored])["reward/errors"] == 1.0


@pytest.mark.parametrize("scores", [[math.nan, 0.0], [math.nan, math.nan]])
def test_fewer_than_two_scored_samples_have_no_advantage(scores: list[float]) -> None:
    (scored,) = RewardScorer(PLAIN, Std.sample, FixedModel(scores)).score([group(RIGHT, WRONG)])
    assert column(scored, "advantage") == column(scored, "rule_advantage") == [0.0, 0.0]
    assert [sample.reward is None for sample in scored.samples] == [math.isnan(score) for score in scores]


def test_group_of_one(rules: RewardScorer) -> None:
    (scored,) = rules.score([group(RIGHT)])
    assert part(scored, "rule") == [1.0]
    assert (scored.samples[0].advantage, scored.samples[0].error) == (0.0, None)


def test_scoring_again_forgets_the_first_time(rules: RewardScorer) -> None:
    scored = RewardScorer(PLAIN, Std.population, FixedModel([math.nan, 1.0])).score([group(RIGHT, WRONG)])
    (again,) = rules.score(scored)
    assert column(again, "error") == [None, None]
    assert column(again, "rule_advantage") == [1.0, -1.0]


def test_mistakes_of_the_data_set_or_the_model_name_it(rules: RewardScorer) -> None:
    with pytest.raises(DataError, match=r"train/17.*'nope'"):
        rules.score([group(RIGHT, verifier="nope")])
    with pytest.raises(DataError, match=r"train/17.*grid"):
        rules.score([group(RIGHT, facts={"grid": 7})])
    with pytest.raises(DataError, match="shapes"):
        RewardScorer(PLAIN, Std.none, FixedModel([1.0])).score([group(RIGHT, WRONG)])


def test_metrics() -> None:
    scorer = RewardScorer(PLAIN, Std.population, FixedModel([1.0, 0.0, 0.0, math.nan], [2.0, 1.0]))
    metrics = reward_metrics(scorer.score([group(RIGHT, WRONG, CUT, BARE), group(BARE, WRONG, picture=False)]))
    # Valid: rule 1, 0, 0 and 1, 0; format 1, 1, 0 and 0, 1; model 1, 0, 0 and 2, 1; total adds them up.
    assert metrics == pytest.approx(
        {
            "reward/rule": 0.4,
            "reward/accuracy": 0.4,
            "reward/format": 0.6,
            "reward/model": 0.8,
            "reward/total": 0.4 + 0.06 + 0.8,
            "reward/errors": 1.0,
            "response/length_mean": (4 + 5 + 6 + 7 + 4 + 5) / 6,
            "response/truncated_share": 1 / 6,
            "response/repetition": (0 + 1 / 2 + 2 / 3 + 3 / 4 + 0 + 1 / 2) / 6,  # 4-grams of equal tokens: 1, 2, 3 …
            "hallucination/rate": 1 / 4,
            "hallucination/false_claim_share": 1 / 11,
            "hallucination/coverage": 3 / 4,
        }
    )


def test_metrics_over_nothing(rules: RewardScorer) -> None:
    metrics = reward_metrics([], prefix="eval/")
    assert metrics["eval/errors"] == 0.0 and math.isnan(metrics["eval/total"])
    text_only = reward_metrics(rules.score([group(BARE, WRONG, picture=False)]))
    assert math.isnan(text_only["hallucination/rate"]) and math.isnan(text_only["reward/model"])
