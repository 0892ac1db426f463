"""How much a training step costs over its bare parts.

``python -m benchmarks.step_time`` lets the whole system (32 prompts x 8 samples on the embedded default) and the parts
that no such system can avoid take turns, step by step, on the same prompts and the same tokens. ``_parts.py`` says what
each part is. Ratios of the whole step to

* ``plain``: ``generate`` + ``forward_backward``, and ``distinct``: ``generate`` + ``forward_backward_distinct``: bounds
  that don't know how the learner makes its rows;
* ``own``: ``generate`` + ``passes``: with the learner's own rows, so that it stays a bound when they get better;
* ``parts``: ``sample`` + ``train_step``: our own parts alone. What is above 1 here is Ray, reward, buffer, optimizer
  and sync.

``overlap limit``: with ``controller.lag=1`` rollout and learner run at once. Both are run at once here, each on its
share of the cores; no such step can be shorter than the longer one of ``sample`` and ``train_step``.

The learning rate is so small that the policy stays the same. Medians (quartiles) of the rounds after the warm-up.
Writes OUT/step_time.json. Exit status 1 if ``--at-most`` is exceeded by the ratio to ``plain``.
``$SKYRL_BENCHMARK_MODELS`` names a folder with other models (``policy``, ``reward``).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks import _parts, _turns
from benchmarks._turns import ROOT, Block, Side, Spread, Turns, python, started, turn

PROMPTS, SAMPLES = 32, 8
PHASES = ("rollout", "reward", "buffer", "learner", "sync")
ORDERS = {
    "sample": "rollout",
    "train_step": "learner",
    "forward_backward": "learner",
    "forward_backward_distinct": "learner",
}
"""What is asked for → the child that does it."""
BOUNDS = {
    "plain": ("generate", "forward_backward"),
    "distinct": ("generate", "forward_backward_distinct"),
    "own": ("generate", "passes"),
    "parts": ("sample", "train_step"),
}


def main() -> None:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of the table")
    parser.add_argument("--steps", type=int, default=12, help="rounds that count")
    parser.add_argument("--warm-up", type=int, default=6, help="rounds before those")
    parser.add_argument("--no-limit", action="store_true", help="leave the overlap's limit out: two children less")
    parser.add_argument("--at-most", type=float, help="highest ratio to plain that is right")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "benchmarks", help="folder of the result")
    parser.add_argument("--whole", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.whole:
        serve(config(), given.whole)
        return
    if given.warm_up < 1 or given.steps < 2:
        parser.error("--warm-up must be 1 or more, --steps 2 or more")
    with tempfile.TemporaryDirectory(prefix="step-time-") as work:
        result = measure(Path(work), given.steps, given.warm_up, not given.no_limit)
    given.out.mkdir(parents=True, exist_ok=True)
    result = _turns.saved(given.out / "step_time.json", result)
    print(json.dumps({k: v for k, v in result.items() if k != "blocks"}) if given.json else table(result))
    sys.exit(given.at_most is not None and result["ratios"]["plain"]["median"] > given.at_most)


def config() -> Any:
    """The embedded default with 32 prompts, quiet."""
    from skyrl.settings import Config, WandbMode

    cfg = Config(name="benchmark")
    cfg.rollout.prompts_per_step, cfg.rollout.samples_per_prompt = PROMPTS, SAMPLES
    cfg.rollout.num_workers = cfg.reward.num_workers = 2  # as conf/model/digits.yaml
    cfg.learner.lr = 1e-12
    cfg.data.eval_size = 16
    cfg.cluster.dashboard = False
    cfg.monitoring.wandb = WandbMode.off
    cfg.checkpoint.export, cfg.checkpoint.every, cfg.evaluation.every = False, 0, 0
    cfg.controller.steps = 100_000
    return cfg


def serve(cfg: Any, work: Path) -> None:
    """The whole system as a child, which leaves ``STEP.pkl`` of each step in ``work`` for the bare parts."""
    turns = Turns()
    from benchmarks._system import embedded_models, serve
    from skyrl.data.stream import PromptStream
    from skyrl.digits.scenes import datasets
    from skyrl.records import RolloutRequest

    policy, reward = embedded_models()
    stream = PromptStream(len(datasets(cfg)["train"]), cfg.data.seed)
    asked = cfg.rollout.prompts_per_step, cfg.rollout.samples_per_prompt

    def report(step: int, metrics: dict[str, float], batch: Any) -> dict[str, Any]:
        request = RolloutRequest("train", stream.take(asked[0]), step, asked[1], False, cfg.controller.seed)
        _parts.record(work / f"{step}.pkl", (cfg, policy, request, batch))
        return {name: value for name, value in metrics.items() if name.startswith(("time/", "overlap/", "learner/"))}

    serve(cfg, policy, reward, turns, report, batches=True)


def measure(work: Path, steps: int, warm_up: int, limit: bool) -> dict[str, Any]:
    """All turns, and what follows from them."""
    from skyrl.crew.ray_executor import COMMON_ENVIRONMENT

    cores = os.cpu_count() or 1
    whole = Side("whole", python("benchmarks.step_time", "--whole", str(work)), {}, work / "whole.log")
    with started([whole]):
        turn(whole, [whole])
        first, children = str(work / "1.pkl"), {("rollout", cores), ("learner", cores)}
        if limit:
            children |= {("rollout", max(1, cores // 2)), ("learner", max(1, cores - cores // 2))}
        # The same environment as the actors have: only the system's own work may make a difference.
        bare = [
            Side(
                f"{role}-{n}",
                python("benchmarks._parts", role, str(n), first),
                COMMON_ENVIRONMENT,
                work / f"{role}-{n}.log",
            )
            for role, n in sorted(children)
        ]
        with started(bare) as known:
            return _rounds(whole, known, work, steps, warm_up, limit)


def _rounds(whole: Side, bare: dict[str, Side], work: Path, steps: int, warm_up: int, limit: bool) -> dict[str, Any]:
    cores, sides = os.cpu_count() or 1, [whole, *bare.values()]
    shares = [bare[f"rollout-{max(1, cores // 2)}"], bare[f"learner-{max(1, cores - cores // 2)}"]] if limit else []
    wholes, blocks, limits = list[Block](), list[Block](), list[float]()
    seconds = defaultdict[str, list[float]](list)
    for number in range(2, warm_up + steps + 2):
        round_of = [turn(whole, sides)]
        file = work / f"{number}.pkl"
        for order in list(ORDERS) if number % 2 else list(ORDERS)[::-1]:
            round_of.append(turn(bare[f"{ORDERS[order]}-{cores}"], sides, f"{order} {file}"))
        words = [f"sample {file}", f"train_step {file}"] if limit else []
        at_once = _turns.together(shares, words, sides)
        file.unlink()
        if number < warm_up + 2:
            continue
        blocks += round_of
        wholes.append(round_of[0])
        for part, found in (pair for block in round_of[1:] for pair in block.report.items()):
            seconds[part].append(found)
        limits += [max(found for block in at_once for found in block.report.values())] if limit else []
    return _result(wholes, seconds, limits, blocks)


def _result(
    wholes: list[Block], seconds: dict[str, list[float]], limits: list[float], blocks: list[Block]
) -> dict[str, Any]:
    step = [one.report["time/step"] for one in wholes]
    bounds = {
        name: [sum(both) for both in zip(*(seconds[part] for part in parts), strict=True)]
        for name, parts in BOUNDS.items()
    }
    ratios = {name: Spread.of([a / b for a, b in zip(step, bound, strict=True)]) for name, bound in bounds.items()}
    return {
        "machine": _turns.machine(),
        "step": Spread.of(step),
        "phases": {name: Spread.of([one.report[f"time/{name}"] for one in wholes]) for name in PHASES},
        "parts": {part: Spread.of(found) for part, found in seconds.items()},
        "ratios": ratios,
        "overlap_limit": Spread.of(limits) if limits else None,
        "warnings": _turns.warnings_of(blocks),
        "blocks": _turns.as_json(blocks),
    }


def table(result: dict[str, Any]) -> str:
    """The result for people, in Markdown."""
    lines = ["| part | seconds (quartiles) |", "|---|---|", _row("whole step", result["step"])]
    lines += [_row(f"… {name}", found) for name, found in result["phases"].items()]
    lines += [_row(f"alone: {name}", found) for name, found in result["parts"].items()]
    if result["overlap_limit"]:
        lines += [_row("overlap's limit", result["overlap_limit"])]
    lines += ["", "| whole step over | ratio (quartiles of the rounds) |", "|---|---|"]
    lines += [_row(" + ".join(BOUNDS[name]), found) for name, found in result["ratios"].items()]
    return "\n".join([*lines, *(["", *(f"- {one}" for one in result["warnings"])] if result["warnings"] else [])])


def _row(name: str, found: Any) -> str:
    return f"| {name} | {Spread(**found)} |"


if __name__ == "__main__":
    main()
