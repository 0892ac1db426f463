"""What members reserve and how many threads each has."""

from __future__ import annotations

import pytest

from skyrl.crew.placement import Placement, check_free
from skyrl.records import ConfigError
from skyrl.settings import Config, WeightSync


@pytest.mark.parametrize(
    ("cores", "workers", "lag", "asked", "threads"),
    [(8, 1, 0, 0, 8), (8, 2, 0, 0, 4), (8, 2, 1, 0, 2), (2, 1, 2, 0, 1), (2, 3, 1, 0, 1), (2, 1, 1, 2, 2)],
)
def test_roles_that_work_at_once_share_the_cores(cores: int, workers: int, lag: int, asked: int, threads: int) -> None:
    cfg = Config()
    cfg.controller.lag, cfg.rollout.num_workers, cfg.rollout.threads = lag, workers, asked
    placement = Placement(cfg, [{"Resources": {"CPU": float(cores)}}])
    specs = placement.specs("rollout", dict, cfg.rollout, lambda place, own: (place, own))
    assert [spec.args for spec in specs] == [(place, threads) for place in range(workers)]
    assert {spec.env["OMP_NUM_THREADS"] for spec in specs} == {str(threads)}


def test_a_run_that_does_not_fit_beside_others_is_refused() -> None:
    cfg = Config()
    cfg.rollout.num_workers, cfg.rollout.num_cpus, cfg.learner.num_cpus, cfg.reward.num_cpus = 2, 1.0, 0.5, 0.4
    cpus = 2 * 1.0 + 0.5 + 0.4 + 0.1
    assert cpus == 3.0
    check_free(cfg, [{"CPU": 2.0}, {"CPU": 1.0}], True)
    check_free(cfg, [{"CPU": 1.0}, {"CPU": 1.0}, {"CPU": 1.0}], True)
    check_free(cfg, [{"CPU": 1.0}, {"CPU": 1.4}], False)
    needs = r"^the actors need 3 CPUs and 0 GPUs; other runs hold .* have 0.35, 2.7 CPUs and 0, 0 GPUs free: wait "
    with pytest.raises(ConfigError, match=needs):  # 3.05 in all, but in pieces that do not fit
        check_free(cfg, [{"CPU": 0.35}, {"CPU": 2.7}], True)
    with pytest.raises(ConfigError, match="the actors need 3 CPUs"):
        check_free(cfg, [{}, {"CPU": 2.9}], True)


def test_a_gpu_that_two_share_is_looked_for_with_the_cpus_of_both() -> None:
    cfg = Config()
    cfg.rollout.device = cfg.learner.device = "cuda"
    cfg.rollout.weight_sync = WeightSync.ipc
    cfg.rollout.num_cpus = cfg.learner.num_cpus = 2.0
    check_free(cfg, [{"CPU": 4.0, "GPU": 1.0}, {"CPU": 1.0}], True)
    with pytest.raises(ConfigError, match=r"4\.35 CPUs and 1 GPUs"):
        check_free(cfg, [{"CPU": 3.9, "GPU": 1.0}, {"CPU": 9.0}], True)
    cfg.rollout.weight_sync = WeightSync.nccl
    with pytest.raises(ConfigError, match=r"4\.35 CPUs and 2 GPUs"):
        check_free(cfg, [{"CPU": 9.0, "GPU": 1.0}], True)
