"""What the policy's processor makes of prompts and answers."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from skyrl.checks.prompts import written_once
from skyrl.checks.subject import Skip, Subject
from skyrl.records import ConfigError, Prompt
from skyrl.settings import Config, RolloutConfig

PICTURED = 8
"""Prompts whose pictures go through the processor."""


def readable(subject: Subject) -> None:
    """Seen before anything starts: the processor can be loaded, and the policy can take what the prompts hold.

    Raises:
        ConfigError: if files or packages are missing, if prompts have pictures and the policy takes text only, or, with
            vLLM, as :func:`context`.
    """
    subject.encoder  # noqa: B018 -- opens it
    with suppress(Skip):
        pictures(subject)
    fits(subject.cfg, subject.policy)


def fits(cfg: Config, policy: str) -> None:
    """As :func:`context`, with vLLM, which would say it in words of its own when it starts."""
    if cfg.rollout.engine == RolloutConfig().engine:
        try:
            context(Subject(cfg, policy))
        except Skip:
            return
        except ConfigError as error:
            raise ConfigError(f"{error}; lower one of the two") from error


def pictures(subject: Subject) -> str:
    """A policy that takes text only gets no pictures."""
    pictured = _pictured(subject)
    try:
        takes_none = subject.encoder.image_token is None
    except Exception as error:  # whatever it is, the check of the chat template tells it
        raise Skip("the policy's processor can't be opened") from error
    if takes_none:
        raise ConfigError(
            f"model.policy={subject.cfg.model.policy} takes text only, but prompt {pictured[0].id!r} has "
            f"{len(pictured[0].images)} picture(s); choose a vision-language model, or data without pictures"
        )
    return f"the policy takes them; {len(pictured)} of the prompts that were looked at have some"


def chat_template(subject: Subject) -> str:
    """A prompt is written and read back, and an answer with its tags comes back as it was."""
    encoder = subject.encoder
    _, prompt = subject.prompts["train"][0]
    ids, unknown = encoder.text_ids(prompt), getattr(encoder.tokenizer, "unk_token_id", None)
    if unknown is not None and unknown in ids:
        raise ConfigError(
            f"the tokenizer has no token for a part of prompt {prompt.id!r}: {encoder.chat_text(prompt)!r}"
        )
    think, thought, say, said = subject.cfg.reward.answer.tags
    answer = f"{think}1+1 is 2.{thought}{say}2{said}"
    bare = answer.removeprefix(encoder.answer_prefix)
    back = encoder.decode_answer(encoder.answer_ids([answer])[0])
    if back.strip() != bare:
        raise ConfigError(f"the answer {bare!r} comes back from the tokenizer as {back!r}")
    opens = f"; it writes {encoder.answer_prefix} itself" if encoder.answer_prefix else ""
    return f"{len(ids)} tokens for prompt {prompt.id!r}{opens}: {_short(encoder.chat_text(prompt))}"


def prompt_form(subject: Subject) -> str:
    """Prompts are written once, with one beginning."""
    prompts = [prompt for some in subject.prompts.values() for _, prompt in some]
    return f"{written_once(subject.encoder, prompts)} prompts are written once, with one beginning"


def stop_tokens(subject: Subject) -> str:
    """Something that the policy can say ends an answer."""
    encoder = subject.encoder
    vocabulary = vocabulary_of(subject.policy)
    names = {i: encoder.tokenizer.convert_ids_to_tokens(i) for i in encoder.stop_token_ids}
    within = [i for i in names if vocabulary is None or i < vocabulary]
    if not within:
        raise ConfigError(f"all stop tokens lie beyond the {vocabulary} tokens of the output layer: {names}")
    if forbidden := {*within} & {*encoder.forbidden_token_ids()}:
        raise ConfigError(f"stop tokens that are never sampled: {sorted(forbidden)}")
    return ", ".join(f"{names[i]} ({i})" for i in within)


def picture_tokens(subject: Subject) -> str:
    """The processor writes as many placeholders as it says that pictures of these sizes take."""
    pictured = _pictured(subject)[:PICTURED]
    encoder, counts = subject.encoder, list[int]()
    foretell = getattr(encoder.processor, "_get_num_multimodal_tokens", None)
    for prompt in pictured:
        ids, tensors = encoder.encode(prompt)
        counts.append(int((ids == encoder.image_token_id).sum()))
        if not counts[-1] or not tensors:
            got = f"{counts[-1]} picture tokens and {len(tensors)} tensors"
            raise ConfigError(f"prompt {prompt.id!r}: the processor made {got}")
        sizes = [tuple(map(int, picture.shape[:2])) for picture in prompt.images]
        if foretell is not None:
            told = sum(foretell(image_sizes=sizes)["num_image_tokens"])
            # Some processors count the marks round a picture as well: all that its placeholder becomes.
            whole = len(ids) - len(encoder.text_ids(prompt)) + len(sizes)
            if told not in (counts[-1], whole):
                raise ConfigError(
                    f"prompt {prompt.id!r}: {counts[-1]} picture tokens are in the prompt, {whole} with the marks "
                    f"round them; the processor counts {told} for pictures of (height, width) {sizes}"
                )
    how = "as the processor counts them" if foretell is not None else "which this processor can't count beforehand"
    return f"{min(counts)} to {max(counts)} in {len(pictured)} prompts, {how}"


def _pictured(subject: Subject) -> list[Prompt]:
    """Prompts with pictures; :class:`Skip` if there are none."""
    found = [prompt for some in subject.prompts.values() for _, prompt in some if prompt.images]
    if not found:
        raise Skip("no prompt that was looked at has a picture")
    return found


def context(subject: Subject) -> str:
    """The longest prompt and the longest answer together have positions."""
    cfg, model = subject.cfg.rollout, _text_config(subject.policy)
    positions = model.get("max_position_embeddings")
    if positions is None:
        raise Skip("config.json names no max_position_embeddings")
    scaling = model.get("rope_parameters") or model.get("rope_scaling") or {}
    positions = int(positions * max(1.0, float(scaling.get("factor") or 1.0)))
    need = cfg.max_prompt_tokens + cfg.max_new_tokens
    both = f"rollout.max_prompt_tokens={cfg.max_prompt_tokens} + rollout.max_new_tokens={cfg.max_new_tokens}"
    said = f"{both} = {need} of {positions} positions"
    if need > positions:
        raise ConfigError(f"{said} (max_position_embeddings in the config.json of model.policy)")
    return said


def vocabulary_of(folder: str) -> int | None:
    """Size of the output layer by ``config.json``; None if it does not say."""
    found = _text_config(folder).get("vocab_size")
    return None if found is None else int(found)


def _text_config(folder: str) -> dict[str, Any]:
    """What ``config.json`` says of the language model; empty without one."""
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ConfigError(f"{path} is no JSON: {error}") from error
    return config | (config.get("text_config") or {})


def _short(text: str) -> str:
    return repr(text if len(text) <= 160 else f"{text[:80]}…{text[-80:]}")
