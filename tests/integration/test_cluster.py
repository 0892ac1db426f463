"""Several workers of every kind, ZeRO-3, and actors spread over two Ray nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from skyrl.crew.ray_executor import ray_session
from skyrl.data.stream import PromptStream
from skyrl.loop import Loop
from skyrl.records import ConfigError
from skyrl.run import model_folders
from skyrl.settings import Config
from skyrl.system import start_system
from tests.tiny_runs import Sink

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[Cluster]:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    yield cluster
    cluster.shutdown()


def test_two_of_everything_over_two_nodes(
    two_nodes: Cluster, make_config: Callable[..., Config], tmp_path: Path
) -> None:
    cfg = make_config("cluster", tmp_path)
    cfg.cluster.address = two_nodes.address
    cfg.rollout.num_workers = cfg.reward.num_workers = cfg.learner.num_workers = 2
    cfg.learner.zero_stage = 3
    cfg.controller.steps = 2
    sink = Sink()
    with ray_session(cfg, "test-cluster"), start_system(cfg, *model_folders(cfg)) as system:
        Loop(cfg, system, PromptStream(system.sizes()["train"], 0), sink, tmp_path).run()
        nodes = {node for crew in system.crews for node in crew.each(_node)}
        names = sorted(ray.util.list_named_actors())
    assert names == ["learner-0", "learner-1", "reward-0", "reward-1", "rollout-0", "rollout-1", "sample-buffer"]
    assert len(nodes) == 2
    trained = [metrics for _, metrics in sink.all if "loss/total" in metrics]
    assert len(trained) == 2
    assert all(metrics["sync/logprob_gap"] < 1e-4 for metrics in trained)
    assert all(metrics["learner/tokens"] > 0 for metrics in trained)
    assert (tmp_path / "policy" / "model.safetensors").is_file()


def test_a_cluster_that_is_too_small_is_refused_at_once(two_nodes: Cluster, make_config: Callable[..., Config]) -> None:
    cfg = make_config("cluster")
    cfg.cluster.address = two_nodes.address
    cfg.rollout.num_workers, cfg.rollout.num_cpus = 3, 1.0
    with (
        ray_session(cfg, "test-small"),
        pytest.raises(ConfigError, match=r"the actors need 3\.6 CPUs, the Ray cluster has 2"),
        start_system(cfg, *model_folders(cfg)),
    ):
        pass


def _node(_member: object) -> str:
    return str(ray.get_runtime_context().get_node_id())
