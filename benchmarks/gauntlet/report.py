"""The document: what was noticed, when, and under which name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from benchmarks.gauntlet.clean import RUNS
from benchmarks.gauntlet.fault import Fault
from benchmarks.gauntlet.faults import CHOSEN, FAULTS

Row = dict[str, Any]
WITHIN = 1
"""Steps after the first one in which a fault acts."""
WORDS = 150
"""Characters of a message that are shown."""
LIMITS = (
    "## What this does not show",
    "",
    "The policy is the embedded one of a million parameters, in float32, on a CPU, with 8 prompts of 8 answers a step.",
    "In 16 bits the sync's proof sees less, because rounding hides more, and whether weights moved can't be seen of",
    "small steps. Each fault is our own patch of the kind that was reported; a milder one of the same kind may pass,",
    "and faults that are not in the list were not looked for.",
)


def verdict(fault: Fault, row: Row) -> tuple[int | None, str]:
    """The step in which the fault was first called by its right name, and the words; (None, what else was said)."""
    for step, text in row["said"]:
        if re.search(fault.said, text, re.DOTALL):
            return step, text
    return None, "; ".join(text for _, text in row["said"])


def caught(fault: Fault, row: Row) -> bool:
    """Under its right name, within one step."""
    step, _ = verdict(fault, row)
    return step is not None and step <= fault.acts + WITHIN


def table(faults: list[Fault], rows: dict[str, Row]) -> list[str]:
    lines = [
        "| Fault | What goes wrong | Reported in | Acts in step | Noticed in step | Under which message |",
        "|" + "---|" * 6,
    ]
    for fault in faults:
        if fault.name not in rows:
            continue
        step, text = verdict(fault, rows[fault.name])
        seen = "**not noticed**" if step is None else _when(step)
        if step is None and text:
            seen = "**not by its name**"
        reports = ", ".join(f"[{name}](https://github.com/{name.replace('#', '/issues/')})" for name in fault.reports)
        shown = _cell(text, fault.said)
        lines.append(
            f"| `{fault.name}` | {fault.story} | {reports or '-'} | {_when(fault.acts)} | {seen} | {shown or '-'} |"
        )
    return lines


def _when(step: int) -> str:
    return str(step) if step else "before 1"


def _cell(text: str, right: str = "") -> str:
    """The beginning of a message, and of a long one the part that ends with the right name."""
    text = " ".join(text.split())
    match = re.search(right, text)
    if len(text) > WORDS:
        end = match.end() if match else 0
        middle = f"… {text[end - WORDS // 2 : end]}" if end > WORDS else ""
        text = f"{text[: WORDS // 2 if middle else WORDS]}{middle}…"
    return text.replace("|", "\\|")


def document(rows: list[Row]) -> str:
    """The text of ``gauntlet.md``."""
    faulty = {row["fault"]: row for row in rows if row["kind"] == "fault"}
    clean = [row for row in rows if row["kind"] == "clean"]
    cost = next((row for row in reversed(rows) if row["kind"] == "cost"), None)
    chosen = [fault for fault in CHOSEN if fault.name in faulty]
    further = [fault for fault in FAULTS if fault.further and fault.name in faulty]
    alarms = [row for row in clean if row["said"]]

    def noticed(faults: list[Fault]) -> int:
        return sum(caught(fault, faulty[fault.name]) for fault in faults)

    lines = [
        "# The gauntlet",
        "",
        "Written by `python -m benchmarks.gauntlet`. Faults that users of this and other systems reported, which raise",
        "no error by themselves, are put back into the running system (vLLM, DeepSpeed, the loop and all members, in",
        "one process on a CPU) by a small patch, one at a time. *Noticed* is a refusal, an error or an alarm under the",
        "name that stands in the fault's definition, in the step in which it first acts or the next.",
        "",
        f"- **{noticed(chosen)} of {len(chosen)}** faults that were chosen first",
        f"- {noticed(further)} of {len(further)} further ones",
        f"- **{len(alarms)} of {len(clean)}** runs without a fault said anything ({RUNS} are wanted)",
    ]
    if cost is not None:
        lines.append(
            f"- all that notices takes **{cost['share']:.1%}** of a step, the weight sync's proof included "
            f"({cost['without_proof']:.1%} without it): {cost['text']}"
        )
    lines += ["", "## The 24", "", *table(CHOSEN, faulty), "", "## Further ones", ""]
    lines += [*table([fault for fault in FAULTS if fault.further], faulty), "", "## Without a fault", ""]
    lines += [f"- run {row['run']} ({' '.join(row['settings'])}): {_cell(str(row['said']))}" for row in alarms]
    lines += (
        [] if alarms else [f"Nothing was said in {len(clean)} runs of 25 settings with several seeds (`clean.py`)."]
    )
    return "\n".join([*lines, "", *LIMITS]) + "\n"


def write(rows: list[Row], folder: Path) -> Path:
    path = folder / "gauntlet.md"
    path.write_text(document(rows), encoding="utf-8")
    return path
