"""Starting the learner cases in processes of their own, one per rank, and comparing weights and gradients."""

from __future__ import annotations

import os
import pickle
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

LIMIT = 400
Weights = dict[str, np.ndarray]


def run_all(script: str, policy: Path, work: Path) -> dict[tuple[int, int], dict[Any, Any]]:
    """(world size, rank) → results of all cases of ``script``, one rank alone and then two together."""
    found = {}
    for world_size in (1, 2):
        run_ranks(Path(__file__).with_name(script), policy, work, world_size)
        for rank in range(world_size):
            file = work / f"results-{world_size}-{rank}.pkl"
            found[world_size, rank] = pickle.loads(file.read_bytes())
            file.unlink()  # pytest would keep hundreds of megabytes of three sessions
    for checkpoint in work.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    return found


def run_ranks(script: Path, policy: Path, work: Path, world_size: int) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
        "OMP_WAIT_POLICY": "passive", "PYTHONWARNINGS": "ignore",
    }  # fmt: skip
    logs = [work / f"log-{world_size}-{rank}.txt" for rank in range(world_size)]
    processes = []
    for rank, log in enumerate(logs):
        command = [sys.executable, str(script), str(policy), str(work), str(rank), str(world_size)]
        processes.append(subprocess.Popen(command, env=environment, stdout=log.open("w"), stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(timeout=LIMIT) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    tails = "\n".join(log.read_text()[-3000:] for log in logs)
    assert codes == [0] * world_size, tails


def distance(a: Weights, b: Weights) -> float:
    assert a.keys() == b.keys()
    return max(float(np.abs(a[name] - b[name]).max()) for name in a)


def gradient_error(got: Weights, want: Weights) -> float:
    """Largest difference, in units of the largest entry."""
    assert got.keys() == want.keys()
    largest = max(float(np.abs(g).max()) for g in want.values())
    return distance(got, want) / largest
