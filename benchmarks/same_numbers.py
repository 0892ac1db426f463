"""Do two versions of the code give the same numbers? Short seeded runs, recorded by each, compared value by value.

::

    python -m benchmarks.same_numbers record OUT --policy FOLDER --reward FOLDER --data FOLDER [--source OTHER_CHECKOUT]
    python -m benchmarks.same_numbers compare OLD NEW

Both sides must be given the same model folders and the same data (``train.parquet``, ``eval.parquet`` and
``pairs.parquet`` in one folder): a rebuilt model would be another one. ``record`` starts ``python -m skyrl.launch`` for
every run of :data:`RUNS`, with the code of ``--source`` (this checkout by default), and keeps the metrics of each step
in ``OUT/<run>.jsonl``. Wall times and what follows from them are left out. ``compare`` prints a line a run and the
first values that differ; its exit status is 1 if any do.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

COMMON = (
    *("data={source}", "data.train_path={data}/train.parquet", "data.eval_path={data}/eval.parquet"),
    *("rollout.prompts_per_step=16", "rollout.samples_per_prompt=4", "data.eval_size=48", "evaluation.every=2"),
    *("checkpoint.every=0", "checkpoint.export=false", "cluster.dashboard=false", "monitoring.wandb=off"),
    *("monitoring.console=false", "monitoring.ray_metrics=false", "learner.lr=3e-4", "learner.warmup_steps=1"),
    *("rollout.threads=1", "reward.threads=1", "learner.threads=1"),
)
RUNS: dict[str, tuple[tuple[str, ...], ...]] = {
    "default": (("controller.steps=5",),),
    "grpo_without_buffer": (("controller.steps=5", "algorithm=grpo", "buffer=off"),),
    "joint_without_buffer": (("controller.steps=5", "buffer=off"),),
    "mpo_then_grpo": (("controller.steps=5", "algorithm=mpo_then_grpo", "algorithm.mpo_steps=2"),),
    "offline_pairs": (
        ("controller.steps=4", "algorithm=mpo", "data.pairs_per_step=8", "data.pairs_path={data}/pairs.parquet"),
    ),
    "dropout_ntp": (
        ("controller.steps=4", "buffer=off", "algorithm.mpo.pairs=dropout_ntp", "algorithm.mpo.threshold.kind=off"),
    ),
    "two_ranks_zero3": (("controller.steps=3", "buffer=off", "learner.num_workers=2", "learner.zero_stage=3"),),
    "resumed": (
        ("controller.steps=3", "checkpoint.every=3"),
        ("controller.steps=5", "checkpoint.every=3", "resume=auto"),
    ),
}
"""Name → one or more starts, each with its overrides; a second one goes on in the folder of the first."""
TIMES = ("time/", "overlap/", "throughput/", "sync/seconds", "eval/seconds", "eval/probe_seconds")


def record(out: Path, source: Path, policy: Path, reward: Path, data: Path, only: list[str]) -> None:
    """Run everything (or ``only`` the named runs) and write ``OUT/<run>.jsonl``."""
    out.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"PYTHONPATH": str(source / "src")}
    named = next(name for name in ("files", "parquet") if (source / "conf" / "data" / f"{name}.yaml").is_file())
    for name, starts in RUNS.items():
        if only and name not in only:
            continue
        print(f"{name} …", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            run_dir = Path(folder) / "run"
            for overrides in starts:
                words = [word.format(data=data, source=named) for word in (*COMMON, *overrides)]
                words += [f"name=same_{name}", f"run_dir={run_dir}", f"model.policy={policy}", f"model.reward={reward}"]
                command = [sys.executable, "-m", "skyrl.launch", *words]
                subprocess.run(command, check=True, env=environment, cwd=folder, stdout=subprocess.DEVNULL)
            shutil.copy(run_dir / "metrics.jsonl", out / f"{name}.jsonl")


def compare(old: Path, new: Path) -> int:
    """Print what differs; the number of runs that do."""
    differing = 0
    for name in sorted({path.stem for folder in (old, new) for path in folder.glob("*.jsonl")}):
        if not ((old / f"{name}.jsonl").is_file() and (new / f"{name}.jsonl").is_file()):
            print(f"{name}: recorded on one side only")
            differing += 1
            continue
        before, after = values(old / f"{name}.jsonl"), values(new / f"{name}.jsonl")
        shared = before.keys() & after.keys()
        other = {key: _distance(before[key], after[key]) for key in shared if before[key] != after[key]}
        lost, added = sorted(before.keys() - shared), sorted(after.keys() - shared)
        names = {key[1] for key in other}
        print(
            f"{name}: {len(shared)} values on both sides, {len(other)} differ"
            + (
                f" (by up to {max(other.values()):.1e}, first at step {min(other)[0]}, {len(names)} names)"
                if other
                else ""
            )
            + (f"; only before: {sorted({key[1] for key in lost})}" if lost else "")
            + (f"; only after: {sorted({key[1] for key in added})}" if added else "")
        )
        for key in sorted(other)[:6]:
            print(f"    step {key[0]:<3}{key[1]:<32}{before[key]!r} → {after[key]!r}")
        differing += bool(other or lost)
    return differing


def values(path: Path) -> dict[tuple[int, str], float | None]:
    """(step, metric) → value of a metrics.jsonl, without wall times. A step that is logged twice keeps both parts."""
    found: dict[tuple[int, str], float | None] = {}
    for line in path.read_text().splitlines():
        row: Mapping[str, Any] = json.loads(line)
        for name, value in row.items():
            # A null says that nothing was measured, as an absent name does.
            if name != "step" and value is not None and not name.startswith(TIMES):
                found[row["step"], name] = value
    return found


def _distance(a: float | None, b: float | None) -> float:
    """Relative, or absolute for values below 1."""
    return math.inf if a is None or b is None else abs(a - b) / max(1.0, abs(a), abs(b))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record")
    recording.add_argument("out", type=Path)
    for name in ("policy", "reward", "data"):
        recording.add_argument(f"--{name}", type=Path, required=True)
    recording.add_argument("--source", type=Path, default=Path(__file__).parents[1])
    recording.add_argument("--only", nargs="*", default=[], choices=list(RUNS))
    comparing = commands.add_parser("compare")
    comparing.add_argument("old", type=Path)
    comparing.add_argument("new", type=Path)
    given = parser.parse_args()
    if given.command == "compare":
        sys.exit(1 if compare(given.old, given.new) else 0)
    record(
        given.out.resolve(),
        given.source.resolve(),
        given.policy.resolve(),
        given.reward.resolve(),
        given.data.resolve(),
        given.only,
    )


if __name__ == "__main__":
    main()
