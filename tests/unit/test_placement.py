"""What members reserve and how many threads each has."""

from __future__ import annotations

import pytest

from skyrl.crew.placement import Placement
from skyrl.settings import Config


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
