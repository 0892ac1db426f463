"""The embedded architecture with random weights, for tests that need a real forward pass but no training."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from transformers import Idefics3ForConditionalGeneration

from skyrl.digits.architecture import build_config, build_processor
from skyrl.digits.scenes import SCENE_PIXELS
from skyrl.policy.encode import PromptEncoder
from skyrl.records import Prompt

SHADES = (0, 51, 255)
"""Grey values of :func:`picture`; the processor maps 0 … 255 linearly to -1 … 1, so these become -1, -0.6 and 1."""


@lru_cache(maxsize=1)
def processor() -> Any:
    """One processor for all tests; nobody may change it."""
    return build_processor()


class CountingProcessor:
    """The processor, and how often it was asked for pictures."""

    def __init__(self) -> None:
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(processor(), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return processor()(*args, **kwargs)


def encoder() -> PromptEncoder:
    """A fresh encoder with an empty cache."""
    return PromptEncoder(processor())


def random_model(seed: int = 0, scale: float = 4.0) -> Any:
    """The policy's architecture with random weights, in evaluation mode.

    Args:
        seed: Of the weights.
        scale: Multiplies all matrices. Freshly drawn ones are so small that a wrong picture hardly shows in the output.
    """
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    model = Idefics3ForConditionalGeneration(build_config(processor().tokenizer))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(scale)
    return model.eval()


def picture(shade: int) -> np.ndarray:
    """A scene-sized picture of one grey."""
    return np.full((SCENE_PIXELS, SCENE_PIXELS, 3), shade, dtype=np.uint8)


def noise(seed: int) -> np.ndarray:
    """A scene-sized picture of random pixels."""
    return np.random.default_rng(seed).integers(0, 256, (SCENE_PIXELS, SCENE_PIXELS, 3), dtype=np.uint8)


def prompt(name: str, *images: np.ndarray, question: str = "What is the sum of the digits?") -> Prompt:
    return Prompt(name, question, images, "1", "exact")


def answer_ids(text: str, end: bool = True) -> np.ndarray:
    """int32 ids of an answer, with the end of sequence unless ``end`` is False."""
    tokenizer = processor().tokenizer
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return np.asarray([*ids, tokenizer.eos_token_id] if end else ids, dtype=np.int32)
