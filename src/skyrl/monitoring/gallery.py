"""Scenes for the report: the model's reasoning before and after, with each claim about the picture judged."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from skyrl.records import DataError, SampleGroup
from skyrl.rewards.claims import check_claims

FIRST = "first of the evaluation set"
FALSE_CLAIM = "first with a false claim before training"

RULE = (
    "Chosen by a fixed rule, not by hand: half of the places go to the first prompts of the evaluation set, the other "
    "half to the next prompts, in the same order, whose answer before training made a false claim about the picture. "
    "What the answers after training look like has no influence. The second half was picked for being false before, so "
    "it can only stay so or get better: only the figures above, over the whole evaluation set, measure progress."
)
"""Stated on the page, so that nobody takes the gallery for a random sample or for hand-picked successes."""

_MAX_SIDE = 512
_GAP = 4
_TAG = re.compile(r"</?(?:think|answer)>")


def picture_base64(images: Sequence[np.ndarray]) -> str | None:
    """The pictures side by side as one PNG in base64; ``None`` if there are none."""
    if not images:
        return None
    lefts = np.cumsum([0, *(image.shape[1] + _GAP for image in images)]).tolist()
    canvas = Image.new("RGB", (lefts[-1] - _GAP, max(image.shape[0] for image in images)), "white")
    for image, left in zip(images, lefts, strict=False):
        canvas.paste(Image.fromarray(image), (left, 0))
    # Photographs would make the page many megabytes; digit scenes stay as they are.
    canvas.thumbnail((_MAX_SIDE * len(images), _MAX_SIDE))
    file = io.BytesIO()
    canvas.save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode("ascii")


def _answer(group: SampleGroup) -> dict[str, Any]:
    """The one greedy answer of an evaluated prompt, as the gallery stores it."""
    if not group.samples:
        raise DataError(f"prompt {group.prompt.id!r} has 0 samples in the evaluation; allowed is at least 1")
    sample = group.samples[0]
    claims = check_claims(sample.text, group.prompt.facts)
    return {
        "text": sample.text,
        "right": sample.right,
        "claims": [{"start": c.start, "end": c.end, "text": c.text, "true": c.true} for c in claims],
        "error": sample.error,
    }


def gallery_entries(groups: Sequence[SampleGroup], limit: int) -> list[dict[str, Any]]:
    """At most ``limit`` prompts, chosen by :data:`RULE`, as ``gallery.json`` holds them; fewer if too few answers made
    a false claim. ``groups`` are the scored answers of the evaluation before training, one greedy sample each."""
    answers = [(group.prompt, _answer(group)) for group in groups]
    first = limit - limit // 2
    chosen = [(FIRST, *each) for each in answers[:first]]
    chosen += [(FALSE_CLAIM, *each) for each in answers[first:] if not all(c["true"] for c in each[1]["claims"])]
    return [
        {
            "id": prompt.id,
            "kind": prompt.kind,
            "question": prompt.question,
            "truth": prompt.answer,
            "chosen": reason,
            "picture": picture_base64(prompt.images),
            "before": before,
            "after": None,
        }
        for reason, prompt, before in chosen[:limit]
    ]


def add_after(entries: Sequence[Mapping[str, Any]], groups: Sequence[SampleGroup]) -> list[dict[str, Any]]:
    """The entries with their side after training filled in, also for entries that a resumed run read back.

    Raises:
        DataError: if a prompt of the gallery was not evaluated again.
    """
    by_id = {group.prompt.id: group for group in groups}
    if missing := [entry["id"] for entry in entries if entry["id"] not in by_id]:
        raise DataError(f"prompts {missing} of the gallery are missing among {len(by_id)} evaluated prompts")
    return [{**entry, "after": _answer(by_id[entry["id"]])} for entry in entries]


def marked(text: str, claims: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """An answer in pieces: its claims (``true`` or ``false``), the think/answer tags (``tag``), the rest (``""``)."""
    spans = [(c["start"], c["end"], "true" if c["true"] else "false") for c in claims]
    spans += [(match.start(), match.end(), "tag") for match in _TAG.finditer(text)]
    position = 0
    for start, end, kind in sorted(spans):
        if start < position or end > len(text) or end <= start:
            continue  # Overlapping marks can't be nested without misleading; the first one stays.
        yield "", text[position:start]
        yield kind, text[start:end]
        position = end
    yield "", text[position:]
