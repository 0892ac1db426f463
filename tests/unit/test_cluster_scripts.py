"""The cluster scripts against a stand-in for ``ray`` that prints its arguments."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "cluster"
SPY = f"""#!{sys.executable}
import json, os, sys
print(json.dumps([sys.argv[1:], os.environ.get("RAY_API_SERVER_ADDRESS")]))
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    shutil.copytree(SCRIPTS, tmp_path / "cluster")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "ray").write_text(SPY)
    (tmp_path / ".venv" / "bin" / "ray").chmod(0o755)
    return tmp_path


def run(project: Path, script: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [str(project / "cluster" / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=clean | env, timeout=60)


@pytest.mark.parametrize("script", ["start_head.sh", "join_worker.sh", "submit.sh"])
def test_syntax_and_help(project: Path, script: str) -> None:
    subprocess.run(["bash", "-n", str(SCRIPTS / script)], check=True)
    done = run(project, script, "--help")
    assert done.returncode == 0 and f"usage: cluster/{script}" in done.stdout


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("start_head.sh", ["--port"], "--port needs a value"),
        ("start_head.sh", ["--port", "abc"], "port is 'abc'; allowed: 1 to 65535"),
        ("start_head.sh", ["now"], "unknown argument 'now'"),
        ("join_worker.sh", [], "usage: cluster/join_worker.sh HEAD_ADDRESS"),
        ("join_worker.sh", ["a b"], "HEAD_ADDRESS is 'a b'; allowed: host or host:port"),
        ("join_worker.sh", ["a:99999"], "port is '99999'"),
        ("join_worker.sh", ["a", "b"], "got 2 arguments"),
        ("submit.sh", ["fast"], "got 'fast'; allowed: key=value"),
    ],
)
def test_wrong_arguments(project: Path, script: str, arguments: list[str], message: str) -> None:
    done = run(project, script, *arguments)
    assert done.returncode == 1 and message in done.stderr and not done.stdout


def test_what_ray_is_called_with(project: Path) -> None:
    head = run(project, "start_head.sh", "--port", "7000").stdout
    assert json.loads(head.splitlines()[0])[0][:3] == ["start", "--head", "--port=7000"]
    assert ":7000" in head.splitlines()[2]
    join = json.loads(run(project, "join_worker.sh", "head-1").stdout)
    assert join[0] == ["start", "--address=head-1:6379"]


def test_submitted_settings_keep_their_quotes(project: Path) -> None:
    settings = ["learner.betas=[0.9, 0.95]", "name=it's"]
    called, address = json.loads(run(project, "submit.sh", "--no-wait", *settings).stdout)
    assert address == "http://127.0.0.1:8265"
    assert called[:4] == ["job", "submit", "--no-wait", "--"] and called[-2:] == settings
    _, address = json.loads(run(project, "submit.sh", RAY_API_SERVER_ADDRESS="http://head:1").stdout)
    assert address == "http://head:1"
    wrong = run(project, "submit.sh", RAY_API_SERVER_ADDRESS="head:1")
    assert wrong.returncode == 1 and "RAY_API_SERVER_ADDRESS is 'head:1'" in wrong.stderr
