"""Does a run's memory grow, and how often does a picture travel?

``python -m benchmarks.memory [--steps 500] [--prompts 4] [--data digits|files] [--json FILE]`` trains the embedded
policy on 100,000 different pictures, 16 answers each, and looks at every process after step 50 and each tenth one:

* ``private``: memory of that process alone (USS), MiB; ``shared``: the rest of what it has in use (RSS - USS), which
  is Ray's object store and libraries.
* ``growth``: the largest private memory of the last fifth of the steps over the one after step 50. It must stay below
  50 MiB for every process.

Before that, without Ray, the bytes that a group of 16 answers and the batch made of it take on the wire, beside what
they would take if every answer brought its own copy of the picture; ``--wire`` does this alone.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import pickle
import shutil
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from skyrl.batch.batcher import Batcher
from skyrl.data.stream import PromptStream
from skyrl.digits.scenes import DigitScenes
from skyrl.monitoring.sink import MetricSink
from skyrl.records import Metrics, Prompt, RewardParts, Sample, SampleGroup
from skyrl.run import model_folders
from skyrl.settings import Config, WandbMode
from skyrl.system import System, start_system

PICTURES, ANSWERS, WARM_UP, EVERY = 100_000, 16, 50, 10
LIMIT = 50.0
"""MiB that a process may grow by after the warm-up."""
SIDE = 448
"""Of a picture on the wire, pixels."""
MIB = 2.0**20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--prompts", type=int, default=4, help="prompts of a step")
    parser.add_argument("--data", choices=["digits", "files"], default="digits", help="generated scenes, or a file")
    parser.add_argument("--json", type=Path, help="write the result there too")
    parser.add_argument("--wire", action="store_true", help="only the bytes on the wire")
    arguments = parser.parse_args()
    result: dict[str, Any] = {"wire": wire()}
    print(wire_table(result["wire"]))
    if not arguments.wire:
        if arguments.steps <= WARM_UP:
            parser.error(f"--steps must be above {WARM_UP}")
        result |= measure(arguments.steps, arguments.prompts, arguments.data)
        print(table(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2))
    return int(any(one["growth"] >= LIMIT for one in result.get("processes", {}).values()))


# ---------------------------------------------------------------- a run


def settings(work: Path, steps: int, prompts: int, data: str) -> Config:
    """The embedded policy with short answers: what a step leaves behind does not depend on their length."""
    cfg = Config(name="memory", run_dir=str(work / "run"))
    cfg.digits.train_size, cfg.digits.text_share = PICTURES, 0.0
    cfg.rollout.prompts_per_step, cfg.rollout.samples_per_prompt, cfg.rollout.max_new_tokens = prompts, ANSWERS, 24
    cfg.rollout.probe_prompts, cfg.rollout.probe_new_tokens = 2, 4
    cfg.controller.steps, cfg.evaluation.every, cfg.checkpoint.every, cfg.checkpoint.export = steps, 0, 0, False
    cfg.data.eval_size, cfg.hallucination.probe_prompts, cfg.cluster.dashboard = 8, 0, False
    cfg.monitoring.wandb, cfg.monitoring.console = WandbMode.off, False
    if data == "files":
        from skyrl.data.parquet import write_parquet

        for split, size in (("train", PICTURES), ("eval", 8)):
            scenes = DigitScenes(split, size, 0.0, seed=0)
            write_parquet(work / f"{split}.parquet", (scenes[row] for row in range(size)))
        cfg.data.source, cfg.reward.verifier = "files", "numeric"
        cfg.data.train_path, cfg.data.eval_path = str(work / "train.parquet"), str(work / "eval.parquet")
    return cfg


def measure(steps: int, prompts: int, data: str) -> dict[str, Any]:
    """One run; what each process had in use, step by step."""
    from skyrl.crew.ray_executor import ray_session
    from skyrl.loop import Loop

    with tempfile.TemporaryDirectory() as work:
        cfg = settings(Path(work), steps, prompts, data)
        started = time.perf_counter()
        with ray_session(cfg, "memory-benchmark"), start_system(cfg, *model_folders(cfg)) as system:
            (Path(work) / "run").mkdir()
            watch = Watch(system)
            Loop(cfg, system, PromptStream(system.sizes()["train"], 0), watch, Path(work) / "run").run()
    found = {name: summary(rows) for name, rows in watch.seen.items()}
    return {
        "steps": steps, "prompts": prompts, "answers": ANSWERS, "data": data,
        "seconds": time.perf_counter() - started, "load": os.getloadavg()[0],
        "processes": found, "samples": watch.seen, "buffer_prompts": watch.buffer, "store_mib": watch.store,
    }  # fmt: skip


class Watch(MetricSink):
    """A metric sink that looks at the processes after a step."""

    def __init__(self, system: System) -> None:
        self.names = {os.getpid(): "driver"}
        for crew in system.crews:
            pids = crew.each(own_pid)
            self.names |= {pid: f"{spec.name}" for spec, pid in zip(crew.specs, pids, strict=True)}
        self.seen: dict[str, list[tuple[int, float, float]]] = defaultdict(list)
        """Process → (step, private MiB, shared MiB)."""
        self.buffer: list[tuple[int, float]] = []
        self.store: list[tuple[int, float]] = []

    def log(self, step: int, metrics: Metrics) -> None:
        if "time/step" not in metrics or step < WARM_UP or step % EVERY:
            return
        self.buffer.append((step, metrics.get("buffer/prompts", 0.0)))
        self.store.append((step, store_mib()))
        mine = psutil.Process()
        for process in (mine, *mine.children(recursive=True)):
            try:
                name = self.names.get(process.pid) or ray_name(process)
                memory = process.memory_full_info()
            except psutil.NoSuchProcess:
                continue
            if name:
                self.seen[name].append((step, memory.uss / MIB, (memory.rss - memory.uss) / MIB))


def own_pid(_member: object) -> int:
    return os.getpid()


def ray_name(process: psutil.Process) -> str | None:
    """Ray's own lasting processes. Its idle workers come and go."""
    return next((name for name in ("raylet", "gcs_server") if name in process.name()), None)


def store_mib() -> float:
    """What lies in shared memory, MiB: Ray's object store, and that of any other run on this machine."""
    return shutil.disk_usage("/dev/shm").used / MIB


def summary(rows: list[tuple[int, float, float]]) -> dict[str, float]:
    """Where it began, where it ended, and the slope between by least squares, MiB in 100 steps."""
    steps, private = np.array([row[0] for row in rows]), np.array([row[1] for row in rows])
    slope = float(np.polyfit(steps, private, 1)[0]) * 100 if len(rows) > 1 else 0.0
    last = private[-max(1, len(rows) // 5) :]
    return {
        "first": float(private[0]), "last": float(private[-1]), "growth": float(last.max() - private[0]),
        "slope": slope, "shared": statistics.median(row[2] for row in rows),
    }  # fmt: skip


def table(result: dict[str, Any]) -> str:
    lines = [
        f"{result['steps']} steps of {result['prompts']} x {result['answers']} ({result['data']}) in "
        f"{result['seconds']:.0f} s; buffer {result['buffer_prompts'][-1][1]:.0f} prompts; shared memory "
        f"{result['store_mib'][0][1]:.1f} to {result['store_mib'][-1][1]:.1f} MiB",
        f"{'MiB':22} {'step 50':>9} {'end':>9} {'growth':>9} {'per 100':>9} {'shared':>9}",
    ]
    for name, one in result["processes"].items():
        numbers = (one[key] for key in ("first", "last", "growth", "slope", "shared"))
        lines.append(f"{name:22} " + " ".join(f"{number:9.1f}" for number in numbers))
    return "\n".join(lines)


# ---------------------------------------------------------------- on the wire


def wire() -> dict[str, dict[str, float]]:
    """MB of pickles: a scored group, and the batch that the real Batcher makes of it and of replayed ones."""
    cfg = Config()
    cfg.rollout.samples_per_prompt = ANSWERS
    batcher, found = Batcher(cfg, ""), {}
    for step in (1, 2, 3):  # the later ones also hold replayed samples
        sent = pickle.dumps([made_group(f"p{step}", 0.25), made_group(f"q{step}", 0.0)], protocol=5)
        batch, _ = batcher.exchange(step, step - 1, pickle.loads(sent))
        batch = pickle.loads(pickle.dumps(batch, protocol=5))
        pictures = {id(image) for item in batch.items for image in item.prompt.images}
        prompts = {item.prompt.id for item in batch.items}
        found[f"step {step}"] = {
            "groups_mb": len(sent) / 1e6,
            "groups_copied_mb": len(pickle.dumps(copied(pickle.loads(sent)))) / 1e6,
            "batch_items": len(batch.items),
            "batch_mb": len(pickle.dumps(batch, protocol=5)) / 1e6,
            "batch_copied_mb": len(pickle.dumps([copy.deepcopy(item) for item in batch.items])) / 1e6,
            "pictures": len(pictures),
            "prompts": len(prompts),
        }
    return found


def made_group(name: str, right_share: float) -> SampleGroup:
    """A picture and 16 scored answers of which so many are right; without one the places are free for replay."""
    rng = np.random.default_rng(len(name))
    picture = rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    samples = []
    for place in range(ANSWERS):
        right = float(place < right_share * ANSWERS)
        sample = Sample(
            place, np.arange(100, dtype=np.int32), np.full(100, -1.0, np.float32), "text " * 20, False,
            int(name[1:]) - 1, RewardParts(right, 1.0, 2.0 * right, right),
            advantage=right - right_share, rule_advantage=right - right_share,
        )  # fmt: skip
        samples.append(sample)
    return SampleGroup(Prompt(name, "?", (picture,), "1", "exact"), np.arange(300, dtype=np.int32), samples)


def copied(groups: list[SampleGroup]) -> list[tuple[Prompt, Sample]]:
    """What a system sends that keeps a row for each answer."""
    return [(copy.deepcopy(group.prompt), sample) for group in groups for sample in group.samples]


def wire_table(found: dict[str, dict[str, float]]) -> str:
    lines = [f"on the wire, a picture of {SIDE} x {SIDE} and {ANSWERS} answers to it, two groups a step; MB:"]
    lines.append(
        f"{'':8} {'groups':>8} {'copied':>8} {'batch':>8} {'copied':>8} {'items':>6} {'prompts':>8} {'pictures':>8}"
    )
    for name, one in found.items():
        sizes = " ".join(f"{one[key]:8.2f}" for key in ("groups_mb", "groups_copied_mb", "batch_mb", "batch_copied_mb"))
        lines.append(f"{name:8} {sizes} {one['batch_items']:6} {one['prompts']:8} {one['pictures']:8}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
