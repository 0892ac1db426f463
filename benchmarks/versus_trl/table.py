"""The comparison for people: one Markdown row a side."""

from __future__ import annotations

from typing import Any

from benchmarks._turns import Spread

HEAD = (
    "| workload | side | seconds a step (quartiles) | answer tokens | prompt tokens | processor seconds | peak MiB "
    "| TRL's time / ours (quartiles) | the same per token |\n|---|---|---|---|---|---|---|---|---|"
)


def table(result: dict[str, Any]) -> str:
    """Rows of all workloads of a result, and what a reader must know of them."""
    rows, notes = [HEAD], []
    for name, load in result["workloads"].items():
        trl = load["sides"].get("trl")
        for side, got in load["sides"].items():
            cells = [name, side, str(Spread(**got["seconds"]))]
            cells += [f"{got[key]:,.0f}" for key in ("answer_tokens", "prompt_tokens")]
            cells += [f"{got['cpu_seconds']:.2f}", f"{got['peak_mib']:,.0f}", *_ratios(trl, got, side)]
            rows.append(f"| {' | '.join(cells)} |")
        notes += [f"- {name}: {warning}" for warning in load["warnings"]]
        notes += [f"- {name}: {note}" for note in _uneven(load["sides"])]
    return "\n".join([*rows, *(["", *notes] if notes else [])])


def _ratios(trl: dict[str, Any] | None, got: dict[str, Any], side: str) -> tuple[str, str]:
    """How many times faster a side is than TRL, each round for itself; and per token."""
    if trl is None or side == "trl":
        return "", ""
    each = Spread.of([theirs / ours for theirs, ours in zip(trl["rounds"], got["rounds"], strict=True)])
    of_tokens = got["answer_tokens"] / trl["answer_tokens"]
    return f"**{each.median:.2f}** ({each.low:.2f}–{each.high:.2f})", f"{each.median * of_tokens:.2f}"


def _uneven(sides: dict[str, Any]) -> list[str]:
    tokens = {name: side["answer_tokens"] for name, side in sides.items()}
    most, least = max(tokens, key=lambda name: tokens[name]), min(tokens, key=lambda name: tokens[name])
    if tokens[most] <= 1.05 * tokens[least]:
        return []
    apart = tokens[most] / tokens[least] - 1
    return [f"{most} sampled {apart:.0%} more tokens than {least}; compare per token"]
