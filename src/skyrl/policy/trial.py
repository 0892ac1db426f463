"""May answers share their prompt's row in this model? Tried on the model itself when a run starts."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, Protocol

import numpy as np
import torch

from skyrl.policy.attention import NAME, attention_of
from skyrl.policy.encode import EncodedBatch, PromptEncoder
from skyrl.policy.forest import Rows
from skyrl.policy.packing import Row
from skyrl.policy.rounding import rounding_errors
from skyrl.records import Prompt, SkyrlError

FLOOR = 1e-5
"""What a token's numbers may differ by, whatever the model."""
ROUNDING, DRAWS = 3.0, 2
"""Above it: so many times what rounding errors do to the plain rows, the largest of so many draws."""
WINDOW = 6
"""Tokens that a sliding window is narrowed to, so that short rows are longer."""
WINDOWS = ("sliding_window", "attention_chunk_size")
SIDE = 112
"""Pixels of a trial picture."""
CAUGHT = (SkyrlError, ImportError, OSError, ValueError, RuntimeError, TypeError, LookupError, AttributeError)

logger = logging.getLogger(__name__)


class Tried(Protocol):
    """A model that is tried: a learner's :class:`~skyrl.learner.backend.Backend`, or the reward model."""

    device: torch.device
    model: Any
    collective: bool

    def score(self, rows: EncodedBatch) -> torch.Tensor:
        """Of the M answer tokens of the rows, [M] log-probabilities or [M, H] other numbers of about their size."""
        ...

    def reduce(self, values: torch.Tensor, operation: Literal["sum", "max"]) -> torch.Tensor:
        """The values [n] over all ranks."""
        ...


def forests_agree(tried: Tried, encoder: PromptEncoder, name: str) -> bool:
    """Whether a forest gives each answer the numbers of its plain row, with pictures if the model takes any.
    Collective, with the same verdict on every rank; a "no" is logged with its reason and the model's ``name``.

    Raises:
        SkyrlError: under ZeRO-3, if the policy's code can't run a forest at all.
    """
    plain = f"{name} runs each answer in a row of its own"
    if (used := attention_of(tried.model)) != {NAME}:
        logger.warning("%s: it computes attention with %s", plain, ", ".join(sorted(used)))
        return False
    windows = [False, True] if _windows(tried.model) else [False]
    try:
        rows = _trial_rows(encoder)
        reason = next((found for narrow in windows if (found := _difference(tried, encoder, rows, narrow))), "")
    except CAUGHT as error:  # the model's own code may refuse in any way
        reason = f"{type(error).__name__}: {error}"
        if tried.collective and not isinstance(error, SkyrlError):  # its parameters are left half gathered
            what = "the policy can't run rows of several answers; set learner.shared_rows=false"
            raise SkyrlError(f"{what} ({reason})") from error
    refused = tried.reduce(torch.tensor([float(bool(reason))], device=tried.device), "max")
    if float(refused):
        logger.warning("%s: %s", plain, reason or "another rank says so")
    return not float(refused)


def _difference(tried: Tried, encoder: PromptEncoder, rows: list[Row], narrow: bool) -> str:
    """What speaks against forests, "" if nothing does."""
    with _narrowed(tried.model, WINDOW if narrow else None):
        plain, forest = (Rows.of(rows, encoder, tried.device, kind) for kind in (False, True))
        want = tried.score(plain.encoded)[plain.places]

        def gap(found: torch.Tensor) -> float:
            """Of all ranks, so that they go the same way."""
            apart = (found - want).abs().max().nan_to_num(nan=torch.inf)
            return float(tried.reduce(apart.double().view(1), "max"))

        apart, limit = gap(tried.score(forest.encoded)[forest.places]), FLOOR
        if apart <= limit:
            return ""
        for seed in range(DRAWS):
            with rounding_errors(tried.model, seed):
                limit = max(limit, ROUNDING * gap(tried.score(plain.encoded)[plain.places]))
        if not apart <= limit:
            return f"its answers' tokens differ by {apart:.2g}, rounding explains {limit:.2g}"
        encoded = forest.encoded
        assert encoded.depths is not None
        wrong = replace(encoded, depths=encoded.depths + encoded.answer_mask)  # every answer one place too far
        seen = gap(tried.score(wrong)[forest.places])
        if seen <= limit:
            return f"rounding errors ({limit:.2g}) would hide a wrong position ({seen:.2g})"
    return ""


def _trial_rows(encoder: PromptEncoder) -> list[Row]:
    """Two prompts with a picture each, if the model takes any, and one without; answers of different lengths, of which
    two begin alike."""
    rng = np.random.default_rng(0)
    allowed = np.setdiff1d(np.arange(len(encoder.tokenizer)), encoder.forbidden_token_ids())
    a, b, c = (rng.choice(allowed, length).astype(np.int32) for length in (9, 5, 2))
    b[:3] = a[:3]
    answers, rows = {"a": (a, b, c), "b": (b, a), "c": (c, a)}, []
    for name, question in (("a", "What do you see?"), ("b", "What is 12 + 3?"), ("c", "What is this picture about?")):
        seen = (rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8),)
        prompt = Prompt(f"trial/{name}", question, seen if encoder.image_token and name != "b" else (), "", "exact")
        rows += [(prompt, encoder.encode(prompt)[0], answer) for answer in answers[name]]
    return rows


def _windows(model: Any) -> list[tuple[Any, str]]:
    """Where parts of the model, and their configurations, keep the width of a sliding window."""
    parts = list(model.modules())
    holders = {id(held): held for part in parts for held in (part, getattr(part, "config", None))}.values()
    return [(held, name) for held in holders for name in WINDOWS if type(getattr(held, name, None)) is int]


@contextmanager
def _narrowed(model: Any, width: int | None) -> Iterator[None]:
    """Inside, every sliding window of the model has this width; None leaves them alone."""
    old = [(held, name, getattr(held, name)) for held, name in (_windows(model) if width else [])]
    try:
        for held, name, _ in old:
            setattr(held, name, width)
        yield
    finally:
        for held, name, value in old:
            setattr(held, name, value)
