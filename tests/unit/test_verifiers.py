"""The rule verifiers."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skyrl.records import DataError
from skyrl.rewards.verifiers.choice import choice_verifier
from skyrl.rewards.verifiers.exact import exact_verifier
from skyrl.rewards.verifiers.numeric import numeric_verifier, parse_number

# ---------------------------------------------------------------- exact


def test_exact() -> None:
    assert exact_verifier("  A\n red  Cat ", "a Red cat") == 1.0
    assert exact_verifier("red cat", "redcat") == 0.0
    assert exact_verifier("", "cat") == 0.0
    with pytest.raises(DataError, match="empty"):
        exact_verifier("", " ")


# ---------------------------------------------------------------- numeric


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("9", Fraction(9)),
        (" -1,234.5 ", Fraction(-2469, 2)),
        ("+.5", Fraction(1, 2)),
        ("9.", Fraction(9)),
        ("2e3", Fraction(2000)),
        ("1.5E-1", Fraction(3, 20)),
        ("3/4", Fraction(3, 4)),
        ("-3 / 4", Fraction(-3, 4)),
        ("12%", Fraction(3, 25)),
        ("12.5 %.", Fraction(1, 8)),
        ("$1,000,000", Fraction(1_000_000)),
        ("$9$", Fraction(9)),
        ("−7", Fraction(-7)),
    ],
)
def test_parse_number(text: str, value: Fraction) -> None:
    assert parse_number(text) == value


NO_NUMBERS = [
    *("", " ", "-", ".", "/", "%", "e5", "nan", "inf", "-Infinity", "1/0", "1/0.0", "1/2/3", "--1", "1 2", "12,34"),
    *("1,2345", "1_000", "0x10", "9 or 8", "9**9**9**9", "9e9999", "1e+99999999999", "٩", "²", "Ⅸ", "1+1"),
    *(
        "__import__('os').system('exit 1')",
        "9" * 201,
        "1" * 1_000_000,
        "1," * 500_000,
        "$" * 1_000_000,
        "1e999/1e999e9",
    ),
]


@pytest.mark.parametrize("text", NO_NUMBERS, ids=lambda text: text[:20])
def test_everything_else_is_no_number_and_fast(text: str) -> None:
    start = time.perf_counter()
    assert numeric_verifier(text, "9") == 0.0
    assert time.perf_counter() - start < 0.5
    with pytest.raises(DataError, match="not a number"):
        numeric_verifier("9", text)


@given(st.text(alphabet="0123456789+-.,eE/%$ ٩naif", max_size=120))
def test_hostile_numbers_neither_crash_nor_leave_the_range(text: str) -> None:
    assert numeric_verifier(text, "9") in (0.0, 1.0)


@given(st.integers(-(10**12), 10**12), st.integers(0, 6))
def test_every_way_to_write_a_number_is_right(units: int, places: int) -> None:
    value = Fraction(units, 10**places)
    for text in (f"{units}/{10**places}", f"{units}e-{places}", f"{units:,}e-{places}", f"{units * 100}e-{places}%"):
        assert parse_number(text) == value


def test_tolerance() -> None:
    assert numeric_verifier("0.333333", "1/3", tolerance=1e-5) == 1.0
    assert numeric_verifier("0.333333", "1/3", tolerance=1e-6) == 1.0
    assert numeric_verifier("0.333", "1/3", tolerance=1e-6) == 0.0
    # 0.01 of 1000 is 10, inclusive; it is relative for small numbers too, and nothing but 0 is 0.
    assert [numeric_verifier(text, "1000", 0.01) for text in ("1009", "1010", "1011", "991")] == [1.0, 1.0, 0.0, 1.0]
    assert [numeric_verifier(text, "0.001", 0.01) for text in ("0.00101", "0.00102", "0.01")] == [1.0, 0.0, 0.0]
    assert [numeric_verifier(text, "0", 0.01) for text in ("0.0", "1e-30")] == [1.0, 0.0]
    assert numeric_verifier("0", "6.63e-34") == 0.0
    assert numeric_verifier("10000000000000001", "10000000000000002", tolerance=0) == 0.0


# ---------------------------------------------------------------- choice


@pytest.mark.parametrize(
    "text",
    [
        "B",
        "b",
        " (B) ",
        "(b)",
        "B.",
        "B)",
        "B:",
        "B) a cat",
        "(B) a cat",
        "B. a cat",
        "answer is B",
        "The answer is (B).",
        "Answer: B",
        "The answer is A. No, the answer is B.",
    ],
)
def test_choice_is_named(text: str) -> None:
    assert choice_verifier(text, "B") == 1.0
    assert choice_verifier(text, "(C)") == 0.0
    assert choice_verifier("B", text) == 1.0


@pytest.mark.parametrize(
    "text", ["", "K", "A or B", "AB", "A, B", "(A)(B)", "a cat", "B cats", "the answer is a B", "B.A."]
)
def test_no_choice_is_named(text: str) -> None:
    assert {choice_verifier(text, letter) for letter in "ABCDEFGHIJ"} == {0.0}


def test_choice_without_truth() -> None:
    with pytest.raises(DataError, match="A-J"):
        choice_verifier("B", "K")
