"""Several workers of every kind, ZeRO-3, and actors spread over two Ray nodes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
from fakes import ListSink
from ray.cluster_utils import Cluster

from skyrl.crew.system import ray_session, start_system
from skyrl.data.stream import PromptStream
from skyrl.loop import Controller
from skyrl.records import ConfigError
from skyrl.run import model_folders
from skyrl.settings import Config

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
    sink = ListSink()
    with ray_session(cfg, "test-cluster"), start_system(cfg, *model_folders(cfg)) as system:
        stream = PromptStream(system.rows["train"], 0)
        Controller(cfg, system.pools, stream, 8, sink, tmp_path).run()
        nodes = {actor["NodeID"]: actor["Name"] for actor in _actors()}
        names = sorted(actor["Name"] for actor in _actors())
    assert names == ["learner-0", "learner-1", "reward-0", "reward-1", "rollout-0", "rollout-1", "sample-buffer"]
    assert len(nodes) == 2
    trained = [metrics for _, metrics in sink.records if "loss/total" in metrics]
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


def _actors() -> list[dict[str, str]]:
    """Name and node of every named actor of this namespace; each is asked where it runs."""
    # By value: the actors can't import this test module.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    names = ray.util.list_named_actors()
    where = [ray.get_actor(name).__ray_call__.remote(_node) for name in names]
    return [{"Name": name, "NodeID": node} for name, node in zip(names, ray.get(where), strict=True)]


def _node(_actor: object) -> str:
    import ray

    return str(ray.get_runtime_context().get_node_id())
