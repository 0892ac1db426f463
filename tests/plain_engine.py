"""A second engine: transformers and a plain loop, on CPU. What it takes to stand where vLLM stands.

It starts in a second, so that whole runs fit in a unit test: ``rollout.engine=tests.plain_engine:PlainEngine``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image

from skyrl.policy.module import load_policy
from skyrl.records import SyncError, WeightSnapshot
from skyrl.rollout.engine import Completion, EngineRequest
from skyrl.settings import Config
from skyrl.sync.snapshot import parameters_of


class PlainEngine:
    """See :class:`skyrl.rollout.engine.Engine`. Keeps nothing between requests, so there is no cache to forget."""

    def __init__(self, cfg: Config, policy_folder: str) -> None:
        from transformers import AutoProcessor

        self.processor: Any = AutoProcessor.from_pretrained(policy_folder)
        self.tokenizer: Any = getattr(self.processor, "tokenizer", self.processor)
        self.model: Any = load_policy(policy_folder, cfg.model.dtype).eval()
        self.vocabulary = int(self.model.get_output_embeddings().weight.shape[0])

    def generate(self, requests: list[EngineRequest]) -> list[list[Completion]]:
        return [self._answers(request) for request in requests]

    def load(self, snapshot: WeightSnapshot) -> None:
        own, sent = dict(self.model.named_parameters()), dict(parameters_of(snapshot))
        if own.keys() != sent.keys():
            raise SyncError(f"weight snapshot {snapshot.version} has other parameters: {own.keys() ^ sent.keys()}")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(sent[name])

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
        for _ in range(request.max_tokens):
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
        prompt_ids = inputs["input_ids"][0].numpy().astype(np.int32)
        return [self._completion(prompt_ids, row, i in going) for i, row in enumerate(rows)]

    def _completion(self, prompt_ids: np.ndarray, row: list[tuple[int, float]], truncated: bool) -> Completion:
        ids, logprobs = np.array([i for i, _ in row], np.int32), np.array([p for _, p in row], np.float32)
        spoken = ids if truncated else ids[:-1]
        text = self.tokenizer.decode(spoken, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return Completion(prompt_ids, ids, logprobs, text, truncated)

    def _inputs(self, request: EngineRequest) -> dict[str, torch.Tensor]:
        """The model's inputs, one row; the processor expands the placeholders."""
        if not request.pictures:
            return {"input_ids": torch.tensor([request.prompt_ids])}
        text = self.tokenizer.decode(request.prompt_ids, clean_up_tokenization_spaces=False)
        if self.tokenizer(text, add_special_tokens=False)["input_ids"] != request.prompt_ids:
            raise ValueError(f"{text!r} has other tokens than those that it was decoded from")
        pictures = [Image.fromarray(picture) for picture in request.pictures]
        return dict(self.processor(text=text, images=pictures, add_special_tokens=False, return_tensors="pt"))


def log_distribution(logits: torch.Tensor, request: EngineRequest) -> torch.Tensor:
    """log-probabilities float32 [n, V] that the next tokens are drawn from."""
    scaled = logits.float() / (request.temperature or 1.0)
    scaled[:, list(request.forbidden_ids)] = -torch.inf
    if request.top_p < 1:  # the fewest likeliest tokens that reach top_p together
        sorted_p, order = scaled.softmax(-1).sort(descending=True)
        beyond = sorted_p.cumsum(-1) - sorted_p >= request.top_p
        scaled[torch.zeros_like(beyond).scatter(-1, order, beyond)] = -torch.inf
    return scaled.log_softmax(-1)
