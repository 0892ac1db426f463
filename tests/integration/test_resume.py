"""A run that was stopped and continued is the run that never stopped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
from fakes import ListSink

from skyrl.crew.system import ray_session, start_system
from skyrl.data.stream import PromptStream
from skyrl.loop import Controller
from skyrl.run import model_folders
from skyrl.settings import Config

pytestmark = pytest.mark.integration


def test_three_steps_and_three_more_equal_six(make_config: Callable[..., Config], tmp_path: Path) -> None:
    """The resumed run samples the same tokens and has the same losses as one that never stopped."""
    cfg = make_config("resume", tmp_path / "whole")
    cfg.controller.steps = 6
    whole = _run(cfg, restore=False)
    cfg = make_config("resume", tmp_path / "cut")
    cfg.controller.steps = 3
    first = _run(cfg, restore=False)
    cfg.controller.steps = 6
    second = _run(cfg, restore=True)
    assert [step for step, _ in whole.losses] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in first.losses + second.losses] == [1, 2, 3, 4, 5, 6]
    assert first.tokens + second.tokens == whole.tokens
    assert len(whole.tokens) == 6 * 6 * 4
    for (_, a), (_, b) in zip(first.losses + second.losses, whole.losses, strict=True):
        assert a == pytest.approx(b, abs=1e-6)
    assert len({round(loss, 6) for _, loss in whole.losses}) > 1


class _Recorded:
    """A reward pool that also notes the tokens of what it scores."""

    def __init__(self, pool: Any) -> None:
        self.pool = pool
        self.tokens: list[list[int]] = []
        self.losses: list[tuple[int, float]] = []

    def score(self, groups: list[Any]) -> list[Any]:
        sampled = [group for part in ray.get(groups) for group in part]
        if len(sampled[0].samples) > 1:  # not an evaluation
            self.tokens += [sample.token_ids.tolist() for group in sampled for sample in group.samples]
        return self.pool.score(groups)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pool, name)


def _run(cfg: Config, restore: bool) -> _Recorded:
    with ray_session(cfg, "test-resume"), start_system(cfg, *model_folders(cfg)) as made:
        recorded, sink = _Recorded(made.pools.reward), ListSink()
        made.pools.reward = recorded
        stream = PromptStream(made.rows["train"], cfg.data.seed)
        run_dir = Path(cfg.run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        controller = Controller(cfg, made.pools, stream, 4, sink, run_dir)
        if restore:
            controller.restore(controller.checkpoints.complete()[0])
        controller.run()
    recorded.losses = [(step, metrics["loss/total"]) for step, metrics in sink.records if "loss/total" in metrics]
    return recorded
