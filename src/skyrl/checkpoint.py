"""Files of a run: checkpoints, written atomically and verified before they are trusted; and its folder, claimed by one
process and held while that lives."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from skyrl.records import MemberLost, SkyrlError

logger = logging.getLogger(__name__)
MANIFEST = "COMPLETE.json"
STATE = "state.json"
BUFFER = "buffer.safetensors"
"""The sample buffer's part of a checkpoint."""
FORMAT = 3
"""Layout of a checkpoint. 1 was written before rollouts could be asked for ahead, 2 held pickled files; neither can be
read any more."""
SETTINGS = "config.json"
"""A run folder's file of settings."""
UNFINISHED = "unfinished-"
"""Begins the names of subfolders with what runs left that ended before their first checkpoint."""
LOCK = ".lock"
"""A run folder's lock file."""
BY_TIME = re.compile(r"\d{4}-\d{2}-\d{2}_\d{2}-\d{2}-\d{2}")
"""Name of a folder that nobody chose: the time at which the run was started."""
FREE = (
    *("resume", "run_dir", "monitoring.", "cluster.", "checkpoint.", "evaluation.", "hallucination.", "filter."),
    *("evaluate.", "controller.steps", "controller.timeout", "digits.cache_dir", "data.eval_size"),
)
"""Settings (or their beginnings) that a resumed run may change without a word."""
FIXED = ("data.", "model.", "digits.")
"""Beginnings of settings that it may not change; paths of data may, because files move."""


class Checkpoints:
    """The folder ``run_dir/checkpoints``, one subfolder a step.

    Args:
        run_dir: The run's folder.
        keep: Complete checkpoints kept.
    """

    def __init__(self, run_dir: Path, keep: int) -> None:
        self.folder, self.keep = run_dir / "checkpoints", keep

    @contextmanager
    def writing(self, step: int, state: dict[str, Any]) -> Iterator[Path]:
        """A temporary folder to save into; at the end it gets its manifest and its final name, and old ones go.

        If the block raises, or the process dies within it, nothing that looks like a checkpoint is left.

        Args:
            step: Step that was finished.
            state: The loop's own small state, written as JSON.

        Raises:
            SkyrlError: if it can't be written, for example on a full disk. The checkpoints before are still there.
        """
        target = self.folder / f"step_{step:06d}"
        temporary = self.folder / f".writing_{step:06d}"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir(parents=True)
            yield temporary
            (temporary / STATE).write_text(json.dumps(state | {"format": FORMAT}, indent=2))
            manifest = {"step": step, "files": {name: _digest(temporary / name) for name in _files(temporary)}}
            (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2))
            shutil.rmtree(target, ignore_errors=True)
            temporary.rename(target)
            for old in self.complete()[self.keep :]:
                shutil.rmtree(old)
        except BaseException as error:
            shutil.rmtree(temporary, ignore_errors=True)  # on a full disk it would keep the disk full
            # A full disk is an OSError here, and whatever their libraries make of it in the members.
            if isinstance(error, (OSError, SkyrlError)) and not isinstance(error, MemberLost):
                free = shutil.disk_usage(self.folder).free if self.folder.exists() else 0
                raise SkyrlError(
                    f"checkpoint of step {step} could not be written to {self.folder}: {error} ({free / 1e9:.1f} GB "
                    "are free there); the checkpoints before it are complete"
                ) from error
            raise

    def complete(self) -> list[Path]:
        """Folders that carry a manifest, newest first. Their content is not checked here."""
        manifests = self.folder.glob(f"step_*/{MANIFEST}")
        # By time, not by step: a run that went on from an earlier step may still have later ones beside it.
        return [p.parent for p in sorted(manifests, key=lambda p: (p.stat().st_mtime_ns, p), reverse=True)]

    def newest(self) -> Path | None:
        """The newest one that is whole; broken ones are named in the log and skipped."""
        return next(filter(_is_whole, self.complete()), None)


def read_state(folder: Path) -> dict[str, Any]:
    """The loop's state of a checkpoint.

    Raises:
        SkyrlError: if another version of skyrl wrote it, or it is damaged.
    """
    state = _json(folder / STATE, "the loop's state")
    if state.get("format", 1) != FORMAT:
        raise SkyrlError(
            f"checkpoint {folder} has layout {state.get('format', 1)}, this version of skyrl reads layout {FORMAT}: "
            "checkpoints of other versions can't be resumed; start a new run from the policy that the old one exported"
        )
    if not isinstance(state.get("step"), int):
        raise SkyrlError(f"{folder / STATE} is damaged: step={state.get('step')!r} must be a whole number")
    return state


def _json(path: Path, what: str) -> dict[str, Any]:
    """The object in a file of JSON."""
    try:
        if not path.is_file():  # a pipe would never end
            raise FileNotFoundError("no such file")
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise SkyrlError(f"{path}, {what}, can't be read: {type(error).__name__}: {error}") from error
    if not isinstance(found, dict):
        raise SkyrlError(f"{path}, {what}, is damaged: it holds {type(found).__name__}, no object")
    return found


def verify(folder: Path) -> None:
    """Compare every file with the manifest.

    Raises:
        SkyrlError: naming what is missing or changed.
    """
    files = _json(folder / MANIFEST, "the list of a checkpoint's files").get("files")
    if not isinstance(files, dict):
        raise SkyrlError(f"checkpoint {folder} is broken: {MANIFEST} lists no files")
    for name, digest in files.items():
        path = folder / name
        if not path.is_file():
            raise SkyrlError(f"checkpoint {folder} is broken: {name} is missing")
        if not path.resolve().is_relative_to(folder.resolve()):
            raise SkyrlError(f"checkpoint {folder} is broken: {name} leads out of it")
        if _digest(path) != digest:
            raise SkyrlError(f"checkpoint {folder} is broken: {name} is not what was written")


def _is_whole(folder: Path) -> bool:
    try:
        verify(folder)
    except SkyrlError as error:
        logger.warning("skipped: %s", error)
        return False
    return True


def find_checkpoint(resume: str, run_dir: Path, name: str) -> Path | None:
    """The checkpoint that ``resume`` means.

    ``auto`` looks in ``run_dir`` if it holds a complete checkpoint, else in the run folders beside it that belong to
    runs of the same name and to this user: in a shared folder it takes over nothing of anybody else's.

    Args:
        resume: ``no``, ``auto`` or a checkpoint folder.
        run_dir: This run's folder.
        name: This run's name.

    Returns:
        A verified checkpoint, or None for ``no`` and for ``auto`` when there is none. Broken ones, and another user's,
        are named in the log and skipped.

    Raises:
        SkyrlError: if an explicitly named checkpoint is broken, or if ``no`` is asked for in a folder that holds
            checkpoints already: a fresh run would overwrite that run's files.
    """
    own = Checkpoints(run_dir, keep=1).complete()
    if resume == "no":
        if own:
            raise SkyrlError(f"run_dir={run_dir} holds the checkpoints of a run; set another run_dir, or resume=auto")
        return None
    if resume != "auto":
        verify(Path(resume))
        return Path(resume).resolve()
    runs = [run_dir] if own else [run for run in _siblings(run_dir) if _name_of(run) == name and not in_use(run)]
    manifests = [manifest for run in runs for manifest in run.glob(f"checkpoints/step_*/{MANIFEST}")]
    for folder in sorted((p.parent for p in manifests), key=lambda p: (p / MANIFEST).stat().st_mtime, reverse=True):
        if _is_whole(folder):
            return folder.resolve()
    for folder in sorted(folder for run in runs for folder in run.glob("checkpoints/step_*")):
        if not (folder / MANIFEST).exists():
            logger.warning("skipped: checkpoint %s has no %s", folder, MANIFEST)
    return None


def in_use(run_dir: Path) -> bool:
    """True if a living process holds the folder."""
    try:
        with (run_dir / LOCK).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _siblings(run_dir: Path) -> list[Path]:
    """Run folders beside this one, without those that another user could have put there."""
    found = sorted(path.parent for path in run_dir.parent.glob(f"*/{SETTINGS}"))
    own = [run for run in found if all(_is_own(path) for path in (run, run / SETTINGS, run / "checkpoints"))]
    if foreign := sorted(set(found) - set(own)):
        logger.warning(
            "skipped: %d run folders of other users, such as %s; to go on with one, give resume its checkpoint",
            len(foreign),
            foreign[0],
        )
    return own


def _is_own(path: Path) -> bool:
    """Whether what the path leads to is this user's, or does not exist."""
    try:
        return path.stat().st_uid == os.geteuid()
    except FileNotFoundError:
        return True
    except OSError:
        return False


def _name_of(run: Path) -> str | None:
    """Name of the run that a folder is of; None, with a warning, if its file of settings is none of ours."""
    try:
        return str(_json(run / SETTINGS, "a run's settings")["name"])
    except (SkyrlError, KeyError) as error:
        logger.warning(
            "skipped: %s is no file of settings of a run (%s: %s)", run / SETTINGS, type(error).__name__, error
        )
        return None


def check_settings(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What a resumed run does differently, a line a setting: ``key: old → new``.

    Where files lie, how long the run is and what it shows may change without a word.

    Args:
        old: ``config.json`` of the run that is resumed.
        new: this run's, of the same form.

    Raises:
        SkyrlError: if data or models are others: the position in the data and the weights would mean something else.
    """
    if not isinstance(old, dict) or "model" not in old:
        raise SkyrlError(f"{SETTINGS} of the run that shall go on is damaged: it holds no settings")
    before, after = _flat(old), _flat(new)
    changed = [
        f"{key}: {before.get(key)!r} → {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not key.startswith(FREE)
    ]
    fixed = [line for line in changed if line.startswith(FIXED) and not line.split(":")[0].endswith("_path")]
    if fixed:
        raise SkyrlError(
            f"a resumed run needs the data and models that it began with; changed: {'; '.join(fixed)}. Repeat the "
            "settings of the first start, or start a new run"
        )
    return changed


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


# ---------------------------------------------------------------- the run's folder


def new_folder(run_dir: Path) -> Path:
    """Make the folder of a fresh run. One that is named by the time gets a number if another run has it already.

    Raises:
        SkyrlError: if it holds a run, or can't be made.
    """
    try:
        if not BY_TIME.fullmatch(run_dir.name):
            run_dir.mkdir(parents=True, exist_ok=True)
            if (run_dir / SETTINGS).exists():
                raise SkyrlError(f"run_dir={run_dir} holds a run already ({SETTINGS}); set another one, or resume=auto")
            return run_dir
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        candidate, number = run_dir, 1
        while True:
            try:
                candidate.mkdir()
                return candidate
            except FileExistsError:
                number += 1
                candidate = run_dir.with_name(f"{run_dir.name}-{number}")
    except OSError as error:
        raise SkyrlError(f"run_dir={run_dir} can't be made: {error}; set another one") from error


def put_aside(run_dir: Path, name: str) -> Path | None:
    """Move what a run of this name left that ended before its first checkpoint into a subfolder, so that it can begin
    again.

    Returns:
        The subfolder; None if there is no such run.
    """
    left = (run_dir / SETTINGS).is_file() and _is_own(run_dir) and _name_of(run_dir) == name
    if not left or in_use(run_dir) or any((run_dir / "checkpoints").glob("step_*")):
        return None
    number = 1
    while (aside := run_dir / f"{UNFINISHED}{number}").exists():
        number += 1
    files = [path for path in run_dir.iterdir() if path.name != LOCK and not path.name.startswith(UNFINISHED)]
    aside.mkdir()
    for path in sorted(files, key=lambda path: path.name == SETTINGS):  # last: until then it can be done again
        path.rename(aside / path.name)
    return aside


@contextmanager
def held(run_dir: Path) -> Iterator[None]:
    """Hold the folder against other processes; the lock goes with this process, however it ends.

    Raises:
        SkyrlError: if a living process holds it (on file systems that know locks), or nothing can be written there.
    """
    try:
        handle = os.open(run_dir / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise SkyrlError(f"run_dir={run_dir} can't be written to: {error}; set another one") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SkyrlError(f"run_dir={run_dir} is in use by a run that is still going on") from error
        yield
    finally:
        os.close(handle)
