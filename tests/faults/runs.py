"""Runs that are struck, beside the same run left alone: what was survived, lost, and how long it took."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq

from benchmarks.same_numbers import values
from tests.faults.child import Plan
from tests.faults.striking import Folder, Strike

ROOT = Path(__file__).parents[2]
ENDS_THE_RUN = ("driver", "raylet", "gcs")
"""What ends the run with it (Ray's own parts on the only host); it is started again with ``resume=auto``."""
GOING = 5.0
"""Seconds in which what a driver started must be gone after it."""
SHOWN = 1500
"""Characters of the end of a log."""


@dataclass
class Struck:
    """One strike and what came of it."""

    point: str
    member: str
    how: str
    survived: bool = False
    """The run went on by itself, or, where the driver was struck, when it was started again."""
    seconds: float | None = None
    """From the strike until a step was done that had not been done before."""
    error: str = ""


@dataclass
class Outcome:
    """A run that was struck, compared with the one that was not."""

    name: str
    strikes: list[Struck]
    differing: list[str] = field(default_factory=list)
    """``step 7 metric: a, b``: values that are not those of the run left alone."""
    policy_equal: bool = False
    """The exported policy has the same bytes."""
    lost: list[str] = field(default_factory=list)
    """Samples of the run left alone that the struck one never trained on, ``step: prompt``."""
    twice: list[str] = field(default_factory=list)
    """Prompts asked twice."""
    left_behind: list[str] = field(default_factory=list)
    """Processes that were there after the run."""

    @property
    def survived(self) -> int:
        return sum(one.survived for one in self.strikes)


def drive(
    folder: Path,
    plan: Plan,
    patience: float,
    show: Callable[[str], None] = lambda _: None,
    module: str = "tests.faults.child",
) -> list[Struck]:
    """Run the plan in ``folder`` until it is done, starting it again after each strike that ended it. One that was
    interrupted goes on where it was.

    Args:
        patience: Seconds without progress after which the run hangs; it is ended and counts as not survived.
        module: What ``python -m`` runs with the folder as its argument.

    Returns:
        What became of each strike. One that never struck was not survived either.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plan.write(folder)
    shared, kept = Folder(folder), folder / "failures.json"
    shared.make()
    failures: dict[str, str] = json.loads(kept.read_text()) if kept.exists() else {}
    excused: Strike | None = None
    while not (done := folder / "done").exists():
        code, said = _once(folder, plan, patience, show, module)
        last = _last(shared, plan)
        if code == 0:
            done.write_text(str(time.time()))
        elif last is not None and last != excused and _excused(last, code):
            excused = last
        else:
            name = "" if last is None else last.file
            if name in failures:  # it fails again without another strike: this is no use
                break
            failures[name] = said
            kept.write_text(json.dumps(failures))
            show(f"not survived: {last}\n{said}")
    finished = float(done.read_text()) if done.exists() else time.time()
    return [_struck(shared, folder, strike, failures, finished) for strike in plan.strikes]


def _excused(strike: Strike, code: int) -> bool:
    """Whether the process of the run was meant to end."""
    role = strike.point.partition("/")[0]
    return role in ENDS_THE_RUN and (code == -signal.SIGKILL or role != "driver")


def _last(shared: Folder, plan: Plan) -> Strike | None:
    done = [(when, strike.number, strike) for strike in plan.strikes if (when := shared.time(strike)) is not None]
    return max(done)[2] if done else None


def _once(folder: Path, plan: Plan, patience: float, show: Callable[[str], None], module: str) -> tuple[int, str]:
    """One process of the run, to its end. Returns its exit code, negative for a signal, and the end of what it said."""
    log, progress = folder / "child.log", folder / "progress.jsonl"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RAY_DEDUP_LOGS": "0"}
    with log.open("ab") as out:
        start = out.tell()
        child = subprocess.Popen(
            [sys.executable, "-m", module, str(folder)],
            cwd=ROOT, env=environment, stdout=out, stderr=out, start_new_session=True,
        )  # fmt: skip
    seen, changed, hangs = (-1, -1), time.monotonic(), False
    try:
        while child.poll() is None and not hangs:
            time.sleep(0.2)
            size = progress.stat().st_size if progress.exists() else 0
            done = len(list((folder / "struck").glob("*.time")))
            if (size, done) != seen:
                seen, changed = (size, done), time.monotonic()
                show(f"{done} of {len(plan.strikes)} strikes, step {_step(progress)} of {plan.steps}")
            hangs = time.monotonic() - changed > patience
    finally:
        left = _end(child.pid)
        child.wait()
    if hangs:
        return 1, f"no progress for {patience:g} s; ended by the harness"
    show(f"exit {child.returncode}" + (f", left behind: {', '.join(left)}" if left else ""))
    return child.returncode, log.read_bytes()[start:].decode(errors="replace")[-SHOWN:]


def _end(group: int) -> list[str]:
    """End what is left of a process of the run and of its Ray; the names of what did not go by itself."""
    deadline = time.monotonic() + GOING
    while left := [one for one in psutil.process_iter(["name", "status"]) if _in_group(one, group)]:
        if time.monotonic() > deadline:
            os.killpg(group, signal.SIGKILL)
            return sorted(str(one.info["name"]) for one in left)
        time.sleep(0.1)
    return []


def _in_group(process: psutil.Process, group: int) -> bool:
    try:
        return process.info["status"] != psutil.STATUS_ZOMBIE and os.getpgid(process.pid) == group
    except ProcessLookupError:
        return False


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _step(path: Path) -> int:
    return max((line["step"] for line in _lines(path)), default=0)


def _struck(shared: Folder, folder: Path, strike: Strike, failures: dict[str, str], finished: float) -> Struck:
    made, when = Struck(strike.point, strike.member, strike.how), shared.time(strike)
    if when is None:
        made.error = "it never came to this point"
        return made
    lines = _lines(folder / "progress.jsonl")
    before = max((line["step"] for line in lines if line["time"] <= when), default=0)
    went_on = min((line["time"] for line in lines if line["time"] > when and line["step"] > before), default=finished)
    made.seconds, made.error = round(went_on - when, 2), failures.get(strike.file, "")
    made.survived = not made.error
    return made


# ---------------------------------------------------------------- comparison


def reference(folder: Path, plan: Plan, local: bool = False) -> Path:
    """The folder of the same run left alone, made unless it is there; ``local``: without Ray, in seconds."""
    alone = replace(plan, strikes=[], hosts=1, local=local)
    if not (folder / "run" / "summary.json").exists() or Plan.read(folder) != alone:
        drive(folder, alone, patience=600)
        if not (folder / "run" / "summary.json").exists():
            raise RuntimeError(f"the run left alone failed; see {folder / 'child.log'}")
    return folder


def compare(name: str, alone: Path, folder: Path, strikes: list[Struck]) -> Outcome:
    """Value by value, sample by sample, and the exported weights byte by byte."""
    made = Outcome(name, strikes)
    old, new = (values(one / "run" / "metrics.jsonl") for one in (alone, folder))
    made.differing = [
        f"step {step} {metric}: {value}, {new.get((step, metric))}"
        for (step, metric), value in sorted(old.items())
        if new.get((step, metric)) != value
    ]
    old_rows, new_rows = samples(alone / "run"), samples(folder / "run")
    plan = Plan.read(folder)
    if plan.oversample and plan.lag:  # answers that are younger have other lengths: groups end in another order
        made.lost = ["a prompt"] * unaccounted(folder / "run", {prompt for _, prompt in new_rows})
    else:
        made.lost = [f"step {step}: {prompt}" for (step, prompt), n in (old_rows - new_rows).items() for _ in range(n)]
    asked = Counter(prompt for _, prompt in {key for key in new_rows})
    made.twice = [f"{prompt}: {n} steps" for prompt, n in asked.items() if n > 1]
    made.policy_equal = _digest(alone) == _digest(folder) != ""
    return made


def unaccounted(run: Path, trained: set[str]) -> int:
    """Prompts taken from the data up to the last step, neither trained on nor left to a later one."""
    newest = max(run.glob("checkpoints/step_*/state.json"))
    state = json.loads(newest.read_text())
    return int(state["stream"]["position"]) - len(trained) - int(state["left"])


def samples(run: Path) -> Counter[tuple[int, str]]:
    """(step, prompt) → how many answers of it were asked for that step and trained on."""
    found: Counter[tuple[int, str]] = Counter()
    for file in sorted((run / "samples").glob("step_*.parquet")):
        rows = pq.read_table(file, columns=["step", "id", "origin"]).to_pylist()
        found.update((row["step"], row["id"]) for row in rows if row["origin"] == "fresh")
    return found


def _digest(folder: Path) -> str:
    file = folder / "run" / "policy" / "model.safetensors"
    return hashlib.blake2b(file.read_bytes()).hexdigest() if file.exists() else ""
