"""Joining the ranks."""

from __future__ import annotations

import os
from datetime import timedelta

import deepspeed

SHM_OP = "deepspeed_shm_comm"


def join_ranks(device: str, rank: int, world_size: int, timeout: float) -> None:
    """Start DeepSpeed's process group (gloo on CPU, nccl on CUDA); does nothing if this process has one.

    Args:
        device: ``cpu`` or ``cuda``.
        rank: This rank, 0 … ``world_size`` - 1. The ranks meet at MASTER_ADDR and MASTER_PORT, which a single one does
            not need.
        world_size: Ranks that will join.
        timeout: Seconds after which a collective call that a peer does not answer is an error.
    """
    if world_size == 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "0")  # any free one
    # Every rank is a process of its own that sees one device, which is therefore the first.
    os.environ.setdefault("LOCAL_RANK", "0")
    # Otherwise DeepSpeed compiles this C++ op at the first start on a CPU: a minute and a compiler, for an all-reduce
    # that only its inference engine calls.
    deepspeed.ops.__compatible_ops__[SHM_OP] = False
    deepspeed.init_distributed(
        "gloo" if device == "cpu" else "nccl",
        auto_mpi_discovery=False,
        verbose=False,
        timeout=timedelta(seconds=timeout),
        rank=rank,
        world_size=world_size,
    )
