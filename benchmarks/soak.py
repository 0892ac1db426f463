"""Does anything grow in a long run whose members die now and then?

``python -m benchmarks.soak [--steps 2000] [--every 100] [--out outputs/soak]`` trains a tiny policy with the plain
engine and backend of ``tests/`` over Ray, and every so many steps one member is killed, the roles in turn, within a
call or between two. Every ``--look`` steps each process of the run is looked at:

* ``private``: memory that it alone has (USS), MiB; open ``files`` (descriptors); ``threads``;
* of the run: number of ``processes``, ``shm``, what lies in /dev/shm, MiB, and ``store``, bytes that Ray's object store
  says are used, MiB.

The criterion, set before: the median of the last quarter of the steps is above that of the second quarter by less than
10 MiB of private memory (each process, and 30 MiB all together), 5 open files, 5 threads, 2 processes, and 16 MiB of
/dev/shm and of the object store. (Ray's log monitor holds the logs of dead workers open until it has 200 files: of its
files 200 are allowed.) A member that was replaced keeps its name here, so what stands under it has several lives; the
driver and Ray's own processes live throughout.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
MIB = 2.0**20
LIMITS = {"private": 10.0, "files": 5.0, "threads": 5.0, "processes": 2.0, "shm": 16.0, "store": 16.0}
ALL_PRIVATE, LOG_FILES = 30.0, 200.0
TURN = [
    ("rollout/sampling", "rollout-0"),
    ("reward/verifying", "reward-0"),
    ("buffer/kept", "sample-buffer"),
    ("learner/backward", "learner-0"),
    ("rollout/loaded", "rollout-1"),
    ("reward/scored", "reward-1"),
    ("buffer/idle", "sample-buffer"),
    ("learner/idle", "learner-0"),
]
"""Where the members are killed, in turn."""
UNITS = {"private": "MiB", "files": "", "threads": "", "processes": "", "shm": "MiB", "store": "MiB"}

Seen = dict[str, dict[str, dict[int, float]]]
"""Quantity → process, or "run" → step → value."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("child", nargs="?", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--every", type=int, default=100, help="steps between two kills")
    parser.add_argument("--look", type=int, default=50, help="steps between two looks")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "soak")
    given = parser.parse_args()
    if given.child is not None:
        _child(given.child.absolute())
        return 0
    if given.steps < 8 * given.look:
        parser.error("--steps must be at least 8 times --look: each quarter needs two looks")
    return _soak(given.out.absolute(), given.steps, given.every, given.look)


def _soak(out: Path, steps: int, every: int, look: int) -> int:
    """The run, its table and its chart; 1 if something grew or a kill was not survived."""
    import tiny_runs

    from tests.faults.child import Plan
    from tests.faults.runs import drive
    from tests.faults.striking import Strike

    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    kills = [
        Strike(number, *TURN[number % len(TURN)], step=step) for number, step in enumerate(range(every, steps, every))
    ]
    plan = Plan(
        tiny_runs.policy_folder(out), steps, evaluate=0, save=20, timeout=120.0, look=look, kept=20, strikes=kills
    )
    started = time.monotonic()

    def show(text: str) -> None:
        print(f"{time.monotonic() - started:6.0f} s  {text}", flush=True)

    strikes = drive(out / "run", plan, patience=400.0, show=_seldom(show), module="benchmarks.soak")
    seen = read(out / "run" / "seen.jsonl")
    result: dict[str, Any] = {
        "steps": steps, "kills": len(kills), "survived": sum(one.survived for one in strikes),
        "seconds": time.monotonic() - started, "load": os.getloadavg()[0],
        "seconds_to_go_on": [one.seconds for one in strikes if one.survived],
        "errors": [f"{one.member} at {one.point}: {one.error[-300:]}" for one in strikes if not one.survived],
        "growth": growth(seen, steps), "seen": seen,
    }  # fmt: skip
    (out / "soak.json").write_text(json.dumps(result, indent=1))
    (out / "soak.md").write_text(table(result))
    chart(seen, out / "soak.png")
    print(table(result))
    return int(result["survived"] < len(kills) or any(not one["flat"] for one in result["growth"]))


def _seldom(show: Any) -> Any:
    """Passes on what was not said in the last ten seconds."""
    last = [0.0]

    def told(text: str) -> None:
        if time.monotonic() - last[0] > 10 or not text[0].isdigit():
            last[0] = time.monotonic()
            show(text)

    return told


# ---------------------------------------------------------------- looking


def _child(folder: Path) -> None:
    from skyrl.cli import run_command
    from tests.faults.child import Plan, work

    every = Plan.read(folder).look

    def look(step: int) -> None:
        if step % every == 0:
            with (folder / "seen.jsonl").open("a") as file:
                file.write(json.dumps({"step": step, **looked(folder)}) + "\n")

    run_command(lambda: work(folder, look), "interrupted")


def looked(folder: Path) -> dict[str, dict[str, float]]:
    """Quantity → process → value, as it is now."""
    import ray

    names = {int(file.read_text()): file.name for file in (folder / "pids").iterdir()} | {os.getpid(): "driver"}
    found: defaultdict[str, dict[str, float]] = defaultdict(dict)
    mine = psutil.Process()
    processes = [mine, *mine.children(recursive=True)]
    for process in processes:
        try:
            name = names.get(process.pid) or ray_name(process)
            memory, files, threads = process.memory_full_info().uss, process.num_fds(), process.num_threads()
        except psutil.NoSuchProcess:
            continue
        if name:
            found["private"][name] = memory / MIB
            found["files"][name], found["threads"][name] = float(files), float(threads)
    found["private"]["all"] = sum(found["private"].values())
    found["processes"]["run"] = float(len(processes))
    found["shm"]["run"] = shutil.disk_usage("/dev/shm").used / MIB
    there, free = (kind().get("object_store_memory", 0.0) for kind in (ray.cluster_resources, ray.available_resources))
    found["store"]["run"] = (there - free) / MIB
    return dict(found)


def ray_name(process: psutil.Process) -> str | None:
    """Ray's own lasting processes. Its idle workers come and go."""
    line = " ".join(process.cmdline())
    known = ("raylet", "gcs_server", "dashboard/agent", "runtime_env/agent", "log_monitor", "monitor.py")
    return next((name for name in known if name in process.name() or name in line), None)


def read(path: Path) -> Seen:
    """What was seen; of a step that came twice, after the run had gone back, the last."""
    seen: Seen = defaultdict(lambda: defaultdict(dict))
    for line in path.read_text().splitlines():
        row = json.loads(line)
        for quantity, values in row.items():
            if quantity != "step":
                for name, value in values.items():
                    seen[quantity][name][row["step"]] = value
    return {quantity: dict(values) for quantity, values in seen.items()}


def growth(seen: Seen, steps: int) -> list[dict[str, Any]]:
    """Of each quantity and process: medians of the second and of the last quarter of the steps, and whether it is
    flat. What was not seen in both is left out."""
    found = []
    for quantity, processes in seen.items():
        for name, values in sorted(processes.items()):
            second = [v for step, v in values.items() if steps / 4 < step <= steps / 2]
            last = [v for step, v in values.items() if step > steps * 3 / 4]
            if second and last:
                before, after = statistics.median(second), statistics.median(last)
                own = {("private", "all"): ALL_PRIVATE, ("files", "log_monitor"): LOG_FILES}
                limit = own.get((quantity, name), LIMITS[quantity])
                found.append(
                    {"quantity": quantity, "process": name, "second": before, "last": after, "limit": limit}
                    | {"flat": after - before < limit}
                )
    return found


# ---------------------------------------------------------------- showing


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    seconds = result["seconds_to_go_on"] or [float("nan")]
    lines = [
        f"{result['steps']} steps with {result['kills']} kills, {result['survived']} survived, in "
        f"{result['seconds']:.0f} s; seconds until the run went on: median {statistics.median(seconds):.1f}, largest "
        f"{max(seconds):.1f}.",
        "",
        "| what | of | second quarter | last quarter | difference | allowed below | flat |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in result["growth"]:
        unit = f" {UNITS[one['quantity']]}".rstrip()
        lines.append(
            f"| {one['quantity']} | {one['process']} | {one['second']:.1f}{unit} | {one['last']:.1f}{unit} | "
            f"{one['last'] - one['second']:+.1f} | {one['limit']:g} | {'yes' if one['flat'] else 'NO'} |"
        )
    return "\n".join([*lines, *(f"\nNot survived: {error}" for error in result["errors"]), ""])


def chart(seen: Seen, path: Path) -> None:
    """Every quantity over the steps, a line a process."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 9))
    places = figure.subplots(3, 2, sharex=True).flat
    for place, (quantity, processes) in zip(places, seen.items(), strict=False):
        for name, values in processes.items():
            if name != "all":
                place.plot(list(values), list(values.values()), label=name, linewidth=1)
        place.set_title(f"{quantity} {UNITS[quantity]}".rstrip(), fontsize=10)
        place.set_ylim(bottom=0)
        if quantity == "private":
            place.legend(fontsize=6, ncols=2)
    figure.supxlabel("step")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
