"""A run whose disk is full goes on, or ends with an error that names the path; nothing that was complete is lost.

The disk is a small tmpfs, which only root can mount.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_runs

from benchmarks.same_numbers import values
from skyrl.checkpoint import Checkpoints, verify
from skyrl.crew.local_executor import LocalExecutor
from skyrl.monitoring.events import read_events
from skyrl.monitoring.sinks import JsonlSink
from skyrl.records import SkyrlError
from skyrl.run import run
from skyrl.settings import Config
from tests.faults.child import Plan

pytestmark = pytest.mark.integration
STEPS, SAVE = 8, 2
ROOM = 32
"""MiB, for two checkpoints of 12.3 MB and a half."""


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return Plan(tiny_runs.policy_folder(tmp_path_factory.getbasetemp()), STEPS, save=SAVE, local=True)


@pytest.fixture(scope="module")
def whole(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], float | None]:
    """Values of the run that had room."""
    return train(plan, tmp_path_factory.mktemp("whole"))


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A disk of so many bytes."""
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def make_room(folder: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=200m", folder], check=True)


def settings(plan: Plan, run_dir: Path) -> Config:
    cfg = plan.config(run_dir)
    cfg.checkpoint.export = False
    return cfg


def train(plan: Plan, folder: Path) -> dict[tuple[int, str], float | None]:
    cfg = settings(plan, folder / "run")
    run(cfg, LocalExecutor())
    return measured(folder)


def measured(folder: Path) -> dict[tuple[int, str], float | None]:
    """Values by step and metric; without what is said of the data at each start."""
    found = values(folder / "run" / "metrics.jsonl")
    return {(step, name): value for (step, name), value in found.items() if not name.startswith("data/")}


def test_a_checkpoint_that_does_not_fit_is_tried_again_after_the_next_step(
    plan: Plan, whole: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = JsonlSink.log

    def room_at_7(self: JsonlSink, step: int, metrics: dict[str, float]) -> None:
        log(self, step, metrics)
        if step == 7:
            make_room(tmp_path / "disk")

    monkeypatch.setattr(JsonlSink, "log", room_at_7)
    with small_disk(tmp_path / "disk", f"{ROOM}m") as disk:
        assert train(plan, disk) == whole
        unsaved = [event for event in read_events(disk / "run") if event.kind == "unsaved"]
        assert [event.step for event in unsaved] == [6]
        assert str(disk / "run" / "checkpoints") in unsaved[0].text and "GB are free there" in unsaved[0].text
        assert [one.name for one in Checkpoints(disk / "run", 2).complete()] == ["step_000008", "step_000007"]


def test_a_last_checkpoint_that_does_not_fit_is_an_error_and_the_run_can_be_resumed(
    plan: Plan, whole: dict, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk", f"{ROOM}m") as disk:
        with pytest.raises(SkyrlError, match=r"checkpoint of step 8 could not be written to .*disk/run/checkpoints: "):
            train(plan, disk)
        complete = Checkpoints(disk / "run", 2).complete()
        assert [one.name for one in complete] == ["step_000004", "step_000002"]
        for one in complete:
            verify(one)
        make_room(disk)
        train(plan, disk)
        assert measured(disk) == whole


def test_a_disk_without_any_room_is_told_of_at_once_and_keeps_what_was_written(
    plan: Plan, whole: dict, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    none = replace(plan, save=0)
    with small_disk(tmp_path / "disk", "120k") as disk:
        with pytest.raises(SkyrlError, match=r"checkpoint of step 8 could not be written to .*GB are free"):
            train(none, disk)
        written = (disk / "run" / "metrics.jsonl").read_text()
        assert written.endswith("\n")
        lines = [json.loads(line) for line in written.splitlines()]
        assert max(line["step"] for line in lines) >= 1
        kept = {(step, name): value for (step, name), value in whole.items() if step <= lines[-1]["step"]}
        found = measured(disk)
        assert {key: value for key, value in kept.items() if key[0] < lines[-1]["step"]}.items() <= found.items()
        told = [one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING]
        for name in ("metrics.jsonl", "samples", "gallery.json", "buffer"):
            assert any(f"{disk}/run/{name}" in text and "GB are free there" in text for text in told), name
        assert any("metrics.jsonl" in text and "lines are lost" in text for text in told)
        make_room(disk)
        train(none, disk)
        assert measured(disk) == whole
