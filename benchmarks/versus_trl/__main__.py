"""TRL's GRPOTrainer against skyrl, side by side, step by step in turn.

::

    .venv/bin/pip install --no-deps --target .venv/trl -r requirements/trl.txt   # once; TRL stands apart from the rest
    .venv/bin/python -m benchmarks.versus_trl [--workload default …] [--only trl same …] [--steps N]

Both sides get the same policy, prompts, group size, length limit, temperature, reward function, optimizer, loss (GRPO
with β = 0, one optimizer step a batch) and a learning rate so small that the policy stays as it is. Sides:

* ``trl``: TRL 1.16 as ``trl_side.py`` sets it, with transformers' ``generate``;
* ``trl_vllm`` (only if asked for): the same with vLLM in TRL's own process (``vllm_mode="colocate"``), which TRL 1.16
  supports up to vLLM 0.31 and on GPUs; what it gives on CPU stands in docs/results/speed.md;
* ``same``: ours with the same algorithm: rule reward alone, no buffer, no reward model, no reference;
* ``whole``: ours with everything of the default: reward model, reference, MPO, Selective Sample Buffer;
* ``lag``: ``same`` with ``controller.lag=1``.

Ours proves each weight sync in every one of them. Each side lives in processes of its own, waits while it isn't its
turn, and begins anew after warm-up turns that don't count. Memory is looked at in a last turn that isn't timed.

On two quiet cores: default 3 minutes, default_coin 2, long_tail 9, pictures 3, long_prompt 5.

Writes ``OUT/versus_trl.json`` (every turn, with the machine's load) and prints a Markdown table. ``--table FILE`` only
prints the table of such a file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import _turns
from benchmarks._turns import ROOT, Block, Side, Spread, peak_memory, python, started, turn
from benchmarks.versus_trl.table import table
from benchmarks.versus_trl.workloads import WORKLOADS, policy_folder

SIDES = ("trl", "trl_vllm", "same", "whole", "lag")
TRL_FOLDER = ROOT / ".venv" / "trl"
INSTALL = "{} has no trl; install it: .venv/bin/pip install --no-deps --target {} -r requirements/trl.txt"


def main() -> None:
    """Measure what was asked for, or print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--only", nargs="+", choices=SIDES, default=["trl", "same", "whole"], help="sides")
    parser.add_argument("--steps", type=int, help="turns of each side that count; by default the workload's own")
    parser.add_argument("--warm-up", type=int, default=2, help="turns of each side before those")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "benchmarks", help="folder of the result")
    parser.add_argument("--trl", type=Path, default=TRL_FOLDER, help="folder that TRL was installed into")
    parser.add_argument("--table", type=Path, help="print the table of this result and measure nothing")
    given = parser.parse_args()
    if given.table:
        print(table(json.loads(given.table.read_text())))
        return
    if (given.steps or 2) < 2 or given.warm_up < 1:
        parser.error("--steps must be 2 or more, --warm-up 1 or more")
    if any(side.startswith("trl") for side in given.only) and not (given.trl / "trl").is_dir():
        parser.error(INSTALL.format(given.trl, given.trl))
    given.out.mkdir(parents=True, exist_ok=True)
    out = given.out / "versus_trl.json"
    result: dict[str, Any] = {"machine": _turns.machine(), "workloads": {}}
    if out.is_file():  # workloads that are measured one by one gather in one file
        result["workloads"] = json.loads(out.read_text())["workloads"]
    for name in given.workload:
        result["workloads"][name] = _measure(name, given) | {"machine": _turns.machine()}
        result = _turns.saved(out, result)
        print(table({"workloads": {name: result["workloads"][name]}}), flush=True)
    print(f"\n{table(result)}\n\n{out}")


def _measure(name: str, given: Any) -> dict[str, Any]:
    """All sides of one workload, in turn."""
    load = WORKLOADS[name]
    steps = given.steps or load.steps
    total = given.warm_up + steps + 1  # one more to look at the memory
    policy_folder(name)  # made before the sides want it
    chosen = [side for side in SIDES if side in given.only and (side != "whole" or load.whole)]
    with tempfile.TemporaryDirectory(prefix="versus-trl-") as work:
        sides = [_side(side, name, total, given.trl, Path(work)) for side in chosen]
        with started(sides) as known:
            print(f"{name}: {', '.join(known)} are up", flush=True)
            blocks = list[Block]()
            for number in range(given.warm_up + steps):
                # Every second round goes the other way round, so that no side always follows the same one.
                order = sides if number % 2 == 0 else sides[::-1]
                told = [turn(side, sides) for side in order]
                blocks += told if number >= given.warm_up else []
                print("  " + ", ".join(f"{one.side} {one.seconds:.2f} s" for one in told), flush=True)
            memory = {side.name: peak_memory(side) for side in sides}
    return {
        "about": load.about,
        "sides": {side: _summary([one for one in blocks if one.side == side], memory[side]) for side in chosen},
        "warnings": _turns.warnings_of(blocks),
        "blocks": _turns.as_json(blocks),
    }


def _side(side: str, name: str, steps: int, trl: Path, work: Path) -> Side:
    from skyrl.crew.ray_executor import COMMON_ENVIRONMENT

    if side.startswith("trl"):
        # The malloc settings of our members make TRL faster too, so it gets them.
        environment = COMMON_ENVIRONMENT | {"PYTHONPATH": str(trl)}
        words = [name, str(steps), *(["--vllm"] if side == "trl_vllm" else [])]
        return Side(side, python("benchmarks.versus_trl.trl_side", *words), environment, work / f"{side}.log")
    return Side(side, python("benchmarks.versus_trl.ours", name, str(steps), side), {}, work / f"{side}.log")


def _summary(blocks: list[Block], memory: float) -> dict[str, Any]:
    """One side's figures. Times in seconds, memory in MiB."""
    seconds = [block.seconds for block in blocks]
    tokens = {
        name: statistics.median(block.report[name] for block in blocks) for name in ("answer_tokens", "prompt_tokens")
    }
    return tokens | {
        "seconds": Spread.of(seconds),
        "cpu_seconds": statistics.median(block.cpu_seconds for block in blocks),
        "peak_mib": memory,
        "rounds": seconds,
    }


if __name__ == "__main__":
    main()
