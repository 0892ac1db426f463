"""What an answer may hold and ends with, on tokenizers and chat templates built like those of the families."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import encoder, picture, processor, prompt

from skyrl.digits.architecture import CHAT_TEMPLATE
from skyrl.policy.encode import TAGS, PromptEncoder
from skyrl.records import ConfigError, DataError
from skyrl.settings import AnswerConfig

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PHI = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}<|endoftext|>{% endif %}"
)
GEMMA = (
    "<bos>{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else 'user' }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
GLM = (
    "[gMASK]{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ m['role'] | upper }}: {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
SINGLE_TURN = (
    "{% if messages | length > 1 %}{{ raise_exception('one turn only') }}{% endif %}{{ messages[0]['content'] }}="
)
R1 = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'].split('</think>')[-1] if m['role'] == 'assistant' else m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
IM = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
PHI_TOKENS = ("<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>")
GLM_TOKENS = ("[gMASK]", "<|user|>", "<|assistant|>", "<|observation|>", "<|endoftext|>")


def tokenizer(template: str, special: Sequence[str], ordinary: Sequence[str] = (), eos: str | None = None) -> Any:
    """One token per byte, and the given ones."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    core.add_tokens([AddedToken(token, special=False, normalized=False) for token in ordinary])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=eos, chat_template=template)


def folder(path: Path, made: Any, generation: Any = None, config: Any = None, text: Any = None) -> str:
    """A model folder whose configurations have these ``eos_token_id``; tokens are given by name."""

    def ids(tokens: Any) -> Any:
        return [ids(one) for one in tokens] if isinstance(tokens, list) else made.convert_tokens_to_ids(tokens)

    made.save_pretrained(path)
    written: dict[str, Any] = {"model_type": "llama"}
    if config is not None:
        written["eos_token_id"] = ids(config)
    if text is not None:
        written["text_config"] = {"eos_token_id": ids(text)}
    (path / "config.json").write_text(json.dumps(written))
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids(generation)}))
    return str(path)


@dataclass
class Family:
    template: str
    special: tuple[str, ...]
    eos: str | None
    end: str
    """What its answers end with."""
    stops: set[str]
    generation: Any = None
    config: Any = None
    text: Any = None
    ordinary: tuple[str, ...] = ()

    def encoder(self, path: Path) -> PromptEncoder:
        made = tokenizer(self.template, self.special, self.ordinary, self.eos)
        return PromptEncoder.from_pretrained(folder(path, made, self.generation, self.config, self.text))


FAMILIES = {
    "qwen": Family(CHATML, IM, "<|im_end|>", "<|im_end|>", {"<|im_end|>", "<|endoftext|>"}, ["<|im_end|>", IM[2]]),
    "gemma 3": Family(
        GEMMA,
        ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        "<eos>",
        "<end_of_turn>",
        {"<eos>", "<end_of_turn>"},
        ["<eos>", "<end_of_turn>"],
    ),
    "phi 3.5": Family(
        PHI,
        PHI_TOKENS,
        "<|endoftext|>",
        "<|end|>",
        {"<|end|>", "<|assistant|>", "<|endoftext|>"},
        ["<|end|>", "<|assistant|>", "<|endoftext|>"],
    ),
    "phi, its end an ordinary added token": Family(
        PHI,
        ("<|endoftext|>",),
        "<|endoftext|>",
        "<|end|>",
        {"<|end|>", "<|endoftext|>"},
        ["<|end|>"],
        ordinary=("<|user|>", "<|assistant|>", "<|end|>"),
    ),
    "glm 4v": Family(
        GLM,
        GLM_TOKENS,
        "<|endoftext|>",
        "<|user|>",
        {"<|user|>", "<|observation|>", "<|endoftext|>"},
        ["<|endoftext|>", "<|user|>", "<|observation|>"],
    ),
    "a next turn that begins with a token that ends nothing": Family(
        GLM, GLM_TOKENS, "<|endoftext|>", "<|endoftext|>", {"<|endoftext|>"}
    ),
    "a base model with a borrowed template": Family(
        CHATML, IM, "<|endoftext|>", "<|im_end|>", {"<|im_end|>", "<|endoftext|>"}, "<|endoftext|>"
    ),
    "a template that ends no turn": Family(PLAIN, ("</s>",), "</s>", "</s>", {"</s>"}),
    "a template of one turn": Family(SINGLE_TURN, ("</s>",), "</s>", "</s>", {"</s>"}),
    "no eos, the template": Family(CHATML, IM, None, "<|im_end|>", {"<|im_end|>"}),
    "no eos, the generation's configuration": Family(PLAIN, IM, None, "<|endoftext|>", {IM[2]}, "<|endoftext|>"),
    "no eos, the configuration": Family(PLAIN, IM, None, "<|im_end|>", {IM[1], IM[2]}, None, [IM[1], IM[2]]),
    "no eos, the text configuration": Family(PLAIN, IM, None, "<|im_end|>", {"<|im_end|>"}, text="<|im_end|>"),
    "an ordinary token as a class's default": Family(CHATML, IM, IM[1], IM[1], {IM[1]}, config="!", text="#"),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_way_to_end_an_answer_is_known_and_can_be_sampled(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    made = family.encoder(tmp_path)
    token = made.tokenizer.convert_tokens_to_ids
    assert made.turn_end_id == token(family.end)
    assert made.stop_token_ids == tuple(sorted(map(token, family.stops)))
    assert made.forbidden_token_ids() == sorted(token(one) for one in {*family.special} - family.stops)
    assert not made.special_tags and made.answer_prefix == ""


@pytest.mark.parametrize("name", FAMILIES)
def test_an_answer_is_read_and_written_without_its_end(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    made = family.encoder(tmp_path)
    text = "<think> é 3.1 </think>\n<answer>4 </answer>"
    (whole,) = made.answer_ids([text])
    bare = made.tokenizer(text)["input_ids"]
    assert whole.dtype == np.int32 and whole.tolist() == [*bare, made.turn_end_id]
    assert made.answer_ids([text], [True])[0].tolist() == bare
    for stop in made.stop_token_ids:
        assert made.spoken(np.array([*bare, stop], np.int32)) == bare
        assert made.decode_answer(np.array([*bare, stop], np.int32)) == text
    assert made.spoken(bare) == bare and made.decode_answer(bare) == text  # truncated
    assert made.decode_answer([]) == "" and made.answer_ids([]) == []
    for hidden in made.forbidden_token_ids():
        assert made.decode_answer([*bare[:3], hidden, *bare[3:], made.turn_end_id]) == text


def test_nothing_that_can_end_an_answer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing can end an answer"):
        Family(PLAIN, IM, None, "", set(), config="!").encoder(tmp_path)
    (tmp_path / "generation_config.json").write_text("{eos}")
    with pytest.raises(ConfigError, match=r"generation_config\.json is no JSON"):
        PromptEncoder.from_pretrained(str(tmp_path))


def test_a_role_of_a_token_that_does_not_exist_is_none(tmp_path: Path) -> None:
    made = tokenizer(CHATML, IM, (), None)
    made.eos_token, made.pad_token = "</s>", "<pad>"
    assert made.eos_token_id is None
    maker = PromptEncoder(made)
    assert maker.stop_token_ids == (made.convert_tokens_to_ids("<|im_end|>"),)
    assert maker.forbidden_token_ids() == sorted(map(made.convert_tokens_to_ids, (IM[0], IM[2])))
    assert maker.decode_answer(maker.answer_ids(["4"])[0]) == "4"


# ---------------------------------------------------------------- tags


def test_tags_go_by_the_names_of_the_settings():
    named = AnswerConfig(think_tag="reason", answer_tag="final").tags
    template = CHATML.replace("assistant\n", "assistant\n<reason>\n")
    made = PromptEncoder(tokenizer(template, (*IM, *named), (), "<|im_end|>"), tags=named)
    assert {*made.special_tags} == {*named} and made.answer_prefix == "<reason>"
    assert not {*made.special_tags.values()} & {*made.forbidden_token_ids()}
    (ids,) = made.answer_ids(["<reason>\na</reason><final>b</final>"])
    assert made.decode_answer(ids) == "a</reason><final>b</final>"
    usual = PromptEncoder(tokenizer(template, (*IM, *named), (), "<|im_end|>"))
    assert not usual.special_tags and usual.answer_prefix == ""


@pytest.mark.parametrize("which", [TAGS, TAGS[:2], TAGS[2:]])
def test_tags_that_are_special_tokens_can_be_sampled_and_stay_in_texts(which: tuple[str, ...]) -> None:
    made = PromptEncoder(tokenizer(CHATML, (*IM, *which), [tag for tag in TAGS if tag not in which], "<|im_end|>"))
    token = made.tokenizer.convert_tokens_to_ids
    assert made.special_tags == {tag: token(tag) for tag in which}
    assert made.forbidden_token_ids() == sorted(map(token, ("<|im_start|>", "<|endoftext|>")))
    text = "<think>1+1</think> <answer>2</answer>"
    (ids,) = made.answer_ids([text])
    assert [i for i in ids if i in set(map(token, TAGS))] == list(map(token, TAGS))
    assert made.decode_answer(ids) == text
    assert made.decode_answer(ids[:4]) == "<think>1+1"
    made.check_question(prompt("x", question=f"Use {''.join(TAGS)}."))


def test_other_tags_than_these_are_special_tokens_as_any() -> None:
    other = ["<reason>", "</reason>"]
    made = PromptEncoder(tokenizer(CHATML, (*IM, *TAGS, *other), (), "<|im_end|>"))
    assert set(made.tokenizer.convert_tokens_to_ids(other)) < set(made.forbidden_token_ids())
    with pytest.raises(DataError, match="special token '</reason>'"):
        made.check_question(prompt("x", question="Use <reason></reason>."))


@pytest.mark.parametrize("special", [True, False])
def test_a_tag_that_ends_the_answer_stays(special: bool, tmp_path: Path) -> None:
    """As in GLM 4.1V, whose generation ends with ``</answer>``."""
    stops = ["<|endoftext|>", "<|user|>", "</answer>"]
    tokens = ((*GLM_TOKENS, *TAGS), ()) if special else (GLM_TOKENS, TAGS)
    made = PromptEncoder.from_pretrained(folder(tmp_path, tokenizer(GLM, *tokens, "<|endoftext|>"), stops))
    end = made.tokenizer.convert_tokens_to_ids("</answer>")
    assert {*made.special_tags} == ({*TAGS} if special else {"</answer>"})
    assert end in made.stop_token_ids and made.turn_end_id == made.tokenizer.convert_tokens_to_ids("<|user|>")
    text = "<think>1+1</think><answer>2</answer>"
    (ids,) = made.answer_ids([text])
    assert ids[-1] == end and (ids == end).sum() == 1
    assert made.spoken(ids) == ids.tolist() and made.decode_answer(ids) == text
    (cut,) = made.answer_ids(["<think>1+1"])  # one that the user's turn ended
    assert cut[-1] == made.turn_end_id and made.decode_answer(cut) == "<think>1+1"


# ---------------------------------------------------------------- templates


def test_a_template_that_opens_the_reasoning_is_found_out() -> None:
    made = PromptEncoder(tokenizer(R1, IM, TAGS, "<|im_end|>"))
    assert made.answer_prefix == "<think>"
    assert made.turn_end_id == made.tokenizer.convert_tokens_to_ids("<|im_end|>")
    bare = made.tokenizer("a</think><answer>b</answer>")["input_ids"]
    for start in ("<think>\n", "<think>", ""):  # no row has it twice
        assert made.answer_ids([f"{start}a</think><answer>b</answer>"])[0].tolist() == [*bare, made.turn_end_id]
    assert made.decode_answer(made.answer_ids(["\n<think>"], [True])[0]) == "\n<think>"


@pytest.mark.parametrize(
    ("ending", "opens"),
    [
        ("<think>", True),
        ("<think>\n\n", True),
        ("<think>\n\n</think>\n\n", False),
        ("Use <think> and </think>.", False),
        ("Begin with <think>.", False),
    ],
)
def test_only_an_open_reasoning_at_the_very_end_counts(ending: str, opens: bool) -> None:
    made = PromptEncoder(tokenizer(CHATML.replace("assistant\n", f"assistant\n{ending}"), IM, TAGS, "<|im_end|>"))
    assert made.answer_prefix == ("<think>" if opens else "")
    made.check_question(prompt("x", question="<think>"))
    assert made.chat_text(prompt("x", question="<think>")).endswith(ending)


def test_a_question_that_ends_with_the_tag_opens_nothing() -> None:
    assert encoder().answer_prefix == ""


THINKS = CHATML.replace(
    "assistant\n", "assistant\n{% if not enable_thinking | default(true) %}<think></think>{% endif %}"
)


def test_variables_reach_the_template_and_unknown_ones_are_refused() -> None:
    made = tokenizer(THINKS, IM, TAGS, "<|im_end|>")
    asked = prompt("x", question="1+1?")
    assert PromptEncoder(made).chat_text(asked).endswith("assistant\n")
    quiet = PromptEncoder(made, {"enable_thinking": False})
    assert quiet.chat_text(asked).endswith("assistant\n<think></think>")
    assert quiet.text_ids(asked) == quiet.tokenizer(quiet.chat_text(asked))["input_ids"]
    for name in ("enable_thinkin", "messages", "add_generation_prompt", "tokenize"):
        with pytest.raises(ConfigError, match=rf"model\.chat_template_kwargs: .* no variable {name}"):
            PromptEncoder(made, {name: True})


def test_variables_of_a_folder(tmp_path: Path) -> None:
    path = folder(tmp_path, tokenizer(THINKS, IM, TAGS, "<|im_end|>"))
    quiet = PromptEncoder.from_pretrained(path, {"enable_thinking": False})
    assert quiet.chat_text(prompt("x")).endswith("<think></think>")


@pytest.mark.parametrize("whole", [True, False])
def test_the_date_of_a_template_never_changes(whole: bool) -> None:
    """Replayed prompts, and those of a run that goes on over midnight, must stay what they were."""
    template = CHAT_TEMPLATE.replace("<assistant>{% endif %}", "{{ strftime_now('%Y-%m-%d %H:%M') }}{% endif %}")
    made = vision(template) if whole else tokenizer(template, ("<end_of_utterance>",), (), None)
    assert PromptEncoder(made).chat_text(prompt("x", question="?")) == "<user>?2026-01-01 00:00"


def vision(template: str) -> Any:
    """The embedded processor with another template."""
    made = copy.deepcopy(processor())
    made.chat_template = template
    return made


PRINTS = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"
PRINTS_JSON = PRINTS.replace("['content']", "['content'] | tojson if m['content'] is not string else m['content']")
CONCATENATES = "{{ '<user>' + messages[0]['content'] + '<assistant>' }}"


@pytest.mark.parametrize("template", [PRINTS, PRINTS_JSON, CONCATENATES])
def test_a_template_that_writes_lists_as_python_does_gets_texts(template: str) -> None:
    made = PromptEncoder(vision(template))
    assert made.chat_text(prompt("x", question='Is "1" odd?')) == '<user>Is "1" odd?<assistant>'
    with pytest.raises(ConfigError, match="writes no questions with pictures"):
        made.encode(prompt("y", picture(0)))


def test_a_text_model_whose_template_reads_parts_gets_parts() -> None:
    template = CHATML.replace("{{ m['content'] }}", "{% for part in m['content'] %}{{ part['text'] }}{% endfor %}")
    made = PromptEncoder(tokenizer(template, IM, (), None))
    asked = prompt("x", question="1+1?")
    assert made.chat_text(asked) == "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
    assert made.turn_end_id == made.tokenizer.convert_tokens_to_ids("<|im_end|>")


@pytest.mark.parametrize("template", ["<assistant>", "{{ messages[0]['text'] }}", "{{ raise_exception('no') }}"])
def test_a_template_that_writes_no_question_is_refused(template: str) -> None:
    with pytest.raises(ConfigError, match="writes no question, neither as a text nor as a list of parts"):
        PromptEncoder(vision(template))


def test_as_many_placeholders_as_pictures() -> None:
    one = CHAT_TEMPLATE.replace("<image>", "{% if loop.first %}<image>{% endif %}")
    made = PromptEncoder(vision(one))
    assert made.chat_text(prompt("x", picture(0), question="?")) == "<user><image>?<assistant>"
    with pytest.raises(ConfigError, match=r"prompt 'x': the chat template wrote 1 placeholders '<image>' for 2 pic"):
        made.chat_text(prompt("x", picture(0), picture(0)))


def test_the_tokenizers_template_serves_where_the_processor_has_none() -> None:
    made = vision("")
    made.chat_template, made.tokenizer.chat_template = None, CHAT_TEMPLATE
    assert PromptEncoder(made).chat_text(prompt("x", picture(0), question="?")) == "<user><image>?<assistant>"


# ---------------------------------------------------------------- questions


@pytest.mark.parametrize("name", FAMILIES)
def test_special_tokens_in_a_question_are_refused_by_name(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    made = family.encoder(tmp_path)
    for token in {*family.special, family.end}:
        assert made.tokenizer(f"a{token}b")["input_ids"].count(made.tokenizer.convert_tokens_to_ids(token)) == 1
        for method in (made.check_question, made.text_ids, made.encode):
            with pytest.raises(DataError, match=r"prompt 'train/7': the question contains the special token") as caught:
                method(prompt("train/7", question=f"What does a{token}b mean?"))
            assert repr(token) in str(caught.value)
    made.check_question(prompt("x", question="<p> a < b | c > d </p> <|pipe|> [INST] <answer></answer>"))


def test_placeholders_in_a_question_are_refused_by_name() -> None:
    made = copy.deepcopy(processor())
    made.video_token = "<user>"  # a token that is not special
    maker = PromptEncoder(made)
    assert maker.tokenizer.convert_tokens_to_ids("<user>") in maker.forbidden_token_ids()
    for token in ("<image>", "<user>"):
        with pytest.raises(DataError, match=f"contains the picture placeholder '{token}'"):
            maker.check_question(prompt("x", question=f"What is {token}?"))
    for token in ("<global-img>", "<end_of_utterance>", "<pad>"):
        with pytest.raises(DataError, match=f"contains the special token '{token}'"):
            maker.check_question(prompt("x", question=f"What is {token}?"))


def test_the_usual_placeholder_is_refused_beside_pictures_whatever_the_models_own_is() -> None:
    made = copy.deepcopy(processor())
    made.image_token = "<|image_pad|>"
    made.tokenizer = tokenizer(CHATML, (*IM, "<|image_pad|>"), (), "<|im_end|>")
    maker = PromptEncoder(made)
    maker.check_question(prompt("x", question="Close the <image> of an SVG."))
    with pytest.raises(DataError, match="prompt 'y': the question contains the picture placeholder '<image>'"):
        maker.check_question(prompt("y", picture(0), question="<image>\nWhat is it?"))


def test_a_text_model_takes_no_pictures() -> None:
    with pytest.raises(DataError, match=r"'train/6' has 1 picture\(s\), but the policy takes text only"):
        PromptEncoder(tokenizer(CHATML, IM, (), "<|im_end|>")).check_question(prompt("train/6", picture(0)))
