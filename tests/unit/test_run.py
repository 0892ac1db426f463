"""What a run refuses, with messages of its own, before and while it starts."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray

from skyrl.crew.ray_executor import ray_session
from skyrl.records import DataError, SkyrlError
from skyrl.run import check_size
from skyrl.settings import Config


def test_a_step_never_asks_a_prompt_twice() -> None:
    cfg = Config()
    cfg.rollout.prompts_per_step = 8
    check_size(8, cfg)
    with pytest.raises(DataError, match=r"7 training prompts.*rollout\.prompts_per_step=8.*7 or less$"):
        check_size(7, cfg)
    cfg.data.pool_path = "pool.parquet"
    with pytest.raises(DataError, match=r"pool_min"):
        check_size(7, cfg)
    cfg.data.pairs_path = Path("pairs.parquet").name  # offline: no prompt is asked
    check_size(1, cfg)


@pytest.mark.parametrize(
    "error", [Exception("The current node timed out"), ConnectionError("no head"), ValueError("x")]
)
def test_ray_that_does_not_start_is_a_clear_error(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(**_: object) -> None:
        raise error

    monkeypatch.setattr(ray, "init", fail)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(SkyrlError, match=f"could not be started here: {error}"), ray_session(Config(), "test"):
        pass


def test_other_errors_stay_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> None:
        raise KeyError("num_cpu")

    monkeypatch.setattr(ray, "init", fail)
    with pytest.raises(KeyError), ray_session(Config(), "test"):
        pass
