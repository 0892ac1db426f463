"""Losses of members in a whole run in this process: what comes out is what comes out without a loss.

An executor that "loses" a member does what RayExecutor does: it asks the crew for what takes over, and makes the call
again. tests/faults does it with processes that are killed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import Sink, Watched, config, numbers, policy_folder, run_loop

from skyrl.batch.batcher import Batcher
from skyrl.crew.executor import Member, MemberSpec
from skyrl.learner.step import LearnerStep
from skyrl.records import MemberLost, SkyrlError
from skyrl.rewards.rewarder import Rewarder
from skyrl.rollout.sampler import Sampler

STEPS = 4
Strike = tuple[Any, int, bool]
"""A function, which of its calls is struck, and whether that one was carried out before the member died."""


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return policy_folder(tmp_path_factory.getbasetemp())


class Losing(Watched):
    """Loses the member that a struck call goes to."""

    def __init__(self, strikes: list[Strike]) -> None:
        super().__init__()
        self.strikes = strikes
        self.count: dict[Any, int] = {}
        self.lost: dict[int, Callable[[Any, MemberLost], Any]] = {}

    def start(self, spec: MemberSpec[Any], lost: Callable[[Any, MemberLost], Any]) -> Member[Any]:
        member = super().start(spec, lost)
        self.lost[id(member)] = lost
        return member

    def restart(self, member: Member[Any]) -> Member[Any]:
        return self.start(member.spec, self.lost[id(member)])

    def call(self, member: Member[Any], function: Any, pieces: int, args: Any, kwargs: Any) -> Any:
        self.count[function] = self.count.get(function, 0) + 1
        for struck, place, after in self.strikes:
            if struck is function and place == self.count[function]:
                if after:
                    super().call(member, function, pieces, args, kwargs)
                why = MemberLost(member.spec.name, function.__qualname__, f"{member.spec.name} died")
                member = self.lost[id(member)](member, why)
        return super().call(member, function, pieces, args, kwargs)


def run(policy: str, folder: Path, strikes: list[Strike], lag: int = 0, every: int = 2, **more: Any) -> Sink:
    cfg = config(folder, STEPS, lag)
    cfg.checkpoint.every, cfg.evaluation.every = every, 2
    cfg.controller.restarts = more.pop("restarts", 3)
    return run_loop(cfg, policy, Losing(strikes), **more)


def last(sink: Sink) -> dict[int, dict[str, float]]:
    return {step: values for step, values in numbers(sink).items()}


WITHOUT_RETRIES = [
    (Sampler.generate, 3), (Sampler.generate, 5), (Rewarder.score, 4), (Sampler.update, 3),
    (Batcher.exchange, 1), (Batcher.exchange, 2), (Batcher.exchange, 3), (Batcher.exchange, 4), (Batcher.save, 2),
]  # fmt: skip


@pytest.mark.parametrize("after", [False, True], ids=["before the work", "after it"])
def test_a_lost_sampler_rewarder_or_buffer_changes_no_number(policy: str, tmp_path: Path, after: bool) -> None:
    whole = numbers(run(policy, tmp_path / "whole", []))
    strikes: list[Strike] = [(function, place, after) for function, place in WITHOUT_RETRIES]
    struck = run(policy, tmp_path / "struck", strikes)
    assert numbers(struck) == whole
    assert [event.kind for event in struck.events] == ["replaced"] * len(strikes)


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("place", [1, 3, 4])
def test_a_lost_learner_takes_the_run_back_and_changes_no_number(
    policy: str, tmp_path: Path, lag: int, place: int
) -> None:
    """Before the first checkpoint the run begins again; behind it, it goes back to it."""
    whole = numbers(run(policy, tmp_path / "whole", [], lag))
    struck = run(policy, tmp_path / "struck", [(LearnerStep.train_step, place, True)], lag)
    assert numbers(struck) == whole
    assert [(event.kind, event.member) for event in struck.events] == [("restarted", "learner-0")]
    assert struck.rewound == [0 if place == 1 else 2]


def test_a_learner_that_is_lost_again_and_again_ends_the_run(policy: str, tmp_path: Path) -> None:
    strikes: list[Strike] = [(LearnerStep.train_step, place, False) for place in range(1, 9)]
    with pytest.raises(MemberLost, match=r"^learner-0 died$"):
        run(policy, tmp_path, strikes, restarts=2)


def test_a_buffer_without_its_log_takes_the_run_back(
    policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = numbers(run(policy, tmp_path / "whole", []))

    def gone(*_: Any) -> None:
        raise SkyrlError("the log went with its host")

    monkeypatch.setattr(Batcher, "recover", gone)
    struck = run(policy, tmp_path / "struck", [(Batcher.exchange, 4, False)])
    assert numbers(struck) == whole
    assert [(event.kind, event.member) for event in struck.events] == [("restarted", "sample-buffer")]


def test_a_checkpoint_that_can_not_be_written_is_tried_again_and_the_last_one_must_be(
    policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, failures = LearnerStep.save, {2: 1}

    def save(self: LearnerStep, folder: Path) -> None:
        step = int(folder.parent.name.rpartition("_")[2])
        if failures.get(step, 0):
            failures[step] -= 1
            raise SkyrlError("no space left on device")
        real(self, folder)

    monkeypatch.setattr(LearnerStep, "save", save)
    struck = run(policy, tmp_path / "struck", [])
    assert [(event.kind, event.step) for event in struck.events] == [("unsaved", 2)]
    assert sorted(path.name for path in (tmp_path / "struck" / "checkpoints").iterdir()) == [
        "step_000003",
        "step_000004",
    ]
    failures[STEPS] = 1
    with pytest.raises(SkyrlError, match="no space left"):
        run(policy, tmp_path / "last", [])
