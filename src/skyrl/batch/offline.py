"""Batches of offline MPO: preference pairs from a file, in a shuffled order that a checkpoint can go on with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from skyrl.data.preference_pairs import ParquetPairs
from skyrl.data.stream import PromptStream
from skyrl.records import DataError, PreferencePair, Sample, TrainBatch, TrainItem
from skyrl.settings import DataConfig, RolloutConfig


class OfflinePairs:
    """Owns the pairs of ``data.pairs_path``.

    Args:
        data: The file, its order's seed and the pairs of a step.
        policy_folder: Hugging Face folder whose tokenizer and processor encode them.
        rollout: Its ``max_prompt_tokens`` and ``max_new_tokens`` are the longest prompt and answer.
        chat_template_kwargs: ``model.chat_template_kwargs``.
        tags: Those of ``reward.answer``; the usual ones by default.

    Raises:
        DataError: for a broken file, naming row and column, a text that is too long, or fewer pairs than a step takes.
    """

    def __init__(
        self,
        data: DataConfig,
        policy_folder: str,
        rollout: RolloutConfig,
        chat_template_kwargs: dict[str, Any] | None = None,
        tags: Sequence[str] | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        # torch and transformers, which the buffer needs for nothing else.
        from skyrl.policy.encode import TAGS, PromptEncoder

        self.pairs, self.per_step = ParquetPairs(str(data.pairs_path)), data.pairs_per_step
        if self.per_step > len(self.pairs):
            raise DataError(
                f"{data.pairs_path} has {len(self.pairs)} pairs, but data.pairs_per_step={self.per_step}: a step would "
                f"train some of them twice; lower it to {len(self.pairs)} or less"
            )
        self.stream = PromptStream(len(self.pairs), data.seed)
        """The position in the file, which is state."""
        self.encoder = PromptEncoder.from_pretrained(
            policy_folder, chat_template_kwargs, trust_remote_code, tags or TAGS
        )
        self.max_prompt_tokens = rollout.max_prompt_tokens
        self.pairs.check_tokens(self.encoder, rollout.max_prompt_tokens, rollout.max_new_tokens)

    def batch(self, step: int, version: int, weights: dict[str, float]) -> TrainBatch:
        """The next pairs, in order, chosen before rejected; no item is in the GRPO term. Nobody sampled them: their
        log-probabilities are ``None``, and they have the learner's own ``version``.

        Raises:
            DataError: if a picture can't be decoded, or a prompt with its pictures is too long.
        """
        items: list[TrainItem] = []
        pairs: list[PreferencePair] = []
        for row in self.stream.take(self.per_step):
            pair = self.pairs[row]
            prompt_ids = self.encoder.encode(pair.prompt)[0]
            if len(prompt_ids) > self.max_prompt_tokens:
                raise DataError(
                    f"{self.pairs.path}, pair {pair.prompt.id!r} has a prompt of {len(prompt_ids)} tokens with its "
                    f"pictures; rollout.max_prompt_tokens allows {self.max_prompt_tokens}"
                )
            pairs.append(PreferencePair(len(items), len(items) + 1, pair.margin))
            texts = [pair.chosen, pair.rejected]
            for index, (text, ids) in enumerate(zip(texts, self.encoder.answer_ids(texts), strict=True)):
                sample = Sample(index, ids, None, text, truncated=False, policy_version=version)
                items.append(TrainItem(pair.prompt, prompt_ids, sample, grpo_weight=0.0))
        return TrainBatch(step, version, weights, items, pairs, grpo_samples=0, grpo_tokens=0)
