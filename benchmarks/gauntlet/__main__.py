"""Put silent faults into the running system, and see whether it notices them.

``python -m benchmarks.gauntlet`` runs what is missing of: each fault once, 100 runs without a fault, and what noticing
costs; and writes ``docs/results/gauntlet.md``. Each finished run is one line of ``docs/results/gauntlet.jsonl``: an
interrupted gauntlet goes on where it was. ``--report`` only writes the document.
"""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.gauntlet import worker
from benchmarks.gauntlet.clean import RUNS
from benchmarks.gauntlet.faults import BY_NAME, CHOSEN, FAULTS
from benchmarks.gauntlet.report import caught, write

RESULTS = Path(__file__).parents[2] / "docs" / "results"
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--faults", nargs="*", choices=list(BY_NAME), metavar="FAULT", help="these only; default all")
    parser.add_argument("--chosen", action="store_true", help="the 24 faults only")
    parser.add_argument("--clean", type=int, default=RUNS, help=f"runs without a fault, 0 … {RUNS}")
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--no-cost", action="store_true", help="don't measure what noticing costs")
    parser.add_argument("--report", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    store = arguments.out / "gauntlet.jsonl"
    rows = read(store)
    if not arguments.report:
        names = [fault.name for fault in (CHOSEN if arguments.chosen else FAULTS)]
        names = names if arguments.faults is None else arguments.faults
        done = {row.get("fault", row.get("run")) for row in rows}
        jobs = [name for name in names if name not in done]
        jobs += [run for run in range(arguments.clean) if run not in done]
        run_all(jobs, store, arguments.workers)
        if not arguments.no_cost and all(row["kind"] != "cost" for row in rows):
            with pool(1) as one:  # alone on the machine
                keep(store, one.submit(worker.measure).result())
    path = write(read(store), arguments.out)
    print(f"report: {path}")


def read(store: Path) -> list[Row]:
    """Rows of the finished runs."""
    if not store.is_file():
        return []
    return [json.loads(line) for line in store.read_text(encoding="utf-8").splitlines() if line.strip()]


def keep(store: Path, row: Row) -> None:
    with store.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def pool(workers: int) -> ProcessPoolExecutor:
    """Processes with one vLLM engine each; what they print goes into a log."""
    return ProcessPoolExecutor(workers, get_context("spawn"), initializer=worker.begin)


def run_all(jobs: list[str | int], store: Path, workers: int) -> None:
    """Run the jobs side by side, and show each as it ends."""
    print(f"{len(jobs)} runs to do, results in {store}", flush=True)
    if not jobs:
        return
    started = time.monotonic()
    with pool(min(workers, len(jobs))) as processes:
        waiting = [processes.submit(worker.one, job) for job in jobs]
        for count, future in enumerate(as_completed(waiting), 1):
            row = future.result()
            keep(store, row)
            if row["kind"] == "fault":
                fine, what = caught(BY_NAME[row["fault"]], row), row["fault"]
            else:
                fine, what = not row["said"], f"clean run {row['run']}"
            said = "" if fine and row["kind"] == "clean" else f": {str(row['said'])[:160]}"
            shown = (
                ("noticed" if fine else "NOT NOTICED") if row["kind"] == "fault" else ("silent" if fine else "ALARM")
            )
            print(f"{count}/{len(jobs)} {time.monotonic() - started:.0f} s  {what}: {shown}{said}", flush=True)


if __name__ == "__main__":
    main()
