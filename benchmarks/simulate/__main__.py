"""Runs of any size on one machine.

python -m benchmarks.simulate run --engines 512 --prompts 512 --samples 4 --lag 1 --steps 300
python -m benchmarks.simulate split --gpus 64 --prompts 512 --samples 16 --costs h100_7b --lengths math_long_tail
python -m benchmarks.simulate published     ratios of other systems
python -m benchmarks.simulate control       what the control plane takes; --ray with Ray actors
python -m benchmarks.simulate measured      a short real run against its prediction
python -m benchmarks.simulate plot          docs/results/simulation.png from docs/results/simulation.json

Lengths and costs are names of files in ``skyrl/simulate/lengths`` and ``costs``, or paths of your own.
``--save`` writes the result into ``docs/results/simulation.json``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.simulate.split import Job, Split, splits
from skyrl.records import SkyrlError
from skyrl.simulate.cost import read_costs
from skyrl.simulate.lengths import read_lengths
from skyrl.simulate.world import Plan, simulate

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "simulation.json"
CHECKED = 4
"""Splits that are also simulated."""
CHECKED_STEPS = 12
SHOWN = 10


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.simulate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, function in COMMANDS.items():
        own = commands.add_parser(name, help=function.__doc__)
        own.add_argument("--save", action="store_true", help=f"into {RESULTS.name}")
        if name in ("run", "split"):
            _add_job(own)
        if name == "run":
            _add_run(own)
        if name == "split":
            own.add_argument("--gpus", type=_count, required=True)
            own.add_argument("--draws", type=_count, default=8, help="of the lengths, that means are taken over")
            own.add_argument("--colocated", action="store_true", help="both roles may share all GPUs, at lag 0")
        if name == "control":
            own.add_argument("--ray", action="store_true", help="with Ray actors")
            own.add_argument("--actors", type=_count, default=4, help="Ray actors that serve the members of a crew")
            own.add_argument("--workers", type=_count, nargs="+", default=[16, 64, 256, 512])
        if name == "measured":
            own.add_argument(
                "--from", dest="found", type=Path, help="JSON of benchmarks.simulate.measure; else measure"
            )
    arguments = parser.parse_args()
    began = time.perf_counter()
    try:
        result = COMMANDS[arguments.command](arguments)
    except SkyrlError as error:
        sys.exit(f"error: {error}")
    if arguments.save and result is not None:
        stored = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
        part = arguments.command + ("_ray" if getattr(arguments, "ray", False) else "")
        command = " ".join(["python -m benchmarks.simulate", *(one for one in sys.argv[1:] if one != "--save")])
        stored[part] = {"command": command, "seconds": round(time.perf_counter() - began, 1), "result": result}
        RESULTS.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")


def _count(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text}; allowed: 1 or more")
    return number


def _add_job(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompts", type=_count, default=512, help="rollout.prompts_per_step")
    parser.add_argument("--samples", type=_count, default=16, help="rollout.samples_per_prompt")
    parser.add_argument("--lengths", default="math_long_tail")
    parser.add_argument("--costs", default="h100_7b")
    parser.add_argument("--reward-workers", type=_count, default=8)


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--engines", type=_count, default=16, help="rollout.num_workers")
    parser.add_argument("--learner-gpus", type=_count, default=32)
    parser.add_argument("--lag", type=int, default=1, choices=range(9), metavar="0 … 8")
    parser.add_argument("--oversample", type=float, default=0.0)
    parser.add_argument("--steps", type=_count, default=24)
    parser.add_argument("--colocated", action="store_true", help="engines and learner take turns on the same GPUs")
    parser.add_argument(
        "--call-us", type=float, default=0.0, help="microseconds that a call to a member costs the loop"
    )


# ------------------------------------------------------------------ commands


def run(arguments: argparse.Namespace) -> Any:
    """one run"""
    plan = Plan(
        arguments.prompts, arguments.samples, arguments.engines, arguments.learner_gpus, arguments.lag, arguments.steps,
        arguments.oversample, arguments.colocated, arguments.reward_workers,
    )  # fmt: skip
    costs, lengths = read_costs(arguments.costs), read_lengths(arguments.lengths)
    found = simulate(plan, costs, lengths, call_seconds=arguments.call_us * 1e-6)[0]
    for name, value in asdict(found).items():
        shown = "  ".join(f"{k} {v:.4g}" for k, v in value.items()) if isinstance(value, dict) else f"{value:.4g}"
        print(f"{name:<20}{shown}")
    return asdict(plan) | asdict(found)


def split(arguments: argparse.Namespace) -> Any:
    """the best split of a number of GPUs"""
    costs, lengths = read_costs(arguments.costs), read_lengths(arguments.lengths)
    job = Job(
        arguments.prompts, arguments.samples, reward_workers=arguments.reward_workers, colocated=arguments.colocated
    )
    began = time.perf_counter()
    found = splits(arguments.gpus, job, costs, lengths, arguments.draws)
    searched = time.perf_counter() - began
    print(f"{len(found)} splits of {arguments.gpus} GPUs in {searched:.1f} s; seconds of a step:")
    print(
        f"{'engines':>9}{'GPUs each':>11}{'learner GPUs':>14}{'lag':>5}{'step':>9}{'rollout':>9}{'learner':>9}"
        f"{'simulated':>11}"
    )
    rows = []
    for place, one in enumerate(found):
        simulated = simulated_step(one, job, arguments) if place < CHECKED else None
        learner = f"{one.learner_gpus} shared" if one.colocated else str(one.learner_gpus)
        last = "" if simulated is None else f"{simulated:>11.1f}"
        if place < SHOWN:
            print(
                f"{one.engines:>9}{one.engine.gpus:>11}{learner:>14}{one.lag:>5}{one.step:>9.1f}{one.rollout:>9.1f}"
                f"{one.learner:>9.1f}{last}"
            )
        rows.append(
            {"engines": one.engines, "gpus_each": one.engine.gpus, "learner_gpus": one.learner_gpus, "lag": one.lag,
             "colocated": one.colocated, "step": one.step, "rollout": one.rollout, "learner": one.learner,
             "simulated": simulated}
        )  # fmt: skip
    return {"gpus": arguments.gpus, "splits": len(found), "search_seconds": searched, "rows": rows}


def simulated_step(one: Split, job: Job, arguments: argparse.Namespace) -> float:
    """Mean seconds of a step of the real loop with this split."""
    plan = Plan(
        job.prompts, job.samples, one.engines, one.learner_gpus, one.lag, CHECKED_STEPS, colocated=one.colocated,
        reward_workers=job.reward_workers, replay=False,
    )  # fmt: skip
    costs, lengths = read_costs(arguments.costs), read_lengths(arguments.lengths)
    return simulate(plan, costs, lengths, one.engine)[0].mean_step


def published(arguments: argparse.Namespace) -> Any:
    """ratios that other systems published"""
    from benchmarks.simulate.published import as_json, rows

    found = rows()
    print(f"{'':<38}{'schedule':<32}{'published':>10}{'ours':>7}{'error':>8}{'slow side':>11}{'fast side':>11}")
    for row in found:
        print(
            f"{row.case:<38}{row.schedule:<32}{row.published:>10.2f}{row.ours:>7.2f}{row.error:>+8.0%}"
            f"{row.before:>11.1f}{row.after:>11.1f}"
        )
    return as_json(found)


def control(arguments: argparse.Namespace) -> Any:
    """what the control plane takes"""
    from benchmarks.simulate.control import in_process, with_ray

    short = read_lengths("digits")
    if arguments.ray:
        rows = [with_ray(workers, short, arguments.actors) for workers in arguments.workers]
    else:
        rows = [in_process(workers, short) for workers in arguments.workers]
        rows.append(in_process(256, read_lengths("math_long_tail"), steps=12))
    for row in rows:
        print("  ".join(f"{name} {value:.4g}" for name, value in row.items()))
    return rows


def measured(arguments: argparse.Namespace) -> Any:
    """a short real run against its prediction"""
    from benchmarks.simulate.measure import compared, measure

    given: Path | None = arguments.found
    found = measure() if given is None else json.loads(given.read_text(encoding="utf-8"))
    rows = compared(found)
    print(f"{'run':<10}{'measured':>10}{'predicted':>11}{'error':>8}   seconds of a step")
    for row in rows:
        print(f"{row['run']:<10}{row['measured']:>10.3f}{row['predicted']:>11.3f}{row['error']:>+8.0%}")
    return rows


def plot(arguments: argparse.Namespace) -> None:
    """the chart"""
    from benchmarks.simulate.plots import draw

    draw(json.loads(RESULTS.read_text(encoding="utf-8")), RESULTS.with_suffix(".png"))


COMMANDS = {
    "run": run, "split": split, "published": published, "control": control, "measured": measured, "plot": plot,
}  # fmt: skip

if __name__ == "__main__":
    main()
