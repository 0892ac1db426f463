"""The Selective Sample Buffer: how long adding and drawing take, or what the importance correction leaves of the bias.

python benchmarks/ssb.py [--json] [--sizes 4096 1000000] [--runs 30] [--only default recency …]
python benchmarks/ssb.py --bias [--json] [--runs 20000]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from skyrl.records import Prompt, Sample, SampleGroup
from skyrl.replay.amount import replay_weights
from skyrl.replay.ssb import SelectiveSampleBuffer
from skyrl.settings import BufferConfig, Eviction, Unit

BATCH = 256
GROUP = 8
TOKENS = np.zeros(16, dtype=np.int32)
LOGPROBS = np.zeros(16, dtype=np.float32)
MASK = np.ones(16, dtype=bool)
PICTURE = np.zeros((28, 28, 3), dtype=np.uint8)
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "recency": {"recency": 0.98},
    "uniform": {"uniform_share": 0.2},
    "smallest": {"eviction": Eviction.smallest},
    "group": {"unit": Unit.group},
    "all": {"recency": 0.98, "uniform_share": 0.2, "eviction": Eviction.smallest, "unit": Unit.group},
}
CORRECTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "corrected": {"importance_correction": True},
    "corrected, u = 0.2": {"importance_correction": True, "uniform_share": 0.2},
}
ONE_RIGHT = [7**0.5] + [-(7**-0.5)] * 7
"""Advantages of a group with one right answer of eight."""
DRAWS = [(drawn, size) for size in (200, 2048) for drawn in (1, 2, 5, 10, 20, 50)]
DRAWS += [(128, size) for size in (4096, 2048, 512, 256, 128)]
"""Samples drawn, samples in the buffer (multiples of eight)."""


def make_groups(version: int, advantages: list[float]) -> list[SampleGroup]:
    """Effective samples in groups of 8. The arrays are shared: the buffer's bookkeeping is what is timed."""
    groups = []
    for start in range(0, len(advantages), GROUP):
        samples = [
            Sample(place, TOKENS, LOGPROBS, "", False, version, None, advantage, rule_advantage=1.0, mask=MASK)
            for place, advantage in enumerate(advantages[start : start + GROUP])
        ]
        groups.append(SampleGroup(Prompt(f"{version}/{start}", "?", (PICTURE,), "", "exact"), TOKENS, samples))
    return groups


def median_ms(runs: int, call: Callable[[int], object]) -> float:
    """Median milliseconds of ``call(0) … call(runs - 1)``."""
    times = []
    for run in range(runs):
        start = time.perf_counter()
        call(run)
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def measure(size: int, runs: int, options: dict[str, Any]) -> dict[str, float]:
    """Fill a buffer with ``size`` samples, one policy version per 256, then time the operations."""
    rng = np.random.default_rng(0)
    versions = -(-size // BATCH)
    fresh = [make_groups(version, rng.normal(size=BATCH).tolist()) for version in range(versions + runs)]
    # Old enough for the timed calls, which bring the versions up to `versions + runs - 1`.
    buffer = SelectiveSampleBuffer(BufferConfig(capacity=size, max_age=versions + runs, **options), seed=0)
    buffer.add([group for groups in fresh[:versions] for group in groups], versions - 1)
    results = {"samples": float(len(buffer))}
    results["add_256_ms"] = median_ms(runs, lambda run: buffer.add(fresh[versions + run], versions + run))
    newest = versions + runs - 1
    results["draw_256_ms"] = median_ms(runs, lambda run: buffer.draw(BATCH, newest))
    # Each call moves the version on by one, so that the oldest 256 samples are dropped first.
    oldest = int(newest - buffer.stats(newest)["age_max"])
    first = oldest + buffer.cfg.max_age + 1
    few = min(runs, versions // 2)  # no more than half of the buffer
    results["expire_draw_ms"] = median_ms(few, lambda run: buffer.draw(BATCH, first + run))
    return results


def bias(drawn: int, size: int, runs: int, options: dict[str, Any]) -> dict[str, float]:
    """The weight that right answers get in replay, as a multiple of their share of the buffer (1 is unbiased), with its
    standard error, where each group has one right answer of eight."""
    cfg = BufferConfig(capacity=size, **options)
    buffer = SelectiveSampleBuffer(cfg, seed=0)
    buffer.add(make_groups(0, ONE_RIGHT * (size // GROUP)), 0)
    right = np.zeros(runs)
    for run in range(runs):
        samples = buffer.draw(drawn, 0)
        weights = replay_weights(samples, size, cfg)
        right[run] = np.mean(weights * [one.sample.advantage > 0 for one in samples]) * GROUP
    return {"right": right.mean(), "error": right.std() / runs**0.5}


def table(results: dict[str, dict[str, float]]) -> str:
    columns = list(next(iter(results.values())))
    lines = [f"{'':<32}" + "".join(f"{column:>16}" for column in columns)]
    lines += [f"{name:<32}" + "".join(f"{row[column]:>16,.3f}" for column in columns) for name, row in results.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of a table")
    parser.add_argument("--bias", action="store_true", help="what the importance correction leaves, instead of times")
    parser.add_argument("--sizes", nargs="+", type=int, default=[4096, 1_000_000], help="samples in the buffer (512…)")
    parser.add_argument("--runs", type=int, help="runs that a median (30) or a mean (20,000) is taken over")
    parser.add_argument("--only", nargs="+", choices=OPTIONS, default=list(OPTIONS), help="settings to measure")
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    if arguments.bias:
        results = {
            f"{drawn} of {size}, {name}": bias(drawn, size, arguments.runs or 20_000, options)
            for drawn, size in DRAWS
            for name, options in CORRECTIONS.items()
        }
    else:
        results = {
            f"{size}, {name}": measure(size, arguments.runs or 30, OPTIONS[name])
            for size in arguments.sizes
            for name in arguments.only
        }
    if arguments.json:
        print(json.dumps(results | {"load": {"before": load, "after": os.getloadavg()[0]}}))
    else:
        print(f"{table(results)}\nload of the machine: {load:.2f} before, {os.getloadavg()[0]:.2f} after")


if __name__ == "__main__":
    main()
