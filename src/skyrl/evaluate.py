"""``python -m skyrl.evaluate``: a policy on benchmarks of the field, and on a run's own evaluation prompts."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console

from skyrl.cli import read_settings, run_command
from skyrl.settings import Config

if TYPE_CHECKING:
    from skyrl.crew.executor import Executor
    from skyrl.system import System

HELP = """\
Asks a policy the questions of benchmarks, judges the answers, and writes results.json, answers.parquet and report.html.
Started again with the same settings it asks only what is missing.

Usage: python -m skyrl.evaluate tasks=[name,...] [group=option ...] [key=value ...] [options]

Settings are those of python -m skyrl.launch; tasks= stands for evaluate.tasks=. The ones that matter most here:
  evaluate.data_dir=/data           official files: of the task gsm8k in /data/gsm8k; without it the Hugging Face hub
  evaluate.samples=8 evaluate.temperature=0.6  answers to each question, for avg@k, pass@k and maj@k
  evaluate.limit=100                first questions of each task
  evaluate.output=/results          folder of the results
  rollout.max_new_tokens=4096       longest answer

Examples:
  python -m skyrl.evaluate model=huggingface model.policy=/path/to/model tasks=[gsm8k,math500] evaluate.data_dir=/data
  python -m skyrl.evaluate model=huggingface model.policy=outputs/digits/2026-01-01_12-00-00/policy tasks=[training]
docs/evaluation.md has the tasks and defines the numbers, docs/configuration.md explains every setting.
"""


def main() -> None:
    """Entry point; exit codes as :func:`skyrl.cli.run_command` says."""
    run_command(_work, "interrupted; the same command goes on where it stopped")


def _work() -> None:
    arguments = [f"evaluate.{one}" if one.startswith("tasks=") else one for one in sys.argv[1:]]
    config = read_settings(arguments, HELP, with_learner=False)
    if config is not None:
        evaluate(config, Console())


def evaluate(cfg: Config, console: Console, executor: Executor | None = None) -> dict[str, Any]:
    """Evaluate ``model.policy`` on ``evaluate.tasks``.

    Args:
        executor: Where the members run; None starts or joins Ray, if anything is to be asked.

    Returns:
        What ``results.json`` holds.

    Raises:
        ConfigError: for an unknown task, or an output folder with answers of other settings.
        DataError: naming file, row and column of what can't be read.
        SkyrlError: whatever went wrong in a member.
    """
    from skyrl.checks.policy import fits
    from skyrl.evaluation.benchmark import evaluate_on_tasks, prepared
    from skyrl.run import model_folders, with_absolute_paths

    cfg = prepared(with_absolute_paths(cfg))
    policy, _ = model_folders(cfg)
    fits(cfg, policy)

    @contextmanager
    def start(cfg: Config) -> Iterator[System]:
        from skyrl.crew.ray_executor import ray_session
        from skyrl.system import start_system

        if executor is not None:
            with start_system(cfg, policy, None, executor, train=False) as system:
                yield system
            return
        with ray_session(cfg, namespace=f"skyrl-evaluate-{cfg.name}-{os.getpid()}"):
            console.print(f"starting {cfg.rollout.num_workers} rollout and {cfg.reward.num_workers} reward members")
            with start_system(cfg, policy, None, train=False) as system:
                yield system

    return evaluate_on_tasks(cfg, console, start, policy)


if __name__ == "__main__":
    main()
