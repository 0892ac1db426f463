"""Folders of runs: two that start in one second, one that holds a run, one that is in use."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from skyrl.checkpoint import LOCK, SETTINGS, find_checkpoint, held, in_use, new_folder, put_aside
from skyrl.records import SkyrlError

HOLD = """
import sys
from pathlib import Path
from skyrl.checkpoint import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    input()
"""


def test_runs_that_start_in_one_second_get_folders_of_their_own(tmp_path: Path) -> None:
    wanted = tmp_path / "digits" / "2026-11-25_12-00-00"
    made = [new_folder(wanted) for _ in range(3)]
    assert [folder.name for folder in made] == [wanted.name, f"{wanted.name}-2", f"{wanted.name}-3"]
    assert all(folder.is_dir() for folder in made)


def test_a_chosen_folder_that_holds_a_run_is_refused_and_an_empty_one_is_not(tmp_path: Path) -> None:
    chosen = tmp_path / "mine"
    assert new_folder(chosen) == new_folder(chosen) == chosen
    (chosen / SETTINGS).write_text("{}")
    with pytest.raises(SkyrlError, match=r"mine holds a run already \(config\.json\); set another one, or resume=auto"):
        new_folder(chosen)


def test_a_folder_that_can_not_be_made_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SkyrlError, match=r"run_dir=.*file/run can't be made"):
        new_folder(tmp_path / "file" / "run")


def test_what_ended_before_its_first_checkpoint_is_put_aside_and_nothing_else(tmp_path: Path) -> None:
    run = tmp_path / "mine"
    assert put_aside(run, "digits") is None  # there is none
    run.mkdir()
    assert put_aside(run, "digits") is None  # it holds no run
    (run / SETTINGS).write_text('{"name": "digits"}')
    (run / "metrics.jsonl").write_text("{}")
    assert put_aside(run, "other") is None
    with held(run):
        assert put_aside(run, "digits") is None
    aside = put_aside(run, "digits")
    assert aside == run / "unfinished-1" and (aside / "metrics.jsonl").exists()
    assert sorted(path.name for path in run.iterdir()) == [LOCK, "unfinished-1"]
    (run / SETTINGS).write_text('{"name": "digits"}')
    assert put_aside(run, "digits") == run / "unfinished-2"
    (run / "checkpoints" / "step_000002").mkdir(parents=True)
    (run / SETTINGS).write_text('{"name": "digits"}')
    assert put_aside(run, "digits") is None  # a checkpoint, even a broken one, is somebody's work


def test_a_folder_is_held_by_one_living_process(tmp_path: Path) -> None:
    assert not in_use(tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    assert in_use(tmp_path)
    with pytest.raises(SkyrlError, match="is in use by a run that is still going on"), held(tmp_path):
        pass
    process.kill()  # the lock goes with the process
    process.wait()
    assert (tmp_path / LOCK).exists() and not in_use(tmp_path)
    with held(tmp_path):
        pass


@pytest.mark.parametrize("content", ["", "[]", "{}", "not json", '{"name": '])
def test_a_foreign_file_of_settings_beside_the_run_is_named_and_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str
) -> None:
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / SETTINGS).write_text(content)
    assert find_checkpoint("auto", tmp_path / "own", "digits") is None
    assert "foreign/config.json is no file of settings of a run" in caplog.text
