"""What a run refuses, with messages of its own, before and while it starts."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray

from skyrl.checkpoint import Checkpoints
from skyrl.crew.ray_executor import ray_session
from skyrl.data.datasets import check_size
from skyrl.learner.files import write_state
from skyrl.records import DataError, SkyrlError
from skyrl.run import run
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
    "error", [Exception("The current node timed out"), ConnectionError("no head"), ValueError("x"), OSError("full")]
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


def test_a_temporary_folder_too_deep_for_rays_sockets_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> None:
        raise OSError("AF_UNIX path length cannot exceed 107 bytes")

    monkeypatch.setattr(ray, "init", fail)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(SkyrlError, match=r"107 bytes; set TMPDIR to a shorter path$"), ray_session(Config(), "test"):
        pass


def test_a_checkpoint_of_other_ranks_is_refused_before_anything_starts(tmp_path: Path) -> None:
    cfg = Config(name="resumed", run_dir=str(tmp_path / "run"), resume="auto")
    with Checkpoints(tmp_path / "run", 2).writing(3, {"step": 3}) as folder:
        (folder / "learner").mkdir()
        write_state(folder / "learner", cfg, {})
    (tmp_path / "run" / "config.json").write_text('{"name": "resumed"}')
    cfg.learner.num_workers = 2
    with pytest.raises(SkyrlError, match=r"was saved with learner\.num_workers=1 \(here 2\); use the same to resume"):
        run(cfg)
    assert not ray.is_initialized()
