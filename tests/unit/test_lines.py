"""Files of a run on a disk that is full: nothing complete is lost, and nothing half is left."""

from __future__ import annotations

import json
import logging
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from skyrl.monitoring.events import EventSink, read_events
from skyrl.monitoring.lines import LineFile
from skyrl.monitoring.records import read_metrics, write_json
from skyrl.monitoring.sinks import JsonlSink
from skyrl.records import Event, SkyrlError


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file may grow beyond so many bytes: a write stops in the middle there, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_lines_that_do_not_fit_wait_and_come_in_order(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "lines"
    file = LineFile(path)
    with caplog.at_level(logging.WARNING):
        with largest_file(10):
            file.write("first")
            file.write("the second")  # four bytes of it would fit
            assert path.read_text() == "first\n"
            file.write("third")
            assert path.read_text() == "first\n"
        file.write("last")
    assert path.read_text() == "first\nthe second\nthird\nlast\n"
    assert len(caplog.records) == 1
    assert f"{path} can't be written: File too large (" in caplog.text and "GB are free there" in caplog.text
    file.close()


def test_lines_that_never_fitted_are_an_error_at_the_end(tmp_path: Path) -> None:
    file = LineFile(tmp_path / "lines")
    with largest_file(6), pytest.raises(SkyrlError, match=r"lines can't be written: .*; 2 lines are lost"):
        for line in ("first", "second", "third"):
            file.write(line)
        file.close()
    assert (tmp_path / "lines").read_text() == "first\n"


def test_half_a_line_of_a_killed_process_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_text('{"a": 1}\n{"a": 2')
    file = LineFile(path)
    file.write('{"a": 3}')
    file.close()
    assert path.read_text() == '{"a": 1}\n{"a": 3}\n'
    path.write_text("half")
    LineFile(path).close()
    assert path.read_text() == ""


def test_metrics_and_events_of_a_full_disk_come_back_with_room(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics, events = JsonlSink(path), EventSink(tmp_path / "events.jsonl")
    with largest_file(200):
        for step in range(1, 9):
            metrics.log(step, {"reward/rule": step / 8, "time/step": 0.25})
            events.event(Event(time.time(), step, "unsaved", "", f"step {step}"))
            assert [record["step"] for record in read_metrics(path)] == list(range(1, min(step, 3) + 1))
    metrics.log(9, {"reward/rule": 9.0})
    metrics.close()
    events.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == list(range(1, 10))
    assert [event.text for event in read_events(tmp_path)] == [f"step {step}" for step in range(1, 9)]


def test_a_file_that_is_replaced_keeps_its_old_content_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "gallery.json"
    write_json(path, [1])
    with largest_file(10), pytest.raises(SkyrlError, match=r"gallery\.json can't be written: .*GB are free there"):
        write_json(path, list(range(100)))
    assert json.loads(path.read_text()) == [1] and [file.name for file in tmp_path.iterdir()] == ["gallery.json"]
    (tmp_path / "file").touch()
    with pytest.raises(SkyrlError, match=r"file/gallery\.json can.t be written: File exists"):
        write_json(tmp_path / "file" / "gallery.json", [])
