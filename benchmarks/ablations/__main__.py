"""The paper's tables at small scale.

``python -m benchmarks.ablations`` runs what is missing of the grid and writes ``docs/results/ablations.md`` with its
plots. Each finished run is one line of ``docs/results/ablations.jsonl``: an interrupted grid goes on where it was.
``--report`` only writes the document; ``--quick`` runs a few methods for two steps with tiny models into ``--out``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from queue import Empty, Queue

from benchmarks.ablations.grid import METHODS, SEEDS, VARIANTS, Job, Row, jobs
from benchmarks.ablations.report import write_report

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help=f"folder of the results; default {RESULTS.relative_to(ROOT)}")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--workers", type=int, default=2, help="runs side by side, one thread each")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no run after so many minutes")
    parser.add_argument("--quick", action="store_true", help="a few methods, two steps, tiny models; needs --out")
    parser.add_argument("--report", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    if arguments.quick and arguments.out is None:
        parser.error("--quick needs --out, so that its results never mix with the real ones")
    out = arguments.out or RESULTS
    out.mkdir(parents=True, exist_ok=True)
    store = out / "ablations.jsonl"
    methods, seeds = arguments.methods, tuple(arguments.seeds)
    if arguments.quick:
        methods, seeds = ["default", "mpo", *VARIANTS], (0,)
    if not arguments.report:
        wanted = missing(jobs(methods, seeds, arguments.quick), read(store))
        print(f"{len(wanted)} runs to do, results in {store}")
        Grid(wanted, store, arguments.workers, arguments.minutes).run()
    print(f"report: {write_report(read(store), out)}")


def read(store: Path) -> list[Row]:
    """Rows of the finished runs."""
    if not store.is_file():
        return []
    return [json.loads(line) for line in store.read_text(encoding="utf-8").splitlines() if line.strip()]


def missing(wanted: list[Job], rows: list[Row]) -> list[Job]:
    """The jobs without a row.

    Raises:
        SystemExit: if a job's row was made with other overrides: the two must not stand in one table.
    """
    made = {row["key"]: row["overrides"] for row in rows}
    stale = [job.key for job in wanted if made.get(job.key, job.overrides()) != job.overrides()]
    if stale:
        raise SystemExit(
            f"the rows of {', '.join(stale)} were made with other settings; take them out of the file first"
        )
    return [job for job in wanted if job.key not in made]


class Grid:
    """Deals jobs to worker processes."""

    def __init__(self, wanted: list[Job], store: Path, workers: int, minutes: float) -> None:
        self.queue: Queue[Job] = Queue()
        for job in wanted:
            self.queue.put(job)
        self.total, self.done, self.store = len(wanted), 0, store
        self.workers = min(workers, len(wanted))
        self.lock = threading.Lock()
        self.started = time.monotonic()
        self.deadline = self.started + 60 * minutes
        self.failed: list[str] = []
        self.processes: list[subprocess.Popen[str]] = []

    def run(self) -> None:
        """Block until the queue is empty or the time is up.

        Raises:
            SystemExit: if a worker died; the finished rows are kept.
        """
        if not self.total:
            return
        build_models(self.queue.queue[0])
        threads = [threading.Thread(target=self._serve, daemon=True) for _ in range(self.workers)]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        finally:  # interrupted: a worker would else finish its run for nobody
            for process in self.processes:
                process.terminate()
        if self.failed:
            raise SystemExit("\n".join(self.failed))

    def _serve(self) -> None:
        command = [sys.executable, "-m", "benchmarks.ablations.worker", commit()]
        log = self.store.with_name(f"worker-{threading.get_ident()}.log")
        with log.open("w") as errors:
            process = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
            )
            self.processes.append(process)
            ended_well = self._deal(process, log)
            process.wait()
        if ended_well:
            log.unlink()

    def _deal(self, process: subprocess.Popen[str], log: Path) -> bool:
        """Hand jobs to one worker; False if it died."""
        assert process.stdin is not None and process.stdout is not None
        while time.monotonic() < self.deadline:
            try:
                job = self.queue.get_nowait()
            except Empty:
                break
            process.stdin.write(json.dumps(asdict(job)) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
            if not line:
                self.failed.append(f"{job.key} failed; the end of {log}:\n{log.read_text()[-3000:]}")
                return False
            self._keep(json.loads(line))
        process.stdin.close()
        return True

    def _keep(self, row: Row) -> None:
        with self.lock:
            with self.store.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, separators=(",", ":")) + "\n")
            self.done += 1
            minutes = (time.monotonic() - self.started) / 60
            last = row["evaluations"][-1]
            print(
                f"[{self.done}/{self.total}, {minutes:.1f} min] {row['key']}: accuracy {last['eval/accuracy']:.3f}, "
                f"hallucination {last['eval/hallucination']:.3f}, {row['seconds']:.0f} s",
                flush=True,
            )


def build_models(job: Job) -> None:
    """Build or find the embedded models before the workers want them at the same time."""
    from skyrl.cli import compose_config
    from skyrl.run import model_folders

    model_folders(compose_config(job.overrides()))


def commit() -> str:
    """Short hash of the code that runs, with a plus if the tree has changes; "unknown" outside a checkout."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty=+"], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


if __name__ == "__main__":
    main()
