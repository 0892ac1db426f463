"""Packages, places for the members, memory."""

from __future__ import annotations

import json
import os
import struct
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from skyrl.checks.subject import Skip, Subject
from skyrl.crew.placement import check_resources
from skyrl.monitoring.sinks import check_tensorboard
from skyrl.records import ConfigError
from skyrl.settings import Config
from skyrl.settings.reward_model import is_endpoint

GIB = 2**30
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def packages(subject: Subject) -> str:
    """Those that the settings need are installed. Nothing is imported."""
    cfg = subject.cfg
    wanted = {"torch": "training", "transformers": "models"}
    if cfg.rollout.engine.startswith("skyrl."):
        wanted["vllm"] = "rollout.engine"
    if cfg.learner.backend.startswith("skyrl."):
        wanted["deepspeed"] = "learner.backend"
    missing = [f"{name} ({why})" for name, why in wanted.items() if find_spec(name) is None]
    if missing:
        raise ConfigError(f"not installed: {', '.join(missing)}")
    check_tensorboard(cfg.monitoring.tensorboard)
    return ", ".join(wanted)


def resources(subject: Subject) -> str:
    """Ray could place all members on this machine."""
    cfg = subject.cfg
    address = cfg.cluster.address or os.environ.get("RAY_ADDRESS")
    if address:
        raise Skip(f"the run joins the cluster at {address}, which is asked when it starts")
    cpus, gpus = cfg.cluster.num_cpus or os.cpu_count() or 1, 0
    if "cuda" in (cfg.rollout.device, cfg.learner.device, cfg.reward.device):
        import torch

        gpus = torch.cuda.device_count()
    check_resources(cfg, [{"Resources": {"CPU": cpus, "GPU": gpus}}], with_learner=True)
    return f"{cpus} CPUs and {gpus} GPUs hold all members"


def memory(subject: Subject) -> str:
    """An estimate of what the parts of a run hold on a machine without GPUs, beside what there is."""
    cfg, parts = subject.cfg, memory_parts(subject.cfg, subject.policy, subject.reward)
    need = sum(parts.values())
    listed = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items())
    if "cuda" in (cfg.rollout.device, cfg.learner.device):
        raise Skip(
            f"GPUs are not looked at; without activations about {need / GIB:.1f} GiB over all devices ({listed})"
        )
    have = machine_memory()
    said = f"about {need / GIB:.1f} GiB of {have / GIB:.1f} GiB, activations not counted ({listed})"
    if need > have:
        raise ConfigError(said)
    return said


def memory_parts(cfg: Config, policy: str, reward: str | None) -> dict[str, float]:
    """Part of a run → bytes over all its members.

    Raises:
        ConfigError: if a folder has no safetensors files whose heads can be read.
    """
    width, ranks, stage = DTYPE_BYTES[cfg.model.dtype], cfg.learner.num_workers, cfg.learner.zero_stage
    count = parameters_in(policy)
    trained = 0 if cfg.learner.lora.rank else count  # the factors are some thousandths
    copies = {
        part: 1 if stage >= least else ranks for part, least in (("optimizer", 1), ("gradients", 2), ("weights", 3))
    }
    master = 4 if width == 2 else 0
    parts: dict[str, float] = {
        "engines": cfg.rollout.num_workers * (count * width + cfg.rollout.kv_cache_gib * GIB),
        "learner": copies["weights"] * count * width
        + copies["gradients"] * trained * width
        + copies["optimizer"] * trained * (8 + master),
        "weights on their way": count * width,
    }
    if cfg.algorithm.mpo.weight > 0 or cfg.algorithm.grpo.kl_weight > 0:
        parts["reference policy"] = copies["weights"] * count * width
    if reward is not None and not is_endpoint(reward):
        parts["reward models"] = cfg.reward.num_workers * parameters_in(reward) * width
    return parts


def parameters_in(folder: str) -> int:
    """Numbers in the safetensors files of a folder and the folders in it; only their heads are read."""
    files = sorted(Path(folder).rglob("*.safetensors"))
    total = 0
    for path in files:
        try:
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                head = json.loads(file.read(length))
        except (struct.error, ValueError, OverflowError, MemoryError) as error:
            raise ConfigError(f"{path} is no safetensors file: {error}") from error
        total += sum(int(np.prod(entry["shape"])) for name, entry in head.items() if name != "__metadata__")
    if not total:
        raise Skip(f"{folder} has no safetensors files, so its parameters can't be counted")
    return total


def machine_memory() -> int:
    """Bytes of this machine, or of the container if that has less."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else ""
    return min(pages, int(text)) if text.isdecimal() else pages
