"""Each of IFEval's 25 instructions against texts judged by hand; broken truths; and texts made to be slow."""

from __future__ import annotations

import json
import sys
import time
from types import ModuleType
from typing import Any

import pytest

from skyrl.records import DataError
from skyrl.rewards.conventions import Takes
from skyrl.rewards.runner import Verdict, VerifierRunner
from skyrl.rewards.verifiers.ifeval import INSTRUCTIONS, ifeval_verifier, sentences

LESS, LEAST = "less than", "at least"
P3 = "One is here.\n\nTwo is, there.\n\n'Three', she said."

CASES: list[tuple[str, dict[str, Any], str, bool]] = [
    ("keywords:existence", {"keywords": ["Cat", "dog"]}, "cats and Dogs", True),
    ("keywords:existence", {"keywords": ["cat", "dog"]}, "cats", False),
    ("keywords:existence", {"keywords": ["C++"]}, "I know c++ well", True),
    ("keywords:frequency", {"keyword": "ha", "frequency": 3, "relation": LEAST}, "Ha ha, haha", True),
    ("keywords:frequency", {"keyword": "ha", "frequency": 4, "relation": LESS}, "Ha ha, haha", False),
    ("keywords:forbidden_words", {"forbidden_words": ["cat", "red"]}, "Concatenate the reds", True),
    ("keywords:forbidden_words", {"forbidden_words": ["cat", "red"]}, "A Cat.", False),
    ("keywords:letter_frequency", {"letter": "E", "let_frequency": 3, "let_relation": LEAST}, "Eel, be", True),
    ("keywords:letter_frequency", {"letter": "!", "let_frequency": 1, "let_relation": LESS}, "No!", False),
    ("language:response_language", {"language": "de"}, "DE text", True),
    ("language:response_language", {"language": "de"}, "EN text", False),
    ("change_case:english_capital", {}, "EN TEXT, 5.", True),
    ("change_case:english_capital", {}, "EN text", False),
    ("change_case:english_capital", {}, "DE TEXT", False),
    ("change_case:english_lowercase", {}, "en text, 5.", True),
    ("change_case:english_lowercase", {}, "en Text", False),
    ("change_case:english_lowercase", {}, "de text", False),
    ("change_case:capital_word_frequency", dict(capital_frequency=3, capital_relation=LEAST), "A BIG, U.S. dog", True),
    ("change_case:capital_word_frequency", dict(capital_frequency=1, capital_relation=LESS), "Big Dog iPad", True),
    ("change_case:capital_word_frequency", dict(capital_frequency=2, capital_relation=LESS), "BIG-DOG **NO**", False),
    ("length_constraints:number_sentences", {"num_sentences": 3, "relation": LEAST}, "One. Two! Three", True),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": LESS}, "Dr. A. Smith, e.g. him.", True),
    ("length_constraints:number_words", {"num_words": 4, "relation": LEAST}, "don't stop now", True),
    ("length_constraints:number_words", {"num_words": 3, "relation": LESS}, "one two three", False),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a\n***\nb", True),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "***\na\n***\nb\n***\n", True),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a\n***\n***\nb", False),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a\n\nb", False),
] + [
    ("length_constraints:nth_paragraph_first_word", dict(num_paragraphs=n, nth_paragraph=k, first_word=w), P3, right)
    for n, k, w, right in [
        (3, 1, "one", True), (3, 2, "Two", True), (3, 3, "three", True), (2, 1, "one", False), (3, 4, "one", False),
        (3, 2, "is", False), (3, 0, "three", False),
    ]
] + [
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[name] and [a [b]]", True),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[name\n] and [b]", False),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye.\np. s. More", True),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "Bye.\nP.S. More", False),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "Bye.\nP.P.S More", True),
    ("detectable_format:number_bullet_lists", {"num_bullets": 3}, "* a\n  * b\n- c\n**no**\nx - y", True),
    ("detectable_format:number_bullet_lists", {"num_bullets": 1}, "* a\n* b", False),
    ("detectable_format:constrained_response", {}, "Well. My answer is maybe. So.", True),
    ("detectable_format:constrained_response", {}, "My answer is perhaps.", False),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*one* and **two**", True),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 1}, "* a\n* b\n** **", False),
    ("detectable_format:multiple_sections", dict(section_spliter="PART", num_sections=2), "PART 1\nPART 2", True),
    ("detectable_format:multiple_sections", dict(section_spliter="Part", num_sections=2), "Part 1\nPart", False),
    ("detectable_format:json_format", {}, '```json\n{"a": [1]}\n```', True),
    ("detectable_format:json_format", {}, '{"a": 1} there', False),
    ("detectable_format:json_format", {}, "[" * 100_000, False),
    ("detectable_format:title", {}, "Here:\n<<A poem>>\n…", True),
    ("detectable_format:title", {}, "<< >>", False),
    ("detectable_format:title", {}, "<<A\npoem>>", False),
    ("combination:two_responses", {}, "first******second", True),
    ("combination:two_responses", {}, "******\nfirst\n******\nsecond\n******", True),
    ("combination:two_responses", {}, "same******same", False),
    ("combination:two_responses", {}, "a******b******c", False),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say Hello"}, "  say hello\nHello!", True),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say Hello"}, "Hello. Say hello", False),
    ("startend:end_checker", {"end_phrase": "The End."}, 'So it goes. "the end."', True),
    ("startend:end_checker", {"end_phrase": "The End."}, "The end. Or not", False),
    ("startend:quotation", {}, ' "quoted"\n', True),
    ("startend:quotation", {}, '"quoted" not', False),
    ("startend:quotation", {}, '"', False),
    ("punctuation:no_comma", {}, "none here; none", True),
    ("punctuation:no_comma", {}, "one, here", False),
]  # fmt: skip


@pytest.fixture(autouse=True)
def languages(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that tells languages apart by the first two letters."""
    module = ModuleType("py3langid")
    module.classify = lambda text: (text[:2].lower(), 1.0)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "py3langid", module)


def judged(text: str, *asked: tuple[str, dict[str, Any]], **more: Any) -> float:
    names, kwargs = [name for name, _ in asked], [given for _, given in asked]
    return ifeval_verifier(text, json.dumps({"instruction_id_list": names, "kwargs": kwargs} | more))


@pytest.mark.parametrize(("name", "given", "text", "follows"), CASES)
def test_an_instruction(name: str, given: dict[str, Any], text: str, follows: bool) -> None:
    assert judged(text, (name, given)) == float(follows)


def test_every_instruction_has_a_text_that_follows_and_one_that_does_not() -> None:
    assert len(INSTRUCTIONS) == 25
    for follows in (True, False):
        assert {name for name, _, _, right in CASES if right is follows} >= INSTRUCTIONS.keys() - (
            set() if follows else {"length_constraints:number_sentences"}
        )
    assert judged("One. Two.", ("length_constraints:number_sentences", {"num_sentences": 2, "relation": LESS})) == 0.0


def test_several_instructions() -> None:
    asked = [("punctuation:no_comma", {}), ("startend:quotation", {}), ("detectable_format:title", {"language": None})]
    assert judged('"<<x>>"', *asked) == 1.0
    assert judged('"<<x>>,"', *asked) == 0.0
    assert judged('"<<x>>,"', *asked, score="share") == pytest.approx(2 / 3)
    assert judged("  \n", ("punctuation:no_comma", {})) == 0.0  # nothing follows no instruction


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0), ("One", 1), ("One. Two.", 2), ("Really?! Yes… No.", 3), ('He said "No." Then he left.', 2),
        ("Mr. Smith met Dr. Jones.", 1), ("It costs 3.50 now. Fine.", 2), ("1. Buy milk.\n2. Go home.", 2),
        ("It is I. You knew.", 2), ("J. R. R. Tolkien wrote it.", 1), ("At 5 p.m. we met.", 1), ("一。二！三", 3),
        ("Wait... what?", 1), ("See www.x.org. Good.", 2), ("In 1990. Then", 2),
    ],
)  # fmt: skip
def test_sentences(text: str, count: int) -> None:
    assert sentences(text) == count


@pytest.mark.parametrize(
    ("truth", "words"),
    [
        ("no json", "instruction_id_list"),
        ("[1]", "instruction_id_list"),
        ('{"instruction_id_list": ["a:b"]}', "kwargs"),
        ('{"instruction_id_list": [], "kwargs": []}', "has 0 instructions"),
        ('{"instruction_id_list": ["a:b"], "kwargs": [{}, {}]}', "1 instructions, 2 kwargs"),
        ('{"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}], "score": "half"}', "'half'"),
        ('{"instruction_id_list": ["a:b"], "kwargs": [{}]}', "unknown instruction 'a:b'.*punctuation:no_comma"),
        ('{"instruction_id_list": ["keywords:existence"], "kwargs": [{}]}', "no arguments; it needs keywords"),
        ('{"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{"x": 1}]}', "has x"),
        ('{"instruction_id_list": ["keywords:existence"], "kwargs": [{"keywords": "cat"}]}', "keywords is 'cat'"),
        ('{"instruction_id_list": ["keywords:existence"], "kwargs": [{"keywords": []}]}', "keywords is"),
        ('{"instruction_id_list": ["startend:end_checker"], "kwargs": [{"end_phrase": " "}]}', "end_phrase"),
        (
            '{"instruction_id_list": ["length_constraints:number_paragraphs"], "kwargs": [{"num_paragraphs": 1.5}]}',
            "1.5",
        ),
        (
            '{"instruction_id_list": ["length_constraints:number_words"], '
            '"kwargs": [{"num_words": 3, "relation": "<"}]}',
            "relation .* '<'",
        ),
    ],
)
def test_a_broken_truth_is_an_error(truth: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        ifeval_verifier("Some text", truth)


def test_without_the_package_for_languages_nothing_is_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "py3langid", None)
    with pytest.raises(DataError, match="pip install py3langid"):
        judged("EN text", ("language:response_language", {"language": "en"}))


@pytest.mark.parametrize("piece", ["[", "<<", "*", "a. ", ".", "\n", '"', "******", "P.", "-", "PART 1", "]>>", "A.)"])
def test_long_texts_are_quick(piece: str) -> None:
    text = piece * (200_000 // len(piece)) + "x"
    began = time.monotonic()
    for name, given, *_ in CASES:
        judged(text, (name, given))
    assert time.monotonic() - began < 5


def test_it_runs_in_the_verifier_process() -> None:
    runner = VerifierRunner(2.0)
    try:
        assert runner.takes("ifeval") is Takes.text
        truth = json.dumps({"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]})
        assert [runner.verify("ifeval", text, truth) for text in ("none", "a, b")] == [
            Verdict(1.0, None),
            Verdict(0.0, None),
        ]
    finally:
        runner.close()
