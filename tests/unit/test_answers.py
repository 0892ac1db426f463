"""Where the answer stands, for each form, and whether the form is kept."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skyrl.records import DataError
from skyrl.rewards.answers import AnswerForm
from skyrl.settings import AnswerConfig, AnswerPlace, Think

GOOD = "<think>3+1=4.</think><answer>4</answer>"
PLACES = [at for at in AnswerPlace if at is not AnswerPlace.regex]


def form(prefix: str = "", timeout: float = 5.0, **answer: Any) -> AnswerForm:
    return AnswerForm(AnswerConfig(**answer), prefix, timeout)


def kept(text: str, made: AnswerForm) -> float:
    return made.kept(text, made.find(text))


TAGS = form()

# ---------------------------------------------------------------- tags


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (GOOD, "4"),
        ("<answer>3</answer> no, <answer> 4 </answer>", "4"),
        ("<answer>3</answer> no, <answer>4", "3"),
        ("<answer>3<answer>4</answer>", "4"),
        ("<answer><answer>4</answer></answer>", "4"),
        ("<answer></answer>", ""),
        ("<answer>4", None),
        ("4</answer>", None),
        ("</answer><answer>4", None),
        ("4", None),
        ("", None),
    ],
)
def test_answer_between_tags(text: str, answer: str | None) -> None:
    assert TAGS.find(text) == answer
    named = form(think_tag="reason", answer_tag="final").find(text.replace("answer>", "final>"))
    assert named == answer


KEPT = [GOOD, GOOD.replace("><", ">\n <"), GOOD + "\n", "<think></think><answer>a b</answer>"]
BROKEN = [
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
]


@pytest.mark.parametrize("text", KEPT)
def test_form_is_kept(text: str) -> None:
    assert kept(text, TAGS) == 1.0
    opened = form(prefix="<think>")
    assert kept(text.removeprefix("<think>"), opened) == 1.0 and kept(text, opened) == 0.0
    named = text.replace("think>", "reason>").replace("answer>", "final>")
    assert kept(named, form(think_tag="reason", answer_tag="final")) == 1.0 and kept(named, TAGS) == 0.0


@pytest.mark.parametrize("text", BROKEN)
def test_form_is_broken(text: str) -> None:
    assert kept(text, TAGS) == 0.0


def test_reasoning_between_tags_can_be_optional_or_free() -> None:
    bare, free, inside = "<answer>4</answer>", "3+1=4, so <answer>4</answer>", "<think>3+1=4.</think><answer>4</answer>"
    made = {think: form(think=think) for think in Think}
    assert [kept(bare, made[think]) for think in Think] == [0.0, 1.0, 1.0]
    assert [kept(free, made[think]) for think in Think] == [0.0, 0.0, 1.0]
    assert [kept(inside, made[think]) for think in Think] == [1.0, 1.0, 1.0]
    assert [kept("<think>" + bare, made[think]) for think in Think] == [0.0, 0.0, 1.0]
    assert [kept(bare + " yes", made[think]) for think in Think] == [0.0] * 3
    assert [kept(bare + bare, made[think]) for think in Think] == [0.0] * 3


ALPHABET = st.sampled_from(["<think>", "</think>", "<answer>", "</answer>", " ", "\n", "4", "<", "boxed"])


@given(st.lists(ALPHABET, max_size=9).map("".join))
def test_tags_agree_with_one_regular_expression(text: str) -> None:
    """Exponential in theory, so not for the policy's texts; but it says in one line what the form is."""
    tag = "</?(?:think|answer)>"
    plain = rf"(?:(?!{tag}).)*"
    whole = rf"\s*<think>{plain}</think>\s*<answer>(?P<answer>{plain})</answer>\s*"
    match = re.fullmatch(whole, text, re.DOTALL)
    assert kept(text, TAGS) == float(match is not None and match["answer"].strip() != "")
    if match is not None:
        assert TAGS.find(text) == match["answer"].strip()


@given(st.text())
def test_any_text_without_tags_can_stand_inside(inside: str) -> None:
    clean = inside.replace("<", "")
    assert kept(f"<think>{clean}</think><answer>x{clean}</answer>", TAGS) == 1.0
    assert TAGS.find(f"<think>{clean}</think><answer>{clean}</answer>") == clean.strip()


# ---------------------------------------------------------------- boxes, hashes, numbers, patterns, everything


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{3} or \boxed{4}", "4"),
        (r"\boxed{3}, no, \boxed{4", "3"),
        (r"\boxed{x = \boxed{3}}", "3"),
        (r"$\fbox{7}$ \boxed {5}", "5"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\begin{array}{c}1\\{2}\end{array}}", r"\begin{array}{c}1\\{2}\end{array}"),
        (r"} \boxed{1} {", "1"),
        (r"{ \boxed{1} ", "1"),
        (r"\\boxed{4}", "4"),
        (r"\boxed{}", ""),
        (r"boxed{4}", None),
        (r"\boxed 4", None),
        ("4", None),
    ],
)
def test_boxed(text: str, answer: str | None) -> None:
    made = form(at="boxed")
    assert made.find(text) == answer and kept(text, made) == float(bool(answer))


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("She has 2+1=3.\n#### 3", "3"),
        ("#### 3\n#### 1,234 \n", "1,234"),
        ("#### 3\nThat is all.", "3"),
        ("####\n3", "3"),
        ("##### 3", "3"),
        ("#### ", None),
        ("### 3", None),
    ],
)
def test_hashes(text: str, answer: str | None) -> None:
    assert form(at="hashes").find(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("First 3, then 4.", "4"),
        ("It is -1,234.50.", "-1,234.50"),
        ("It costs $18.50", "18.50"),
        ("3/4 of it", "3/4"),
        ("3 / 4", "3 / 4"),
        ("1 1/4 cups", "1 1/4"),
        (r"$\frac{3}{4}$", r"\frac{3}{4}"),
        ("an area of 12 cm^2", "12"),
        ("12 x_1", "12"),
        ("10^5", "10^5"),
        (r"3 \times 10^{-5} m", r"3 \times 10^{-5}"),
        (r"2\sqrt{3}", r"2\sqrt{3}"),
        ("√3", "√3"),
        ("10-7", "7"),
        ("1e-3", "1e-3"),
        (r"50\%", r"50\%"),
        ("5 H2O", "5"),
        (r"\boxed{42}", "42"),
        ("It is –6", "–6"),
        ("x = - 6", "- 6"),
        ("9 - 6", "6"),
        ("a loss of -$6", "-$6"),
        (r"x is $- \frac{5}{7}$", r"- \frac{5}{7}"),
        (r"\frac{\sqrt{5}}{7}", r"\frac{\sqrt{5}}{7}"),
        ("√5/7", "√5/7"),
        (r"4\frac{1}{7}", r"4\frac{1}{7}"),
        ("7/2.5", "7/2.5"),
        ("4 321 765", "4 321 765"),
        ("7²", "7²"),
        ("10⁻⁴", "10⁻⁴"),
        ("6!", "6!"),
        (r"6\pi", r"6\pi"),
        ("6 million", "6 million"),
        ("6½", "6½"),
        ("none", None),
    ],
)
def test_last_number_is_taken_whole(text: str, answer: str | None) -> None:
    assert form(at="last_number").find(text) == answer


def test_pattern_of_ones_own() -> None:
    assert form(at="regex", pattern=r"Answer: (\w+)").find("Answer: A. No. Answer: B.") == "B"
    assert form(at="regex", pattern=r"\d+").find("1, 2, 33") == "33"
    assert form(at="regex", pattern=r"(?s)Answer:(.*)").find("Answer:\n x\n") == "x"
    assert form(at="regex", pattern=r"Answer: (\w+)").find("no") is None
    assert form(at="regex", pattern=r"a|(b)").find("b a") is None  # the last match has no group 1


def test_exponential_pattern_is_stopped() -> None:
    start = time.perf_counter()
    with pytest.raises(DataError, match=r"reward\.answer\.pattern took longer than 0\.3 s"):
        form(at="regex", pattern=r"(?:a|aa)+$", timeout=0.3).find("a" * 80 + "b")
    assert time.perf_counter() - start < 5


def test_whole() -> None:
    assert form(at="whole").find(" def f():\n  pass \n") == "def f():\n  pass"
    assert form(at="whole").find("<think>x</think>\n 4 ") == "4" and form(at="whole").find(" \n") is None


INSIDE = r"<answer>4</answer> \boxed{4} Answer: 4 #### 4"


@pytest.mark.parametrize("at", [*PLACES, AnswerPlace.regex])
def test_what_is_named_inside_the_reasoning_is_no_answer(at: AnswerPlace) -> None:
    extra = {"pattern": r"Answer: (\d)"} if at is AnswerPlace.regex else {}
    made, opened = form(at=at, **extra), form("<think>", at=at, **extra)
    whole = INSIDE if at is AnswerPlace.whole else "4"
    assert made.find(f"<think>5</think> {INSIDE}") == opened.find(f"5</think> {INSIDE}") == whole
    assert (
        kept(f"<think>5</think> {INSIDE}", made)
        == kept(f"5</think> {INSIDE}", opened)
        == float(at is not AnswerPlace.tags)
    )
    if at is not AnswerPlace.tags:
        assert made.find(f"<think>{INSIDE}") is opened.find(INSIDE) is None  # it never ends
        assert made.find(f"<think>{INSIDE}</think>") is opened.find(f"{INSIDE}</think>") is None
        assert made.find(f"<think>5</think> {INSIDE} <think>") is None
        ignores = form("<think>", at=at, think="none", **extra)
        assert ignores.find(INSIDE) == whole


@pytest.mark.parametrize("at", ["boxed", "last_number", "hashes", "whole"])
def test_reasoning_that_the_form_asks_for(at: str) -> None:
    answer = r"#### \boxed{4}"
    texts = [answer, f"<think>5</think>{answer}", f"so <think>5</think>{answer}", f"<think>a<think>5</think>{answer}"]
    assert [kept(text, form(at=at)) for text in texts] == [1.0, 1.0, 0.0, 0.0]
    assert [kept(text, form(at=at, think="required")) for text in texts] == [0.0, 1.0, 0.0, 0.0]
    assert [kept(text, form(at=at, think="none")) for text in texts] == [1.0] * 4
    assert kept(f"5</think>{answer}", form("<think>", at=at, think="required")) == 1.0
    assert kept("<think>5</think>", form(at=at, think="required")) == 0.0


def test_every_form_is_linear() -> None:
    pieces = [
        "<think>",
        "</think>",
        "<answer>",
        "</answer>",
        "<",
        " ",
        "{",
        "}",
        "\\",
        "\\boxed{",
        "\\boxed ",
        "####",
        "1",
    ]
    pieces += ["1,", "1/", "1 ", "10^", "\\frac{1", "√", "2*", "-", ".", "1\\times", "\\sqrt{1", "1 1 1/"]
    start = time.perf_counter()
    for made in [form(at=at) for at in PLACES]:
        for piece in pieces:
            kept(piece * 50_000, made)
    assert time.perf_counter() - start < 20  # 5 s; a quadratic one would take hours


def test_words_for_what_is_looked_for() -> None:
    assert TAGS.wanted() == "what stands between <answer> and </answer>"
    assert form(at="boxed", think_tag="t").wanted() == r"the content of the last \boxed{…} behind </t>"
    assert form(at="regex", pattern="a.b", think="none").wanted().endswith("reward.answer.pattern, a.b")
