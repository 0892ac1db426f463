"""Templates of a cluster: Ray's own schema for ``ray up``, the form of the RayJob, and the Slurm script against
stand-ins for ``srun``, Ray and the scripts that it calls."""

from __future__ import annotations

import copy
import os
import shutil
import signal
import stat
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"


def read(name: str) -> Any:
    return yaml.safe_load((CLUSTER / name).read_text(encoding="utf-8"))


# ---------------------------------------------------------------- ray up


def test_rays_launcher_takes_the_template() -> None:
    import jsonschema
    from ray.autoscaler._private.util import prepare_config, validate_config

    given = read("ray_up.yaml")
    validate_config(prepare_config(copy.deepcopy(given)))
    with pytest.raises(jsonschema.ValidationError, match="head_start_ray_command"):
        validate_config(prepare_config(copy.deepcopy(given) | {"head_start_ray_command": []}))


def test_the_launcher_uses_our_scripts_and_carries_the_token() -> None:
    given = read("ray_up.yaml")
    assert (
        "cluster/start_head.sh --autoscaling-config ~/ray_bootstrap_config.yaml" in given["head_start_ray_commands"][-1]
    )
    assert given["worker_start_ray_commands"][-1].endswith("cluster/join_worker.sh $RAY_HEAD_IP")
    assert given["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"


# ---------------------------------------------------------------- KubeRay


def test_the_ray_job_has_a_token_and_every_pod_the_shared_volume() -> None:
    spec = read("kuberay.yaml")["spec"]
    cluster = spec["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert tuple(map(int, cluster["rayVersion"].split("."))) >= (2, 52, 0)
    assert cluster["rayVersion"] == version("ray")
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for pod in (group["template"]["spec"] for group in groups):
        (container,) = pod["containers"]
        mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounted == {"shared": "/shared", "memory": "/dev/shm"}
        assert {volume["name"] for volume in pod["volumes"]} == set(mounted)
        grace = {one["name"]: one["value"] for one in container["env"]}["RAY_JOB_STOP_WAIT_TIME_S"]
        assert int(grace) == pod["terminationGracePeriodSeconds"]
    assert "run_dir=/shared/" in spec["entrypoint"] and "resume=auto" in spec["entrypoint"]


def test_the_settings_of_the_ray_job_are_accepted() -> None:
    from skyrl.cli import compose_config

    words = read("kuberay.yaml")["spec"]["entrypoint"].removesuffix("'").split("skyrl.launch ")[1].split()
    assert compose_config(words).rollout.num_workers == 2


# ---------------------------------------------------------------- Slurm

SPY = """#!/usr/bin/env bash
echo "$(basename "$0") $* token=${RAY_AUTH_TOKEN_PATH:-} mode=${RAY_AUTH_MODE:-} ray=${RAY_ADDRESS:-}" >> "$CALLS"
"""
HEAD = SPY + 'head -c 32 /dev/urandom | od -An -tx1 | tr -d " \\n" > "$RAY_AUTH_TOKEN_PATH"\n'
JOIN = SPY + '[ -s "$RAY_AUTH_TOKEN_PATH" ]; exit ${JOIN_CODE:-0}\n'
PYTHON = SPY + "trap 'echo saved >> \"$CALLS\"; exit 130' TERM; for i in $(seq ${STEPS:-1}); do sleep 0.1; done\n"
SRUN = """#!/usr/bin/env bash
echo "srun $*" >> "$CALLS"
while [[ "$1" == --* ]]; do shift; done
SLURM_PROCID=0 exec "$@"
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project of stand-ins, in which only slurm.sh is real."""
    files = {
        "cluster/start_head.sh": HEAD, "cluster/join_worker.sh": JOIN, ".venv/bin/ray": SPY,
        ".venv/bin/python": PYTHON, ".venv/bin/srun": SRUN,
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    shutil.copy(CLUSTER / "slurm.sh", tmp_path / "spooled")  # as sbatch does
    return tmp_path


def start(project: Path, *arguments: str, **env: str) -> subprocess.Popen[str]:
    own = {
        "SLURM_SUBMIT_DIR": str(project), "SLURM_JOB_ID": "4711", "SLURM_JOB_NUM_NODES": "2",
        "CALLS": str(project / "calls"), "SKYRL_SLURM_WAIT": "5",
    }  # fmt: skip
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "SLURM_"))}
    command = ["bash", str(project / "spooled"), *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=clean | own | env, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def calls(project: Path) -> list[str]:
    file = project / "calls"
    return file.read_text().splitlines() if file.is_file() else []


def test_a_slurm_job_starts_head_workers_and_run_with_one_token(project: Path) -> None:
    process = start(project, "name=it", "learner.betas=[0.9, 0.95]")
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    head, step, join, run, stop = calls(project)
    token = str(project / "outputs" / ".slurm-4711" / "auth_token")
    assert head.startswith("start_head.sh --address ") and f"--port 24711 token={token} mode=token" in head
    assert "--nodes=1 --ntasks=1" in step and f"--exclude={os.uname().nodename.split('.')[0]}" in step
    address = head.split()[2]
    assert join.startswith(f"join_worker.sh {address}:24711 token={token}")
    assert run.startswith("python -m skyrl.launch name=it learner.betas=[0.9, 0.95] token=")
    assert run.endswith(f"ray={address}:24711")
    assert stop.startswith("ray stop")
    assert not Path(token).parent.exists()


def test_the_token_is_for_its_user_alone(project: Path) -> None:
    process = start(project, STEPS="100")
    folder = project / "outputs" / ".slurm-4711"
    _until(lambda: any(call.startswith("python") for call in calls(project)))
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "auth_token").stat().st_mode) == 0o600
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)


def test_the_signal_before_the_end_reaches_the_run_which_saves(project: Path) -> None:
    process = start(project, STEPS="100")
    _until(lambda: any(call.startswith("python") for call in calls(project)))
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 130
    assert calls(project)[-2] == "saved" and calls(project)[-1].startswith("ray stop")


def test_a_requeued_job_resumes(project: Path) -> None:
    process = start(project, "name=it", SLURM_RESTART_COUNT="1")
    process.communicate(timeout=30)
    assert any(call.startswith("python -m skyrl.launch name=it resume=auto ") for call in calls(project))


@pytest.mark.parametrize(
    ("arguments", "env", "message"),
    [
        (["fast"], {}, "got 'fast'; allowed: key=value"),
        ([], {"JOIN_CODE": "1"}, "a node could not join"),
        ([], {"SLURM_JOB_NUM_NODES": "3"}, "1 of 2 nodes joined within 2 s"),
        ([], {"SLURM_SUBMIT_DIR": "/"}, "call sbatch in the project's folder"),
    ],
)
def test_what_goes_wrong_is_named_and_nothing_stays(
    project: Path, arguments: list[str], env: dict[str, str], message: str
) -> None:
    process = start(project, *arguments, **{"SKYRL_SLURM_WAIT": "2"} | env)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1 and message in errors
    assert not any(call.startswith("python") for call in calls(project))
    assert not (project / "outputs" / ".slurm-4711").exists()


def test_without_slurm_it_says_how_it_is_called() -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    done = subprocess.run(["bash", str(CLUSTER / "slurm.sh")], capture_output=True, text=True, env=clean, check=False)
    assert done.returncode == 1 and "use: sbatch cluster/slurm.sh key=value" in done.stderr
    subprocess.run(["bash", "-n", str(CLUSTER / "slurm.sh")], check=True)


def _until(there: Any) -> None:
    deadline = time.monotonic() + 20
    while not there():
        assert time.monotonic() < deadline
        time.sleep(0.05)
