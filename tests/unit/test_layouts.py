"""What the columns of other systems' files mean: rows written by hand as each system documents them."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

import pytest

from skyrl.data.layouts import detected, read_cells
from skyrl.data.values import CellError
from skyrl.records import Check, DataError, Turn
from skyrl.settings import Layout

USER = Turn("user", ("1+1?",))
VERL = {
    "data_source": "openai/gsm8k",
    "prompt": [{"role": "user", "content": "1+1?"}],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "2"},
    "extra_info": {"split": "train", "index": 0},
}
SKYRL = {"question": "1+1?", "answer": "2", "verifier": "numeric"}


@pytest.mark.parametrize(
    ("columns", "layout"),
    [
        ("question answer verifier images", Layout.skyrl),
        ("question answer", Layout.skyrl),
        ("messages answer verifier", Layout.skyrl),
        ("data_source prompt ability reward_model extra_info", Layout.verl),
        ("prompt reward_model", Layout.verl),
        ("images problem answer", Layout.verl),
        ("prompt solution image", Layout.trl),
        ("prompt", Layout.trl),
        ("messages solution images", Layout.swift),
        ("messages", Layout.swift),
    ],
)
def test_the_layout_is_found_by_the_columns(columns: str, layout: Layout) -> None:
    assert detected(columns.split()) is layout


def test_columns_of_no_layout_are_refused_with_what_each_needs() -> None:
    with pytest.raises(
        DataError, match="got the columns instruction, output, which are no layout's; allowed: question"
    ):
        detected(["instruction", "output"])


def test_verl() -> None:
    cells = read_cells(VERL, Layout.verl)
    assert (cells.turns, cells.pictures, cells.answer, cells.verifier) == ((USER,), [], "2", None)
    assert cells.kind == "openai-gsm8k"  # a slash would end the metric's name
    assert not cells.used & {"data_source", "ability", "reward_model", "extra_info"}
    as_text = VERL | {"reward_model": json.dumps(VERL["reward_model"]), "prompt": json.dumps(VERL["prompt"])}
    assert read_cells(as_text, Layout.verl).answer == "2"
    assert read_cells(as_text, Layout.verl).turns == (USER,)


def test_easyr1() -> None:
    row = {"problem": "<image>Find x.", "answer": "3", "images": [b"a"]}
    cells = read_cells(row, Layout.verl)
    assert cells.turns == (Turn("user", (None, "Find x.")),) and cells.pictures == [b"a"] and cells.answer == "3"


def test_trl() -> None:
    row: dict[str, Any] = {"prompt": "1+1?", "solution": "<think>x</think><answer> 2 </answer>", "image": b"a"}
    cells = read_cells(row, Layout.trl)
    assert cells.turns == (Turn("user", (None, "1+1?")),) and cells.answer == "2" and cells.pictures == [b"a"]
    parts = [{"type": "text", "text": "Look:"}, {"type": "image", "text": None}, {"type": "text", "text": "1+1?"}]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}]
    cells = read_cells(row | {"prompt": messages}, Layout.trl)
    assert cells.turns == (Turn("system", ("Be brief.",)), Turn("user", ("Look:", None, "1+1?")))
    assert read_cells(row | {"ground_truth": 7}, Layout.trl).answer == "7"
    assert read_cells({"prompt": "hi"}, Layout.trl).answer is None


def test_pictures_that_stand_in_the_messages_themselves() -> None:
    parts = [
        {"type": "image", "image": "a.png"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}},
        {"type": "text", "text": "Same?"},
    ]
    cells = read_cells({"prompt": [{"role": "user", "content": parts}]}, Layout.trl)
    assert cells.pictures == ["a.png", "data:image/png;base64,AA"]
    assert cells.turns == (Turn("user", (None, None, "Same?")),)


def test_swift_drops_the_last_answer_which_is_the_truth_where_there_is_no_solution() -> None:
    said = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "<image>1+1?"},
        {"role": "assistant", "content": "It is <answer>2</answer>"},
    ]
    cells = read_cells({"messages": said, "images": ["a.png"]}, Layout.swift)
    assert cells.turns == (Turn("user", ("Hi",)), Turn("assistant", ("Hello",)), Turn("user", (None, "1+1?")))
    assert cells.answer == "2"
    assert read_cells({"messages": said, "images": ["a.png"], "solution": "3"}, Layout.swift).answer == "3"
    assert read_cells({"messages": said[:3], "images": ["a.png"]}, Layout.swift).answer is None


def test_several_checks_of_a_row() -> None:
    listed = [{"verifier": "numeric", "truth": 2, "weight": 3}, {"verifier": "exact", "truth": "two", "weight": None}]
    want = (Check("numeric", "2", 3.0), Check("exact", "two", 1.0))
    for verifier in (listed, json.dumps(listed)):
        cells = read_cells({"question": "?", "verifier": verifier}, Layout.skyrl)
        assert (cells.checks, cells.verifier, cells.answer) == (want, "numeric", "2")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (2, "2"),
        (2.0, "2"),
        (7.5, "7.5"),
        (-3, "-3"),
        (Decimal("0.10"), "0.10"),
        (["a", 1], '["a", 1]'),
        ({"a": 1}, '{"a": 1}'),
    ],
)
def test_truths_that_are_no_text(value: Any, text: str) -> None:
    assert read_cells(SKYRL | {"answer": value}, Layout.skyrl).answer == text


def test_half_a_letter_and_endless_nesting_are_refused() -> None:
    for column in ("question", "answer"):
        with pytest.raises(CellError, match="allowed: Unicode text"):
            read_cells(SKYRL | {column: json.loads('"a\\ud800"')}, Layout.skyrl)
    assert read_cells(SKYRL | {"question": "é😀"}, Layout.skyrl).turns == (Turn("user", ("é😀",)),)
    with pytest.raises(CellError, match="got the content"):
        read_cells({"messages": [{"role": "user", "content": [[]]}]}, Layout.swift)
    assert read_cells(VERL | {"reward_model": "[" * 100_000}, Layout.verl).answer is None


def test_a_truth_of_our_own_layout_is_never_shortened() -> None:
    assert read_cells(SKYRL | {"answer": "a<answer>b</answer>"}, Layout.skyrl).answer == "a<answer>b</answer>"


def test_a_question_that_is_a_json_list_is_a_question() -> None:
    text = '[{"role": "user", "content": "x"}]'
    assert read_cells(SKYRL | {"question": text}, Layout.skyrl).turns == (Turn("user", (text,)),)


def test_pictures_without_a_place_come_first_in_the_first_users_turn() -> None:
    said = [{"role": "system", "content": "S"}, {"role": "user", "content": "A"}]
    said += [{"role": "assistant", "content": "B"}, {"role": "user", "content": "C"}]
    turns = read_cells({"prompt": said, "images": [b"a", b"b"]}, Layout.trl).turns
    assert turns[1] == Turn("user", (None, None, "A")) and turns[3] == Turn("user", ("C",))


@pytest.mark.parametrize(
    ("row", "layout", "column", "problem"),
    [
        (
            {"question": "A <image> and <image>?", "image": b"a"},
            "skyrl",
            "question",
            "got 2 mark(s) <image> for 1 picture(s)",
        ),
        (
            {"question": "Is <image> a tag?"},
            "skyrl",
            "question",
            "got 1 mark(s) <image> for 0 picture(s); allowed: one for each; remove the mark",
        ),
        (
            {"question": "<image>?", "images": [b"a", b"b"]},
            "skyrl",
            "question",
            "got 1 mark(s) <image> for 2 picture(s)",
        ),
        (
            {"prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}]},
            "trl",
            "prompt",
            "got 1 picture part(s) for 0 picture(s)",
        ),
        (
            {
                "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "<image>?"}]}],
                "image": b"a",
            },
            "trl",
            "prompt",
            "1 picture part(s) and 1 mark(s)",
        ),
        ({"question": "?", "images": [b"a", None]}, "skyrl", "images", "got null among the pictures"),
        ({"question": " "}, "skyrl", "question", "got ' '; allowed: a text that isn't empty"),
        ({"question": 3}, "skyrl", "question", "got 3; allowed: question, a text, or messages"),
        ({}, "skyrl", "messages", "got null; allowed: question, a text, or messages"),
        ({"prompt": []}, "trl", "prompt", "got []; allowed: prompt, messages or a text"),
        ({"prompt": [{"role": "tool", "content": "x"}]}, "trl", "prompt", "role one of system, user, assistant"),
        (
            {"prompt": [{"role": "user", "content": None}]},
            "trl",
            "prompt",
            "got the content null; allowed: a text, or a list",
        ),
        (
            {"prompt": [{"role": "user", "content": [{"type": "video"}]}]},
            "trl",
            "prompt",
            "got the content {'type': 'video'}",
        ),
        (
            {"prompt": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
            "trl",
            "prompt",
            "the last turn is the assistant's; allowed: the user's",
        ),
        (
            {
                "prompt": [
                    {"role": "user", "content": "x"},
                    {"role": "system", "content": "y"},
                    {"role": "user", "content": "z"},
                ]
            },
            "trl",
            "prompt",
            "allowed: system as the first only",
        ),
        (
            {"question": "?", "answer": True},
            "skyrl",
            "answer",
            "got True; allowed: a text that isn't empty, or a number",
        ),
        ({"question": "?", "answer": float("nan")}, "skyrl", "answer", "got nan; allowed"),
        ({"question": "?", "answer": ""}, "skyrl", "answer", "got ''; allowed"),
        ({"question": "?", "answer": "1", "verifier": 3}, "skyrl", "verifier", "got 3; allowed: a name, or a list of"),
        ({"question": "?", "answer": "1", "verifier": []}, "skyrl", "verifier", "got []; allowed"),
        (
            {"question": "?", "verifier": [{"verifier": "exact", "truth": "a", "weight": 0}]},
            "skyrl",
            "verifier",
            "weight above 0",
        ),
        (
            {"question": "?", "verifier": [{"verifier": "exact"}]},
            "skyrl",
            "verifier",
            "got the check {'verifier': 'exact'}",
        ),
        ({"question": "?", "answer": "1", "verifier": "exact", "kind": 3}, "skyrl", "kind", "got 3; allowed: a text"),
    ],
)
def test_what_is_refused(row: dict[str, Any], layout: str, column: str, problem: str) -> None:
    with pytest.raises(CellError) as caught:
        read_cells(row, Layout(layout))
    assert caught.value.column == column and problem in caught.value.problem, caught.value.problem
