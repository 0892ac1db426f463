"""May this policy's answers share their prompt's row? Tried on the policy itself when a run starts."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from skyrl.learner.backend import Backend
from skyrl.learner.passes import Rows
from skyrl.policy.attention import NAME, attention_of
from skyrl.policy.encode import PromptEncoder
from skyrl.policy.packing import Row
from skyrl.records import Prompt, SkyrlError
from skyrl.sync.rounding import rounding_errors

FLOOR = 1e-5
"""Nats that a token's log-probability may differ by, whatever the model."""
ROUNDING, DRAWS = 3.0, 2
"""Above it: so many times what rounding errors do to the plain rows, the largest of so many draws."""
WINDOW = 6
"""Tokens that a sliding window is narrowed to, so that short rows are longer."""
WINDOWS = ("sliding_window", "attention_chunk_size")
SIDE = 112
"""Pixels of a trial picture."""
CAUGHT = (SkyrlError, ImportError, OSError, ValueError, RuntimeError, TypeError, LookupError, AttributeError)
PLAIN = "learner.shared_rows: the policy runs each answer in a row of its own"

logger = logging.getLogger(__name__)


def forests_agree(backend: Backend, encoder: PromptEncoder) -> bool:
    """Whether a forest gives each answer the log-probabilities of its plain row, with pictures if the policy takes any.
    Collective, with the same verdict on every rank; a "no" is logged with its reason.

    Raises:
        SkyrlError: under ZeRO-3, if the policy's code can't run a forest at all.
    """
    if (used := attention_of(backend.model)) != {NAME}:
        logger.warning("%s: it computes attention with %s", PLAIN, ", ".join(sorted(used)))
        return False
    windows = [False, True] if _windows(backend.model) else [False]
    try:
        rows = _trial_rows(encoder)
        reason = next((found for narrow in windows if (found := _difference(backend, encoder, rows, narrow))), "")
    except CAUGHT as error:  # the policy's own code may refuse in any way
        reason = f"{type(error).__name__}: {error}"
        if backend.collective and not isinstance(error, SkyrlError):  # its parameters are left half gathered
            what = "the policy can't run rows of several answers; set learner.shared_rows=false"
            raise SkyrlError(f"{what} ({reason})") from error
    refused = backend.reduce(torch.tensor([float(bool(reason))], device=backend.device), "max")
    if float(refused):
        logger.warning("%s: %s", PLAIN, reason or "another rank says so")
    return not float(refused)


def _difference(backend: Backend, encoder: PromptEncoder, rows: list[Row], narrow: bool) -> str:
    """What speaks against forests, "" if nothing does."""
    with _narrowed(backend.model, WINDOW if narrow else None):
        plain, forest = (Rows.of(rows, encoder, backend.device, kind) for kind in (False, True))
        want = backend.score(plain.encoded)[plain.places]

        def gap(found: torch.Tensor) -> float:
            """Of all ranks, so that they go the same way."""
            apart = (found - want).abs().max().nan_to_num(nan=torch.inf)
            return float(backend.reduce(apart.double().view(1), "max"))

        apart, limit = gap(backend.score(forest.encoded)[forest.places]), FLOOR
        if apart <= limit:
            return ""
        for seed in range(DRAWS):
            with rounding_errors(backend.model, seed):
                limit = max(limit, ROUNDING * gap(backend.score(plain.encoded)[plain.places]))
        if not apart <= limit:
            return f"log-probabilities differ by {apart:.2g} nats, rounding explains {limit:.2g}"
        encoded = forest.encoded
        assert encoded.depths is not None
        wrong = replace(encoded, depths=encoded.depths + encoded.answer_mask)  # every answer one place too far
        seen = gap(backend.score(wrong)[forest.places])
        if seen <= limit:
            return f"rounding errors ({limit:.2g} nats) would hide a wrong position ({seen:.2g})"
    return ""


def _trial_rows(encoder: PromptEncoder) -> list[Row]:
    """Two prompts with a picture each, if the policy takes any, and one without; answers of different lengths, of which
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
