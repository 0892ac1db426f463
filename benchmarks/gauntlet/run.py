"""One run of the real system in this process, with a fault or without: vLLM, DeepSpeed, the loop and the members are
those of every run, without Ray. vLLM starts once and gets the starting weights back at the first sync of each run."""

from __future__ import annotations

import gc
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gauntlet.fault import Fault, replaced

BEFORE = 2
"""Steps of the clean run that a resumed one goes on with."""
STEPS = 3
"""Steps of a run, or behind those."""
SETTINGS = (
    "name=gauntlet",
    f"controller.steps={STEPS}",
    "rollout.prompts_per_step=8",
    "rollout.samples_per_prompt=8",
    "data.eval_size=16",
    "hallucination.probe_prompts=8",
    "evaluation.every=0",
    "checkpoint.every=0",
    "checkpoint.export=false",
    "monitoring.wandb='off'",
    "monitoring.console=false",
    "monitoring.ray_metrics=false",
    *(f"{role}.threads=1" for role in ("rollout", "reward", "learner")),
)
CACHE_BLOCK = 32
"""Tokens of a block of vLLM's prefix cache; 128 by default on a CPU, and prompts of the digits have 56."""


@dataclass
class Outcome:
    """What came of one run."""

    error: str = ""
    """Type and message of what ended it."""
    error_step: int = 0
    """The step in which it did, 0 before the first."""
    alarms: list[tuple[int, str, str]] = field(default_factory=list)
    """Step, name and text of each."""
    seconds: float = 0.0
    steps: int = 0
    """That were finished."""

    def said(self) -> list[tuple[int, str]]:
        """Step and words of everything that was said, in order."""
        told = [(step, f"{name}: {text}") for step, name, text in self.alarms]
        return sorted(told + ([(self.error_step, self.error)] if self.error else []), key=lambda one: one[0])


def prepare() -> None:
    """Before torch and vLLM are imported: one thread for everything, and one vLLM engine for all runs."""
    from skyrl.crew.ray_executor import COMMON_ENVIRONMENT
    from skyrl.rollout.engine import rollout_environment
    from skyrl.settings import RolloutConfig

    os.environ.update(COMMON_ENVIRONMENT | rollout_environment(RolloutConfig(), 1) | {"DS_ACCELERATOR": "cpu"})
    import torch

    torch.set_num_threads(1)


_started: list[tuple[Any, str]] = []
"""The engine of :func:`one_engine` and the folder of its first weights."""


def reset() -> None:
    """Give the engine its first weights back, and empty its caches: a run may have left others."""
    from safetensors.torch import load_file

    for llm, folder in _started:
        weights = load_file(Path(folder) / "model.safetensors")
        update = {"parameters": iter(weights.items()), "version": 0, "whole": True}
        llm.collective_rpc("start_weight_update")
        llm.collective_rpc("update_weights", kwargs={"update_info": update})
        llm.collective_rpc("finish_weight_update")
        llm.reset_prefix_cache()
        llm.llm_engine.reset_encoder_cache()


@contextmanager
def one_engine() -> Iterator[None]:
    """Inside, vLLM starts once: the gauntlet's policies differ in nothing that it reads."""
    from skyrl.rollout import vllm_engine

    def start(original: Any, cfg: Any, folder: str) -> Any:
        if not _started:
            with replaced(vllm_engine, "LLM", lambda llm, **options: llm(**options, block_size=CACHE_BLOCK)):
                _started.append((original(cfg, folder), folder))
        return _started[0][0]

    with replaced(vllm_engine, "_start_llm", start):
        yield


def attempt(settings: Sequence[str], fault: Fault | None = None, base: Sequence[str] = SETTINGS) -> Outcome:
    """Run the system in a folder of its own, under ``fault`` if there is one."""
    reset()
    with tempfile.TemporaryDirectory(prefix="gauntlet-") as work:
        folder, given = Path(work), [*base, *settings]
        if fault is not None:
            given += [*fault.settings, *(fault.prepared(folder) if fault.prepared else [])]
        given.append(f"run_dir={folder / 'run'}")
        resumes = fault is not None and fault.resumes
        if resumes:
            first = _run([*given, f"controller.steps={BEFORE}", f"checkpoint.every={BEFORE}"], folder / "run")
            if first.said():
                return first
            given += [
                f"controller.steps={BEFORE + STEPS}",
                f"resume={folder / 'run' / 'checkpoints' / f'step_{BEFORE:06d}'}",
            ]
        with nullcontext() if fault is None else fault.switch():
            return _run(given, folder / "run")


def _run(settings: Sequence[str], run_dir: Path) -> Outcome:
    from skyrl.cli import compose_config
    from skyrl.crew.local_executor import LocalExecutor
    from skyrl.loop import Loop
    from skyrl.monitoring.events import ALARM, read_events
    from skyrl.run import run

    outcome, now = Outcome(), [0, 0]

    def step(original: Any, loop: Any) -> Any:
        now[:] = [loop.step, now[1]]
        made = original(loop)
        now[1] = loop.step
        return made

    started = time.monotonic()
    with replaced(Loop, "_train_step", step):
        try:
            cfg = compose_config(settings)
            cfg.rollout.num_workers = cfg.reward.num_workers = 1  # of the one engine
            run(cfg, LocalExecutor())
        except Exception as error:  # noqa: BLE001 -- whatever it is: that is what the user would see
            outcome.error, outcome.error_step = f"{type(error).__name__}: {error}", now[0]
            error.__traceback__ = None
    events = [one for one in read_events(run_dir) if one.kind == ALARM]
    outcome.alarms = [(one.step, one.member, one.text) for one in events]
    outcome.seconds, outcome.steps = round(time.monotonic() - started, 1), now[1]
    with suppress(Exception):
        gc.collect()
    return outcome
