"""Batches of offline MPO: preference pairs from a file, in a shuffled order that a checkpoint can go on with."""

from __future__ import annotations

from typing import Any

import numpy as np

from skyrl.data.preference_pairs import ParquetPairs
from skyrl.data.stream import PromptStream
from skyrl.records import DataError, PreferencePair, Prompt, Sample, TrainBatch, TrainItem
from skyrl.settings import DataConfig, RolloutConfig


class OfflinePairs:
    """Owns the pairs of ``data.pairs_path`` and the position in them.

    Args:
        data: The file, its order's seed and the pairs of a step.
        policy_folder: Hugging Face folder whose tokenizer and processor encode them.
        rollout: Its ``max_prompt_tokens`` and ``max_new_tokens`` are the longest prompt and answer; ``None`` checks no
            length.
        chat_template_kwargs: ``model.chat_template_kwargs``.

    Raises:
        DataError: for a broken file, naming row and column, a text that is too long, or fewer pairs than a step takes.
    """

    def __init__(
        self,
        data: DataConfig,
        policy_folder: str,
        rollout: RolloutConfig | None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> None:
        # torch and transformers, which the buffer needs for nothing else.
        from skyrl.policy.encode import PromptEncoder

        self.pairs = ParquetPairs(str(data.pairs_path))
        self.per_step = data.pairs_per_step
        if self.per_step > len(self.pairs):
            raise DataError(
                f"{data.pairs_path} has {len(self.pairs)} pairs, but data.pairs_per_step={self.per_step}: a step would "
                f"train some of them twice; lower it to {len(self.pairs)} or less"
            )
        self.stream = PromptStream(len(self.pairs), data.seed)
        self.encoder = PromptEncoder.from_pretrained(policy_folder, chat_template_kwargs)
        self.max_prompt_tokens = None if rollout is None else rollout.max_prompt_tokens
        self.pairs.check_tokens(
            self.encoder, self.max_prompt_tokens, None if rollout is None else rollout.max_new_tokens
        )

    def batch(self, step: int, version: int, weights: dict[str, float]) -> TrainBatch:
        """The next pairs, for a learner with ``version`` weight updates and the terms' ``weights`` of this step. Items
        come in the order of the pairs, chosen before rejected; none is in the GRPO term. Nobody sampled them: their
        log-probabilities are ``None``, and they have the learner's own version.

        Raises:
            DataError: if a picture can't be decoded, or a prompt with its pictures is too long.
        """
        items: list[TrainItem] = []
        pairs: list[PreferencePair] = []
        for row in self.stream.take(self.per_step):
            pair = self.pairs[row]
            prompt_ids = self._prompt_ids(pair.prompt)
            pairs.append(PreferencePair(len(items), len(items) + 1, pair.margin))
            texts = [pair.chosen, pair.rejected]
            for index, (text, ids) in enumerate(zip(texts, self.encoder.answer_ids(texts), strict=True)):
                sample = Sample(index, ids, None, text, truncated=False, policy_version=version)
                items.append(TrainItem(pair.prompt, prompt_ids, sample, grpo_weight=0.0))
        return TrainBatch(step, version, weights, items, pairs, grpo_samples=0, grpo_tokens=0)

    def state_dict(self) -> dict[str, Any]:
        """The position in the file; picklable."""
        return self.stream.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position.

        Raises:
            DataError: if it was saved for another number of pairs or another seed.
        """
        self.stream.load_state_dict(state)

    def _prompt_ids(self, prompt: Prompt) -> np.ndarray:
        ids, _ = self.encoder.encode(prompt)
        if self.max_prompt_tokens is not None and len(ids) > self.max_prompt_tokens:
            raise DataError(
                f"{self.pairs.path}, pair {prompt.id!r} has a prompt of {len(ids)} tokens with its pictures; "
                f"rollout.max_prompt_tokens allows {self.max_prompt_tokens}"
            )
        return ids
