"""One run, from a valid configuration to its report."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from pkgutil import resolve_name
from typing import Any
from uuid import uuid4

from rich.console import Console

from skyrl.checkpoint import SETTINGS, check_settings, find_checkpoint, held, new_folder, put_aside, read_state
from skyrl.checks.all import cheap_checks
from skyrl.checks.data import repeated
from skyrl.checks.policy import readable
from skyrl.checks.prompts import first_prompts
from skyrl.checks.subject import Subject
from skyrl.crew.door import opened
from skyrl.crew.executor import Executor
from skyrl.crew.ray_executor import ray_session
from skyrl.data.datasets import check_size
from skyrl.data.stream import prompt_stream
from skyrl.learner import files
from skyrl.loop import Loop
from skyrl.monitoring.events import EVENTS, AlarmSink, EventSink, alarms_of, read_events
from skyrl.monitoring.metrics import metric_table
from skyrl.monitoring.model_card import write_model_card
from skyrl.monitoring.records import jsonable, read_json, read_metrics, write_json
from skyrl.monitoring.report import write_report
from skyrl.monitoring.sinks import (
    ConsoleSink,
    JsonlSink,
    MetricSink,
    RayGaugeSink,
    Sinks,
    TensorboardSink,
    WandbSink,
    wandb_mode,
)
from skyrl.monitoring.summary import print_summary, write_summary
from skyrl.monitoring.timeline import FOLDER, Timeline
from skyrl.policy.hub import model_folder
from skyrl.records import ConfigError, Event, Metrics
from skyrl.redaction import hide_variables, redact, redacted
from skyrl.rollout.sampler import Sampler
from skyrl.settings import Config, Overlong, WandbMode
from skyrl.settings.reward_model import is_endpoint
from skyrl.system import System, fitting_rows, start_system

BUILT = {"digits": "skyrl.digits.embedded:embedded_models"}
"""``model.policy`` and ``model.reward`` by name → the function that builds both."""


def run(cfg: Config, executor: Executor | None = None) -> dict[str, Any]:
    """Train, evaluate, save and report.

    Args:
        executor: Where the members run; None starts or joins Ray.

    Returns:
        What ``summary.json`` holds.

    Raises:
        SkyrlError: whatever went wrong in a member, with its own message.
    """
    console, cfg = Console(), with_absolute_paths(cfg)
    hide_variables(filter(None, [cfg.reward.judge.api_key_env]))
    metric_table(cfg)  # a wrong term of one's own is refused before anything starts
    checkpoint = find_checkpoint(cfg.resume, Path(cfg.run_dir), cfg.name)
    if checkpoint is None:
        run_dir = Path(cfg.run_dir).resolve()
        if cfg.resume == "auto":
            aside = put_aside(run_dir, cfg.name)
            console.print("resume=auto: no complete checkpoint yet, a fresh run starts")
            if aside is not None:
                console.print(f"what the run before it left is in {aside} now")
        run_dir = new_folder(run_dir)
    else:  # a resumed run goes on in its old folder, if it can: seen before anything starts
        run_dir = checkpoint.parents[1]
        if (step := read_state(checkpoint)["step"]) > cfg.controller.steps:
            raise ConfigError(
                f"controller.steps={cfg.controller.steps}: the run that shall go on is at step {step} already "
                f"({checkpoint}); allowed: {step} or more"
            )
        files.read_state(checkpoint / "learner", cfg)
    cfg = cfg.model_copy(update={"run_dir": str(run_dir)})
    with held(run_dir):
        if checkpoint is None:
            write_json(run_dir / SETTINGS, cfg)
        else:
            console.print(f"resuming from {checkpoint}")
            settings = run_dir / SETTINGS
            for change in check_settings(read_json(settings), redacted(jsonable(cfg))) if settings.is_file() else ():
                console.print(f"changed since: {change}")
        seconds = _train(cfg, run_dir, checkpoint, executor, console)
        history = read_metrics(run_dir / "metrics.jsonl")
        alarms = alarms_of(cfg, history, read_events(run_dir))
        summary = write_summary(run_dir / "summary.json", history, config=cfg, seconds_training=seconds, alarms=alarms)
        if (policy := run_dir / "policy").is_dir():
            write_model_card(policy, run_dir, cfg, summary)
        print_summary(summary, write_report(run_dir), console)
    return summary


def _train(cfg: Config, run_dir: Path, checkpoint: Path | None, executor: Executor | None, console: Console) -> float:
    """Start everything, go through the steps, take everything down; seconds of the training steps."""
    rows = pool_rows(cfg)
    if rows is not None:
        check_size(len(rows), cfg)
    policy, reward = model_folders(cfg)
    checked = cheap_checks(cfg, policy)
    for note in repeated(checked):
        console.print(redact(note), markup=False, highlight=False, soft_wrap=True)
    if cfg.model.policy not in BUILT:
        readable(checked)
    with ExitStack() as stack:
        if executor is None:
            own = f"skyrl-{cfg.name}-{run_dir.name}-{uuid4().hex[:6]}"  # runs of the same second have one folder name
            dashboard = stack.enter_context(ray_session(cfg, namespace=own))
            if dashboard:
                console.print(f"Ray dashboard: {opened(dashboard)}", soft_wrap=True)
        counts = (cfg.rollout.num_workers, cfg.reward.num_workers, cfg.learner.num_workers)
        console.print("starting {} rollout, {} reward and {} learner members, 1 sample buffer".format(*counts))
        system = stack.enter_context(start_system(cfg, policy, reward, executor))
        given = _sizes(system, rows)
        rows = fitting(cfg, system, rows, console)
        system.rollouts.one(first_prompts)
        sizes = _sizes(system, rows)
        check_size(sizes["train"], cfg)
        step = cfg.rollout.in_flight * cfg.rollout.num_workers
        stream = prompt_stream(system.rollouts.one(Sampler.parts), cfg.data.seed, step, cfg.data.weights, rows)
        loop = Loop(cfg, system, stream, Sinks([]), run_dir, rows)
        if checkpoint is not None:  # nothing of the old run is overwritten before its state was accepted
            loop.restore(checkpoint)
            write_json(run_dir / SETTINGS, cfg)
        loop.timeline = Timeline(run_dir / FOLDER)
        with closing(_sinks(cfg, run_dir, checkpoint, console)) as loop.sink:
            if cfg.data.overlong is Overlong.drop:
                loop.sink.log(loop.step, {f"data/left_out_{s}": float(given[s] - size) for s, size in sizes.items()})
            loop.sink.log(loop.step, _data_metrics(checked, sizes))
            if checkpoint is not None:
                loop.sink.event(Event(time.time(), loop.step, "resumed", "", f"goes on from {checkpoint}"))
            with stops_on_signals(loop):
                loop.run()
            if loop.step < cfg.controller.steps:  # it was stopped, and has saved
                raise KeyboardInterrupt
    return loop.seconds_training


@contextmanager
def stops_on_signals(loop: Loop) -> Iterator[None]:
    """Inside, the first Ctrl-C, SIGTERM or SIGHUP lets the loop end after its present step, with a checkpoint; the
    second one raises KeyboardInterrupt at once, as all do outside. Signals that are ignored (``nohup``), or that the
    caller has a handler of its own for, are left alone."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    taken = [number for number in numbers if signal.getsignal(number) is signal.default_int_handler]

    def interrupt_from_now_on() -> None:
        for number in taken:
            signal.signal(number, signal.default_int_handler)

    def ask(*_: Any) -> None:
        interrupt_from_now_on()
        loop.stop_after_step = True
        # Not by print, which may be what was interrupted.
        os.write(2, b"\nstopping after this step, with a checkpoint; once more: at once\n")

    if threading.current_thread() is threading.main_thread():
        for number in taken:
            signal.signal(number, ask)
        try:
            yield
        finally:
            interrupt_from_now_on()
    else:
        yield


def model_folders(cfg: Config) -> tuple[str, str | None]:
    """Folders of policy and reward model; models that have a name are built or downloaded now, unless they are in their
    cache."""
    found = [cfg.model.policy, cfg.model.reward]
    for name in {model for model in found if model in BUILT}:
        made = resolve_name(BUILT[name])(cfg)
        found = [str(own) if model == name else model for model, own in zip(found, made, strict=True)]
    policy = model_folder(str(found[0]), "model.policy")
    reward = found[1]
    if reward is not None and not is_endpoint(reward):
        reward = str(Path(model_folder(reward, "model.reward")).absolute())  # its links stay as they are
    return str(Path(str(policy)).resolve()), reward


def pool_rows(cfg: Config) -> Sequence[int] | None:
    """Rows of the training data that ``data.pool_path`` leaves; None without a pool."""
    if cfg.data.pool_path is None:
        return None
    from skyrl.data import pool
    from skyrl.data.datasets import build_datasets

    rows: list[int] = pool.pool_rows(Path(cfg.data.pool_path), cfg.data, build_datasets(cfg)["train"]).tolist()
    return rows


def _data_metrics(checked: Subject, sizes: Mapping[str, int]) -> Metrics:
    """What is known of the prompts before the first step."""
    metrics = {"data/train_prompts": float(sizes["train"])}
    if checked.overlap is not None:
        metrics["data/repeated_share"] = checked.overlap.number / len(checked.datasets["eval"])
    return metrics


def _sizes(system: System, rows: Sequence[int] | None) -> dict[str, int]:
    """Prompts per split, of the training prompts those of ``rows``."""
    return system.sizes() | ({} if rows is None else {"train": len(rows)})


def fitting(cfg: Config, system: System, rows: Sequence[int] | None, console: Console) -> Sequence[int] | None:
    """The training rows that can be asked, of ``rows`` (None: of all; also what is returned then if that is so).
    Held-out rows that can't be are taken out of the rollout members' data.

    Raises:
        DataError: as :func:`~skyrl.system.fitting_rows`.
    """
    if cfg.data.source == "digits":  # made to fit, and only drawn when they are asked for
        return rows
    sizes = system.sizes()
    held_out = fitting_rows(cfg, system, "eval", range(sizes["eval"]), console)
    if len(held_out) < sizes["eval"]:
        system.rollouts.prepare(Sampler.keep, "eval", held_out)
    if cfg.data.pairs_path is not None:  # their prompts are asked for evaluation only
        return rows
    found = fitting_rows(cfg, system, "train", range(sizes["train"]) if rows is None else rows, console)
    return rows if rows is None and len(found) == sizes["train"] else found


def with_absolute_paths(cfg: Config) -> Config:
    """Members on a joined cluster need not share this process's working folder."""
    names = ("train_path", "eval_path", "pool_path", "pairs_path", "picture_root")
    # Links stay as they are: relative pictures lie beside the link, and default ids have its name.
    paths = {name: _absolute(path) for name in names if (path := getattr(cfg.data, name)) is not None}
    return cfg.model_copy(update={"data": cfg.data.model_copy(update=paths)})


def _absolute(path: str | list[str]) -> str | list[str]:
    return str(Path(path).absolute()) if isinstance(path, str) else [str(Path(one).absolute()) for one in path]


def _sinks(cfg: Config, run_dir: Path, checkpoint: Path | None, console: Console) -> Sinks:
    step = read_state(checkpoint)["step"] if checkpoint is not None else None
    sinks: list[MetricSink] = [JsonlSink(run_dir / "metrics.jsonl", resume_step=step)]
    if cfg.monitoring.console:
        sinks.append(ConsoleSink(cfg.controller.steps, console))
    mode = wandb_mode(cfg.monitoring.wandb)
    if mode is not WandbMode.off:
        sinks.append(WandbSink(run_dir, project=cfg.monitoring.wandb_project, name=cfg.name, mode=mode, config=cfg))
    if cfg.monitoring.tensorboard:
        sinks.append(TensorboardSink(run_dir, step, read_metrics(run_dir / "metrics.jsonl")))
    if cfg.monitoring.ray_metrics:
        sinks.append(RayGaugeSink(f"{cfg.name}/{run_dir.name}"))
    sinks.append(EventSink(run_dir / EVENTS))
    history = read_metrics(run_dir / "metrics.jsonl") if step is not None else []
    table = metric_table(cfg)
    writing = Sinks(sinks, table)
    return Sinks([writing, AlarmSink(cfg, writing.event, console, history)], table)
