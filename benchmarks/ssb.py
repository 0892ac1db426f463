"""Time to add to and to draw from a full Selective Sample Buffer.

python benchmarks/ssb.py [--json] [--size 1000000] [--runs 30]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import numpy as np

from skyrl.buffer.ssb import SelectiveSampleBuffer
from skyrl.types import Prompt, Sample, SampleGroup

BATCH = 256
GROUP = 8
TOKENS = np.zeros(16, dtype=np.int32)
LOGPROBS = np.zeros(16, dtype=np.float32)
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


def measure(size: int, runs: int) -> dict[str, float]:
    """Fill a buffer with ``size`` samples, one policy version per 256, then time the operations."""
    rng = np.random.default_rng(0)
    versions = -(-size // BATCH)
    buffer = SelectiveSampleBuffer(capacity=size, max_age=versions + runs, alpha=1.0, seed=0)
    start = time.perf_counter()
    for version in range(versions):
        buffer.add(make_groups(version, rng), version)
    fill = time.perf_counter() - start
    fresh = [make_groups(versions + run, rng) for run in range(runs)]
    newest = versions + runs - 1
    results = {"size": float(len(buffer)), "fill_s": fill}
    results["add_256_ms"] = median_ms(runs, lambda run: buffer.add(fresh[run], versions + run))
    results["draw_256_ms"] = median_ms(runs, lambda run: buffer.draw(BATCH, newest))
    # Each call moves the version on by one, so that the oldest 256 samples are dropped first.
    oldest = int(newest - buffer.stats(newest)["age_max"])
    first = oldest + buffer.max_age + 1
    results["draw_256_expire_256_ms"] = median_ms(runs, lambda run: buffer.draw(BATCH, first + run))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of a table")
    parser.add_argument("--size", type=int, default=1_000_000, help="samples in the buffer")
    parser.add_argument("--runs", type=int, default=30, help="runs that each median is taken over")
    options = parser.parse_args()
    results = measure(options.size, options.runs)
    if options.json:
        print(json.dumps(results))
        return
    for name, value in results.items():
        print(f"{name:<26}{value:>14,.3f}")


if __name__ == "__main__":
    main()
