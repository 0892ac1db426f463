"""Prompts and answers as tensors, with the embedded processor and one real forward pass."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import SHADES, CountingProcessor, answer_ids, encoder, noise, picture, processor, prompt, random_model

from skyrl.digits.architecture import CHAT_TEMPLATE, IMAGE_TOKENS, SPECIAL, build_tokenizer
from skyrl.policy import encode
from skyrl.policy.encode import TAGS, EncodedBatch, PromptEncoder
from skyrl.records import ConfigError, DataError, Prompt, Turn

ANSWER = "<think>I see 31/41. 3+1=4.</think><answer>9</answer>"
EOS = "<end_of_utterance>"


def token(text: str) -> int:
    return int(processor().tokenizer.convert_tokens_to_ids(text))


def row(maker: PromptEncoder, asked: Prompt, text: str = ANSWER) -> tuple[Prompt, np.ndarray, np.ndarray]:
    return asked, maker.encode(asked)[0], answer_ids(text)


# ---------------------------------------------------------------- text and tokens


def test_chat_text_has_one_placeholder_per_picture_and_ends_where_the_answer_begins() -> None:
    maker = encoder()
    assert maker.chat_text(prompt("t", question="Is 1 odd?")) == "<user>Is 1 odd?<assistant>"
    assert maker.chat_text(prompt("p", picture(0), question="Max?")) == "<user><image>Max?<assistant>"
    assert maker.chat_text(prompt("q", picture(0), picture(1), question="A?")) == "<user><image><image>A?<assistant>"


def test_text_ids_leave_a_placeholder_one_token_and_encode_expands_it() -> None:
    maker = encoder()
    asked = prompt("p", picture(0))
    image = token("<image>")
    assert maker.text_ids(asked).count(image) == 1
    ids = maker.encode(asked)[0]
    assert ids.dtype == np.int32
    assert (ids == image).sum() == IMAGE_TOKENS == 4
    # Outside the picture's own tokens both are the same.
    around = {image, token("<fake_token_around_image>"), token("<global-img>")}
    assert [i for i in ids if i not in around] == [i for i in maker.text_ids(asked) if i not in around]


def test_text_prompts_have_no_picture_tensors_and_the_ids_that_the_rollout_is_given() -> None:
    maker = encoder()
    ids, pictures = maker.encode(prompt("t"))
    assert pictures == {}
    assert ids.tolist() == maker.text_ids(prompt("t"))


def test_the_policy_can_sample_no_special_token_but_the_end_of_sequence() -> None:
    forbidden = encoder().forbidden_token_ids()
    assert forbidden == sorted(token(t) for t in SPECIAL if t != EOS)
    assert token("<image>") in forbidden and token("<pad>") in forbidden
    assert token(EOS) not in forbidden
    assert not {token(tag) for tag in TAGS} & set(forbidden)


def test_without_a_padding_token_no_ordinary_token_is_forbidden() -> None:
    bare = copy.deepcopy(processor())
    bare.tokenizer.pad_token = None
    maker = PromptEncoder(bare)
    specials = {token(t) for t in SPECIAL if t not in (EOS, "<pad>")}
    assert maker.pad_id == 0 and specials <= set(maker.forbidden_token_ids())
    assert {i for i in maker.forbidden_token_ids()} - specials <= {token("<pad>")}


def test_a_model_without_chat_template_is_refused() -> None:
    bare = copy.deepcopy(processor())
    bare.chat_template = None
    with pytest.raises(ConfigError, match="no chat template"):
        PromptEncoder(bare).text_ids(prompt("x"))


def test_tags_survive_decoding_and_special_tokens_do_not() -> None:
    tokenizer = processor().tokenizer
    ids = answer_ids(ANSWER)
    assert ids[-1] == token(EOS)
    assert [i for i in ids if i in {token(tag) for tag in TAGS}] == [token(tag) for tag in TAGS]
    assert tokenizer.decode(ids, skip_special_tokens=True) == ANSWER


def test_a_digit_is_always_one_and_the_same_token() -> None:
    tokenizer = processor().tokenizer
    digits = [token(str(d)) for d in range(10)]
    assert len(set(digits)) == 10
    for text in ("I see 90/17. 9+0=9, 9+17=26.", "What is 4+4+8?", "<answer>100</answer>"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert [digits.index(i) for i in ids if i in digits] == [int(c) for c in text if c.isdigit()]


# ---------------------------------------------------------------- conversations


def talk(*turns: Turn, images: int = 0) -> Prompt:
    return replace(prompt("talk", *[picture(shade) for shade in SHADES[:images]], question="last"), turns=turns)


def test_turns_are_written_in_order_with_pictures_in_their_places() -> None:
    turns = (
        Turn("system", ("S",)),
        Turn("user", ("A", None, "B", None)),
        Turn("assistant", ("C",)),
        Turn("user", ("D",)),
    )
    asked = talk(*turns, images=2)
    maker = encoder()
    assert maker.chat_text(asked) == "<system>S<user>A<image>B<image><assistant>C<end_of_utterance><user>D<assistant>"
    ids, pictures = maker.encode(asked)
    assert (ids == token("<image>")).sum() == 2 * IMAGE_TOKENS and pictures["pixel_values"].shape[0] == 2
    assert maker.text_ids(asked).count(token("<image>")) == 2
    # The order of the pictures is that of their places.
    torch.testing.assert_close(
        pictures["pixel_values"].mean((1, 2, 3, 4)), torch.tensor([-1.0, -0.6]), atol=1e-6, rtol=0
    )


def test_a_conversation_without_its_pictures() -> None:
    asked = talk(Turn("user", ("A", None, "B")), images=1)
    blind = replace(asked, images=(), variant="blind")
    assert encoder().chat_text(blind) == "<user>AB<assistant>"
    assert encoder().encode(blind)[1] == {}


def test_one_users_turn_with_its_pictures_first_is_the_plain_prompt() -> None:
    plain = prompt("p", picture(0), picture(1), question="Max?")
    same = replace(plain, turns=(Turn("user", (None, None, "Max?")),))
    assert encoder().chat_text(same) == encoder().chat_text(plain)
    assert encoder().encode(same)[0].tolist() == encoder().encode(plain)[0].tolist()


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_special_tokens_are_refused_in_every_turn(role: str) -> None:
    turns = [Turn("user", ("A",)), Turn("assistant", ("B",)), Turn("user", ("C",))]
    wrong = Turn(role, ("a<pad>b",))
    asked = talk(wrong, *turns) if role == "system" else talk(*(wrong if t.role == role else t for t in turns))
    with pytest.raises(DataError, match=f"prompt 'talk': the {role} turn contains the special token '<pad>'"):
        encoder().encode(asked)


def with_template(change: str, to: str) -> PromptEncoder:
    made = copy.deepcopy(processor())
    assert change in CHAT_TEMPLATE
    made.chat_template = CHAT_TEMPLATE.replace(change, to)
    return PromptEncoder(made)


def test_a_template_that_knows_no_system_turn_is_named() -> None:
    start = "{% for message in messages %}"
    refusing = with_template(
        start, "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + start
    )
    asked = talk(Turn("system", ("S",)), Turn("user", ("A",)))
    with pytest.raises(
        ConfigError, match=r"prompt 'talk': the chat template can't write .* of system, user: no system"
    ):
        refusing.chat_text(asked)
    silent = with_template(start, "{% for message in messages if message['role'] != 'system' %}")
    with pytest.raises(
        ConfigError, match=r"prompt 'talk': the chat template changes the conversation; left out .*: 'S'"
    ):
        silent.chat_text(asked)
    assert silent.chat_text(talk(Turn("user", ("A",)))) == "<user>A<assistant>"


def test_a_template_that_moves_pictures_is_named() -> None:
    """LLaVA's write all pictures of a message first."""
    part = "{% for part in message['content'] %}"
    moving = with_template(
        part,
        "{% for part in message['content'] if part['type'] == 'image' %}<image>{% endfor %}"
        "{% for part in message['content'] if part['type'] == 'text' %}",
    )
    first = talk(Turn("user", (None, "A")), images=1)
    assert moving.chat_text(first) == "<user><image>A<assistant>"
    with pytest.raises(ConfigError, match="changes the conversation; left out or moved past a picture: 'A'"):
        moving.chat_text(talk(Turn("user", ("A", None, "B")), images=1))


def test_a_role_whose_parts_are_printed_as_python_does_gets_text() -> None:
    content = "{% if message['content'] is string %}"
    printing = with_template(content, "{% if message['content'] is string or message['role'] == 'system' %}")
    text = printing.chat_text(talk(Turn("system", ("S",)), Turn("user", (None, "A")), images=1))
    assert text == "<system>S<user><image>A<assistant>"


# ---------------------------------------------------------------- collate


def test_rows_are_padded_on_the_right_and_masks_say_what_is_what() -> None:
    maker = encoder()
    short, long = prompt("short", question="1?"), prompt("long", question="1+1?")
    answers = answer_ids("7", end=True), answer_ids("1234", end=False)
    p0, p1 = maker.encode(short)[0], maker.encode(long)[0]
    assert (len(p0), len(p1), len(answers[0]), len(answers[1])) == (4, 6, 2, 4)
    batch = maker.collate([(short, p0, answers[0]), (long, p1, answers[1])])
    pad = token("<pad>")
    assert batch.input_ids.tolist() == [[*p0, *answers[0], *[pad] * 4], [*p1, *answers[1]]]
    assert batch.attention_mask.tolist() == [[1] * 6 + [0] * 4, [1] * 10]
    assert batch.answer_mask.tolist() == [[False] * 4 + [True] * 2 + [False] * 4, [False] * 6 + [True] * 4]
    assert (batch.input_ids.dtype, batch.attention_mask.dtype, batch.answer_mask.dtype) == (
        torch.int64,
        torch.int64,
        torch.bool,
    )
    assert batch.pictures == {}
    wider = maker.collate([(short, p0, answers[0])], length=8)
    assert wider.input_ids.tolist() == [[*p0, *answers[0], pad, pad]]
    assert wider.attention_mask.tolist() == [[1] * 6 + [0, 0]]


def test_pictures_are_joined_in_row_order_also_with_several_a_prompt() -> None:
    maker = encoder()
    black, dark, white = (picture(shade) for shade in SHADES)
    asked = [prompt("two", dark, white), prompt("none"), prompt("three", white, black, dark), prompt("one", black)]
    batch = maker.collate([row(maker, p) for p in asked])
    values = batch.pictures["pixel_values"]
    assert values.shape == (6, 1, 3, 32, 32)
    assert batch.pictures["pixel_attention_mask"].shape == (6, 1, 32, 32)
    expected = [-0.6, 1.0, 1.0, -1.0, -0.6, -1.0]
    torch.testing.assert_close(values.mean((1, 2, 3, 4)), torch.tensor(expected), atol=1e-6, rtol=0)
    placeholders = (batch.input_ids == token("<image>")).sum(1)
    assert placeholders.tolist() == [2 * IMAGE_TOKENS, 0, 3 * IMAGE_TOKENS, IMAGE_TOKENS]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_prompt_is_encoded_as_the_processor_itself_would(count: int) -> None:
    maker = encoder()
    images = [noise(seed) for seed in range(count)]
    asked = prompt(f"{count} pictures", *images)
    own = processor()(
        text="<user>" + "<image>" * count + asked.question + "<assistant>",
        images=[Image.fromarray(image) for image in images],
        return_tensors="pt",
    )
    ids, pictures = maker.encode(asked)
    assert ids.tolist() == own["input_ids"][0].tolist()
    assert set(pictures) == set(own) - {"input_ids", "attention_mask"}
    for name, tensor in pictures.items():  # the processor has [1, pictures, …], we have [pictures, 1, …]
        assert tensor.shape[:2] == (count, 1)
        assert torch.equal(tensor[:, 0], own[name][0]), name


def test_pictures_that_cannot_be_joined_are_named() -> None:
    with pytest.raises(DataError, match=r"'pixel_values' .* different shapes: \[\(3, 32, 32\), \(3, 64, 64\)\]"):
        encode._join({"pixel_values": [torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 64, 64)]})


def test_to_moves_every_tensor() -> None:
    maker = encoder()
    moved = maker.collate([row(maker, prompt("p", picture(0)))]).to("meta")
    tensors = [moved.input_ids, moved.attention_mask, moved.answer_mask, *moved.pictures.values()]
    assert len(tensors) == 5 and all(tensor.device.type == "meta" for tensor in tensors)


class TypingProcessor:
    """The processor, and the token types that Qwen's and Gemma's add: 1 on picture placeholders."""

    def __init__(self, useless: bool = False) -> None:
        self.useless = useless

    def __getattr__(self, name: str) -> Any:
        return getattr(processor(), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out = processor()(*args, **kwargs)
        types = (out["input_ids"] == token("<image>")).long()
        out["token_type_ids" if self.useless else "mm_token_type_ids"] = types * 0 if self.useless else types
        return out


def test_token_types_go_to_the_model_padded_like_the_rows() -> None:
    maker = PromptEncoder(TypingProcessor())
    rows = [
        row(maker, prompt("t"), "7"),
        row(maker, prompt("p", picture(0))),
        row(maker, prompt("q", *[picture(0)] * 2)),
    ]
    batch = maker.collate(rows)
    types = batch.pictures["mm_token_type_ids"]
    assert types.tolist() == (batch.input_ids == token("<image>")).long().tolist()
    assert types.sum(1).tolist() == [0, IMAGE_TOKENS, 2 * IMAGE_TOKENS]
    assert batch.pictures["pixel_values"].shape[0] == 3
    assert "mm_token_type_ids" not in maker.collate(rows[:1]).pictures  # nothing to tell apart without a picture


def test_token_types_that_tell_nothing_apart_are_left_out() -> None:
    maker = PromptEncoder(TypingProcessor(useless=True))
    assert set(maker.encode(prompt("p", picture(0)))[1]) == {"pixel_values", "pixel_attention_mask"}


def test_the_beginning_of_sequence_is_not_written_twice() -> None:
    """The chat template writes it, so the tokenizer must not: the rollout's ids have it once."""
    seen: list[dict[str, Any]] = []

    class Asked(TypingProcessor):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            seen.append(kwargs)
            return processor()(*args, **kwargs)

    PromptEncoder(Asked()).encode(prompt("p", picture(0)))
    assert [kwargs["add_special_tokens"] for kwargs in seen] == [False]


# ---------------------------------------------------------------- errors


def test_a_placeholder_in_an_answer_is_refused_by_name() -> None:
    maker = encoder()
    asked = prompt("train/17", picture(0))
    answer = np.array([token("7"), token("<image>")], dtype=np.int32)
    with pytest.raises(DataError, match=r"'train/17'.*answer contains picture placeholders"):
        maker.collate([row(maker, prompt("fine")), (asked, maker.encode(asked)[0], answer)])


@pytest.mark.parametrize("change", ["other token", "one less", "unexpanded"])
def test_prompt_ids_that_are_not_the_processors_are_refused_by_name(change: str) -> None:
    maker = encoder()
    asked = prompt("train/3", picture(0))
    right = maker.encode(asked)[0]
    other = right.copy()
    other[-2] += 1
    wrong = {"other token": other, "one less": right[:-1], "unexpanded": np.array(maker.text_ids(asked), np.int32)}
    with pytest.raises(DataError, match=r"'train/3': the rollout saw"):
        maker.collate([(asked, wrong[change], answer_ids("7"))])


def test_a_placeholder_inside_a_question_is_refused_by_name() -> None:
    for images in ((), (picture(0),)):
        asked = prompt("train/5", *images, question="What is <image>?")
        with pytest.raises(DataError, match=r"'train/5'.*contains the picture placeholder '<image>'"):
            encoder().encode(asked)


def test_a_text_only_policy_takes_text_and_refuses_pictures_by_name() -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    maker = PromptEncoder(tokenizer)
    assert maker.chat_text(prompt("t", question="1?")) == "<user>1?<assistant>"
    assert maker.encode(prompt("t", question="1?"))[0].tolist() == encoder().text_ids(prompt("t", question="1?"))
    with pytest.raises(DataError, match=r"'train/6' has 2 picture\(s\), but the policy takes text only"):
        maker.encode(prompt("train/6", picture(0), picture(1)))


# ---------------------------------------------------------------- cache


def test_the_cache_is_bounded_and_keeps_what_was_used_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "CACHED_PROMPTS", 2)
    counting = CountingProcessor()
    maker = PromptEncoder(counting)
    a, b, c = (prompt(name, picture(shade)) for name, shade in zip("abc", SHADES, strict=True))
    first = maker.encode(a)
    maker.encode(b)
    assert maker.encode(a)[0] is first[0]
    assert counting.calls == 2
    maker.encode(c)  # b was used longest ago
    assert len(maker._cache) == 2
    assert maker.encode(a)[0] is first[0]
    assert counting.calls == 3
    again = maker.encode(b)
    assert counting.calls == 4
    assert len(maker._cache) == 2
    torch.testing.assert_close(again[1]["pixel_values"].mean(), torch.tensor(-0.6))


def test_large_pictures_do_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    maker = encoder()
    ids, pictures = maker.encode_anew(prompt("a", picture(0)))
    size = ids.nbytes + sum(tensor.nbytes for tensor in pictures.values())
    monkeypatch.setattr(encode, "CACHED_BYTES", int(2.5 * size))
    for name in "abcab":
        maker.encode(prompt(name, picture(0)))
    assert list(maker._cache) == [("a", ""), ("b", "")] and maker._cached_bytes == 2 * size
    monkeypatch.setattr(encode, "CACHED_BYTES", 1)
    maker.encode(prompt("d", picture(0)))
    assert list(maker._cache) == [("d", "")]


def test_another_variant_of_a_prompt_is_another_prompt() -> None:
    maker = encoder()
    seen = prompt("x", picture(0))
    blind, masked = replace(seen, images=(), variant="blind"), replace(seen, images=(picture(255),), variant="masked")
    for _ in range(2):
        assert maker.encode(seen)[1]["pixel_values"].mean() == -1
        assert maker.encode(masked)[1]["pixel_values"].mean() == 1
        assert maker.encode(blind)[1] == {} and len(maker.encode(blind)[0]) < len(maker.encode(seen)[0])
    assert maker.collate([row(maker, one) for one in (masked, blind, seen)]).pictures["pixel_values"].shape[0] == 2


# ---------------------------------------------------------------- forward


@torch.no_grad()
def logits(model: Any, batch: EncodedBatch) -> torch.Tensor:
    return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **batch.pictures).logits


def test_logits_of_a_row_do_not_depend_on_its_neighbours() -> None:
    maker, model = encoder(), random_model()
    asked = [
        prompt("two", noise(1), noise(2)),
        prompt("text", question="What is 3+4?"),
        prompt("one", noise(3), question="What is the largest digit?"),
        prompt("three", noise(4), noise(5), noise(6)),
    ]
    texts = [ANSWER, "7", "<answer>8</answer>", ANSWER + ANSWER]
    rows = [row(maker, p, text) for p, text in zip(asked, texts, strict=True)]
    together = logits(model, maker.collate(rows))
    for i, one in enumerate(rows):
        alone = logits(model, maker.collate([one]))[0]
        torch.testing.assert_close(together[i, : len(alone)], alone, atol=1e-5, rtol=1e-5)
    # The comparison above means something only if the order of the pictures shows in the logits.
    swapped = logits(model, maker.collate([row(maker, prompt("swapped", noise(2), noise(1)))]))[0]
    assert (swapped - together[0, : len(swapped)]).abs().max() > 1e-2
