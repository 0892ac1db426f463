"""One run, from a valid configuration to its report."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import ray
from rich.console import Console

from skyrl.checkpoint import SETTINGS, check_settings, find_checkpoint, read_state
from skyrl.crew.system import ray_session, start_system
from skyrl.data.stream import PromptStream
from skyrl.digits.embedded import embedded_models
from skyrl.interfaces import MetricSink
from skyrl.loop import Controller
from skyrl.monitoring.gauges import RayGaugeSink
from skyrl.monitoring.records import jsonable, read_json, read_metrics, write_json
from skyrl.monitoring.report import write_report
from skyrl.monitoring.sinks import ConsoleSink, JsonlSink, Sinks, WandbSink, wandb_mode
from skyrl.monitoring.summary import print_summary, write_summary
from skyrl.records import DataError, SkyrlError
from skyrl.settings import Config, DataConfig, WandbMode

logger = logging.getLogger(__name__)


def run(cfg: Config) -> dict[str, Any]:
    """Train, evaluate, save and report.

    Returns:
        What ``summary.json`` holds.

    Raises:
        SkyrlError: whatever went wrong in an actor, with the actor's own message.
    """
    console = Console()
    cfg = dataclasses.replace(cfg, data=_absolute_paths(cfg.data))
    checkpoint = find_checkpoint(cfg.resume, Path(cfg.run_dir), cfg.name)
    if checkpoint is not None:  # a resumed run goes on in its old folder
        checkpoint = checkpoint.resolve()
        cfg = dataclasses.replace(cfg, run_dir=str(checkpoint.parents[1]))
        console.print(f"resuming from {checkpoint}")
        settings = Path(cfg.run_dir) / SETTINGS
        for change in check_settings(read_json(settings), jsonable(cfg)) if settings.is_file() else ():
            console.print(f"changed since: {change}")
    elif cfg.resume == "auto":
        console.print("resume=auto: no complete checkpoint yet, a fresh run starts")
    run_dir = Path(cfg.run_dir).resolve()
    run_dir.mkdir(parents=True, exist_ok=True)
    if checkpoint is None:
        write_json(run_dir / SETTINGS, cfg)
    rows = pool_rows(cfg.data)
    if rows is not None:
        check_size(len(rows), cfg)
    policy, reward = model_folders(cfg)
    try:
        with ray_session(cfg, namespace=f"skyrl-{cfg.name}-{run_dir.name}") as dashboard:
            if dashboard:
                console.print(f"Ray dashboard: http://{dashboard}")
            counts = (cfg.rollout.num_workers, cfg.reward.num_workers, cfg.learner.num_workers)
            console.print("starting {} rollout, {} reward and {} learner actors, 1 sample buffer".format(*counts))
            with start_system(cfg, policy, reward) as system:
                size = system.rows["train"] if rows is None else len(rows)
                check_size(size, cfg)
                stream = PromptStream(size, cfg.data.seed)
                controller = Controller(cfg, system.pools, stream, system.rows["eval"], Sinks([]), run_dir, rows)
                if checkpoint is not None:  # nothing of the old run is overwritten before its state was accepted
                    controller.restore(checkpoint)
                    write_json(run_dir / SETTINGS, cfg)
                with closing(_sinks(cfg, run_dir, checkpoint, console)) as controller.sink:
                    controller.run()
    except ray.exceptions.RayTaskError as error:
        raise _own_error(error) from error
    except ray.exceptions.RayError as error:
        raise SkyrlError(f"Ray: {error}") from error
    history = read_metrics(run_dir / "metrics.jsonl")
    seconds = controller.seconds_training
    summary = write_summary(run_dir / "summary.json", history, config=cfg, seconds_training=seconds)
    report = write_report(run_dir)
    print_summary(summary, report, console)
    return summary


def model_folders(cfg: Config) -> tuple[str, str | None]:
    """Folders of policy and reward model; builds the embedded ones if they are asked for and not cached."""
    policy, reward = cfg.model.policy, cfg.model.reward
    if "digits" in (policy, reward):
        from transformers.utils import logging as transformers_logging

        # It warns of the library's own default configuration, which is only compared with when ours is saved.
        transformers_logging.set_verbosity_error()
        own_policy, own_reward = embedded_models(cfg.model)
        policy = str(own_policy) if policy == "digits" else policy
        reward = str(own_reward) if reward == "digits" else reward
    return str(Path(policy).resolve()), _absolute(reward)


def pool_rows(cfg: DataConfig) -> Sequence[int] | None:
    """Rows of the training data that ``data.pool_path`` leaves; None without a pool."""
    if cfg.pool_path is None:
        return None
    from skyrl.data import pool
    from skyrl.data.datasets import build_datasets

    return pool.pool_rows(Path(cfg.pool_path), cfg, build_datasets(cfg)["train"]).tolist()


def check_size(size: int, cfg: Config) -> None:
    """A prompt that comes twice in a step would get the same answers twice: sampling is seeded by prompt and step.

    Raises:
        DataError: if there are fewer training prompts than a step asks.
    """
    wanted = cfg.rollout.prompts_per_step
    if size < wanted and cfg.data.pairs_path is None:
        mend = ", or widen data.pool_min … data.pool_max" if cfg.data.pool_path else ""
        raise DataError(
            f"there are {size} training prompts, but rollout.prompts_per_step={wanted}: a step would ask some of them "
            f"twice; lower it to {size} or less{mend}"
        )


def _absolute_paths(data: DataConfig) -> DataConfig:
    """Actors on a joined cluster need not share this process's working folder."""
    return dataclasses.replace(
        data,
        train_path=_absolute(data.train_path),
        eval_path=_absolute(data.eval_path),
        pool_path=_absolute(data.pool_path),
        pairs_path=_absolute(data.pairs_path),
    )


def _absolute(path: str | None) -> str | None:
    # Links stay as they are: relative pictures lie beside the link, and default ids have its name.
    return None if path is None else str(Path(path).absolute())


def _sinks(cfg: Config, run_dir: Path, checkpoint: Path | None, console: Console) -> Sinks:
    step = read_state(checkpoint)["step"] if checkpoint is not None else None
    sinks: list[MetricSink] = [JsonlSink(run_dir / "metrics.jsonl", resume_step=step)]
    if cfg.monitoring.console:
        sinks.append(ConsoleSink(cfg.controller.steps, console))
    mode = wandb_mode(cfg.monitoring.wandb)
    if mode is not WandbMode.off:
        sinks.append(WandbSink(run_dir, project=cfg.monitoring.wandb_project, name=cfg.name, mode=mode, config=cfg))
    if cfg.monitoring.ray_metrics:
        sinks.append(RayGaugeSink(f"{cfg.name}/{run_dir.name}"))
    return Sinks(sinks)


def _own_error(error: ray.exceptions.RayTaskError) -> SkyrlError:
    """The error that the actor raised, if it is one of ours; else Ray's, with the actor's traceback."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, SkyrlError) else SkyrlError(str(error))
