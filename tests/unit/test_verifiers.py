"""The form of an answer and the rule verifiers."""

from __future__ import annotations

import time
from fractions import Fraction

import hostile_verifiers
import pytest
from hypothesis import given
from hypothesis import strategies as st

from skyrl.records import DataError
from skyrl.rewards.format import extract_answer, format_reward
from skyrl.rewards.verifiers import BUILTIN, get_verifier, verifier_reference
from skyrl.rewards.verifiers.choice import choice_verifier
from skyrl.rewards.verifiers.exact import exact_verifier
from skyrl.rewards.verifiers.numeric import numeric_verifier, parse_number

GOOD = "<think>3+1=4.</think><answer>4</answer>"

# ---------------------------------------------------------------- form


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (GOOD, "4"),
        ("<answer>3</answer> no, <answer> 4 </answer>", "4"),
        ("<answer>3</answer> no, <answer>4", "3"),
        ("<answer>3<answer>4</answer>", "4"),
        ("<answer></answer>", ""),
        ("<answer>4", None),
        ("4</answer>", None),
        ("</answer><answer>4", None),
        ("4", None),
        ("", None),
    ],
)
def test_extract_answer(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    "text", [GOOD, GOOD.replace("><", ">\n <"), GOOD + "\n", "<think></think><answer>a b</answer>"]
)
def test_form_is_kept(text: str) -> None:
    assert format_reward(text) == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "4",
        GOOD + "4",
        GOOD + GOOD,
        "So: " + GOOD,
        GOOD.replace("><", "> so <"),
        GOOD.replace(">4<", "> <"),
        GOOD.removesuffix("</answer>"),
        GOOD.replace("<think>", ""),
        GOOD.replace("3+1", "<think>3+1"),
        GOOD.replace(">4<", ">4</think><"),
        "<answer>4</answer><think>3+1=4.</think>",
        "<think><answer>4</think></answer>",
        "<think>a<answer>b</answer>c</think>",
        "<think>a<answer></think>4</answer>",
        GOOD.upper(),
    ],
)
def test_form_is_broken(text: str) -> None:
    assert format_reward(text) == 0.0


@given(st.text())
def test_any_text_without_tags_can_stand_inside(inside: str) -> None:
    clean = inside.replace("<", "")
    assert format_reward(f"<think>{clean}</think><answer>x{clean}</answer>") == 1.0
    assert extract_answer(f"<think>{clean}</think><answer>{clean}</answer>") == clean.strip()


def test_form_is_linear() -> None:
    start = time.perf_counter()
    for tag in ("<think>", "</think>", "<answer>", "</answer>", "<", " "):
        format_reward(tag * 200_000)
        extract_answer(tag * 200_000)
    assert time.perf_counter() - start < 2.0


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
    *("1,2345", "1_000", "0x10", "9 apples", "9**9**9**9", "9e9999", "1e+99999999999", "٩", "９", "²", "Ⅸ", "1+1"),
    *(
        "__import__('os').system('exit 1')",
        "9" * 101,
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
    assert numeric_verifier("0.333333", "1/3", tolerance=1e-6) == 1.0
    assert numeric_verifier("0.333", "1/3", tolerance=1e-6) == 0.0
    # 0.01 of 1000 is 10, inclusive; below 1 the tolerance is absolute.
    assert [numeric_verifier(text, "1000", 0.01) for text in ("1009", "1011", "991")] == [1.0, 0.0, 1.0]
    assert [numeric_verifier(text, "0.001", 0.01) for text in ("0.01", "0.02")] == [1.0, 0.0]
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


# ---------------------------------------------------------------- registry


def test_unknown_name_is_named() -> None:
    with pytest.raises(DataError, match=r"'nope'.*exact, numeric, math, choice"):
        get_verifier("nope")


@pytest.mark.parametrize(
    "name", ["no_such_module:f", "hostile_verifiers:no_such", "hostile_verifiers:not_a_function", ":"]
)
def test_bad_path(name: str) -> None:
    with pytest.raises(DataError, match="verifier"):
        get_verifier(name)


def test_names() -> None:
    own = {"mine": "hostile_verifiers:right"}
    assert get_verifier("hostile_verifiers:right") is hostile_verifiers.right
    assert get_verifier("numeric") is numeric_verifier and get_verifier("exact") is exact_verifier
    assert verifier_reference("mine", own) == verifier_reference("hostile_verifiers:right") == own["mine"]
    assert [verifier_reference(name, own) for name in BUILTIN] == list(BUILTIN.values())
    with pytest.raises(DataError, match=r"'yours'; allowed: exact, numeric, math, choice, mine, .*reward\.verifiers"):
        verifier_reference("yours", own)
    with pytest.raises(DataError, match="'mine'"):
        verifier_reference("mine")
