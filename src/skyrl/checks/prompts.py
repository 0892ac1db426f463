"""Whether prompts are written once: by a template that was applied twice, or with two beginnings, a policy is asked in
a form that it never saw. Rollout and learner both use it, so no comparison of the two shows it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from skyrl.records import DataError, Prompt

if TYPE_CHECKING:
    from skyrl.policy.encode import PromptEncoder
    from skyrl.rollout.sampler import Sampler

LOOKED_AT = 4
"""Prompts of each split that a run looks at when it starts."""


def first_prompts(sampler: Sampler) -> None:
    """:func:`written_once` for the first prompts that a rollout member has."""
    splits = sampler.datasets.values()
    written_once(sampler.encoder, (data[row] for data in splits for row in range(min(LOOKED_AT, len(data)))))


def written_once(encoder: PromptEncoder, prompts: Iterable[Prompt]) -> int:
    """Look at both ends of each prompt; how many there were.

    Raises:
        DataError: for a prompt that begins with one special token twice, or that ends with what the chat template
            writes in front of an answer twice.
    """
    count = 0
    opening, special = encoder.opening.strip(), {*encoder.tokenizer.all_special_ids} - {encoder.image_token_id}
    for count, prompt in enumerate(prompts, 1):  # noqa: B007 -- is returned
        ids = encoder.encode(prompt)[0]
        if len(ids) > 1 and ids[0] == ids[1] and int(ids[0]) in special:
            token = encoder.tokenizer.convert_ids_to_tokens(int(ids[0]))
            raise DataError(
                f"prompt {prompt.id!r} begins with {token!r} twice: the chat template writes it, and the tokenizer or "
                "the template once more; take it out of one of the two"
            )
        text = encoder.chat_text(prompt).rstrip()
        if opening and text.removesuffix(opening).rstrip().endswith(opening):
            raise DataError(
                f"prompt {prompt.id!r} ends with {opening!r} twice: the chat template was applied to a text that it "
                "had written already; let the data hold plain questions"
            )
    return count
