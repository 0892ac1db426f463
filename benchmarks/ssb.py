"""Time to add to and to draw from a full Selective Sample Buffer, with its default settings and with each option.

python benchmarks/ssb.py [--json] [--size 1000000] [--runs 30] [--only default recency …]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from skyrl.records import Prompt, Sample, SampleGroup
from skyrl.replay.ssb import SelectiveSampleBuffer
from skyrl.settings import BufferConfig, Eviction, Unit

BATCH = 256
GROUP = 8
TOKENS = np.zeros(16, dtype=np.int32)
LOGPROBS = np.zeros(16, dtype=np.float32)
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "recency": {"recency": 0.98},
    "uniform": {"uniform_share": 0.2},
    "smallest": {"eviction": Eviction.smallest},
    "group": {"unit": Unit.group},
    "all": {
        "recency": 0.98,
        "uniform_share": 0.2,
        "eviction": Eviction.smallest,
        "unit": Unit.group,
    },
}
PICTURE = np.zeros((28, 28, 3), dtype=np.uint8)


def make_groups(version: int, rng: np.random.Generator) -> list[SampleGroup]:
    """256 effective samples in groups of 8. The arrays are shared: the buffer's bookkeeping is what is timed."""
    advantages = rng.normal(size=BATCH).tolist()
    groups = []
    for start in range(0, BATCH, GROUP):
        samples = [
            Sample(place, TOKENS, LOGPROBS, "", False, version, advantage=advantages[start + place], rule_advantage=1.0)
            for place in range(GROUP)
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
    buffer = SelectiveSampleBuffer(BufferConfig(capacity=size, max_age=versions + runs, **options), seed=0)
    start = time.perf_counter()
    for version in range(versions):
        buffer.add(make_groups(version, rng), version)
    results = {"samples": float(len(buffer)), "fill_s": time.perf_counter() - start}
    fresh = [make_groups(versions + run, rng) for run in range(runs)]
    newest = versions + runs - 1
    results["add_256_ms"] = median_ms(runs, lambda run: buffer.add(fresh[run], versions + run))
    results["draw_256_ms"] = median_ms(runs, lambda run: buffer.draw(BATCH, newest))
    # Each call moves the version on by one, so that the oldest samples are dropped first.
    oldest = int(newest - buffer.stats(newest)["age_max"])
    first = oldest + buffer.cfg.max_age + 1
    results["expire_draw_ms"] = median_ms(runs, lambda run: buffer.draw(BATCH, first + run))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of a table")
    parser.add_argument("--size", type=int, default=1_000_000, help="samples in the buffer")
    parser.add_argument("--runs", type=int, default=30, help="runs that each median is taken over")
    parser.add_argument("--only", nargs="+", choices=OPTIONS, default=list(OPTIONS), help="settings to measure")
    arguments = parser.parse_args()
    results = {name: measure(arguments.size, arguments.runs, OPTIONS[name]) for name in arguments.only}
    if arguments.json:
        print(json.dumps(results))
        return
    columns = list(next(iter(results.values())))
    print(f"{'settings':<12}" + "".join(f"{column:>16}" for column in columns))
    for name, values in results.items():
        print(f"{name:<12}" + "".join(f"{values[column]:>16,.3f}" for column in columns))


if __name__ == "__main__":
    main()
