"""The cluster scripts word for word on hosts without a common file system: a head, two workers, and a stranger on their
network. Needs root, for network and mount namespaces."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.network_hosts import PROJECT, Host, missing, network
from tests.tiny_runs import policy_folder

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(bool(reason := missing()), reason=f"hosts can't be made here: {reason}"),
]
PYTHON, RAY = (str(PROJECT / ".venv" / "bin" / name) for name in ("python", "ray"))
SMALL = [
    "name=hosts", "run_dir=/mnt/run", "model.policy=/mnt/model", "model.reward=null", "reward.model_weight=0",
    "algorithm.mpo.pairs=rule", "algorithm.mpo.threshold.kind=off", "data.eval_size=4", "digits.train_size=400",
    "digits.kinds=[max]", "digits.text_share=0", "rollout.prompts_per_step=6", "rollout.samples_per_prompt=4",
    "rollout.max_new_tokens=24", "rollout.probe_prompts=2", "rollout.probe_new_tokens=4", "learner.num_workers=2",
    "learner.num_cpus=1.1", "learner.zero_stage=1", "rollout.threads=1", "reward.threads=1", "learner.threads=1",
    "hallucination.probe_prompts=2", "evaluation.every=0", "checkpoint.every=1", "monitoring.wandb=off",
    "controller.timeout=120",
]  # fmt: skip
"""Settings of a run that takes seconds."""
PLAIN = ["rollout.engine=plain_engine:PlainEngine"]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Host]]:
    """A head that two workers have joined, and a stranger. Their own names are 127.0.1.1 to them, as on Debian."""
    folder = tmp_path_factory.mktemp("hosts")
    with network(folder, ["head", "second", "third", "stranger"], "127.0.1.1 {name}") as made:
        head, *workers, _ = made
        for host in made:
            host.env = {"PYTHONPATH": f"{PROJECT / 'tests'}:{PROJECT}"}
        done = head.run("cluster/start_head.sh", "--dashboard-host", "0.0.0.0")
        assert done.returncode == 0, done.stdout
        address = next(line for line in done.stdout.splitlines() if "join_worker.sh" in line).split()[-1]
        assert address == f"{head.address}:6379"
        for worker in workers:
            _give_token(head, worker)
            done = worker.run("cluster/join_worker.sh", address)
            assert done.returncode == 0, done.stdout
        yield made


def test_who_has_no_token_runs_nothing_on_the_head(hosts: list[Host], tmp_path: Path) -> None:
    head, *_, stranger = hosts
    attempts, wrong = (
        [PYTHON, "tests/intruder.py", head.address],
        {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "ab" * 32},
    )
    lying = stranger.start(tmp_path / "log", *attempts, "/mnt/liar", **wrong)
    refused = json.loads(stranger.run(*attempts, "/mnt/stranger").stdout.splitlines()[-1])
    assert {refused[way] for way in ("dashboard", "dashboard agent")} == {"401"}
    assert lying.wait(60.0) == 0
    refused = json.loads((tmp_path / "log").read_text().splitlines()[-1])
    assert {refused[way] for way in ("dashboard", "dashboard agent")} == {"403"}
    assert _notes(head) == []
    right = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": _token(head)}
    let_in = json.loads(stranger.run(*attempts, "/mnt/friend", **right).stdout.splitlines()[-1])
    stranger.run(RAY, "stop", "--force")
    assert _notes(head) == [f"friend-{place}" for place in range(len(let_in))], let_in


def test_joining_says_in_a_minute_what_is_wrong(hosts: list[Host]) -> None:
    head, *_, stranger = hosts
    join = "cluster/join_worker.sh"
    for address, token, message in (
        (
            head.address,
            "",
            "error: the cluster's token is missing: copy ~/.ray/auth_token of the head's user to /mnt/.ray/",
        ),
        (
            head.address,
            "0" * 64,
            f"error: the Ray cluster at {head.address}:6379 has another token than this user here",
        ),
        ("10.77.0.99", "0" * 64, "error: no head of a Ray cluster answers at 10.77.0.99:6379: "),
        (f"{head.address}:1", "0" * 64, f"error: no head of a Ray cluster answers at {head.address}:1: "),
    ):
        done = stranger.run(join, address, timeout=60.0, **({"RAY_AUTH_TOKEN": token} if token else {}))
        assert done.returncode == 1 and done.stdout.startswith(message), done.stdout


def test_a_run_over_three_hosts_without_a_common_file_system(hosts: list[Host], tmp_path: Path) -> None:
    head, *workers, _ = hosts
    _copy_model(head, tmp_path)
    done = head.run("cluster/submit.sh", *SMALL, *PLAIN, "controller.steps=1", timeout=240.0)
    assert done.returncode == 0, done.stdout[-4000:]
    for worker in workers:
        assert f"copying /mnt/model to {worker.address}: " in done.stdout
        assert {file.name for file in (worker.home / "model").iterdir()} == {
            file.name for file in (head.home / "model").iterdir()
        }
        assert not list((worker.home / "run").rglob("*.safetensors")), "a checkpoint stayed behind"
    run = head.home / "run"
    manifest = json.loads((run / "checkpoints" / "step_000001" / "COMPLETE.json").read_text())
    for rank in (0, 1):  # two hosts have room for them, of which one at most is the head
        assert any(f"zero_pp_rank_{rank}_" in name for name in manifest["files"]), manifest["files"]
    assert (run / "policy" / "model.safetensors").is_file()
    assert (run / "report.html").is_file()
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert max(one.get("sync/logprob_gap", 0.0) for one in steps) < 1e-4


@pytest.mark.cluster
def test_a_resumed_run_takes_its_parts_from_here_and_vllm_samples(hosts: list[Host], tmp_path: Path) -> None:
    head, *_ = hosts
    _copy_model(head, tmp_path)
    done = head.run("cluster/submit.sh", *SMALL, "resume=auto", "controller.steps=2", timeout=300.0)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "resuming from /mnt/run/checkpoints/step_000001" in done.stdout
    assert (head.home / "run" / "checkpoints" / "step_000002" / "COMPLETE.json").is_file()


@pytest.mark.cluster
def test_a_run_survives_the_loss_of_a_host_that_comes_back(hosts: list[Host], tmp_path: Path) -> None:
    head, _, third, _ = hosts
    _copy_model(head, tmp_path)
    third.run(RAY, "stop", "--force")
    staying = third.start(tmp_path / "stay.log", "cluster/join_worker.sh", "--stay", head.address)
    _wait("the third host joins", lambda: _nodes(head) == 3, 60.0)
    more = ["run_dir=/mnt/lost", "rollout.num_workers=3", "rollout.prompts_per_step=6", "controller.steps=12"]
    run = head.start(tmp_path / "run.log", "cluster/submit.sh", *SMALL, *PLAIN, *more)
    saved = head.home / "lost" / "checkpoints" / "step_000002" / "COMPLETE.json"
    _wait("the second step", lambda: saved.is_file() or run.poll() is not None, 240.0)
    cut = time.monotonic()
    third.link(False)
    _wait("it is missed", lambda: _nodes(head) == 2, 60.0)
    print(f"missed after {time.monotonic() - cut:.0f} s")
    third.link(True)
    _wait("it comes back", lambda: _nodes(head) == 3, 120.0)
    print(f"back after {time.monotonic() - cut:.0f} s")
    assert run.wait(400.0) == 0, (tmp_path / "run.log").read_text()[-6000:]
    events = [json.loads(line) for line in (head.home / "lost" / "events.jsonl").read_text().splitlines()]
    assert {event["kind"] for event in events} & {"replaced", "restarted", "left"}, events
    assert staying.poll() is None
    lines = (head.home / "lost" / "metrics.jsonl").read_text().splitlines()
    trained = [json.loads(line)["step"] for line in lines if "time/step" in json.loads(line)]
    assert trained == list(range(1, 13))  # each once, also if the learner went back
    os.kill(staying.pid, signal.SIGTERM)


@pytest.mark.cluster
def test_the_same_attempts_run_code_on_a_head_without_a_token(tmp_path: Path) -> None:
    """What the test of them shows is the token's doing."""
    with network(tmp_path, ["open", "intruder"]) as (head, stranger):
        started = head.run(RAY, "start", "--head", "--dashboard-host=0.0.0.0", RAY_AUTH_MODE="disabled")
        assert started.returncode == 0, started.stdout
        stranger.run(PYTHON, "tests/intruder.py", head.address, "/mnt/stranger")
        assert _notes(head) == [f"stranger-{place}" for place in range(4)]


def _wait(what: str, done: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, f"{what}: not within {seconds:g} s"
        time.sleep(1.0)


def _nodes(head: Host) -> int:
    """Hosts that the head takes for alive."""
    said = head.run(RAY, "status", RAY_AUTH_MODE="token").stdout
    return said.partition("Pending:")[0].count(" node_")


def _notes(host: Host) -> list[str]:
    return sorted(file.name for file in host.home.iterdir() if file.name[-2] == "-")


def _token(host: Host) -> str:
    return (host.home / ".ray" / "auth_token").read_text()


def _give_token(head: Host, other: Host) -> None:
    """What the line does that start_head.sh prints."""
    step = "umask 077; mkdir -p ~/.ray; cat > ~/.ray/auth_token"
    done = other.run("bash", "-c", f"printf %s {_token(head)} | sh -c '{step}'")
    assert done.returncode == 0, done.stdout


def _copy_model(head: Host, folder: Path) -> None:
    shutil.copytree(policy_folder(folder), head.home / "model", dirs_exist_ok=True)
