"""What a model's chat template does, found out by rendering small conversations with it."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Any

from jinja2.exceptions import TemplateError

from skyrl.records import ConfigError

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
        self._takes_pictures = self._writes(True, 1)
        self.opening = self.prompt(QUESTION).partition(QUESTION)[2]
        """What it writes between a question and its answer."""
        turns = [("user", QUESTION), ("assistant", ANSWER), ("user", NEXT)]
        said = [_message(role, text, self._in_parts) for role, text in turns]
        self.end = self._try(said[:2], False).partition(ANSWER)[2]
        self.between = self._try(said, False).partition(ANSWER)[2].partition(NEXT)[0]
        """What it writes behind a last answer, and between an answer and the next question; "" if it can't."""

    def prompt(self, question: str, pictures: int = 0) -> str:
        """The user's message, pictures first, up to where the answer begins.

        Raises:
            ConfigError: if there are pictures and the template writes none.
        """
        if pictures and not self._takes_pictures:
            raise _refused("has a chat template that writes no questions with pictures")
        return self._render([_message("user", question, self._in_parts or pictures > 0, pictures)], True)

    def _writes(self, in_parts: bool, pictures: int) -> bool:
        text = self._try([_message("user", QUESTION, in_parts, pictures)], True)
        # Many print a list of parts as Python or JSON would: [{'type': 'text', 'text': '…'}].
        return QUESTION in text and not re.search(rf"""["']text["']: ?["']{QUESTION}""", text)

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


def _message(role: str, text: str, in_parts: bool, pictures: int = 0) -> dict[str, Any]:
    parts = [{"type": "image"} for _ in range(pictures)] + [{"type": "text", "text": text}]
    return {"role": role, "content": parts if in_parts else text}
