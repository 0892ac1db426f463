"""The report of a run: one HTML file that opens from disk without a network.

It is made from the files of the run folder alone, so it can be made again at any time, also of a run that broke::

    python -m skyrl.monitoring.report RUN_DIR
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from skyrl.monitoring.console import PHASES, duration, number, percent
from skyrl.monitoring.gallery import RULE, gallery_html
from skyrl.monitoring.records import read_json, read_metrics, write_text_atomically
from skyrl.monitoring.svg import Series, line_chart
from skyrl.records import DataError

History = Sequence[Mapping[str, Any]]


@dataclass(slots=True, frozen=True)
class _Chart:
    """What one chart shows: the text of the legend → the metric."""

    title: str
    unit: str
    lines: Mapping[str, str]
    from_zero: bool = True


_CHARTS = (
    _Chart("Accuracy", "share", {"evaluation (greedy)": "eval/accuracy", "training (sampled)": "reward/accuracy"}),
    _Chart(
        "Hallucination rate",
        "share",
        {"evaluation (greedy)": "eval/hallucination", "training (sampled)": "hallucination/rate"},
    ),
    _Chart("Reward", "-", {part: f"reward/{part}" for part in ("total", "rule", "format")}),
    _Chart(
        "Reward model, raw score",
        "-",
        {"evaluation (greedy)": "eval/reward_model", "training (sampled)": "reward/model"},
        from_zero=False,
    ),
    _Chart(
        "Effective share of the rollout batch",
        "share",
        {"with SSB": "buffer/effective_share", "without SSB (fresh)": "buffer/effective_share_fresh"},
    ),
    _Chart("Time per phase", "s", {phase: f"time/{phase}" for phase in PHASES}),
    _Chart("Loss", "-", {"total": "loss/total", "GRPO": "loss/grpo", "MPO": "loss/mpo"}, from_zero=False),
    _Chart(
        "MPO terms, before their weights",
        "nats",
        {"preference (DPO)": "loss/preference", "quality (BCO)": "loss/quality", "generation (NLL)": "loss/generation"},
        from_zero=False,
    ),
)


def smoothing_window(history: History) -> int:
    """Steps of the running mean: a tenth of the run, at most 25."""
    return max(1, min(25, len(history) // 10))


def _series(history: History, label: str, name: str) -> Series:
    """A metric's course; evaluations are few and are therefore drawn as they are."""
    points = [(float(r["step"]), float(r[name])) for r in history if r.get(name) is not None]
    return Series(label, points, smooth=not name.startswith("eval/"))


def _charts(history: History) -> str:
    """All charts that have data."""
    window = smoothing_window(history)
    drawn = ""
    for chart in _CHARTS:
        lines = [_series(history, label, name) for label, name in chart.lines.items()]
        drawn += line_chart(chart.title, lines, unit=chart.unit, window=window, from_zero=chart.from_zero)
    steps = "step" if window == 1 else f"{window} steps"
    return (
        f'<h2>Curves</h2><p class="quiet">Training: the bold line and the number at its end are the mean of the last '
        f"{steps}, the faint line is each step. Evaluation: one dot each. Hover for the values of a step.</p>"
        f'<div class="charts">{drawn}</div>'
    )


def _tile(label: str, before: str, after: str = "–", note: str = "") -> str:
    """A large figure, or two with an arrow. All arguments are texts of our own."""
    figure = before if after == "–" else f'<span class="from">{before} →</span> {after}'
    return (
        f'<div class="tile"><p class="quiet">{label}</p><p class="figure">{figure}</p><p class="quiet">{note}</p></div>'
    )


def _tiles(summary: Mapping[str, Any]) -> str:
    """The figures at the top."""

    def shares(label: str, first: str, second: str, note: str) -> str:
        return _tile(label, percent(summary.get(first)), percent(summary.get(second)), note)

    gap = summary.get("sync_logprob_gap_max")
    tiles = [
        shares("Accuracy", "accuracy_before", "accuracy_after", "evaluation, before → after"),
        shares("Hallucination rate", "hallucination_before", "hallucination_after", "answers with a false claim"),
        shares("Effective share", "effective_share_fresh", "effective_share", "fresh → with SSB, mean"),
        _tile("Training", duration(summary.get("seconds_training")), note=f"{number(summary.get('steps'))} steps"),
        _tile("Largest sync gap", f"{number(gap)}{'' if gap is None else ' nats'}", note="rollout against learner"),
    ]
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _kinds(summary: Mapping[str, Any]) -> str:
    """Accuracy by kind of question."""
    before: Mapping[str, Any] = summary.get("accuracy_by_kind_before") or {}
    after: Mapping[str, Any] = summary.get("accuracy_by_kind_after") or {}
    if not before and not after:
        return ""
    rows = "".join(
        f'<tr><td>{escape(kind)}</td><td class="number">{percent(before.get(kind))}</td>'
        f'<td class="number">{percent(after.get(kind))}</td></tr>'
        for kind in sorted({*before, *after})
    )
    return (
        '<h2>Accuracy by kind of question</h2><div class="table"><table><tr><th>kind</th><th class="number">before</th>'
        f'<th class="number">after</th></tr>{rows}</table></div>'
    )


def _gallery(entries: Sequence[Mapping[str, Any]]) -> str:
    """The section of scenes."""
    if not entries:
        return ""
    legend = (
        '<p class="quiet">Statements about the picture are checked against the facts: <mark class="true">true</mark> '
        '<mark class="false">false</mark>; unmarked text makes no checkable statement.</p>'
    )
    return (
        f'<h2>Scenes</h2><p class="quiet">{escape(RULE)}</p>{legend}<div class="gallery">{gallery_html(entries)}</div>'
    )


def _flatten(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """A nested configuration as dotted names and texts."""
    if isinstance(value, Mapping) and value:
        return [pair for key, item in value.items() for pair in _flatten(item, f"{prefix}.{key}".removeprefix("."))]
    return [(prefix, "null" if value is None else str(value))]


def _details(title: str, value: Mapping[str, Any]) -> str:
    """A table that is folded away."""
    rows = "".join(f"<tr><td>{escape(name)}</td><td>{escape(text)}</td></tr>" for name, text in _flatten(value))
    return f'<details><summary>{title}</summary><div class="table"><table>{rows}</table></div></details>'


def _settings(summary: Mapping[str, Any]) -> str:
    """Configuration and versions."""
    machine = {key: summary[key] for key in ("python", "platform", "cpu_count") if key in summary}
    tables = {"Configuration": summary.get("config"), "Versions": (summary.get("versions") or {}) | machine}
    return "<h2>Settings</h2>" + "".join(_details(title, value) for title, value in tables.items() if value)


def write_report(run_dir: Path, *, title: str | None = None) -> Path:
    """Write ``report.html`` of a run folder and return its path.

    Args:
        run_dir: holds ``metrics.jsonl`` and, if the run got so far, ``summary.json`` and ``gallery.json``.
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
    entries: list[Any] = read_json(gallery_file) if gallery_file.is_file() else []
    heading = title or f"skyrl run: {(summary.get('config') or {}).get('name', run_dir.name)}"
    unfinished = "" if summary else '<p class="bad">This run has no summary: it has not ended, or it broke.</p>'
    style = resources.files("skyrl.monitoring").joinpath("report.css").read_text(encoding="utf-8")
    # The policy forbids scripts and every fetch, a second wall behind the escaping of what a model wrote.
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(heading)}</title><style>{style}</style></head>\n<body><main><h1>{escape(heading)}</h1>{unfinished}"
        f"{_tiles(summary) if summary else ''}{_kinds(summary)}\n{_charts(history)}\n{_gallery(entries)}\n"
        f"{_settings(summary)}</main></body></html>\n"
    )
    path = run_dir / "report.html"
    write_text_atomically(path, page)
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write report.html of a run folder.")
    parser.add_argument("run_dir", type=Path)
    print(write_report(parser.parse_args().run_dir))
