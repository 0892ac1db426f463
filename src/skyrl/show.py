"""``python -m skyrl.show RUN``: the samples of a run as one HTML page, to filter, sort and search. docs/monitoring.md
describes it. The run may still be going on; nothing of it is started, loaded or changed."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from skyrl.checkpoint import SETTINGS
from skyrl.cli import run_command
from skyrl.data.datasets import PromptDataset, build_datasets
from skyrl.monitoring.gallery import picture_base64
from skyrl.monitoring.pages import render
from skyrl.monitoring.records import jsonable, read_json, write_text_atomically
from skyrl.monitoring.samples import EVAL, FOLDER, SCHEMA, STEP, sample_files
from skyrl.monitoring.selection import MARKS, NUMBERS, PLAIN, choose, marks_of
from skyrl.records import DataError, Prompt, SkyrlError
from skyrl.rewards.claims import check_claims
from skyrl.rewards.rewarder import PLUGINS
from skyrl.settings import Config

PICTURE_BYTES = 48_000_000
"""Of base64: beyond them a page would hardly open."""
OF_THE_DATA = ("model", "data", "digits", "reward")
"""Groups of settings that decide what a row of the data set is."""


def main() -> None:
    """Entry point; exit codes as :func:`skyrl.cli.run_command` says."""
    parser = argparse.ArgumentParser(
        prog="python -m skyrl.show", description="Write the samples of a run as one HTML page (docs/monitoring.md)."
    )
    parser.add_argument("run", type=Path, help="folder of a run, also of one that is going on")
    parser.add_argument("--output", type=Path, help="the page (default: samples.html in the run's folder)")
    parser.add_argument("--limit", type=int, default=1000, help="most samples on the page (default: 1000)")
    given = parser.parse_args()
    if given.limit < 1:
        parser.error(f"--limit {given.limit}: must be 1 or more")
    run_command(lambda: print(write_page(given.run, given.output, given.limit)), "interrupted; no page was written")


def write_page(run_dir: Path, output: Path | None = None, limit: int = 1000) -> Path:
    """Write the page and return its path.

    Args:
        output: The file; None means ``samples.html`` in the run's folder.
        limit: Most samples on it; :func:`skyrl.monitoring.selection.choose` says which.

    Raises:
        DataError: if the folder is no run's, holds no samples, or has a broken file.
    """
    files = _files(run_dir)
    table, places = _numbers(files)
    marks = marks_of(table)
    chosen = choose(marks, table["step"].to_numpy(), limit)
    rows = _rows(files, places, chosen)
    for place, row in rows.items():
        row["marks"] = [name for name, strength in marks.items() if strength[place] > 0]
    notes, pictures = _add_prompts(run_dir, list(rows.values()))
    here = np.array(list(rows), dtype=int)
    has = {name: strength > 0 for name, strength in marks.items()}
    has[PLAIN] = ~np.any(list(has.values()), axis=0)
    told = [(name, MARKS.get(name, ""), int(has[name][here].sum()), int(has[name].sum())) for name in has]
    steps = table["step"].to_numpy()
    page = render(
        "show.jinja",
        script="show.js",
        heading=f"Samples of {run_dir.resolve().name}",
        kept=len(rows),
        all=len(table),
        files=len(files),
        ran=(int(steps.min()), int(steps.max())) if len(steps) else None,
        notes=notes,
        marks=told,
        data=jsonable(
            {
                "samples": list(rows.values()),
                "pictures": pictures,
                "marks": [name for name, _, _, there in told if there and name != PLAIN],
                "kinds": sorted({row["kind"] for row in rows.values()}),
            }
        ),
    )
    path = output or run_dir / "samples.html"
    write_text_atomically(path, page)
    return path


def _files(run_dir: Path) -> list[Path]:
    if not (run_dir / SETTINGS).is_file():
        raise DataError(f"{run_dir} has no {SETTINGS}; allowed is the folder of a run, such as outputs/digits/<time>")
    found = [path for name in (STEP, EVAL) for _, path in sample_files(run_dir / FOLDER, name)]
    if not found:
        raise DataError(
            f"{run_dir / FOLDER} holds no samples: the run has not evaluated yet, it ran with monitoring.samples=off, "
            "or with an older version of skyrl"
        )
    return found


def _read(path: Path, columns: list[str]) -> pa.Table | None:
    """Columns of a file; None if it is gone: a run that is going on keeps the newest only."""
    try:
        return pq.read_table(path, columns=columns)
    except FileNotFoundError:
        return None
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} can't be read: {error}; remove it, and the page is made without it") from error


def _numbers(files: Sequence[Path]) -> tuple[pa.Table, np.ndarray]:
    """The columns :data:`NUMBERS` of all samples, and [N, 2]: number of the file and row within it."""
    tables, places = [], []
    for number, path in enumerate(files):
        table = _read(path, NUMBERS)
        if table is not None:
            tables.append(table)
            places.append(np.column_stack([np.full(len(table), number), np.arange(len(table))]))
    if not tables:
        raise DataError(f"{files[0].parent}: all samples were removed meanwhile; try again")
    return pa.concat_tables(tables), np.concatenate(places)


def _rows(files: Sequence[Path], places: np.ndarray, chosen: np.ndarray) -> dict[int, dict[str, Any]]:
    """Place of each chosen sample → everything that its file says."""
    rows: dict[int, dict[str, Any]] = {}
    for number in np.unique(places[chosen, 0]):
        own = chosen[places[chosen, 0] == number]
        table = _read(files[number], SCHEMA.names)
        own = own[places[own, 1] < (0 if table is None else len(table))]  # it may have been written anew
        if table is not None:
            rows |= zip(own.tolist(), table.take(places[own, 1]).to_pylist(), strict=True)
    for row in rows.values():
        row["rules"] = json.loads(row["rules"] or "{}")
    return rows


# ---------------------------------------------------------------- what the data set knows


def _add_prompts(run_dir: Path, rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[str]]:
    """Give each row its ``picture``, a place in the list of pictures that is returned, and its ``claim_spans``; what
    could not be given is said in notes, which come first."""
    for row in rows:
        row["picture"], row["claim_spans"] = None, []
    try:
        found = _prompts(run_dir, rows)
    except (SkyrlError, OSError, ValidationError) as error:
        return [f"The data can't be read, so there are no pictures: {error}"], []
    notes = []
    for row in rows:
        if row["claims"] is not None and (prompt := found.get((row["split"], row["id"]))) is not None:
            row["claim_spans"] = [(c.start, c.end, c.true) for c in check_claims(row["text"], prompt.facts)]
    if missing := len({(row["split"], row["id"]) for row in rows} - found.keys()):
        notes.append(f"{missing} prompts are not in the data any more; their pictures are missing.")
    pictures, left_out = _pictures(rows, found)
    if left_out:
        notes.append(f"{left_out} samples are without their picture, which would make the page too large.")
    return notes, pictures


def _pictures(rows: Iterable[dict[str, Any]], prompts: Mapping[tuple[str, str], Prompt]) -> tuple[list[str], int]:
    """Set each row's ``picture``. Returns the pictures, each once, and how many samples found no room for theirs."""
    made = {key: picture_base64(prompt.images) for key, prompt in prompts.items()}
    places: dict[str, int] = {}
    size = left_out = 0
    for row in rows:
        picture = None if row["variant"] else made.get((row["split"], row["id"]))
        if picture is None:
            continue
        if picture not in places:
            if size + len(picture) > PICTURE_BYTES:
                left_out += 1
                continue
            places[picture], size = len(places), size + len(picture)
        row["picture"] = places[picture]
    return list(places), left_out


def _prompts(run_dir: Path, rows: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], Prompt]:
    """The prompts of rows, by split and id."""
    for plugin in entry_points(group=PLUGINS):  # they may bring checkers of claims
        plugin.load()
    saved = read_json(run_dir / SETTINGS)
    cfg = Config.model_validate({name: group for name, group in saved.items() if name in OF_THE_DATA})
    found: dict[tuple[str, str], Prompt] = {}
    for split, dataset in build_datasets(cfg).items():
        wanted = {row["id"] for row in rows if row["split"] == split}
        found |= {(split, prompt.id): prompt for prompt in _with_ids(dataset, wanted)}
    return found


def _with_ids(dataset: PromptDataset, wanted: set[str]) -> Iterable[Prompt]:
    """The prompts of these ids, as many as there are; at best without making any other."""
    ids = getattr(dataset, "ids", None)
    if ids is not None:
        for row in (row for row, name in enumerate(ids()) if name in wanted):
            yield dataset[row]
        return
    rest = set(wanted)
    for name in wanted:  # most ids end with the number of the row
        end = name.rpartition("/")[2]
        if end.isdecimal() and int(end) < len(dataset) and (prompt := dataset[int(end)]).id == name:
            rest.discard(name)
            yield prompt
    for row in range(len(dataset) if rest else 0):
        if (prompt := dataset[row]).id in rest:
            yield prompt


if __name__ == "__main__":
    main()
