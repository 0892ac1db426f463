"""The output layer of the learner with whole logits, as it was, and in blocks: peak memory and time of a forward and a
backward pass. A third way, chunks of rows under ``torch.utils.checkpoint``, is measured beside them::

    python -m benchmarks.output_layer [--json FILE] [--rounds 5] [--threads 1] [--only V]

Memory is what a process of its own that makes one pass has at most, beyond what it had before the pass: so the gradient
of the weight, which every way makes, counts too. Times are medians of passes that take turns in one process: seconds of
the processor, which other programs do not change as much as those of the clock; both are in the file.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from skyrl.objective.reductions import token_logprobs
from skyrl.policy.output_layer import BLOCK_BYTES, answer_logprobs

CASES = ((1_000, 128, 6_000), (32_000, 512, 2_000), (150_000, 512, 1_000))
"""Vocabulary, hidden size, answer tokens."""
TEMPERATURE, FORBIDDEN = 0.9, (0, 3)
Way = Callable[[nn.Linear, Tensor, Tensor], Tensor]


def whole(head: nn.Linear, hidden: Tensor, ids: Tensor) -> Tensor:
    return token_logprobs(head(hidden), ids, TEMPERATURE, FORBIDDEN)[0]


def blocks(head: nn.Linear, hidden: Tensor, ids: Tensor) -> Tensor:
    return answer_logprobs(head, hidden, ids, TEMPERATURE, FORBIDDEN)[0]


def row_chunks(head: nn.Linear, hidden: Tensor, ids: Tensor) -> Tensor:
    rows = max(1, BLOCK_BYTES // (4 * head.out_features))
    parts = zip(hidden.split(rows), ids.split(rows), strict=True)
    return torch.cat([checkpoint(whole, head, some, some_ids, use_reentrant=False) for some, some_ids in parts])


WAYS: dict[str, Way] = {"whole": whole, "row chunks": row_chunks, "blocks": blocks}


def case(vocabulary: int, width: int, tokens: int, trained: bool) -> tuple[nn.Linear, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    head = nn.Linear(width, vocabulary, bias=False).requires_grad_(trained)
    hidden, ids = torch.randn(tokens, width, requires_grad=True), torch.randint(5, vocabulary, (tokens,))
    return head, hidden, ids, torch.randn(tokens)


def one_pass(way: Way, head: nn.Linear, hidden: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
    head.weight.grad = hidden.grad = None
    logprobs = way(head, hidden, ids)
    (logprobs * weights).sum().backward()
    assert hidden.grad is not None
    return logprobs.detach(), hidden.grad, *([] if head.weight.grad is None else [head.weight.grad])


def peak(way: str, vocabulary: int, width: int, tokens: int, trained: bool) -> float:
    """MiB of one pass in this process, which must be a fresh one."""
    made = case(vocabulary, width, tokens, trained)
    small = case(8, width, 4, trained)
    one_pass(WAYS[way], *small)  # libraries get their buffers
    before = resident("VmRSS")
    one_pass(WAYS[way], *made)
    return resident("VmHWM") - before


def resident(what: str) -> float:
    """MiB of this process: VmRSS now, VmHWM the most so far. (``ru_maxrss`` would count the parent's.)"""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith(f"{what}:")) / 1024


def peak_apart(way: str, *shape: int) -> float:
    command = [sys.executable, "-m", "benchmarks.output_layer", "--peak", way, *map(str, shape)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def times(rounds: int, *shape: Any) -> dict[str, dict[str, float]]:
    """Way → median seconds of a pass, by the clock and of the processor, and its largest difference from whole logits
    as a share of the largest number."""
    made = case(*shape)
    want = [part.clone() for part in one_pass(whole, *made)]
    found: dict[str, dict[str, float]] = {}
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in WAYS}
    for name, way in WAYS.items():
        got = one_pass(way, *made)
        apart = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, want, strict=True)]
        found[name] = {"difference": max(apart)}
    for _ in range(rounds):
        for name, way in WAYS.items():
            clock, processor = time.perf_counter(), time.process_time()
            one_pass(way, *made)
            taken[name].append((time.perf_counter() - clock, time.process_time() - processor))
    for name, pairs in taken.items():
        clocks, processors = zip(*pairs, strict=True)
        found[name] |= {"clock": statistics.median(clocks), "processor": statistics.median(processors)}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", default=Path("outputs/output_layer.json"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", type=int, metavar="V", help="only this vocabulary")
    parser.add_argument("--peak", nargs=5, metavar=("WAY", "V", "H", "N", "TRAINED"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.peak:
        way, vocabulary, width, tokens, trained = given.peak
        print(peak(way, int(vocabulary), int(width), int(tokens), bool(int(trained))))
        return 0
    results = []
    print("| vocabulary | H | tokens | layer | way | peak MiB | of whole | processor s | of whole | difference |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for shape in [shape for shape in CASES if given.only in (None, shape[0])]:
        for trained in (True, False):
            measured = times(given.rounds, *shape, trained)
            for way, numbers in measured.items():
                numbers["peak_mib"] = peak_apart(way, *shape, int(trained))
                base = measured["whole"]
                memory, seconds = (numbers[key] / base[key] for key in ("peak_mib", "processor"))
                cells = (*shape, "trained" if trained else "frozen", way, f"{numbers['peak_mib']:.0f}", f"{memory:.2f}")
                last = (f"{numbers['processor']:.3f}", f"{seconds:.2f}", f"{numbers['difference']:.1e}")
                print("|", " | ".join(map(str, (*cells, *last))), "|", flush=True)
                results.append({"shape": shape, "trained": trained, "way": way, **numbers})
    given.json.parent.mkdir(parents=True, exist_ok=True)
    setting = {"threads": given.threads, "rounds": given.rounds, "load": os.getloadavg(), "torch": torch.__version__}
    given.json.write_text(json.dumps({"setting": setting, "results": results}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
