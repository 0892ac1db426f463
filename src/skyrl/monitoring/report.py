"""The report of a run: one HTML file that opens from disk without a network.

It is made from the files of the run folder alone, so it can be made again at any time, also of a run that broke::

    python -m skyrl.monitoring.report RUN_DIR
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from skyrl.monitoring.charts import charts_with_data, smoothing_window
from skyrl.monitoring.events import ALARM, OVER, read_events
from skyrl.monitoring.gallery import RULE, marked
from skyrl.monitoring.pages import render
from skyrl.monitoring.records import read_json, read_metrics, write_text_atomically
from skyrl.monitoring.summary import figures, kinds
from skyrl.records import DataError, Event


def dotted(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """A nested configuration as dotted names and texts."""
    if isinstance(value, Mapping) and value:
        return [pair for key, item in value.items() for pair in dotted(item, f"{prefix}.{key}".removeprefix("."))]
    return [(prefix, "null" if value is None else str(value))]


def told_alarms(events: Iterable[Event]) -> list[dict[str, Any]]:
    """The alarms of a run that has no summary, as ``summary.json`` has them but for how often each was seen."""
    found: dict[str, dict[str, Any]] = {}
    for event in events:
        if event.kind == ALARM:
            new = {"name": event.member, "first_step": event.step, "message": event.text, "last_step": None}
            found.setdefault(event.member, new)
        if event.kind in (ALARM, OVER) and event.member in found:
            found[event.member]["on"] = event.kind == ALARM
    return list(found.values())


def write_report(run_dir: Path, *, title: str | None = None) -> Path:
    """Write ``report.html`` of a run folder and return its path.

    Args:
        run_dir: holds ``metrics.jsonl`` and, if the run got so far, ``summary.json``, ``gallery.json`` and
            ``events.jsonl``.
        title: heading; the default is the configured name of the run.

    Raises:
        DataError: if there is no ``metrics.jsonl`` or a file is broken.
    """
    metrics = run_dir / "metrics.jsonl"
    if not metrics.is_file():
        raise DataError(f"{run_dir} has no metrics.jsonl; allowed is the folder of a run")
    history = read_metrics(metrics)
    summary_file, gallery_file = run_dir / "summary.json", run_dir / "gallery.json"
    summary: dict[str, Any] = read_json(summary_file) if summary_file.is_file() else {}
    events = read_events(run_dir)
    machine = {key: summary[key] for key in ("python", "platform", "cpu_count") if key in summary}
    settings = {"Configuration": summary.get("config"), "Versions": (summary.get("versions") or {}) | machine}
    page = render(
        "report.jinja",
        heading=title or f"skyrl run: {(summary.get('config') or {}).get('name', run_dir.name)}",
        ended=bool(summary),
        figures=figures(summary),
        kinds=kinds(summary),
        charts=charts_with_data(history),
        window=smoothing_window(history),
        alarms=summary["alarms"] if "alarms" in summary else told_alarms(events),
        events=[event for event in events if event.kind not in (ALARM, OVER)],
        gallery=read_json(gallery_file) if gallery_file.is_file() else [],
        marked=marked,
        rule=RULE,
        settings={name: dotted(table) for name, table in settings.items() if table},
    )
    path = run_dir / "report.html"
    write_text_atomically(path, page)
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write report.html of a run folder.")
    parser.add_argument("run_dir", type=Path)
    print(write_report(parser.parse_args().run_dir))
