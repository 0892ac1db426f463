"""``python -m skyrl.grafana FOLDER``: a Grafana board of the runs on a Ray cluster, with what Prometheus and Grafana
need to show it. docs/monitoring.md describes it."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from skyrl.cli import run_command
from skyrl.monitoring.board import SERVICE_DISCOVERY, write_board


def main() -> None:
    """Entry point; exit codes as :func:`skyrl.cli.run_command` says."""
    parser = argparse.ArgumentParser(
        prog="python -m skyrl.grafana",
        description="Write a Grafana board of the runs on this host's Ray, and the settings with which Prometheus and "
        "Grafana show it (docs/monitoring.md).",
    )
    parser.add_argument("folder", type=Path, help="where to write; files of an earlier call are replaced")
    parser.add_argument("--prometheus", default="http://127.0.0.1:9090", help="its address (default: %(default)s)")
    parser.add_argument(
        "--discovery", default=SERVICE_DISCOVERY, help="file in which Ray says whom to scrape (default: %(default)s)"
    )
    given = parser.parse_args()
    if not given.prometheus.startswith(("http://", "https://")):
        parser.error(f"--prometheus {given.prometheus}: must begin with http:// or https://")
    run_command(lambda: print(_written(given.folder, given.prometheus, given.discovery)), "interrupted")


def _written(folder: Path, prometheus: str, discovery: str) -> str:
    write_board(folder, prometheus, discovery)
    here = shlex.quote(str(folder.absolute()))
    return (
        f"prometheus --config.file={here}/prometheus.yml --storage.tsdb.path={here}/prometheus "
        "--web.listen-address=127.0.0.1:9090\n"
        f"grafana server --homepath /usr/share/grafana --config {here}/grafana.ini\n"
        "then http://127.0.0.1:3000, Dashboards, skyrl"
    )


if __name__ == "__main__":
    main()
