"""``python -m skyrl.launch``: from the command line to a finished run."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence

from skyrl.cli import read_settings, run_command

HELP = """\
Trains a vision-language model with hybrid reinforcement learning: GRPO with a Selective Sample Buffer, and MPO, in one
step.

Usage: python -m skyrl.launch [group=option ...] [key=value ...] [options]

Examples:
  python -m skyrl.launch                                   the embedded default, two CPU cores
  python -m skyrl.launch controller.steps=10 buffer=off    ten steps without replay
  python -m skyrl.launch resume=auto                       go on where the last run stopped
docs/configuration.md explains every setting. python -m skyrl.filter_prompts --help: leave out prompts that teach
nothing, before a run.
"""


def main() -> None:
    """Entry point; exit codes as :func:`skyrl.cli.run_command` says."""
    run_command(_work, f"interrupted; go on with: {_resume_command(sys.argv[1:])}")


def _work() -> None:
    config = read_settings(sys.argv[1:], HELP)
    if config is not None:
        from skyrl.run import run

        run(config)


def _resume_command(arguments: Sequence[str]) -> str:
    """The command that goes on with the run of these arguments: the same settings, from its newest checkpoint."""
    kept = [argument for argument in arguments if not argument.startswith("resume=")]
    return shlex.join([sys.executable, "-m", "skyrl.launch", *kept, "resume=auto"])


if __name__ == "__main__":
    main()
