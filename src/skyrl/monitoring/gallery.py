"""Scenes for the report: the model's reasoning before and after, with each claim about the picture judged."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
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
    height = max(image.shape[0] for image in images)
    width = sum(image.shape[1] for image in images) + _GAP * (len(images) - 1)
    canvas = Image.new("RGB", (width, height), "white")
    left = 0
    for image in images:
        canvas.paste(Image.fromarray(image), (left, 0))
        left += image.shape[1] + _GAP
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
    """Choose at most ``limit`` prompts by :data:`RULE` and describe them as ``gallery.json`` holds them.

    Args:
        groups: the scored greedy answers of the evaluation before training, one sample each.
        limit: number of places; fewer are filled if too few answers made a false claim.
    """
    entries: list[dict[str, Any]] = []
    places_first = limit - limit // 2
    for position, group in enumerate(groups):
        if len(entries) >= limit:
            break
        before = _answer(group)
        if position >= places_first and all(claim["true"] for claim in before["claims"]):
            continue
        prompt = group.prompt
        entries.append(
            {
                "id": prompt.id,
                "kind": prompt.kind,
                "question": prompt.question,
                "truth": prompt.answer,
                "chosen": FIRST if position < places_first else FALSE_CLAIM,
                "picture": picture_base64(prompt.images),
                "before": before,
                "after": None,
            }
        )
    return entries


def add_after(entries: Iterable[Mapping[str, Any]], groups: Sequence[SampleGroup]) -> list[dict[str, Any]]:
    """The entries with their side after training filled in, also for entries that a resumed run read back.

    Raises:
        DataError: if a prompt of the gallery was not evaluated again.
    """
    by_id = {group.prompt.id: group for group in groups}
    filled = []
    for entry in entries:
        group = by_id.get(entry["id"])
        if group is None:
            raise DataError(f"prompt {entry['id']!r} of the gallery is missing among {len(by_id)} evaluated prompts")
        filled.append({**entry, "after": _answer(group)})
    return filled


def marked_text(text: str, claims: Sequence[Mapping[str, Any]]) -> str:
    """An answer as safe HTML: claims and the think/answer tags are marked, everything is escaped."""
    spans = [(c["start"], c["end"], "true" if c["true"] else "false") for c in claims]
    spans += [(match.start(), match.end(), "tag") for match in _TAG.finditer(text)]
    parts, position = [], 0
    for start, end, kind in sorted(spans):
        if start < position or end > len(text) or end <= start:
            continue  # Overlapping marks can't be nested without misleading; the first one stays.
        parts.append(escape(text[position:start]))
        inner = escape(text[start:end])
        if kind == "tag":
            parts.append(f'<span class="tag">{inner}</span>')
        else:
            parts.append(f'<mark class="{kind}" title="{kind} claim about the picture">{inner}</mark>')
        position = end
    parts.append(escape(text[position:]))
    return "".join(parts)


def _answer_html(title: str, answer: Mapping[str, Any] | None) -> str:
    """One side of an entry."""
    if answer is None:
        return f'<div class="answer"><h4>{title}</h4><p class="quiet">not evaluated</p></div>'
    verdict, css = ("✓ right", "good") if answer["right"] else ("✗ wrong", "bad")
    if answer.get("error"):
        verdict, css = f"not scored: {escape(answer['error'])}", "bad"
    return (
        f'<div class="answer"><h4>{title} <span class="{css}">{verdict}</span></h4>'
        f"<p>{marked_text(answer['text'], answer['claims'])}</p></div>"
    )


def gallery_html(entries: Sequence[Mapping[str, Any]]) -> str:
    """The gallery as HTML, without its heading."""
    parts = []
    for entry in entries:
        picture = entry["picture"]
        # Base64 has no character that could end the attribute; anything else is not a picture of ours.
        if picture and re.fullmatch(r"[A-Za-z0-9+/]+={0,2}", picture):
            shown = f'<img alt="picture of the question" src="data:image/png;base64,{picture}">'
        else:
            shown = '<div class="nopicture">no picture</div>'
        meta = " · ".join(escape(str(entry.get(key, ""))) for key in ("id", "kind", "chosen"))
        parts.append(
            f'<article class="scene">{shown}<div class="text"><p class="question">{escape(entry["question"])}</p>'
            f'<p class="quiet">answer: <b>{escape(entry["truth"])}</b> · {meta}</p><div class="answers">'
            f"{_answer_html('before', entry['before'])}{_answer_html('after', entry['after'])}</div></div></article>"
        )
    return "".join(parts)
