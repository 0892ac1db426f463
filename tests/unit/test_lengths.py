"""Prompts measured without encoding each, those that are too long, and what is cut off."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tiny_models import CountingProcessor, encoder, noise, picture, prompt

from skyrl.policy.encode import PromptEncoder
from skyrl.policy.lengths import PromptLengths
from skyrl.records import DataError, Prompt, Turn


def black(one: Prompt) -> Prompt:
    """As the outline of a file's row."""
    return replace(one, images=tuple(np.broadcast_to(np.uint8(0), image.shape) for image in one.images))


def test_lengths_are_the_processors_and_each_size_is_run_once() -> None:
    counting = CountingProcessor()
    lengths, maker = PromptLengths(PromptEncoder(counting), limit=1000), encoder()
    asked = [prompt(f"p{n}", *[noise(n)] * (n % 3), question="What is it? " * (n + 1)) for n in range(12)]
    asked.append(replace(asked[1], turns=(Turn("system", ("Be brief.",)), Turn("user", ("A", None, "B")))))
    for one in asked:
        assert lengths.tokens(black(one)) == len(maker.encode_anew(one)[0])
    assert counting.calls == 2  # one picture, two pictures


def test_near_the_limit_the_whole_prompt_is_encoded() -> None:
    counting = CountingProcessor()
    one = prompt("p", picture(0))
    lengths = PromptLengths(PromptEncoder(counting), limit=len(encoder().encode(one)[0]) + 3)
    for _ in range(2):
        lengths.tokens(black(one))
    assert counting.calls == 3


def test_pictures_that_the_processor_refuses_name_the_prompt() -> None:
    class Refusing(CountingProcessor):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            raise ValueError("absolute aspect ratio must be smaller than 200")

    with pytest.raises(
        DataError, match="prompt 'p': the model's processor refuses its pictures of 900x3 pixels: Value"
    ):
        PromptLengths(PromptEncoder(Refusing()), 99).tokens(prompt("p", np.zeros((3, 900, 3), np.uint8)))


WORDS = " ".join(f"word{n}" for n in range(60))


@pytest.mark.parametrize(
    "asked",
    [
        prompt("text", question=f"{WORDS} Is 1 odd?"),
        prompt("picture", picture(0), question=f"{WORDS} Is 1 odd?"),
        replace(
            prompt("turns", picture(0), question=f"{WORDS} Is 1 odd?"),
            turns=(Turn("system", ("Be brief.",)), Turn("user", (WORDS, None, " Is 1 odd?"))),
        ),
    ],
)
def test_the_beginning_of_the_last_turn_is_cut_off_and_no_more_than_needed(asked: Prompt) -> None:
    maker = encoder()
    for limit in (60, 100, 151):
        lengths = PromptLengths(maker, limit)
        cut = lengths.cut(asked)
        assert lengths.tokens(cut) <= limit < lengths.tokens(asked)
        assert cut.question.endswith(" Is 1 odd?") and len(cut.images) == len(asked.images)
        again = lengths.cut(black(asked))
        assert (again.question, again.turns) == (cut.question, cut.turns)
        removed = len(asked.question) - len(cut.question)
        assert asked.question[removed:] == cut.question
        if asked.turns:
            assert cut.turns[0] == asked.turns[0] and cut.turns[1].parts.count(None) == 1
            assert "".join(part or "" for part in cut.turns[1].parts) == cut.question
        longer = asked.question[removed - 8 : removed]
        assert lengths.tokens(replace(cut, question=longer + cut.question, turns=())) > limit - 12


def test_what_fits_stays_and_what_cannot_fit_is_refused() -> None:
    short = prompt("s", question="1+1?")
    assert PromptLengths(encoder(), 50).cut(short) is short
    with pytest.raises(DataError, match=r"prompt 'p' is too long for rollout.max_prompt_tokens=3 however it is cut"):
        PromptLengths(encoder(), 3).cut(prompt("p", picture(0)))
