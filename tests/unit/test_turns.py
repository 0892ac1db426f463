"""Benchmarks whose sides take turns: orders, processor time, memory, and what the tables make of it."""

import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks._turns import Block, Side, Spread, peak_memory, started, together, turn, warnings_of
from benchmarks.overlap import _accuracies
from benchmarks.step_time import _result
from benchmarks.versus_trl.table import table

CHILD = """
import sys, time
from benchmarks._turns import EndedError, Turns

turns, told = Turns(), {"ready": True}
print("said to the log")
while True:
    try:
        word = turns.wait(**told)
    except EndedError:
        break
    if word == "die":
        sys.exit("dead of it")
    held, begun = bytearray(60_000_000 if word == "large" else 0), time.process_time()
    while time.process_time() - begun < (0.3 if word == "work" else 0.0):
        pass
    told = {"did": word}
"""


@pytest.fixture
def sides(tmp_path: Path) -> list[Side]:
    return [Side(name, [sys.executable, "-c", CHILD], {}, tmp_path / f"{name}.log") for name in ("a", "b")]


def test_turns(sides: list[Side]) -> None:
    with started(sides):
        block = turn(sides[0], sides, "work")
        assert block.report == {"did": "work"} and block.seconds >= 0.3
        assert block.cpu_seconds == pytest.approx(0.3, abs=0.15)
        assert block.waiting < 0.1, "the other one slept"
        both = together(sides, ["work", "rest"], sides)
        assert [one.report["did"] for one in both] == ["work", "rest"] and both[0].seconds == both[1].seconds
        small = sides[1].memory()
        assert peak_memory(sides[1], "large") >= small
        with pytest.raises(SystemExit, match="dead of it"):
            turn(sides[1], sides, "die")
    assert sides[0].process.returncode == 0, "it ended when nothing more was wanted"
    assert "said to the log" in sides[0].log.read_text()


def _block(side: str, seconds: float, others: float = 0.0, **report: float) -> Block:
    return Block(side, "step", seconds, report, seconds, 0.0, others, 0.0)


def test_spread_and_warnings() -> None:
    assert Spread.of([5.0, 1.0, 3.0, 2.0, 4.0]) == Spread(3.0, 2.0, 4.0)
    assert warnings_of([_block("a", 1.0, 0.05)] * 3) == []
    (said,) = warnings_of([_block("a", 1.0, 0.0), _block("a", 1.0, 0.2)])
    assert "1 of 2 blocks" in said and "20.0%" in said


def test_ratios_of_rounds() -> None:
    """The median of each round's ratio: a load that doubles all of one round changes nothing."""
    steps = [_block("whole", 3.0, **{"time/step": 3.0 * load}) for load in (1, 2, 1)]
    for one in steps:
        one.report |= {f"time/{name}": 0.1 for name in ("rollout", "reward", "buffer", "learner", "sync")}
    names = ("generate", "sample", "forward_backward", "forward_backward_distinct", "passes", "train_step")
    seconds = {name: [1.0 * load for load in (1, 2, 1)] for name in names} | {"passes": [0.5, 1.0, 0.5]}
    ratios = _result(steps, seconds, [], steps)["ratios"]
    assert ratios["plain"] == Spread(1.5, 1.5, 1.5) and ratios["own"].median == 2.0


def test_table_against_trl() -> None:
    def side(seconds: float, tokens: float) -> dict[str, object]:
        times = {"seconds": asdict(Spread.of([seconds])), "rounds": [seconds] * 3, "cpu_seconds": 1.0}
        return times | {"answer_tokens": tokens, "prompt_tokens": 10.0, "peak_mib": 1500.0}

    made = table(
        {"workloads": {"default": {"sides": {"trl": side(4.0, 200), "same": side(2.0, 100)}, "warnings": ["w"]}}}
    )
    row = next(line for line in made.splitlines() if "| same |" in line)
    assert row.endswith("| 1,500 | **2.00** (2.00–2.00) | 1.00 |")
    assert "- default: w" in made and "trl sampled 100% more tokens than same" in made


def test_accuracy_after_equal_time() -> None:
    """40 steps of lag 1 take as long as 30 of lag 0, whose accuracy there lies between two evaluations."""
    curve = {str(step): 0.6 + step / 200 for step in range(0, 41, 20)}
    rows = [
        {"name": name, "seed": seed, "length": 40, "seconds": [1.0] * 40, "accuracy": curve | {"40": last}}
        for seed in (0, 1)
        for name, last in (("lag0", 0.80), ("lag1", 0.82 + 0.01 * seed))
    ]
    times = {"step": {"lag0": {"median": 4.0}, "lag1": {"median": 3.0}}}
    steps, duration = _accuracies(rows, times)[-2:]
    assert steps.endswith("| +2.0, +3.0 |")
    assert "30.0 steps of lag 0" in duration and duration.endswith("| +7.0, +8.0 |")
