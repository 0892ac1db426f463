"""``python -m skyrl.filter_prompts``: the offline pass of the Selective Sample Buffer.

It samples answers of the starting policy to the training prompts, scores them, and writes how often each prompt was
answered right. Training with ``data.pool_path`` then leaves out the prompts that teach nothing, because the policy is
always right or always wrong on them. Settings are those of ``python -m skyrl.launch``; they are checked before Ray and
the libraries behind it are imported.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from skyrl.cli import read_settings, run_command
from skyrl.monitoring.console import percent
from skyrl.records import ConfigError, RolloutRequest, SampleGroup, SkyrlError
from skyrl.settings import Config

if TYPE_CHECKING:
    from skyrl.data.pool import PoolRow
    from skyrl.system import System

STEP = 0
"""Part of every sample's seed. Training begins at step 1, so it never repeats these answers."""
IN_FLIGHT = 2
"""Chunks that are asked for at a time: one is sampled while the one before is scored."""
HELP = """\
Samples the starting policy on the training prompts and writes each prompt's pass rate to a Parquet file, so that
training can leave out what is always right or always wrong.

Usage: python -m skyrl.filter_prompts [group=option ...] [key=value ...] [options]

Settings are those of python -m skyrl.launch. The ones that matter most here:
  filter.output=pool.parquet       the file written, when the whole pass is done
  filter.rows=2000                 roll out the first rows only (default: all)
  rollout.samples_per_prompt=8     answers to each prompt
  rollout.prompts_per_step=64      prompts in one request

Examples:
  python -m skyrl.filter_prompts filter.rows=2000
  python -m skyrl.filter_prompts data=files data.train_path=train.parquet data.eval_path=eval.parquet \\
      model=huggingface model.policy=/path/to/model
  python -m skyrl.launch data.pool_path=pool.parquet data.pool_max=0.9
docs/selective_sample_buffer.md explains the pass, docs/configuration.md every setting.
"""


def main() -> None:
    """Entry point; exit codes as :func:`skyrl.cli.run_command` says."""
    run_command(_work, "interrupted; no pool was written")


def _work() -> None:
    config = read_settings(sys.argv[1:], HELP, with_learner=False)
    if config is not None:
        _check_output(Path(config.filter.output))
        filter_prompts(config, Console())


def filter_prompts(cfg: Config, console: Console) -> Path:
    """Roll out, score, write ``filter.output`` and print what the pool is like.

    Returns:
        The absolute path of the pool.

    Raises:
        SkyrlError: whatever went wrong in an actor, or if the pool can't be written. Nothing half-written is left.
    """
    from skyrl.crew.ray_executor import ray_session
    from skyrl.data.datasets import build_datasets
    from skyrl.data.pool import write_pool
    from skyrl.run import model_folders, with_absolute_paths
    from skyrl.system import fitting_rows, start_system

    output = Path(cfg.filter.output).absolute()
    cfg = with_absolute_paths(cfg)
    policy, reward = model_folders(cfg)
    with ray_session(cfg, namespace=f"skyrl-filter-{cfg.name}-{os.getpid()}"):
        console.print(f"starting {cfg.rollout.num_workers} rollout and {cfg.reward.num_workers} reward members")
        with start_system(cfg, policy, reward, train=False) as system:
            size = system.sizes()["train"]
            wanted: Sequence[int] = range(min(size, cfg.filter.rows or size))
            if cfg.data.source != "digits":
                wanted = fitting_rows(cfg, system, "train", wanted, console)
            rows = roll_out(cfg, system, wanted, console)
    origin = {
        "policy": policy,
        "samples_per_prompt": cfg.rollout.samples_per_prompt,
        "temperature": cfg.rollout.temperature,
        "seed": cfg.controller.seed,
    }
    try:
        write_pool(output, rows, cfg.data, build_datasets(cfg)["train"], **origin)
    except OSError as error:
        raise SkyrlError(f"{output}: could not be written: {error}") from error
    print_summary(rows, size, output, console)
    return output


def roll_out(cfg: Config, system: System, wanted: Sequence[int], console: Console) -> list[PoolRow]:
    """Sample and score these training rows, ``rollout.prompts_per_step`` at a time, with a progress bar.

    Returns:
        One row per prompt, in order.
    """
    from skyrl.data.pool import PoolRow

    rollout, found = cfg.rollout, list[PoolRow]()
    asked: deque[tuple[Sequence[int], list[list[SampleGroup]]]] = deque()
    columns = (TextColumn("rolling out"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, refresh_per_second=2) as bar:
        task = bar.add_task("", total=len(wanted))

        def collect() -> None:
            rows, promises = asked.popleft()
            groups = [group for part in system.rewards.fetch(promises) for group in part]
            found.extend(PoolRow.of(row, group) for row, group in zip(rows, groups, strict=True))
            bar.update(task, completed=len(found))

        for start in range(0, len(wanted), rollout.prompts_per_step):
            rows = wanted[start : start + rollout.prompts_per_step]
            request = RolloutRequest(
                "train", tuple(rows), STEP, rollout.samples_per_prompt, greedy=False, seed=cfg.controller.seed
            )
            asked.append((rows, system.ask(request)[1]))
            if len(asked) == IN_FLIGHT:
                collect()
        while asked:
            collect()
    return found


def print_summary(rows: Sequence[PoolRow], size: int, output: Path, console: Console) -> None:
    """A small table of the pool, and how to train on it.

    Args:
        rows: the pool.
        size: rows of the whole training data.
        output: the file.
    """
    rates = [row.pass_rate for row in rows if row.pass_rate is not None]
    counts = {
        "always right": sum(rate == 1 for rate in rates),
        "always wrong": sum(rate == 0 for rate in rates),
        "effective": sum(0 < rate < 1 for rate in rates),
    }
    if len(rates) < len(rows):
        counts["not scored"] = len(rows) - len(rates)
    table = Table(title="Prompt pool", title_justify="left", box=None, padding=(0, 2), pad_edge=False)
    for name in ("", "prompts", "share"):
        table.add_column(name, justify="right" if name else "left")
    for name, count in counts.items():
        table.add_row(name, str(count), percent(count / len(rows)))
    table.add_row("all", str(len(rows)), "")
    console.print(table)
    if len(rows) < size:
        console.print(f"only the first {len(rows)} of {size} training rows are in it; training on it uses no others")
    if not counts["effective"]:
        console.print("no prompt is effective: there is nothing to train on with the default limits")
    # A path that is wrapped can't be copied.
    line = f"train on it, with the same data settings: {sys.executable} -m skyrl.launch data.pool_path={output}"
    console.print(line, soft_wrap=True, markup=False, highlight=False)


def _check_output(path: Path) -> None:
    """Raise ConfigError now rather than after the pass."""
    try:
        path.resolve().parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"filter.output={path}: its folder can't be made: {error}") from error
    if path.is_dir() or not os.access(path.resolve().parent, os.W_OK):
        raise ConfigError(f"filter.output={path}: must be a file in a folder that can be written to")


if __name__ == "__main__":
    main()
