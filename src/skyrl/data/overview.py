"""What files of prompts hold: counts, and a page that shows rows with their pictures."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from skyrl.records import Prompt

SHOWN_SIDE = 320
"""Longest side of a picture on the page, pixels."""
QUANTILES = {"least": 0.0, "median": 0.5, "p95": 0.95, "most": 1.0}


def counted(prompts: Iterable[Prompt], tokens: Callable[[Prompt], int] | None = None) -> dict[str, Any]:
    """Counts and spreads of prompts, as JSON has them; one prompt is held at a time.

    Args:
        tokens: Measures a prompt; without it tokens are not counted.
    """
    counts: dict[str, Counter[str]] = {name: Counter() for name in ("kind", "verifier", "pictures", "turns")}
    spread: dict[str, list[int]] = {
        "question characters": [],
        "truth characters": [],
        "picture pixels": [],
        "tokens": [],
    }
    for prompt in prompts:
        counts["kind"][prompt.kind] += 1
        counts["verifier"].update({check.verifier for check in prompt.all_checks})
        counts["pictures"][str(len(prompt.images))] += 1
        counts["turns"][", ".join(turn.role for turn in prompt.conversation)] += 1
        spread["question characters"].append(len(prompt.question))
        spread["truth characters"].append(len(prompt.answer))
        spread["picture pixels"] += [picture.shape[0] * picture.shape[1] for picture in prompt.images]
        if tokens is not None:
            spread["tokens"].append(tokens(prompt))
    return {
        "prompts": counts["kind"].total(),
        **{name: dict(found.most_common()) for name, found in counts.items()},
        **{
            name: {label: int(np.quantile(values, q, method="nearest")) for label, q in QUANTILES.items()}
            for name, values in spread.items()
            if values
        },
    }


def write_page(path: Path, title: str, prompts: Iterable[Prompt]) -> None:
    """One HTML file that shows prompts, pictures inside; everything of the data is escaped."""
    pages = Environment(
        loader=PackageLoader("skyrl.data", ""), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    with path.open("w", encoding="utf-8") as file:
        file.writelines(pages.get_template("show.jinja").generate(title=title, rows=map(_shown, prompts)))


def _shown(prompt: Prompt) -> dict[str, Any]:
    pictures = iter(prompt.images)
    turns = [{"role": turn.role, "parts": list(_parts(turn.parts, pictures))} for turn in prompt.conversation]
    return {"prompt": prompt, "turns": turns, "checks": prompt.all_checks}


def _parts(parts: Iterable[str | None], pictures: Iterator[np.ndarray]) -> Iterator[dict[str, str]]:
    for part in parts:
        if part is not None:
            yield {"text": part}
            continue
        picture = Image.fromarray(next(pictures))
        size = "{}×{}".format(*picture.size)
        picture.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
        file = io.BytesIO()
        picture.save(file, format="PNG")
        yield {"picture": base64.b64encode(file.getvalue()).decode(), "size": size}
