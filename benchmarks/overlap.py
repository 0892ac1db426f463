"""What ``controller.lag=1`` gives on one machine: time per step, and accuracy after equal steps and equal time.

::

    python -m benchmarks.overlap time [--only lag1 …]   # 3 minutes on two quiet cores
    python -m benchmarks.overlap accuracy [--seeds 5]   # 2 minutes a run, 2 runs a seed; goes on where it stopped
    python -m benchmarks.overlap table

``time``: whole systems take turns, step by step: lag 0 on all cores (``lag0``) and lag 1 with rollout and learner each
on its share of the cores (``lag1``), on all of them both (``lag1_all_cores``), and with two rollout workers
(``lag1_two_workers``). The limit that no overlap can beat is measured in the same rounds: ``Sampler.generate`` and a
learner step without optimizer on the prompts and tokens of that round's ``lag0`` step, both at once, each on its share
of the cores and without Ray; the longer one counts. ``lag0`` has two rollout and two reward workers, as the default run
has (conf/model/digits.yaml); ``lag1`` one of each, which is faster with a lag on two cores.

``accuracy``: the default run (40 steps) with lag 0 and lag 1 for each seed (order of prompts, sampling, replay), each
finished run a line of OUT/overlap_accuracy.jsonl. Equal time is 40 steps of ``lag1`` as ``time`` clocked them, for a
load would fall on one run and not on another; lag 0's accuracy there is interpolated between its evaluations.
``$SKYRL_BENCHMARK_MODELS`` names a folder with other models (``policy``, ``reward``).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import _turns, step_time
from benchmarks._system import embedded_models
from benchmarks._turns import ROOT, Block, Side, Spread, python, started, turn

ONE = {"rollout.num_workers": 1, "reward.num_workers": 1}
SHARED, ALL = (ONE | dict.fromkeys(("rollout.threads", "learner.threads", "reward.threads"), count) for count in (1, 2))
VARIANTS: dict[str, dict[str, int]] = {
    "lag0": {},
    "lag1": {"controller.lag": 1} | SHARED,
    "lag1_all_cores": {"controller.lag": 1} | ALL,
    "lag1_two_workers": SHARED | {"controller.lag": 1, "rollout.num_workers": 2},
}
"""Name → settings. The shares are those of two cores."""
RUNS = {name: VARIANTS[name] for name in ("lag0", "lag1")}
EVERY = 4
"""Steps between evaluations of the accuracy runs."""
WANTED = 0.9
"""Of the limit."""
TIMES, ACCURACY = "overlap_time.json", "overlap_accuracy.jsonl"


def main() -> None:
    """One of the three commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="?", choices=["time", "accuracy", "table"], default="table")
    parser.add_argument("--steps", type=int, default=12, help="rounds of `time` that count")
    parser.add_argument("--warm-up", type=int, default=5, help="rounds before those")
    parser.add_argument(
        "--only", nargs="+", choices=list(VARIANTS), default=["lag1"], help="of `time`, beside lag0; 4 to 6 GiB each"
    )
    parser.add_argument("--prompts", type=int, default=64, help="of a step of `time`; the default run has 64")
    parser.add_argument("--seeds", type=int, default=5, help="of `accuracy`")
    parser.add_argument("--length", type=int, default=40, help="steps of a run of `accuracy`")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "benchmarks", help="folder of the results")
    parser.add_argument("--whole", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.whole:
        name, prompts, folder = given.whole
        step_time.serve(_config(name, int(prompts)), Path(folder))
        return
    given.out.mkdir(parents=True, exist_ok=True)
    if given.command == "time":
        with tempfile.TemporaryDirectory(prefix="overlap-") as work:
            result = _measure(Path(work), ["lag0", *(name for name in given.only if name != "lag0")], given)
        _turns.saved(given.out / TIMES, result)
    elif given.command == "accuracy":
        for seed in range(given.seeds):
            for name in RUNS:
                _run(name, seed, given.length, given.out)
    print(table(given.out))


def _config(name: str, prompts: int) -> Any:
    cfg = step_time.config()
    cfg.name, cfg.rollout.prompts_per_step = name, prompts
    for key, value in VARIANTS[name].items():
        group, setting = key.split(".")
        setattr(getattr(cfg, group), setting, value)
    return cfg


def _measure(work: Path, names: list[str], given: Any) -> dict[str, Any]:
    """All turns of `time`."""
    from skyrl.crew.ray_executor import COMMON_ENVIRONMENT

    cores, count = os.cpu_count() or 1, str(given.prompts)
    for name in names:
        (work / name).mkdir()
    wholes = [
        Side(
            name,
            python("benchmarks.overlap", "time", "--whole", name, count, str(work / name)),
            {},
            work / f"{name}.log",
        )
        for name in names
    ]
    with started(wholes):
        turn(wholes[0], wholes)
        first = str(work / "lag0" / "1.pkl")
        threads = {"rollout": max(1, cores // 2), "learner": max(1, cores - cores // 2)}
        bare = [
            Side(role, python("benchmarks._parts", role, str(n), first), COMMON_ENVIRONMENT, work / f"{role}.log")
            for role, n in threads.items()
        ]
        with started(bare):
            sides, blocks, limits = [*wholes, *bare], list[Block](), list[float]()
            for number in range(given.warm_up + given.steps):
                told = [turn(side, sides) for side in (wholes if number % 2 == 0 else wholes[::-1])]
                file = work / "lag0" / f"{number + 2}.pkl"
                at_once = _turns.together(bare, [f"sample {file}", f"train_step {file}"], sides)
                for left in work.glob("*/*.pkl"):
                    left.unlink()
                if number >= given.warm_up:
                    blocks += told
                    limits.append(max(found for block in at_once for found in block.report.values()))
    steps = {name: [block.report["time/step"] for block in blocks if block.side == name] for name in names}
    return {
        "machine": _turns.machine(),
        "prompts": given.prompts,
        "step": {name: Spread.of(found) for name, found in steps.items()},
        "limit": Spread.of(limits),
        "share": {
            name: Spread.of([limit / step for limit, step in zip(limits, found, strict=True)])
            for name, found in steps.items()
        },
        "warnings": _turns.warnings_of(blocks),
        "blocks": _turns.as_json(blocks),
    }


def _run(name: str, seed: int, length: int, out: Path) -> None:
    """One run of `accuracy`, unless it is in the file already."""
    file, wanted = out / ACCURACY, {"name": name, "seed": seed, "length": length}
    if any(wanted.items() <= row.items() for row in _rows(file)):
        print(f"{name}, seed {seed}: there already", flush=True)
        return
    policy, reward = embedded_models()
    with tempfile.TemporaryDirectory(prefix="overlap-") as work:
        words = [f"{key}={value}" for key, value in RUNS[name].items()]
        words += [f"controller.seed={seed}", f"data.seed={seed}", f"controller.steps={length}"]
        words += [f"evaluation.every={EVERY}", "checkpoint.every=0", "checkpoint.export=false", f"run_dir={work}/run"]
        words += [f"model.policy={policy}", f"model.reward={reward}"]
        words += ["monitoring.wandb=off", "monitoring.console=false", "cluster.dashboard=false"]
        done = subprocess.run(python("skyrl.launch", *words), cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{name}, seed {seed} failed:\n{done.stderr[-3000:]}")
        lines = [json.loads(line) for line in (Path(work) / "run" / "metrics.jsonl").read_text().splitlines()]
    accuracy = {line["step"]: line["eval/accuracy"] for line in lines if line.get("eval/accuracy") is not None}
    seconds = [line["time/step"] for line in lines if line.get("time/step") is not None]
    row = wanted | {"accuracy": accuracy, "seconds": seconds}
    with file.open("a") as written:
        written.write(json.dumps(row) + "\n")
    print(f"{name}, seed {seed}: accuracy {accuracy[length]:.3f}", flush=True)


def _rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def table(out: Path) -> str:
    """Markdown of what was measured so far."""
    lines: list[str] = []
    times = json.loads((out / TIMES).read_text()) if (out / TIMES).is_file() else None
    if times:
        lines += ["| | seconds a step (quartiles) | limit / step |", "|---|---|---|"]
        for name, found in times["step"].items():
            lines.append(f"| {name} | {Spread(**found)} | {Spread(**times['share'][name])} |")
        lines += [f"| limit | {Spread(**times['limit'])} | wanted: {WANTED} |"]
        lines += ["", *(f"- {one}" for one in times["warnings"])] if times["warnings"] else []
    rows = _rows(out / ACCURACY)
    if rows:
        lines += ["", *_accuracies(rows, times)]
    return "\n".join(lines) or "nothing measured yet"


def _accuracies(rows: list[dict[str, Any]], times: dict[str, Any] | None) -> list[str]:
    """Differences lag 1 − lag 0 over seeds, in points, with 95 % intervals."""
    import numpy as np

    length: int = max(row["length"] for row in rows)
    by = {(row["name"], row["seed"]): row for row in rows if row["length"] == length}
    seeds = sorted({seed for _, seed in by if all((name, seed) in by for name in RUNS)})
    if times:
        ratio, clock = times["step"]["lag1"]["median"] / times["step"]["lag0"]["median"], "as `time` clocked them"
    else:
        middle = {name: np.median([s for seed in seeds for s in by[name, seed]["seconds"]]) for name in RUNS}
        ratio, clock = float(middle["lag1"] / middle["lag0"]), "by the runs' own clocks"
    steps, duration = [], []
    for seed in seeds:
        curve = {int(step): value for step, value in by["lag0", seed]["accuracy"].items()}
        last = by["lag1", seed]["accuracy"][str(length)]
        steps.append(100 * (last - curve[length]))
        duration.append(100 * (last - float(np.interp(length * ratio, list(curve), list(curve.values())))))
    if not seeds:
        return ["no seed has both runs yet"]
    equal = f"after equal time, {length * ratio:.1f} steps of lag 0 {clock}"
    return [
        f"| accuracy of lag 1 − lag 0, points, {len(seeds)} seeds | mean ± half of 95 % interval | each |",
        "|---|---|---|",
        f"| after {length} steps | {_interval(steps)} | {_each(steps)} |",
        f"| {equal} | {_interval(duration)} | {_each(duration)} |",
    ]


def _interval(values: list[float]) -> str:
    from scipy.stats import t

    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:+.1f}"
    half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:+.1f} ± {half:.1f}"


def _each(values: list[float]) -> str:
    return ", ".join(f"{value:+.1f}" for value in values)


if __name__ == "__main__":
    main()
