"""What ``rollout.oversample`` gives and costs where answers have a long tail: time per step, and what is trained on.

::

    python -m benchmarks.long_tail time [--steps 12]   # 16 prompts x 16 answers, temperature 1.7, up to 400 tokens
    python -m benchmarks.long_tail bias [--seeds 3]    # runs of 30 steps at temperature 1.5; goes on where it stopped
    python -m benchmarks.long_tail rule                # which groups come when, without any model: seconds
    python -m benchmarks.long_tail table

``time``: whole systems take turns, step by step, one for each share of further prompts; the policy stays as it is. The
first steps, in which more begins than ends, do not count.

``bias``: each seed (order of prompts, sampling, replay) is a run without and with over-sampling; both train the same
number of groups. Each finished run is a line of OUT/long_tail_bias.jsonl.

``rule``: groups of 16 answers whose lengths are drawn as those of ``time`` are spread (lognormal, median 36, mean 54,
at most 400), all growing by a token a step of the engine, go through the rule of ``Sampler.generate_enough``. The
policy never changes, so what differs between steps is the rule's own doing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import _turns
from benchmarks._turns import ROOT, Block, Side, Spread, Turns, python, started, turn

SHARES = (0.0, 0.25, 0.5, 1.0)
WARM_UP = 8
TIMES, BIAS = "long_tail_time.json", "long_tail_bias.jsonl"
RUN = (
    *("rollout.prompts_per_step=16", "rollout.samples_per_prompt=8", "rollout.temperature=1.5"),
    *("rollout.max_new_tokens=200", "evaluation.every=5", "checkpoint.every=0", "checkpoint.export=false"),
    *("monitoring.wandb=off", "monitoring.console=false", "cluster.dashboard=false", "hallucination.probe_prompts=0"),
)
FOLLOWED = (
    *("response/length_mean", "response/truncated_share", "rollout/carried", "rollout/stopped"),
    *("rollout/versions_mean", "batch/lag_mean", "buffer/effective_share_fresh", "grpo/clip_fraction"),
    *("time/rollout", "time/step"),
)


def main() -> None:
    """One of the three commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="?", choices=["time", "bias", "rule", "table"], default="table")
    parser.add_argument("--steps", type=int, default=12, help="rounds of `time` that count")
    parser.add_argument(
        "--shares", nargs="+", type=float, default=[0.0, 0.5], help="of `time`; 0 comes first; 6.5 GiB each"
    )
    parser.add_argument("--share", type=float, default=0.5, help="of `bias`")
    parser.add_argument("--seeds", type=int, default=3, help="of `bias`")
    parser.add_argument("--length", type=int, default=30, help="steps of a run of `bias`")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "benchmarks", help="folder of the results")
    parser.add_argument("--side", type=float, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side is not None:
        _serve(given.side)
        return
    if given.command == "rule":
        print(_rule())
        return
    given.out.mkdir(parents=True, exist_ok=True)
    if given.command == "time":
        with tempfile.TemporaryDirectory(prefix="long-tail-") as work:
            found = _measure(Path(work), given.shares, given.steps)
        (given.out / TIMES).write_text(json.dumps(found, indent=1))
    elif given.command == "bias":
        for seed in range(given.seeds):
            for share in (0.0, given.share):
                _run(share, seed, given.length, given.out)
    print(table(given.out))


def _serve(share: float) -> None:
    """One side of ``time``."""
    from benchmarks._system import serve
    from benchmarks.versus_trl.workloads import config, policy_folder

    turns, cfg = Turns(), config("long_tail", "same")
    cfg.name, cfg.rollout.oversample = f"long-tail-{share:g}", share
    cfg.rollout.max_num_seqs = cfg.rollout.in_flight * cfg.rollout.samples_per_prompt

    def report(step: int, metrics: dict[str, float], batch: object) -> dict[str, Any]:
        tokens = metrics["throughput/tokens_per_second"] * metrics["time/step"]
        return {name: metrics[name] for name in FOLLOWED if name in metrics} | {"tokens": round(tokens)}

    serve(cfg, policy_folder("long_tail")[0], None, turns, report)


def _measure(work: Path, shares: list[float], steps: int) -> dict[str, Any]:
    sides = [
        Side(f"{share:g}", python("benchmarks.long_tail", "time", "--side", f"{share}"), {}, work / f"{share:g}.log")
        for share in shares
    ]
    blocks = list[Block]()
    with started(sides):
        for number in range(WARM_UP + steps):
            told = [turn(side, sides) for side in (sides if number % 2 == 0 else sides[::-1])]
            blocks += told if number >= WARM_UP else []
    return {"machine": _turns.machine(), "warnings": _turns.warnings_of(blocks), "blocks": _turns.as_json(blocks)}


def _run(share: float, seed: int, length: int, out: Path) -> None:
    """One run of ``bias``, unless it is in the file already."""
    file, wanted = out / BIAS, {"share": share, "seed": seed, "length": length}
    if any(wanted.items() <= row.items() for row in _rows(file)):
        return
    with tempfile.TemporaryDirectory(prefix="long-tail-") as work:
        words = [*RUN, f"controller.seed={seed}", f"data.seed={seed}", f"controller.steps={length}"]
        words += [f"rollout.oversample={share:g}", f"run_dir={work}/run"]
        done = subprocess.run(python("skyrl.launch", *words), cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"share {share:g}, seed {seed} failed:\n{done.stderr[-3000:]}")
        lines = [json.loads(line) for line in (Path(work) / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line.get("time/step") is not None]
    row: dict[str, Any] = wanted | {
        "accuracy": {line["step"]: line["eval/accuracy"] for line in lines if line.get("eval/accuracy") is not None},
        "steps": [{name: line[name] for name in FOLLOWED if line.get(name) is not None} for line in steps],
    }
    with file.open("a") as written:
        written.write(json.dumps(row) + "\n")
    print(f"share {share:g}, seed {seed}: accuracy {row['accuracy'][length]:.3f}", flush=True)


def _rule(prompts: int = 16, samples: int = 16, steps: int = 30, runs: int = 400, most: int = 4) -> str:
    """Table over ``runs`` repetitions of ``steps`` steps."""
    import numpy as np

    lines = [
        "| further prompts | engine steps a step | to none | mean length trained in step 1 | 2-5 | 6-30 "
        "| groups carried | answers of several versions | oldest token, versions | left at the end, mean length |",
        "|" + "---|" * 10,
    ]
    base = 0.0
    for share in SHARES:
        draw, spent, lengths, ages = np.random.default_rng(0), [], np.zeros((runs, steps)), []
        mixed, left = [], []
        for run in range(runs):
            # Lengths of a group's answers, their tokens so far, those at the first stop, steps carried.
            going = list[tuple[Any, int, int, int]]()
            for step in range(steps):
                new = prompts + round(prompts * share) - len(going)
                drawn = np.minimum(400, np.ceil(draw.lognormal(np.log(36), 0.9, (new, samples))))
                going += [(own, 0, 0, 0) for own in drawn]
                rest = np.array([own.max() - had for own, had, *_ in going])
                due = [r for r, one in zip(rest, going, strict=True) if one[3] >= most]
                now = max(np.sort(rest)[prompts - 1], *due, 0)
                done = [place for place, r in enumerate(rest) if r <= now][:prompts]
                lengths[run, step] = np.mean([going[place][0].mean() for place in done])
                if step >= 5:
                    spent.append(now)
                    ages += [going[place][3] for place in done]
                    mixed += [np.mean((own > first) & (c > 0)) for own, _, first, c in (going[place] for place in done)]
                going = [
                    (own, had + now, first or now, c + 1)
                    for place, (own, had, first, c) in enumerate(going)
                    if place not in done
                ]
            left += [own.mean() for own, *_ in going]
        base = base or float(np.mean(spent))
        means = [f"{lengths[:, part].mean():.1f}" for part in (slice(0, 1), slice(1, 5), slice(5, steps))]
        lines.append(
            f"| {share:g} | {np.mean(spent):.0f} | {np.mean(spent) / base:.2f} | {' | '.join(means)} "
            f"| {np.mean(np.array(ages) > 0):.0%} | {np.mean(mixed):.1%} | {max(ages)} "
            f"| {f'{np.mean(left):.1f}' if left else '–'} |"
        )
    return "\n".join(lines)


def _rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def table(out: Path) -> str:
    """Markdown of what was measured so far."""
    lines = list[str]()
    if (out / TIMES).is_file():
        lines += _times(json.loads((out / TIMES).read_text()))
    if rows := _rows(out / BIAS):
        lines += ["", *_biases(rows)]
    return "\n".join(lines) or "nothing measured yet"


def _times(found: dict[str, Any]) -> list[str]:
    sides: dict[str, list[dict[str, Any]]] = {}
    for block in found["blocks"]:
        sides.setdefault(block["side"], []).append(block)
    lines = [
        "| further prompts | seconds a step (quartiles) | rollout | processor seconds | tokens trained a second "
        "| time to none | groups carried | answers stopped |",
        "|---|---|---|---|---|---|---|---|",
    ]
    base = [block["report"]["time/step"] for block in next(iter(sides.values()))]
    for name, blocks in sides.items():
        reports = [block["report"] for block in blocks]
        steps, rollouts = [one["time/step"] for one in reports], [one["time/rollout"] for one in reports]
        rate = sum(one["tokens"] for one in reports) / sum(steps)
        ratio = Spread.of([one / other for one, other in zip(steps, base, strict=True)])
        carried, stopped = (
            statistics.mean(one.get(key, 0.0) for one in reports) for key in ("rollout/carried", "rollout/stopped")
        )
        lines.append(
            f"| {name} | {Spread.of(steps)} | {statistics.median(rollouts):.2f} "
            f"| {statistics.median(block['cpu_seconds'] for block in blocks):.2f} | {rate:.0f} | {ratio} "
            f"| {carried:.0%} | {stopped:.0%} |"
        )
    return [*lines, *(["", *(f"- {one}" for one in found["warnings"])] if found["warnings"] else [])]


def _biases(rows: list[dict[str, Any]]) -> list[str]:
    """Accuracy and lengths by step, means over the seeds."""
    length, lines = max(row["length"] for row in rows), list[str]()
    rows = [row for row in rows if row["length"] == length]
    parts = {
        "1": (0, 1),
        "2–5": (1, 5),
        f"6–{length // 2}": (5, length // 2),
        f"{length // 2 + 1}–{length}": (length // 2, length),
    }
    for title, key in (
        ("tokens of an answer", "response/length_mean"),
        ("answers at the limit, %", "response/truncated_share"),
    ):
        scale = 100 if key.endswith("share") else 1
        lines += [f"| {title}, steps | {' | '.join(parts)} |", "|---" * (len(parts) + 1) + "|"]
        for share in sorted({row["share"] for row in rows}):
            own = [row["steps"] for row in rows if row["share"] == share]
            cells = [
                statistics.mean(step[key] * scale for steps in own for step in steps[a:b]) for a, b in parts.values()
            ]
            lines.append(f"| further prompts {share:g} | {' | '.join(f'{cell:.1f}' for cell in cells)} |")
        lines.append("")
    at = list(rows[0]["accuracy"])
    lines += [f"| accuracy, %, after steps | {' | '.join(at)} | seeds |", "|---" * (len(at) + 2) + "|"]
    for share in sorted({row["share"] for row in rows}):
        own = [row["accuracy"] for row in rows if row["share"] == share]
        cells = [100 * statistics.mean(one[step] for one in own) for step in at]
        lines.append(f"| further prompts {share:g} | {' | '.join(f'{cell:.1f}' for cell in cells)} | {len(own)} |")
    by = {(row["share"], row["seed"]): row["accuracy"][str(length)] for row in rows}
    pairs = [100 * (value - by[0.0, seed]) for (share, seed), value in by.items() if share > 0 and (0.0, seed) in by]
    return [*lines, "", f"At the end with − without, points, by seed: {', '.join(f'{one:+.1f}' for one in pairs)}"]


if __name__ == "__main__":
    main()
