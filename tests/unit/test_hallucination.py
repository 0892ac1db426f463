"""Claims about digit scenes, checked against the known digits."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from skyrl.records import DataError, Prompt, Sample, SampleGroup
from skyrl.rewards import claims as hallucination
from skyrl.rewards.claims import Claim, check_claims, register_checker
from skyrl.rewards.metrics import claim_metrics

FACTS = {"grid": [[3, 1], [4, 1]]}


def verdicts(text: str, facts: dict = FACTS) -> str:
    return "".join(claim.text + ("+" if claim.true else "-") for claim in check_claims(text, facts))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>I see 31/41. 3+1=4, 4+4=8, 8+1=9.</think><answer>9</answer>", "3+1+4+1+"),
        ("<think>I see 37/41. 3+7=10.</think>", "3+7-4+1+"),
        ("I see 13/41.", "1-3-4+1+"),
        ("I see 314/1.", "3+1+4-1-"),  # no third column; 1 isn't the digit at row 2, column 1
        ("I see 31/41/1.", "3+1+4+1+1-"),  # no third row
        ("I see 31//41.", "3+1+4-1-"),  # an empty second row shifts the rest to a row that isn't there
        ("I see 31", "3+1+"),  # cut off: only what is said is claimed
        ("I see 31/41. No, I see 38/41.", "3+1+4+1+3+8-4+1+"),
        ("I see ٣١/٤١.", ""),  # digits of another script are no claims, and crash nothing
        ("3+1=4</think><answer>9</answer>", ""),
        ("AI see 31/41.", ""),
        ("", ""),
    ],
)
def test_grid_claims(text: str, expected: str) -> None:
    assert verdicts(text) == expected


def test_spans_point_into_the_text() -> None:
    text = "<think>I see 37/41.</think>"
    claims = check_claims(text, FACTS)
    assert claims[1] == Claim(start=14, end=15, text="7", true=False)
    assert all(text[claim.start : claim.end] == claim.text for claim in claims)


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=4), min_size=1, max_size=4))
def test_faithful_reading_is_all_true_and_one_changed_digit_is_one_false_claim(grid: list[list[int]]) -> None:
    reading = "I see " + "/".join("".join(map(str, row)) for row in grid) + "."
    claims = check_claims(reading, {"grid": grid})
    assert [claim.true for claim in claims] == [True] * sum(map(len, grid))
    changed = [list(row) for row in grid]
    changed[-1][-1] = (changed[-1][-1] + 1) % 10
    assert [claim.true for claim in check_claims(reading, {"grid": changed})].count(False) == 1


def test_no_facts_or_unknown_facts() -> None:
    assert check_claims("I see 31/41.", {}) == []
    assert check_claims("I see 31/41.", {"weather": "rain"}) == []
    assert verdicts("I see 31/41.", {"weather": "rain", **FACTS}) == "3+1+4+1+"


def test_own_checker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hallucination, "CHECKERS", dict(hallucination.CHECKERS))
    register_checker("weather", lambda text, fact: [Claim(0, 3, text[:3], text[:3] == fact)])
    assert verdicts("sun. I see 31/41.", {**FACTS, "weather": "sun"}) == "sun+3+1+4+1+"


def test_a_checker_is_imported_when_its_fact_is_met_and_not_before(monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import sys; from skyrl.rewards.claims import check_claims; check_claims('I see 3', {'other': 1});"
        "early = 'skyrl.digits.claims' in sys.modules; found = check_claims('I see 3', {'grid': [[3]]});"
        "print(early, 'skyrl.digits.claims' in sys.modules, found[0].true)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True", "True"]
    monkeypatch.setattr(hallucination, "CHECKERS", dict(hallucination.CHECKERS))
    register_checker("digits", "skyrl.digits.claims:check_grid")
    assert verdicts("I see 37.", {"digits": [[3, 1]]}) == "3+7-"


@pytest.mark.parametrize("grid", [7, [7], [["a"]], [[12]], None])
def test_malformed_fact(grid: object) -> None:
    with pytest.raises(DataError, match="grid"):
        check_claims("I see 31/41.", {"grid": grid})


def claimed(counts: list[tuple[int, int]]) -> dict[str, float]:
    """Metrics of answers with these numbers of claims and false claims."""
    nothing = np.zeros(0, dtype=np.int32)
    samples = [Sample(0, nothing, None, "", False, 0, claims=claims, false_claims=false) for claims, false in counts]
    prompt = Prompt("p", "?", (), "", "exact")
    return claim_metrics([SampleGroup(prompt, nothing, samples, checkable=True)], "rate", "x/")


def test_rates() -> None:
    # 10 claims with 3 false ones; 2 of 4 answers have a false claim; 3 of 4 claim anything.
    rates = claimed([(4, 0), (4, 1), (2, 2), (0, 0)])
    assert rates == {"x/false_claim_share": 0.3, "rate": 0.5, "x/coverage": 0.75}


def test_rates_over_nothing() -> None:
    assert claimed([]) == {}
    assert claimed([(0, 0), (0, 0)]) == {"rate": 0.0, "x/coverage": 0.0}
