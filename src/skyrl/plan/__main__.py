"""``python -m skyrl.plan``: what a run would take on a cluster, before it is paid for."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from skyrl.cli import read_settings, run_command
from skyrl.records import ConfigError

HELP = """\
Says before anything is paid for what a run would take: memory of each member, where it lands, what does not fit and
which change would help, seconds of a step. Starts nothing, and reads of the models only their config.json.

Usage: python -m skyrl.plan cluster=CLUSTER [group=option ...] [key=value ...] [options]

  cluster=CLUSTER   nodes x GPUs x card, such as 5x8xH100-SXM, or a YAML file with nodes, gpus, gpu, cpus, memory_gib …
                    (docs/operations.md)
  --lengths NAME    how long answers are: math_long_tail (default), digits, uniform, or a JSON file
  --costs FILE      measured speeds (src/skyrl/simulate/cost.py); else those of the card's data sheet
  --json FILE       write everything there, too

Settings are those of python -m skyrl.launch; models and data need not be there. Exit status 0 if the run fits, else 1.
Each figure says whether it was measured, computed or assumed.

Examples:
  python -m skyrl.plan experiment=r1v2_38b cluster=5x8xH100-SXM
  python -m skyrl.plan model=huggingface model.policy=FOLDER_OR_HUB_NAME data=files rollout=gpu learner=gpu_zero3 \\
      model.dtype=bfloat16 cluster=1x8xA100-80GB
"""
CLUSTER = "cluster="


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see python -m skyrl.plan --help")


def main() -> None:
    """Entry point; exit codes as :func:`skyrl.cli.run_command` says, and 1 if the run does not fit."""
    run_command(_work, "interrupted")


def _work() -> None:
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--lengths", default="math_long_tail")
    parser.add_argument("--costs")
    own, rest = parser.parse_known_args(sys.argv[1:])
    clusters = [word.removeprefix(CLUSTER) for word in rest if word.startswith(CLUSTER)]
    cfg = read_settings([word for word in rest if not word.startswith(CLUSTER)], HELP, with_files=False)
    if cfg is None:
        return
    if len(clusters) != 1:
        raise ConfigError(
            f"cluster: must be given once, such as cluster=5x8xH100-SXM; it is there {len(clusters)} times"
        )
    from skyrl.monitoring.records import write_json
    from skyrl.plan.foretell import foretell
    from skyrl.plan.machines import read_machines
    from skyrl.plan.report import as_json, show
    from skyrl.simulate.cost import read_costs
    from skyrl.simulate.lengths import read_lengths

    machines, lengths = read_machines(clusters[0]), read_lengths(own.lengths)
    found = foretell(cfg, machines, lengths, read_costs(own.costs) if own.costs else None)
    show(Console(), cfg, machines, found)
    if own.json:
        write_json(own.json, as_json(cfg, machines, found))
    if found.problems:
        sys.exit(1)


if __name__ == "__main__":
    main()
