"""The cluster scripts against a stand-in for ``ray`` that prints its arguments."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "cluster"
SPY = f"""#!{sys.executable}
import json, os, sys
shown = ["RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE", "RAY_health_check_timeout_ms"]
print(json.dumps([sys.argv[1:], *map(os.environ.get, shown)]))
"""
TOKEN = "0123456789abcdef"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    shutil.copytree(SCRIPTS, tmp_path / "cluster")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "ray").write_text(SPY)
    # It stands in for "python -m skyrl.crew.door ADDRESS" too.
    (tmp_path / ".venv" / "bin" / "python").write_text(
        f'#!/bin/sh\necho "$@" > {tmp_path}/asked\nexit ${{REFUSED:-0}}\n'
    )
    for name in ("ray", "python"):
        (tmp_path / ".venv" / "bin" / name).chmod(0o755)
    return tmp_path


def run(project: Path, script: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [str(project / "cluster" / script), *arguments]
    home = {"HOME": str(project / "home")}
    return subprocess.run(command, capture_output=True, text=True, env=clean | home | env, timeout=60)


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
        ("join_worker.sh", [], "usage: cluster/join_worker.sh [--stay] HEAD_ADDRESS"),
        ("join_worker.sh", ["a b"], "HEAD_ADDRESS is 'a b'; allowed: host or host:port"),
        ("join_worker.sh", ["a:99999"], "port is '99999'"),
        ("join_worker.sh", ["a", "b"], "got 2 arguments"),
        ("join_worker.sh", ["head"], "the cluster's token is missing: copy ~/.ray/auth_token of the head's user to "),
        ("submit.sh", ["a=1"], "the cluster's token is missing: copy ~/.ray/auth_token of the head's user to "),
        ("submit.sh", ["fast"], "got 'fast'; allowed: key=value"),
    ],
)
def test_wrong_arguments(project: Path, script: str, arguments: list[str], message: str) -> None:
    done = run(project, script, *arguments)
    assert done.returncode == 1 and message in done.stderr and not done.stdout


def test_what_ray_is_called_with(project: Path) -> None:
    head = run(project, "start_head.sh", "--port", "7000", "--address", "10.1.2.3").stdout
    called, _, mode, patience = json.loads(head.splitlines()[0])
    assert called[:4] == ["start", "--head", "--node-ip-address=10.1.2.3", "--port=7000"]
    assert "--dashboard-host=127.0.0.1" in called and mode == "token" and patience == "5000"
    assert "cluster/join_worker.sh 10.1.2.3:7000" in head
    called, _, mode, _ = json.loads(run(project, "join_worker.sh", "head-1", RAY_AUTH_TOKEN=TOKEN).stdout)
    assert called == ["start", "--address=head-1:6379"] and mode == "token"
    assert (project / "asked").read_text() == "-m skyrl.crew.door head-1:6379\n"
    refused = run(project, "join_worker.sh", "head-1", REFUSED="1", RAY_AUTH_TOKEN=TOKEN)
    assert refused.returncode == 1 and not refused.stdout  # Ray is not called


def test_the_head_makes_the_token_that_the_printed_step_carries(project: Path) -> None:
    head = run(project, "start_head.sh", "--address", "10.1.2.3").stdout
    file = project / "home" / ".ray" / "auth_token"
    token = file.read_text()
    assert len(token) == 64 and set(token) <= set("0123456789abcdef")
    assert file.stat().st_mode & 0o777 == 0o600
    assert token not in head
    run(project, "start_head.sh", "--address", "10.1.2.3")
    assert file.read_text() == token  # a second head of this user has the same
    step = next(line for line in head.splitlines() if "ssh HOST" in line).partition("ssh HOST ")[2]
    other = project / "other"
    other.mkdir()
    quoted, _, source = step.partition(" < ")
    env = os.environ | {"HOME": str(other)}
    with open(source) as reader:
        subprocess.run(["sh", "-c", shlex.split(quoted)[0]], stdin=reader, env=env, check=True)
    assert (other / ".ray" / "auth_token").read_text() == token
    assert (other / ".ray" / "auth_token").stat().st_mode & 0o777 == 0o600


def test_a_token_that_others_can_read_is_closed_and_one_of_the_environment_is_not_written(project: Path) -> None:
    file = project / "home" / ".ray" / "auth_token"
    file.parent.mkdir(parents=True)
    file.write_text(TOKEN)
    file.chmod(0o644)
    run(project, "start_head.sh", "--address", "10.1.2.3")
    assert file.read_text() == TOKEN and file.stat().st_mode & 0o777 == 0o600
    file.unlink()
    assert "ssh HOST" not in run(project, "start_head.sh", "--address", "10.1.2.3", RAY_AUTH_TOKEN=TOKEN).stdout
    assert not file.exists()


@pytest.mark.parametrize("script", ["start_head.sh", "join_worker.sh", "submit.sh"])
def test_no_script_works_without_the_token(project: Path, script: str) -> None:
    arguments = ["head"] if script == "join_worker.sh" else []
    done = run(project, script, *arguments, RAY_AUTH_MODE="disabled")
    assert done.returncode == 1 and "RAY_AUTH_MODE is 'disabled'" in done.stderr and not done.stdout


def test_submitted_settings_keep_their_quotes(project: Path) -> None:
    settings = ["learner.betas=[0.9, 0.95]", "name=it's"]
    done = run(project, "submit.sh", "--no-wait", *settings, RAY_AUTH_TOKEN=TOKEN)
    called, address, mode, _ = json.loads(done.stdout)
    assert address == "http://127.0.0.1:8265" and mode == "token"
    assert called[:4] == ["job", "submit", "--no-wait", "--"] and called[-2:] == settings
    own = run(project, "submit.sh", RAY_API_SERVER_ADDRESS="http://head:1", RAY_AUTH_TOKEN=TOKEN)
    assert json.loads(own.stdout)[1] == "http://head:1"
    wrong = run(project, "submit.sh", RAY_API_SERVER_ADDRESS="head:1", RAY_AUTH_TOKEN=TOKEN)
    assert wrong.returncode == 1 and "RAY_API_SERVER_ADDRESS is 'head:1'" in wrong.stderr
