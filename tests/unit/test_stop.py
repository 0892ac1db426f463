"""A signal while training: the step that it falls into is finished and saved, and the resumed run is the uninterrupted
one; a second signal ends it at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_runs import Watched, config, numbers, policy_folder, run_loop

from skyrl.checkpoint import Checkpoints
from skyrl.loop import Loop
from skyrl.monitoring.events import read_events
from skyrl.monitoring.records import read_metrics
from skyrl.records import ConfigError
from skyrl.run import run, stops_on_signals
from skyrl.settings import Config

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
STEPS = 4


@pytest.fixture
def interrupting() -> Iterator[None]:
    """The handlers of a command (``skyrl.cli.run_command``); afterwards the process's own."""
    before = {number: signal.getsignal(number) for number in NUMBERS}
    for number in NUMBERS:
        signal.signal(number, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Stopped:
    """A loop as far as signals know it."""

    stop_after_step = False


@pytest.mark.usefixtures("interrupting")
@pytest.mark.parametrize("first", NUMBERS)
@pytest.mark.parametrize("second", NUMBERS)
def test_the_first_signal_asks_and_the_second_interrupts(
    first: signal.Signals, second: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    loop = Stopped()
    with stops_on_signals(loop):  # type: ignore[arg-type]
        os.kill(os.getpid(), first)
        assert loop.stop_after_step
        assert "stopping after this step" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), second)
            signal.pause()
    with pytest.raises(KeyboardInterrupt):  # outside as before
        os.kill(os.getpid(), first)
        signal.pause()


@pytest.mark.usefixtures("interrupting")
def test_signals_that_are_ignored_or_handled_elsewhere_are_left_alone() -> None:
    heard: list[int] = []
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    loop = Stopped()
    with stops_on_signals(loop):  # type: ignore[arg-type]
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGTERM)
    assert heard == [signal.SIGTERM] and not loop.stop_after_step


def whole_run(folder: Path, policy: str, resume: str = "no") -> Config:
    cfg = config(folder, STEPS, lag=1)
    cfg.model.policy, cfg.resume = policy, resume
    cfg.checkpoint.every = 0  # nothing but the stop saves
    return cfg


@pytest.mark.usefixtures("interrupting")
@pytest.mark.parametrize("at", [1, 3])
def test_a_stopped_run_is_resumed_as_the_uninterrupted_one(tmp_path: Path, at: int) -> None:
    policy = policy_folder(tmp_path.parent / "stopped")
    expected = numbers(run_loop(config(tmp_path / "whole", STEPS, lag=1), policy))

    def stop(_: object, batch: object) -> None:
        if batch.step == at:  # type: ignore[attr-defined]
            os.kill(os.getpid(), signal.SIGTERM)

    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run(whole_run(folder, policy), Watched(stop))
    assert [path.name for path in Checkpoints(folder, 2).complete()] == [f"step_{at:06d}"]
    assert not (folder / "policy").exists() and not (folder / "summary.json").exists()
    run(whole_run(folder, policy, "auto"), Watched())
    assert [(event.kind, event.step) for event in read_events(folder) if event.kind != "alarm"] == [
        ("stopped", at), ("resumed", at)
    ]  # fmt: skip
    found: dict[int, dict[str, float]] = {}
    for line in read_metrics(folder / "metrics.jsonl"):
        if "time/step" in line:
            found[int(line["step"])] = line
    assert sorted(found) == sorted(expected) == list(range(1, STEPS + 1))
    shorter = whole_run(folder, policy, "auto")
    shorter.controller.steps = STEPS - 1
    with pytest.raises(ConfigError, match=rf"controller.steps={STEPS - 1}: .* is at step {STEPS} already"):
        run(shorter, Watched())
    for step, values in expected.items():
        same = {name: found[step][name] for name in values}
        assert same == pytest.approx(values, rel=0, abs=0, nan_ok=True), step


@pytest.mark.usefixtures("interrupting")
def test_nothing_is_saved_twice_or_for_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal before the first step leaves nothing to save; one in a step that is due is saved once."""
    policy = policy_folder(tmp_path.parent / "stopped")
    saved: list[int] = []
    save = Loop._save

    def noted(loop: Loop) -> None:
        saved.append(loop.step)
        save(loop)

    monkeypatch.setattr(Loop, "_save", noted)
    evaluate = Loop._evaluate

    def stopping(loop: Loop) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        evaluate(loop)

    with monkeypatch.context() as early, pytest.raises(KeyboardInterrupt):
        early.setattr(Loop, "_evaluate", stopping)
        run(whole_run(tmp_path / "early", policy), Watched())
    assert saved == []
    due = whole_run(tmp_path / "due", policy)
    due.checkpoint.every = 2

    def stop(_: object, batch: object) -> None:
        if batch.step == 2:  # type: ignore[attr-defined]
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        run(due, Watched(stop))
    assert saved == [2]
