"""Several workers of every kind, ZeRO-3, and actors spread over two Ray nodes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from skyrl.crew import placement
from skyrl.crew.ray_executor import ray_session
from skyrl.data.stream import PromptStream
from skyrl.loop import Loop
from skyrl.records import ConfigError
from skyrl.run import model_folders
from skyrl.settings import Config
from skyrl.system import start_system
from tests.tiny_runs import Sink, policy_folder

pytestmark = pytest.mark.integration
TESTS = str(Path(__file__).parents[1])
SMALL = [
    "name=shared", "controller.steps=1", "model.reward=null", "reward.model_weight=0", "algorithm.mpo.pairs=rule",
    "algorithm.mpo.threshold.kind=off", "data.eval_size=4", "digits.train_size=400", "digits.kinds=[max]",
    "digits.text_share=0", "rollout.engine=plain_engine:PlainEngine", "learner.backend=plain_backend:PlainBackend",
    "rollout.prompts_per_step=6", "rollout.samples_per_prompt=4", "rollout.max_new_tokens=24",
    "rollout.probe_prompts=2", "rollout.probe_new_tokens=4", "rollout.threads=1", "reward.threads=1",
    "learner.threads=1", "evaluation.every=0", "hallucination.probe_prompts=2", "monitoring.wandb=off",
    "controller.timeout=120",
]  # fmt: skip
"""Settings of a run that takes seconds."""


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[Cluster]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", TESTS)  # members find the plain engine there
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


def test_a_run_that_does_not_fit_beside_another_is_refused(
    two_nodes: Cluster, make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement, "ENDING_SECONDS", 1.0)
    cfg = make_config("cluster")
    cfg.cluster.address = two_nodes.address
    cfg.rollout.num_workers, cfg.rollout.num_cpus = 2, 0.6  # 1.8 in all
    with ray_session(cfg, "test-second"):
        first = ray.remote(num_cpus=0.5)(Holder).remote()
        ray.get(first.there.remote())
        with pytest.raises(
            ConfigError, match=r"^the actors need 1\.8 CPUs .* have (0\.5, 1|1, 0\.5) CPUs .* free: wait"
        ):
            start_system(cfg, *model_folders(cfg)).__enter__()
        ray.kill(first)


def test_two_runs_of_one_name_and_second_share_a_cluster(two_nodes: Cluster, tmp_path: Path) -> None:
    policy, runs = policy_folder(tmp_path), []
    for user in ("one", "other"):
        folder = tmp_path / user / "2026-01-01_00-00-00"
        settings = [*SMALL, f"model.policy={policy}", f"run_dir={folder}", f"cluster.address={two_nodes.address}"]
        command = [sys.executable, "-m", "skyrl.launch", *settings]
        env = os.environ | {"PYTHONPATH": TESTS}
        runs.append(
            (folder, subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        )
    for folder, run in runs:
        said = run.communicate(timeout=200)[0]
        assert run.returncode == 0, said[-4000:]
        assert (folder / "summary.json").is_file()


class Holder:
    def there(self) -> None:
        pass


def _node(_member: object) -> str:
    return str(ray.get_runtime_context().get_node_id())
