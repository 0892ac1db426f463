"""What the verifiers are made of: normalising, units, arithmetic, LaTeX, structure."""

from __future__ import annotations

import time
import unicodedata
from fractions import Fraction
from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skyrl.rewards.verifiers.arithmetic import exact
from skyrl.rewards.verifiers.choice import parse_choice
from skyrl.rewards.verifiers.expressions import NotMathematics
from skyrl.rewards.verifiers.formulas import same_formula
from skyrl.rewards.verifiers.latex import to_latex
from skyrl.rewards.verifiers.math import math_verifier
from skyrl.rewards.verifiers.nodes import Group, Leaf, Named, Words
from skyrl.rewards.verifiers.normalise import bare, boxed, canonical, fold
from skyrl.rewards.verifiers.quantity import close, read_quantity
from skyrl.rewards.verifiers.structure import read
from skyrl.rewards.verifiers.units import read_unit

# ---------------------------------------------------------------- normalise


@given(st.text(max_size=200))
def test_fold_is_stable_and_one_form(text: str) -> None:
    folded = fold(text)
    assert fold(folded) == folded
    assert fold(unicodedata.normalize("NFD", text)) == fold(unicodedata.normalize("NFC", text)) == folded


@given(st.text(alphabet="1x $*\\{}()boxedtext_^.,:=`'\"", max_size=60))
def test_bare_ends_and_is_stable_under_decoration(text: str) -> None:
    assert isinstance(canonical(bare(fold(text))), str)


@pytest.mark.parametrize("value", ["7", "x+1", "B", "\\frac{1}{2}"])
@pytest.mark.parametrize(
    "around",
    [
        "{}",
        "{}.",
        "**{}**",
        "`{}`",
        "${}$",
        "\\({}\\)",
        "\\[{}\\]",
        "$${}$$",
        "\\boxed{{{}}}",
        "= {}",
        "The answer is {}.",
    ],
)
def test_decoration_counts_for_nothing(value: str, around: str) -> None:
    assert bare(around.format(value)) == value


def test_boxed() -> None:
    assert boxed("7") is None
    assert boxed("\\boxed{7} and \\fbox{\\frac{1}{2}}, \\boxed{7}") == ["7", "\\frac{1}{2}"]
    assert boxed("\\boxed{7} \\boxed{8") == [] and boxed("\\boxed 7") == []


@pytest.mark.parametrize(
    "unit", ["(", "**", "`", "$", "\\boxed{", "the answer is ", "\u0301\u0316", "½", "\u200b", "x^"]
)
def test_normalising_is_linear(unit: str) -> None:
    text = unit * (100_000 // len(unit))
    start = time.perf_counter()
    fold(text)
    canonical(fold(text[:5000]))
    bare(fold(text[:5000]))
    assert time.perf_counter() - start < 5.0


# ---------------------------------------------------------------- numbers and units


@pytest.mark.parametrize(
    ("one", "other", "ratio"),
    [("cm", "m", Fraction(1, 100)), ("km/h", "m/s", Fraction(5, 18)), ("m^2", "cm^2", 10_000), ("L", "cm^3", 1000)],
)
def test_sizes_of_units(one: str, other: str, ratio: Fraction) -> None:
    first, second = read_unit(" " + one), read_unit(" " + other)
    assert first is not None and second is not None and first.powers == second.powers
    assert first.size / second.size == ratio


@pytest.mark.parametrize(
    "text", [" or 6", " and 6", " x", "x", " million", " pi", " tenths", "^2", " (or 6)", " 6", "+1"]
)
def test_no_units(text: str) -> None:
    assert read_unit(text) is None


@given(
    st.integers(-(10**9), 10**9), st.integers(0, 5), st.sampled_from(["", " apples", " cm", "%", "°", "\\text{ kg}"])
)
def test_decimals_are_exact(units: int, places: int, tail: str) -> None:
    text = f"{'-' if units < 0 else ''}{abs(units) // 10**places:,}"
    if places:
        text += f".{abs(units) % 10**places:0{places}d}"
    quantity = read_quantity(text + tail)
    assert quantity is not None and quantity.value == Fraction(units, 10**places)


def test_only_long_decimals_stand_for_what_they_round() -> None:
    def stands(decimal: str, full: str) -> bool:
        answer, truth = read_quantity(decimal), read_quantity(full)
        assert answer is not None and truth is not None
        return close(answer, truth) and close(truth, answer)

    assert stands("0.333333", "1/3") and stands("0.666666", "2/3") and stands("0.666667", "2/3")
    assert not stands("0.33333", "1/3") and not stands("0.333334", "1/3") and not stands("0.333332", "1/3")
    assert stands("1.500000", "3/2") and not stands("1.500000", "10/7") and not stands("0.500000", "4/9")
    assert not stands("0.2500001", "1/4")


# ---------------------------------------------------------------- formulas

NUMBERS = st.integers(0, 99).map(str)
ARITHMETIC = st.recursive(
    NUMBERS,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from("+-*/"), inner).map(lambda parts: f"({parts[0]}{parts[1]}{parts[2]})"),
        st.tuples(inner, st.integers(0, 4)).map(lambda parts: f"({parts[0]})^{parts[1]}"),
    ),
    max_leaves=8,
)


@given(ARITHMETIC)
@settings(deadline=None)
def test_arithmetic_against_python(text: str) -> None:
    python = "".join(f"Fraction({part})" if part.isdigit() else part for part in _pieces(text.replace("^", "**")))
    try:
        wanted = eval(python, {"Fraction": Fraction})
    except ZeroDivisionError:
        wanted = None
    assert exact(text) == wanted


def _pieces(text: str) -> list[str]:
    spaced = "".join(sign if sign.isdigit() or sign == "*" else f" {sign} " for sign in text)
    return [part for chunk in spaced.split() for part in ([chunk] if "*" not in chunk else _stars(chunk))]


def _stars(chunk: str) -> list[str]:
    parts = chunk.replace("**", " ** ").split() if "**" in chunk else chunk.replace("*", " * ").split()
    return parts


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3\\frac{1}{7}", "22/7"),
        ("2\\frac{3}{2}", "3"),
        ("\\frac12", "1/2"),
        ("5!/3!", "20"),
        ("2(3)", "6"),
        ("-2^2", "-4"),
    ],
)
def test_exact(text: str, value: str) -> None:
    assert exact(text) == Fraction(value)


@pytest.mark.parametrize(
    "text", ["", "1/0", "2^{10^{9}}", "9^9^9^9", "100000!", "1 2", "x", "(" * 500 + "1" + ")" * 500, "1.2.3"]
)
def test_not_plain(text: str) -> None:
    assert exact(text) is None


@given(st.lists(st.integers(-9, 9), min_size=3, max_size=3), st.integers(1, 9))
@settings(deadline=None)
def test_polynomials_against_their_roots(roots: list[int], shift: int) -> None:
    a, b, c = roots
    expanded = f"x^3 + ({-(a + b + c)}) x^2 + ({a * b + b * c + a * c}) x + ({-a * b * c})"
    for first, second, third in permutations(f"(x - ({root}))" for root in roots):
        assert same_formula(first + second + third, expanded)
    assert not same_formula(f"{expanded} + {shift}", expanded)


@pytest.mark.parametrize(
    ("text", "latex"),
    [
        ("sqrt(3)/2", "\\sqrt{3}/2"),
        ("e^(2x)", "e^{2x}"),
        ("x^10", "x^{10}"),
        ("2pi", "2\\pi "),
        ("\\frac12", "\\frac{1}{2}"),
        ("0.5x", "\\frac{1}{2}x"),
        ("3\\frac{1}{7}", "(3+\\frac{1}{7})"),
    ],
)
def test_latex(text: str, latex: str) -> None:
    assert to_latex(text) == latex


@pytest.mark.parametrize("text", ["seat + 1", "x^", "(1", "1)", "\\frac{1}", "1 2", "--1", "{" * 500 + "}" * 500])
def test_no_mathematics(text: str) -> None:
    with pytest.raises(NotMathematics):
        to_latex(text)


# ---------------------------------------------------------------- structure


def test_structure() -> None:
    one, two = Leaf("1"), Leaf("2")
    assert read("1") == one
    assert read("1, 2") == read("1 and 2") == Group("list", (one, two))
    assert read("\\{1, 2\\}") == Group("set", (one, two))
    assert read("(1, 2]") == Group("tuple", (one, two), "(]")
    assert read("1,000") == Leaf("1000") and read("(1,000)") == Group("tuple", (one, Leaf("000")), "()")
    assert read("x = 1") == Named("x", one, "x = 1")
    assert read("1:2") == Group("ratio", (one, two))
    assert read("No solution.") == read("no solution") == Words("no solution")
    assert read("\\begin{pmatrix}1\\\\2\\end{pmatrix}") == Group("matrix", (Group("row", (one,)), Group("row", (two,))))


@given(st.text(alphabet="12x,;(){}[]\\|:=<±& and", max_size=60))
def test_any_text_has_a_structure(text: str) -> None:
    assert read(text) is not None


@given(st.lists(st.integers(-20, 20), min_size=2, max_size=5), st.randoms())
def test_order_is_free_in_sets_only(numbers: list[int], random: object) -> None:
    turned = numbers[1:] + numbers[:1]
    one, other = (", ".join(map(str, part)) for part in (numbers, turned))
    assert math_verifier(f"\\{{{other}\\}}", f"\\{{{one}\\}}") == 1.0
    assert math_verifier(f"({other})", f"({one})") == float(turned == numbers)
    assert math_verifier(f"\\{{{other}, 21\\}}", f"\\{{{one}\\}}") == 0.0


@given(st.lists(st.lists(st.integers(-9, 9), min_size=2, max_size=2), min_size=2, max_size=2))
def test_matrices_by_entry(rows: list[list[int]]) -> None:
    def latex(matrix: list[list[int]]) -> str:
        return "\\begin{pmatrix}" + " \\\\ ".join(" & ".join(map(str, row)) for row in matrix) + "\\end{pmatrix}"

    turned = [list(column) for column in zip(*rows, strict=True)]
    assert math_verifier(latex(rows), latex(rows).replace(" ", "").replace("pmatrix", "bmatrix")) == 1.0
    assert math_verifier(latex(turned), latex(rows)) == float(turned == rows)
    assert math_verifier(str(rows[1][1]), latex(rows)) == 0.0


# ---------------------------------------------------------------- choice


@pytest.mark.parametrize(
    "between", [" or ", ", ", " and ", "/", "; ", ". ", ") ", " & ", " maybe ", " or maybe ", "", " "]
)
@pytest.mark.parametrize("around", ["{}", "({})", "The answer is {}", "\\boxed{{{}}}", "**{}**", "Option {}"])
def test_two_choices_are_none(between: str, around: str) -> None:
    for first, second in permutations("ABCI", 2):
        assert parse_choice(around.format(f"{first}{between}{second}")) is None


def test_a_letter_right_before_a_word_is_none() -> None:
    assert [parse_choice(text) for text in ("A cat", "Based on it", "Dogs", "I think", "C4", "a cat")] == [None] * 6
