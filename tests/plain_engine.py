"""A second engine: transformers and a plain loop, on CPU. What it takes to stand where vLLM stands.

It starts in a second, so that whole runs fit in a unit test: ``rollout.engine=tests.plain_engine:PlainEngine``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from skyrl.policy.module import load_policy
from skyrl.records import SyncError
from skyrl.rollout.engine import Completion, EngineRequest, Enough
from skyrl.settings import Config


class PlainEngine:
    """See :class:`skyrl.rollout.engine.Engine`. Keeps nothing between requests, so there is no cache to forget."""

    def __init__(self, cfg: Config, policy_folder: str) -> None:
        from transformers import AutoProcessor

        self.processor: Any = AutoProcessor.from_pretrained(policy_folder)
        self.tokenizer: Any = getattr(self.processor, "tokenizer", self.processor)
        self.model: Any = load_policy(policy_folder, cfg.model.dtype).eval()
        self.vocabulary = int(self.model.get_output_embeddings().weight.shape[0])

    def generate(self, requests: list[EngineRequest], enough: Enough | None = None) -> list[list[Completion]]:
        made = [
            [self._answers(one)[0] for one in request.singly] if request.begun else self._answers(request)
            for request in requests
        ]
        return made if enough is None else self._stopped(made, enough)

    def _stopped(self, made: list[list[Completion]], enough: Enough) -> list[list[Completion]]:
        """What there would be if all answers grew side by side, a token at a time, until there is enough."""
        lengths = [max(len(one.token_ids) for one in answers) for answers in made]
        for now in sorted(set(lengths)):
            if enough([place for place, length in enumerate(lengths) if length <= now]):
                return [[one if len(one.token_ids) <= now else self._cut(one, now) for one in part] for part in made]
        return made

    def _cut(self, one: Completion, kept: int) -> Completion:
        return replace(
            one, token_ids=one.token_ids[:kept], logprobs=one.logprobs[:kept], text="", truncated=False, stopped=True
        )

    def load(self, parameters: Iterable[tuple[str, torch.Tensor]], version: int, whole: bool) -> None:
        own, sent = dict(self.model.named_parameters()), dict(parameters)
        if not sent.keys() <= own.keys() or (whole and own.keys() != sent.keys()):
            raise SyncError(f"weight snapshot {version} has other parameters: {own.keys() ^ sent.keys()}")
        with torch.no_grad():
            for name, tensor in sent.items():
                own[name].copy_(tensor)

    def transfer(self, method: str, kwargs: dict[str, Any]) -> None:
        raise SyncError(f"PlainEngine has no {method}: it takes weights with rollout.weight_sync=shm only")

    @torch.no_grad()
    def _answers(self, request: EngineRequest) -> list[Completion]:
        inputs = self._inputs(request)
        draws = [torch.Generator().manual_seed((request.seed or 0) + i) for i in range(request.n)]
        rows: list[list[tuple[int, float]]] = [[] for _ in draws]
        going = set(range(request.n))
        out = self.model(**inputs, use_cache=True)
        cache, logits = out.past_key_values, out.logits[:, -1].expand(request.n, -1)
        cache.batch_repeat_interleave(request.n)  # the prompt is read once
        for _ in range(request.max_tokens - sum(map(len, request.begun))):
            distribution = log_distribution(logits, request)
            chosen = distribution.argmax(-1)
            if request.temperature > 0:
                drawn = [row.exp().multinomial(1, generator=draws[i]) for i, row in enumerate(distribution)]
                chosen = torch.cat(drawn)
            for i in sorted(going):
                rows[i].append((int(chosen[i]), float(distribution[i, chosen[i]])))
                if rows[i][-1][0] in request.stop_ids:
                    going.remove(i)
            if not going:
                break
            logits = self.model(input_ids=chosen[:, None], past_key_values=cache, use_cache=True).logits[:, -1]
        prompt_ids = inputs["input_ids"][0, : inputs["input_ids"].shape[1] - sum(map(len, request.begun))]
        prompt_ids = prompt_ids.numpy().astype(np.int32)
        return [self._completion(prompt_ids, row, i in going, *request.begun) for i, row in enumerate(rows)]

    def _completion(
        self, prompt_ids: np.ndarray, row: list[tuple[int, float]], truncated: bool, begun: Sequence[int] = ()
    ) -> Completion:
        ids, logprobs = np.array([i for i, _ in row], np.int32), np.array([p for _, p in row], np.float32)
        spoken = ids if truncated else ids[:-1]
        text = self.tokenizer.decode(
            [*begun, *spoken.tolist()], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return Completion(prompt_ids, ids, logprobs, text, truncated)

    def _inputs(self, request: EngineRequest) -> dict[str, torch.Tensor]:
        """The model's inputs, one row: the prompt, whose placeholders the processor expands, and what was begun."""
        begun = torch.tensor([own for own in request.begun], dtype=torch.long).reshape(1, -1)
        if not request.pictures:
            return {"input_ids": torch.cat([torch.tensor([request.prompt_ids]), begun], 1)}
        text = self.tokenizer.decode(request.prompt_ids, clean_up_tokenization_spaces=False)
        if self.tokenizer(text, add_special_tokens=False)["input_ids"] != request.prompt_ids:
            raise ValueError(f"{text!r} has other tokens than those that it was decoded from")
        pictures = [Image.fromarray(picture) for picture in request.pictures]
        made = dict(self.processor(text=text, images=pictures, add_special_tokens=False, return_tensors="pt"))
        made["input_ids"] = torch.cat([made["input_ids"], begun], 1)
        return made | {"attention_mask": torch.ones_like(made["input_ids"])}


def log_distribution(logits: torch.Tensor, request: EngineRequest) -> torch.Tensor:
    """log-probabilities float32 [n, V] that the next tokens are drawn from."""
    scaled = logits.float() / (request.temperature or 1.0)
    scaled[:, list(request.forbidden_ids)] = -torch.inf
    if request.top_p < 1:  # the fewest likeliest tokens that reach top_p together
        sorted_p, order = scaled.softmax(-1).sort(descending=True)
        beyond = sorted_p.cumsum(-1) - sorted_p >= request.top_p
        scaled[torch.zeros_like(beyond).scatter(-1, order, beyond)] = -torch.inf
    return scaled.log_softmax(-1)
