"""How many tokens prompts have, without encoding each picture, and cutting those that have too many."""

from __future__ import annotations

from dataclasses import replace

from skyrl.policy.encode import PromptEncoder
from skyrl.records import DataError, Prompt, Turn

EXACT = 16
"""Tokens round a limit in which a prompt with pictures is encoded as a whole: a picture's last token and the text
behind it may join."""
REFUSALS = (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError)
"""What processors raise for pictures that they can't take."""


class PromptLengths:
    """Measures prompts by the model's own processor. How many tokens pictures add depends on their sizes alone, so each
    combination of sizes is run through the processor once.

    Args:
        limit: The most tokens that a prompt may have.
    """

    def __init__(self, encoder: PromptEncoder, limit: int) -> None:
        self.encoder, self.limit = encoder, limit
        self._added: dict[tuple[tuple[int, ...], ...], int] = {}

    def tokens(self, prompt: Prompt) -> int:
        """Tokens of a prompt, placeholders expanded; those of its pictures may be black ones of the same sizes.

        Raises:
            DataError: naming the prompt, for a text that can't be asked and for pictures that the processor refuses.
        """
        text = len(self.encoder.text_ids(prompt))
        if not prompt.images:
            return text
        sizes = tuple(picture.shape[:2] for picture in prompt.images)
        if sizes not in self._added:
            self._added[sizes] = self._whole(prompt) - text
        found = text + self._added[sizes]
        return found if abs(found - self.limit) > EXACT else self._whole(prompt)

    def cut(self, prompt: Prompt) -> Prompt:
        """The prompt, if need be without as many characters at the beginning of its last turn as make it short enough;
        pictures and what stands at the end stay. The same prompt is always cut alike.

        Raises:
            DataError: as :meth:`tokens`, and if it is too long even with one character left.
        """
        if self.tokens(prompt) <= self.limit:
            return prompt
        low, high = 0, len(prompt.question) - 1  # characters cut off: too few, perhaps enough
        if high < 1 or self.tokens(_shortened(prompt, high)) > self.limit:
            raise DataError(
                f"prompt {prompt.id!r} is too long for rollout.max_prompt_tokens={self.limit} however it is cut"
            )
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.tokens(_shortened(prompt, middle)) <= self.limit else (middle, high)
        return _shortened(prompt, high)

    def _whole(self, prompt: Prompt) -> int:
        try:
            return len(self.encoder.encode_anew(prompt)[0])
        except REFUSALS as error:
            sizes = ", ".join(f"{picture.shape[1]}x{picture.shape[0]}" for picture in prompt.images)
            raise DataError(
                f"prompt {prompt.id!r}: the model's processor refuses its pictures of {sizes} pixels: "
                f"{type(error).__name__}: {error}"
            ) from error


def _shortened(prompt: Prompt, count: int) -> Prompt:
    """Without the first ``count`` characters of the last turn's texts."""
    parts = list[str | None]()
    for part in prompt.conversation[-1].parts:
        kept = part if part is None else part[count:]
        count -= 0 if part is None else min(count, len(part))
        parts += [] if kept == "" else [kept]
    turns = (*prompt.turns[:-1], Turn("user", tuple(parts))) if prompt.turns else ()
    return replace(prompt, question="".join(part for part in parts if part is not None), turns=turns)
