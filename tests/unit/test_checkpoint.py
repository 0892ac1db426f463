"""Checkpoints: atomic, verified, pruned, found."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

import pytest

from skyrl.checkpoint import FORMAT, Checkpoints, check_settings, find_checkpoint, held, read_state, verify
from skyrl.monitoring.records import jsonable
from skyrl.records import SkyrlError
from skyrl.settings import Config


def write(run: Path, step: int, keep: int = 2) -> Path:
    checkpoints = Checkpoints(run, keep)
    with checkpoints.writing(step, {"step": step}) as folder:
        (folder / "learner").mkdir()
        (folder / "learner" / "weights.bin").write_bytes(bytes([step]) * 100)
    return checkpoints.complete()[0]


def test_what_is_written_is_complete_verified_and_read_back(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", 3)
    verify(folder)
    assert folder.name == "step_000003"
    assert read_state(folder) == {"step": 3, "format": FORMAT}


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10):
        write(tmp_path, step)
    assert [p.name for p in Checkpoints(tmp_path, 2).complete()] == ["step_000010", "step_000003"]


def test_an_error_while_saving_leaves_no_checkpoint_and_keeps_the_old_one(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "first"
    old = write(run, 1)
    with (
        pytest.raises(SkyrlError, match=r"checkpoint of step 2 could not be written to .*: disk full \(.* GB are free"),
        Checkpoints(run, 2).writing(2, {}) as folder,
    ):
        (folder / "half").write_text("half")
        raise OSError("disk full")
    assert [path.name for path in (run / "checkpoints").iterdir()] == [old.name]  # nothing keeps the disk full
    with pytest.raises(KeyError), Checkpoints(run, 2).writing(2, {}):  # what is no fault of the disk stays what it is
        raise KeyError("name")
    assert Checkpoints(run, 2).complete() == [old]
    settings(run)
    assert find_checkpoint("auto", tmp_path / "runs" / "second", "mine") == old


@pytest.mark.parametrize("damage", ["change", "remove", "manifest"])
def test_auto_names_and_skips_a_broken_one(tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str) -> None:
    good, bad = write(tmp_path / "a", 1), write(tmp_path / "a", 2)
    settings(tmp_path / "a")
    weights = bad / "learner" / "weights.bin"
    if damage == "change":
        weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    elif damage == "remove":
        weights.unlink()
    else:
        (bad / "COMPLETE.json").write_text("{")
    with caplog.at_level(logging.WARNING):
        assert find_checkpoint("auto", tmp_path / "b", "mine") == good
    assert str(bad) in caplog.text


def settings(run: Path, **changes: object) -> dict:
    """Writes a run's config.json."""
    run.mkdir(parents=True, exist_ok=True)
    content = jsonable(Config(name="mine")) | changes
    (run / "config.json").write_text(json.dumps(content))
    return content


def test_an_explicit_broken_one_is_an_error(tmp_path: Path) -> None:
    folder = write(tmp_path, 1)
    (folder / "learner" / "weights.bin").write_bytes(b"")
    with pytest.raises(SkyrlError, match=r"weights\.bin is not what was written"):
        find_checkpoint(str(folder), tmp_path / "new", "mine")


def test_auto_takes_the_newest_of_all_runs_of_this_name_and_nothing_if_there_is_none(tmp_path: Path) -> None:
    new = tmp_path / "new"
    assert find_checkpoint("auto", new, "mine") is None
    for place, name in enumerate(("first", "second", "other")):
        settings(tmp_path / name, name="other" if name == "other" else "mine")
        time.sleep(0.01)
        write(tmp_path / name, 9 - place)
    assert find_checkpoint("auto", new, "mine") == tmp_path / "second" / "checkpoints" / "step_000008"
    assert find_checkpoint("no", new, "mine") is None


def test_a_folder_with_checkpoints_of_its_own_is_resumed_or_left_alone(tmp_path: Path) -> None:
    own = write(tmp_path / "first", 1)
    time.sleep(0.01)
    settings(tmp_path / "second")
    write(tmp_path / "second", 5)
    assert find_checkpoint("auto", tmp_path / "first", "mine") == own
    with pytest.raises(SkyrlError, match="holds the checkpoints of a run"):
        find_checkpoint("no", tmp_path / "first", "mine")


def test_auto_passes_over_a_run_that_is_still_going_on(tmp_path: Path) -> None:
    settings(tmp_path / "first")
    folder = write(tmp_path / "first", 1)
    with held(tmp_path / "first"):
        assert find_checkpoint("auto", tmp_path / "second", "mine") is None
    assert find_checkpoint("auto", tmp_path / "second", "mine") == folder


def test_a_resumed_run_says_what_it_does_differently(tmp_path: Path) -> None:
    old = settings(tmp_path)
    new = Config(name="mine", run_dir="elsewhere", resume="auto")
    new.controller.steps, new.monitoring.console, new.data.eval_size = 7, False, 3
    assert check_settings(old, jsonable(new)) == []
    new.learner.lr, new.data.train_path = 0.5, "/moved.parquet"
    assert check_settings(old, jsonable(new)) == [
        "data.train_path: None → '/moved.parquet'",
        "learner.lr: 0.0001 → 0.5",
    ]
    new.digits.kinds, new.digits.model_seed = ["max"], 3
    with pytest.raises(SkyrlError, match=r"digits\.kinds: \['sum'.* → \['max'\]; digits\.model_seed: 0 → 3\. Repeat"):
        check_settings(old, jsonable(new))


def test_a_run_resumed_from_an_early_step_keeps_what_it_writes_next(tmp_path: Path) -> None:
    for step in (20, 40, 60, 80):
        write(tmp_path, step)
        time.sleep(0.01)
    assert write(tmp_path, 30).name == "step_000030"
    assert [p.name for p in Checkpoints(tmp_path, 2).complete()] == ["step_000030", "step_000080"]


def test_a_checkpoint_of_an_older_layout_is_refused_by_name(tmp_path: Path) -> None:
    folder = write(tmp_path, 1)
    state = json.loads((folder / "state.json").read_text())
    del state["format"]  # as it was written before layouts had numbers
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(
        SkyrlError, match=r"step_000001 has layout 1, this version of skyrl reads layout 3: checkpoints of"
    ):
        read_state(folder)


@pytest.mark.parametrize("content", [[1], {"rubbish": 3}])
def test_a_damaged_file_of_settings_is_said_to_be_so(content: object) -> None:
    with pytest.raises(
        SkyrlError, match=r"^config\.json of the run that shall go on is damaged: it holds no settings$"
    ):
        check_settings(content, jsonable(Config()))  # type: ignore[arg-type]
