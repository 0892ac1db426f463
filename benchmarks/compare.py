"""Settings of ours against each other, whole systems in turn, step by step.

::

    python -m benchmarks.compare one=rollout.num_workers=1,reward.num_workers=1 two=
    python -m benchmarks.compare --kind whole --rounds 10 a=rollout.prompts_per_step=64 b=…

Each side is ``name=key=value,key=value…``, on top of our side of a workload of ``benchmarks.versus_trl`` (two rollout
and two reward workers); ``--kind`` says which: the ``same`` algorithm as TRL's, or the default's ``whole``. Medians
of the rounds after the warm-up, and of the ratios to the first side. Each side takes 4 to 7 GiB. Writes
OUT/compare.json.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import _turns
from benchmarks._turns import ROOT, Block, Side, Spread, Turns, python, started, turn
from benchmarks.versus_trl.workloads import WORKLOADS, config, policy_folder

WARM_UP = 3
DEFAULT = ["one=rollout.num_workers=1,reward.num_workers=1", "two="]


def main() -> None:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sides", nargs="*", default=DEFAULT, help="name=key=value,…; the first is compared with")
    parser.add_argument("--workload", choices=list(WORKLOADS), default="default")
    parser.add_argument("--kind", choices=["same", "whole"], default="same")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "benchmarks", help="folder of the result")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    settings = dict(side.partition("=")[::2] for side in given.sides)
    if given.child:
        _serve(given.workload, given.kind, *settings.items())
        return
    if given.rounds < 2 or len(settings) < len(given.sides) or not all(settings):
        parser.error("--rounds must be 2 or more, and each side needs a name of its own")
    given.out.mkdir(parents=True, exist_ok=True)
    result = _turns.saved(given.out / "compare.json", _measure(settings, given))
    print(table(result))


def _measure(settings: dict[str, str], given: Any) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="compare-") as work:
        words = ["--child", "--workload", given.workload, "--kind", given.kind]
        sides = [
            Side(name, python("benchmarks.compare", *words, f"{name}={text}"), {}, Path(work) / f"{place}.log")
            for place, (name, text) in enumerate(settings.items())
        ]
        blocks = list[Block]()
        with started(sides):
            for number in range(WARM_UP + given.rounds):
                told = [turn(side, sides) for side in (sides if number % 2 == 0 else sides[::-1])]
                blocks += told if number >= WARM_UP else []
    return {
        "machine": _turns.machine(),
        "workload": given.workload,
        "kind": given.kind,
        "settings": settings,
        "warnings": _turns.warnings_of(blocks),
        "blocks": _turns.as_json(blocks),
    }


def table(result: dict[str, Any]) -> str:
    """Markdown: seconds of a step and of its parts, and ratios to the first side."""
    of = {name: [one for one in result["blocks"] if one["side"] == name] for name in result["settings"]}
    first = [one["report"]["time/step"] for one in next(iter(of.values()))]
    lines = ["| side | settings | seconds a step (quartiles) | parts | of the first |", "|---|---|---|---|---|"]
    for name, blocks in of.items():
        seconds = [one["report"]["time/step"] for one in blocks]
        parts = {
            key.removeprefix("time/"): statistics.median(one["report"][key] for one in blocks)
            for key in blocks[0]["report"]
            if key != "time/step"
        }
        told = ", ".join(f"{part} {value:.2f}" for part, value in parts.items())
        ratio = Spread.of([own / base for own, base in zip(seconds, first, strict=True)])
        lines.append(f"| {name} | {result['settings'][name]} | {Spread.of(seconds)} | {told} | {ratio} |")
    return "\n".join([*lines, "", *(f"- {one}" for one in result["warnings"])])


def _serve(workload: str, kind: str, side: tuple[str, str]) -> None:
    """One side, until the parent wants no more."""
    turns = Turns()
    from omegaconf import OmegaConf

    from benchmarks._system import serve
    from skyrl.settings.run import checked

    words = OmegaConf.from_dotlist([word for word in side[1].split(",") if word])
    values = OmegaConf.to_container(OmegaConf.merge(config(workload, kind).model_dump(mode="json"), words))
    assert isinstance(values, dict)
    cfg = checked({str(key): value for key, value in values.items()})
    policy, reward = policy_folder(workload)

    def report(step: int, metrics: dict[str, float], batch: object) -> dict[str, Any]:
        return {name: value for name, value in metrics.items() if name.startswith("time/")}

    serve(cfg, policy, reward if kind == "whole" else None, turns, report)


if __name__ == "__main__":
    main()
