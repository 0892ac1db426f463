"""What dead processes wrote, from this host and from another one, without secrets."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from skyrl.crew import logs
from skyrl.crew.crew import Crew
from skyrl.crew.executor import MemberSpec
from skyrl.crew.logs import keep_log
from skyrl.crew.ray_executor import RayExecutor, ray_session
from skyrl.records import MemberLost
from skyrl.redaction import HIDDEN
from skyrl.settings import Config

pytestmark = pytest.mark.integration
SECRET = "planted-secret-of-a-member"


class Dying:
    def die(self, text: str) -> None:
        print("x" * 100_000, "the last words", flush=True)
        print(text, file=sys.stderr, flush=True)
        os._exit(7)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    monkeypatch.setenv("PLANTED_TOKEN", SECRET)
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    made.add_node(num_cpus=1)
    made.wait_for_nodes()
    cfg = Config(name="logs")
    cfg.cluster.address = made.address
    with ray_session(cfg, "test-logs"):
        yield made
    made.shutdown()


def dead(name: str, node: str, text: str) -> str:
    """Ray's id of an actor that died on a node."""
    there = NodeAffinitySchedulingStrategy(node, soft=False)
    actor = ray.remote(Dying).options(name=name, num_cpus=0.1, scheduling_strategy=there).remote()
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(actor.die.remote(text))
    return str(actor._actor_id.hex())


def test_the_end_of_what_a_dead_member_wrote_is_kept(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = ray.get_runtime_context().get_node_id()
    (other,) = (node["NodeID"] for node in ray.nodes() if node["NodeID"] != here)
    for name, node in (("rollout-0", here), ("learner-1", other)):
        file = keep_log(dead(name, node, f"Traceback: 401 with {SECRET}"), tmp_path)
        assert file == tmp_path / "logs" / f"{name}.log"
        text = file.read_text()
        assert text.startswith(f"===== {name}: process ") and "the last words" in text
        assert f"Traceback: 401 with {HIDDEN}" in text and SECRET not in text
        assert f"(the last {logs.TAIL} of 100" in text and len(text) < 1.1 * logs.TAIL
    again = keep_log(dead("rollout-0.2", here, "second life"), tmp_path)
    assert again == tmp_path / "logs" / "rollout-0.log"
    assert again.read_text().count("===== rollout-0: process") == 2 and "second life" in again.read_text()

    crew = Crew(RayExecutor(folder=tmp_path), [MemberSpec("sample-buffer", Dying, cpus=0.1)], 60.0)
    log = tmp_path / "logs" / "sample-buffer.log"
    with pytest.raises(MemberLost, match=rf"^sample-buffer died in Dying\.die: .*; its log: {log}$"):
        crew.one(Dying.die, "what the error names")
    assert "what the error names" in log.read_text()
    crew.stop()

    gone = dead("reward-0", other, "nobody reads this")
    (node,) = (node for node in cluster.list_all_nodes() if node.node_id == other)
    cluster.remove_node(node)
    monkeypatch.setattr(logs, "ANSWER_SECONDS", 5.0)
    file = keep_log(gone, tmp_path)
    assert file is not None
    assert "its log lies on " in file.read_text() and "that host did not send it: " in file.read_text()

    blocked = tmp_path / "file"
    blocked.touch()
    assert keep_log(gone, blocked) is None
    assert keep_log("0" * 32, tmp_path) is None
