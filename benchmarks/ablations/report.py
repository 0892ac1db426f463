"""Writes ``ablations.md`` and its plots from the finished rows alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from benchmarks.ablations.claims import CLAIMS, EARLY, FILLED, FRESH, LATE
from benchmarks.ablations.figures import Figure, Interval, drop_from_best, final, of, over_steps, rollouts_to
from benchmarks.ablations.grid import BASE, METHODS, SEEDS, TABLES, Row
from benchmarks.ablations.plots import evaluation_curves, step_curves
from benchmarks.ablations.text import HEAD, NOTES

KINDS = ("max", "min", "count", "text_arithmetic")
ACCURACIES = (0.65, 0.70, 0.75)
CURVES = (("eval/accuracy", "accuracy (greedy, held out)"), ("eval/hallucination", "hallucination rate"))
CALIBRATED = slice(5, None)
"""Steps after the first calibration of a threshold."""
Column = tuple[str, Figure, float]
"""Heading, figure, factor for printing."""

MAIN: tuple[Column, ...] = (
    ("accuracy", final("eval/accuracy"), 100),
    ("hallucination", final("eval/hallucination"), 100),
    ("false claims", final("eval/false_claim_share"), 100),
    ("length", final("eval/length_mean"), 1),
    ("repetition", final("eval/repetition"), 100),
)


def write_report(rows: Sequence[Row], out: Path) -> Path:
    """Write ``out/ablations.md`` and ``out/*.png``; returns the document's path."""
    parts = [HEAD.format(setup=_setup(rows)), _verdicts(rows)]
    for table, methods in TABLES.items():
        if any(row["method"] in methods for row in rows):
            parts.append(_section(rows, out, table, methods))
    parts.append(_methods())
    path = out / "ablations.md"
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def _setup(rows: Sequence[Row]) -> str:
    seeds = sorted({row["seed"] for row in rows})
    seconds = sum(row["seconds"] for row in rows)
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    missing = [name for name in METHODS if not set(SEEDS) <= {row["seed"] for row in rows if row["method"] == name}]
    text = (
        f"{len(rows)} finished runs, seeds {', '.join(map(str, seeds))}, {seconds / 3600:.1f} hours of single-threaded "
        f"runs, as many side by side as `--workers` says (two); code {commits}."
    )
    return text + (f" Not all seeds are finished for: {', '.join(missing)}." if missing else "")


def _verdicts(rows: Sequence[Row]) -> str:
    lines = [
        "| Where | Claim | Whose | The paper's figures | Here: difference, points | Seeds | Verdict |",
        "|---|---|---|---|---|---|---|",
    ]
    for claim in CLAIMS:
        found = claim.measure(rows)
        lines.append(
            f"| {claim.table} | {claim.text} | {claim.source} | {claim.paper} | {shown(found, 100, signed=True)} "
            f"| {found.count} | {claim.verdict(rows)} |"
        )
    return "\n".join(["## The claims", "", NOTES["verdicts"], "", *lines])


def _section(rows: Sequence[Row], out: Path, table: str, methods: Sequence[str]) -> str:
    name = table.lower().replace(" ", "_")
    lines = [f"## {table}", "", NOTES[name], "", *_table(rows, methods, MAIN, start=True)]
    if table == "Table 2":
        lines += ["", *_table(rows, methods, _efficiency()), "", NOTES["efficiency"]]
        step_curves(
            out / f"{name}_effective.png",
            rows,
            methods,
            ((FRESH, "effective share of fresh answers"), (FILLED, "effective share of the batch")),
        )
        lines += ["", f"![effective share]({name}_effective.png)"]
    if table == "Table 3":
        kinds = tuple((kind, final(f"eval/accuracy/{kind}"), 100.0) for kind in KINDS)
        lines += ["", "Accuracy by kind of question:", "", *_table(rows, methods, kinds, start=True)]
        probes: tuple[Column, ...] = (
            ("same answer without the picture", final("eval/blind_agreement"), 100),
            ("accuracy lost without it", final("eval/blind_accuracy_drop"), 100),
            ("log-probability lost when masked, nats", final("eval/picture_drop"), 1),
            ("right answers that the reward model rejects", final("eval/gate_rejected"), 100),
        )
        lines += ["", "Probes:", "", *_table(rows, methods, probes, start=True)]
    if table == "Thresholds":
        more: tuple[Column, ...] = (
            ("τ, last steps", over_steps("threshold/tau", LATE), 1),
            ("steps with the risk under control", over_steps("threshold/controlled", CALIBRATED), 100),
            ("accepted, last steps", over_steps("threshold/acceptance", LATE), 100),
            ("risk, last steps", over_steps("threshold/risk", LATE), 100),
            ("its bound", over_steps("threshold/risk_bound", LATE), 100),
            ("pairs a step", over_steps("mpo/pairs"), 1),
            ("below its best accuracy", drop_from_best("eval/accuracy"), 100),
        )
        lines += ["", *_table(rows, methods, more)]
    evaluation_curves(out / f"{name}.png", rows, methods, CURVES)
    return "\n".join([*lines, "", f"![{table}: accuracy and hallucination over training]({name}.png)"])


def _efficiency() -> tuple[Column, ...]:
    columns: list[Column] = [
        ("effective, fresh, first 10 steps", over_steps(FRESH, EARLY), 100),
        ("last 10", over_steps(FRESH, LATE), 100),
        ("effective, batch, first 10", over_steps(FILLED, EARLY), 100),
        ("last 10 ", over_steps(FILLED, LATE), 100),
    ]
    columns += [(f"rollouts to {100 * goal:.0f} %", rollouts_to(goal, 256), 1) for goal in ACCURACIES]
    return tuple(columns)


def _table(rows: Sequence[Row], methods: Sequence[str], columns: Sequence[Column], start: bool = False) -> list[str]:
    lines = [f"| | {' | '.join(name for name, *_ in columns)} |", "|---" * (len(columns) + 1) + "|"]
    own = [row for row in rows if row["method"] in methods]
    if start and own:
        values = [_before(own[0], figure) * factor for _, figure, factor in columns]
        lines.append(f"| warm start | {' | '.join(_number(value) for value in values)} |")
    for method in methods:
        runs = sum(row["method"] == method for row in rows)
        cells = [_cell(of(rows, method, figure), factor, runs) for _, figure, factor in columns]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return lines


def _cell(value: Interval, factor: float, runs: int) -> str:
    """A mean says of how many runs it is, if some have no value."""
    return shown(value, factor) + (f" ({value.count} of {runs})" if 0 < value.count < runs else "")


def _before(row: Row, figure: Figure) -> float:
    """The same figure of the evaluation before training, which all runs of a table share."""
    return figure(row | {"evaluations": row["evaluations"][:1]})


def shown(value: Interval, factor: float = 1.0, signed: bool = False) -> str:
    """``mean ± half``."""
    if not value.count:
        return "–"
    mean = _number(value.mean * factor, signed)
    return mean if math.isnan(value.half) else f"{mean} ± {_number(value.half * factor)}"


def _number(value: float, signed: bool = False) -> str:
    if not math.isfinite(value):
        return "–"
    digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 1 else 2
    return f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}"


def _methods() -> str:
    lines = [
        "## The runs",
        "",
        "Every run: what `python -m skyrl.launch` does with",
        "",
        f"`{' '.join(BASE)} controller.seed=SEED`",
        "",
        "but in one process without Ray, and with the prompts in an order that SEED decides (for SEED 0 the same).",
        "",
    ]
    lines += ["| Method | and |", "|---|---|"]
    lines += [
        f"| {name} | {' '.join(f'`{part}`' for part in parts) or 'nothing: the default'} |"
        for name, parts in METHODS.items()
    ]
    return "\n".join(lines)
