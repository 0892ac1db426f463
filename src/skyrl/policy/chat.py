"""What a model's chat template does, found out by rendering small conversations with it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from jinja2.exceptions import TemplateError

from skyrl.records import ConfigError, Turn

QUESTION, ANSWER, NEXT = "question-7f3", "answer-7f3", "another-7f3"  # no template writes these of its own accord
TEMPLATE_FAULTS = (TemplateError, TypeError, ValueError, AttributeError, KeyError)
"""What a template may raise for a message in a form, or of a role, that it does not know."""


class ChatTemplate:
    """Writes prompts with the chat template of a processor or a plain tokenizer.

    Args:
        variables: Further ones of the template, such as ``{"enable_thinking": False}``.
        in_parts: Give it messages as lists of parts, if it takes those as well as plain strings.

    Raises:
        ConfigError: if there is no template, or one that does not read a variable or does not write questions.
    """

    def __init__(self, processor: Any, variables: dict[str, Any], in_parts: bool) -> None:
        owners = (processor, getattr(processor, "tokenizer", processor))
        self._owner: Any = next((owner for owner in owners if getattr(owner, "chat_template", None)), None)
        if self._owner is None:
            raise _refused("has no chat template, so no prompt can be written for it")
        read = set(re.findall(r"\w+", str(self._owner.chat_template))) - {"messages", "add_generation_prompt"}
        if unread := sorted(variables.keys() - read):
            raise ConfigError(f"model.chat_template_kwargs: the chat template reads no variable {', '.join(unread)}")
        # A template that writes today's date would make another prompt of a replayed one tomorrow.
        day = {"strftime_now": datetime(2026, 1, 1).strftime} if "strftime_now" in read else {}
        self._variables = variables | day
        forms = [form for form in (in_parts, not in_parts) if self._writes(form, 0)]
        if not forms:
            raise _refused("has a chat template that writes no question, neither as a text nor as a list of parts")
        self._in_parts = forms[0]
        self._forms = {"user": forms[0]}
        self._takes_pictures = self._writes(True, 1)
        self.opening = self.prompt((Turn("user", (QUESTION,)),)).partition(QUESTION)[2]
        """What it writes between a question and its answer."""
        turns = [Turn("user", (QUESTION,)), Turn("assistant", (ANSWER,)), Turn("user", (NEXT,))]
        said = [_message(turn, self._in_parts) for turn in turns]
        self.end = self._try(said[:2], False).partition(ANSWER)[2]
        self.between = self._try(said, False).partition(ANSWER)[2].partition(NEXT)[0]
        """What it writes behind a last answer, and between an answer and the next question; "" if it can't."""

    def prompt(self, turns: Sequence[Turn], answer_next: bool = True) -> str:
        """A conversation, pictures in their places, up to where the answer begins; all of it with its end if no
        answer comes next.

        Raises:
            ConfigError: if there are pictures and the template writes none, or if it refuses the conversation, as many
                do where there is a system turn.
        """
        pictured = any(None in turn.parts for turn in turns)
        if pictured and not self._takes_pictures:
            raise _refused("has a chat template that writes no questions with pictures")
        messages = [_message(turn, self._form(turn.role) or None in turn.parts) for turn in turns]
        try:
            return self._render(messages, answer_next)
        except TEMPLATE_FAULTS as error:
            roles = ", ".join(turn.role for turn in turns)
            raise ConfigError(f"the chat template can't write a conversation of {roles}: {error}") from error

    def _form(self, role: str) -> bool:
        """Whether it takes this role's messages as lists of parts: some read those in the user's turns only."""
        if role not in self._forms:
            said = [Turn("user", (NEXT,)), Turn(role, (QUESTION,)), Turn("user", (NEXT,))][role == "system" :]

            def writes(form: bool) -> bool:
                messages = [_message(turn, form if turn.role == role else self._in_parts) for turn in said]
                return _wrote(self._try(messages, True))

            self._forms[role] = (
                not self._in_parts if writes(not self._in_parts) > writes(self._in_parts) else self._in_parts
            )
        return self._forms[role]

    def _writes(self, in_parts: bool, pictures: int) -> bool:
        return _wrote(self._try([_message(Turn("user", (*[None] * pictures, QUESTION)), in_parts)], True))

    def _try(self, messages: list[dict[str, Any]], answer_next: bool) -> str:
        try:
            return self._render(messages, answer_next)
        except TEMPLATE_FAULTS:
            return ""

    def _render(self, messages: list[dict[str, Any]], answer_next: bool) -> str:
        render = self._owner.apply_chat_template
        return str(render(messages, add_generation_prompt=answer_next, tokenize=False, **self._variables))


def _refused(why: str) -> ConfigError:
    mend = "put the template of the model's family into chat_template.jinja in its folder"
    return ConfigError(f"the processor of model.policy or model.reward {why}; {mend}")


def _wrote(text: str) -> bool:
    # Many print a list of parts as Python or JSON would: [{'type': 'text', 'text': '…'}].
    return QUESTION in text and not re.search(rf"""["']text["']: ?["']{QUESTION}""", text)


def _message(turn: Turn, in_parts: bool) -> dict[str, Any]:
    parts = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in turn.parts]
    return {"role": turn.role, "content": parts if in_parts else "".join(part or "" for part in turn.parts)}


def misplaced(text: str, turns: Sequence[Turn], placeholder: str | None) -> str | None:
    """What of a conversation does not stand in the text that a template made of it: the first of its texts that was
    left out or moved past a picture; None if all stand where they should.

    Args:
        placeholder: A picture's; texts never hold it.
    """
    pieces, place = (text.split(placeholder) if placeholder else [text]), 0
    rest = pieces[0]
    for turn in turns:
        for part in turn.parts:
            if part is None:
                place += 1
                rest = pieces[place] if place < len(pieces) else ""
                continue
            # Templates strip texts, and leave the reasoning of earlier answers out.
            said = (part.rpartition("</think>")[2] if turn.role == "assistant" else part).strip()
            _, found, rest = rest.partition(said) if said else ("", "-", rest)
            if not found:
                return said
    return None
