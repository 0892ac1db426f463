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
import pytest
import torch
from learner_cases import build_policy

SCRIPT = Path(__file__).with_name("learner_mpo_cases.py")
LIMIT = 600
Weights = dict[str, np.ndarray]
Results = dict[tuple[int, int], dict[Any, Any]]
"""(world size, rank) → (case, ZeRO stage) → what happened there."""
SHARED: list[tuple[Path, Results]] = []


def run_all(folders: pytest.TempPathFactory) -> tuple[Path, Results]:
    """The starting policy, and the results of all cases, one rank alone and then two together; run once a session."""
    if SHARED:
        return SHARED[0]
    torch.set_num_threads(1)
    policy, work = folders.mktemp("policy"), folders.mktemp("ranks")
    found: Results = {}
    build_policy(policy)
    for world_size in (1, 2):
        run_ranks(SCRIPT, policy, work, world_size)
        for rank in range(world_size):
            file = work / f"results-{world_size}-{rank}.pkl"
            found[world_size, rank] = pickle.loads(file.read_bytes())
            file.unlink()  # pytest would keep hundreds of megabytes of three sessions
    for checkpoint in work.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    SHARED.append((policy, found))
    return SHARED[0]


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
