"""The sample buffer's member dies, whenever: the one that is built anew goes on as the lost one would have."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skyrl.batch import journal
from skyrl.batch.batcher import Batcher
from skyrl.batch.journal import HEAD, Journal
from skyrl.data.stream import PromptStream
from skyrl.records import Begun, DataError, Prompt, RewardParts, Sample, SampleGroup, SkyrlError, TrainBatch
from skyrl.replay import saved
from skyrl.settings import (
    AlgorithmConfig,
    BufferConfig,
    Config,
    ControllerConfig,
    GrpoConfig,
    GrpoFilter,
    MonitoringConfig,
    MpoConfig,
    ThresholdConfig,
    ThresholdKind,
    Unit,
)

LEARNING = ThresholdConfig(kind=ThresholdKind.quantile, value=0.0, quantile=0.3, every=2, min_labelled=1, window=16)
PICTURES = [np.full((2, 3, 3), shade, dtype=np.uint8) for shade in range(40)]


def make(run: Path | str, **options: Any) -> Batcher:
    """A small buffer that drops and replays, and thresholds that move."""
    buffer = {"capacity": 9, "max_age": 3, "mix": 1.0} | options
    cfg = Config(
        run_dir=str(run),
        controller=ControllerConfig(seed=3, lag=1),
        buffer=BufferConfig(**buffer),
        algorithm=AlgorithmConfig(
            grpo=GrpoConfig(filter=GrpoFilter.all), mpo=MpoConfig(threshold=LEARNING, pairs_per_prompt=2), gate=LEARNING
        ),
        monitoring=MonitoringConfig(samples="off"),
    )
    return Batcher(cfg, "")


def group(rng: np.random.Generator, name: str, version: int) -> SampleGroup:
    """Four answers; about half of the groups are effective, some answers failed."""
    samples = []
    for index in range(4):
        length = int(rng.integers(1, 5))
        sample = Sample(
            index,
            rng.integers(0, 99, length).astype(np.int32),
            rng.normal(size=length).astype(np.float32),
            f"{name}: \ud800 {index}",
            False,
            version,
            RewardParts(float(rng.integers(2)), 1.0, float(rng.normal()), 0.5, {"exact": 1.0}),
            advantage=float(rng.normal()),
            rule_advantage=float(rng.integers(2)),
            false_claims=int(rng.integers(2)),
        )
        if rng.random() < 0.1:
            sample = replace(sample, reward=None, error="crashed", advantage=0.0, rule_advantage=0.0)
        samples.append(sample)
    images = tuple(PICTURES[int(place)] for place in rng.integers(0, len(PICTURES), rng.integers(0, 3)))
    facts = {"grid": [[1, 2]], "large": 2**80} if images else {}
    prompt = Prompt(name, "?", images, "", "exact", facts=facts, extra={"rate": float("nan")})
    return SampleGroup(prompt, rng.integers(0, 9, 3).astype(np.int32), samples, checkable=bool(images))


def groups_of(step: int) -> list[SampleGroup]:
    """What is sampled for a step, always the same."""
    rng = np.random.default_rng(step)
    return [group(rng, f"{step}/{place}", max(0, step - 1 - int(rng.integers(2)))) for place in range(3)]


def run_step(one: Batcher, step: int) -> dict[str, np.ndarray]:
    """The step's batch and report, as bytes."""
    batch, report = one.exchange(step, step - 1, groups_of(step))
    return saved.pack((batch, report))


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(one[name].tobytes() == other[name].tobytes() for name in one)


def state(one: Batcher) -> dict[str, np.ndarray]:
    return saved.pack(one._state([], []))


def log_of(run: Path) -> Path:
    (log,) = (run / journal.FOLDER).glob("log_*")
    return log


# ---------------------------------------------------------------- a kill at any byte


@settings(max_examples=25, deadline=None)
@given(
    saves=st.sets(st.integers(1, 10)),
    small=st.sampled_from([0, 1500, 10**6]),
    unit=st.sampled_from(Unit),
    kills=st.dictionaries(st.integers(1, 10), st.tuples(st.just(1.0) | st.floats(0, 1), st.booleans()), min_size=1),
)
def test_killed_after_any_byte_it_goes_on_as_if_nothing_had_happened(
    saves: set[int], small: int, unit: Unit, kills: dict[int, tuple[float, bool]]
) -> None:
    never = make("", unit=unit)
    wanted = {step: run_step(never, step) for step in range(1, 11)}
    with tempfile.TemporaryDirectory() as folder, patch.object(journal, "SMALL", small):
        run, newest, step = Path(folder) / "run", None, 1
        one = make(run, unit=unit)
        while step <= 10:
            assert same(run_step(one, step), wanted[step])
            share, acknowledged = kills.pop(step, (None, True))
            if share is not None:
                # In the middle of its record, or behind it, with the driver told or not.
                one.journal.close()
                log = log_of(run)
                ends = [0, *(end for _, end in journal._records(log))]
                left = ends[-2] + round(share * (ends[-1] - ends[-2]))
                os.truncate(log, left)
                step = step if left == ends[-1] and acknowledged else step - 1
                one = make(run, unit=unit)
                one.recover(newest, step)
            elif step in saves:
                newest = Path(folder) / f"checkpoint_{step}"
                one.save(newest, {}, {})
            step += 1
        assert same(state(one), state(never))


def test_the_rates_at_which_that_test_looks_are_not_all_one_case() -> None:
    """Its groups fill the buffer, move the thresholds, and give pairs, replays and pictures."""
    with tempfile.TemporaryDirectory() as folder:
        one = make(Path(folder))
        reports = [one.exchange(step, step - 1, groups_of(step)) for step in range(1, 11)]
    assert max(report.metrics["buffer/size"] for _, report in reports) == 9
    assert sum(report.metrics["buffer/replayed"] for _, report in reports) > 5
    assert len({report.metrics["gate/tau"] for _, report in reports}) > 3
    assert sum(len(batch.pairs) for batch, _ in reports) > 5


# ---------------------------------------------------------------- a kill at any operation on files


class Killed(BaseException):
    pass


OPERATIONS = [(os, "fsync"), (os, "link"), (os, "replace"), (Path, "replace"), (Path, "unlink"), (saved, "save_file")]


def killing(stack: ExitStack, place: int) -> list[int]:
    """Let the ``place``-th operation on files, and all after it, do nothing but raise; counts them."""
    count = [0]

    def killed(operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            if count[0] >= place:
                raise Killed
            return operation(*args, **kwargs)

        return call

    for owner, name in OPERATIONS:
        stack.enter_context(patch.object(owner, name, killed(getattr(owner, name))))
    return count


@pytest.mark.parametrize("what", ["save", "compaction", "first step"])
def test_killed_between_any_two_operations_on_files(tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run, kept = tmp_path / "run", 0 if what == "first step" else 4
    if what == "compaction":
        monkeypatch.setattr(journal, "SMALL", 0)
    whole, wanted = make(tmp_path / "whole"), {}
    for step in range(1, 9):
        wanted[step] = run_step(whole, step)
    for place in range(1, 50):
        shutil.rmtree(run, ignore_errors=True)
        run.mkdir()
        one, checkpoint = make(run), run / "checkpoint"
        for step in range(1, kept + 1):
            run_step(one, step)
        with ExitStack() as stack, suppress(Killed):
            count = killing(stack, place)
            if what == "save":
                one.save(checkpoint, {}, {})
            else:
                run_step(one, kept + 1)
        if count[0] < place:
            assert place > 5
            break
        two = make(run)
        two.recover(None, kept)
        assert all(same(run_step(two, step), wanted[step]) for step in range(kept + 1, 9)), place
        assert len(list((run / journal.FOLDER).iterdir())) == 2


# ---------------------------------------------------------------- what it costs


def test_base_and_log_are_bounded_by_the_state_and_a_picture_stands_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "SMALL", 20_000)
    rng, one = np.random.default_rng(0), make(tmp_path, capacity=12)
    shown = [rng.integers(0, 256, (16, 16, 3)).astype(np.uint8) for _ in range(4)]
    sizes, begun = [], set()
    for step in range(1, 80):
        groups = groups_of(step)
        for place, each in enumerate(groups):
            each.prompt = replace(each.prompt, images=(shown[(step + place) % 4].copy(),))
        one.exchange(step, step - 1, groups)
        base, log = sorted((tmp_path / journal.FOLDER).iterdir())
        begun.add(base.name)
        sizes.append(log.stat().st_size)
        assert log.stat().st_size < max(20_000, 2 * base.stat().st_size) + 10_000
        held = saved.picture_names(base)
        for content, _ in journal._records(log):
            new = {name for name in journal.load(content) if name.startswith(saved.PICTURE)}
            assert not new & held
            held |= new
        assert len(held) <= 4
    assert len(begun) > 3 and max(sizes) > 20_000


def test_a_checkpoints_file_is_the_base_without_a_second_copy(tmp_path: Path) -> None:
    one = make(tmp_path)
    run_step(one, 1)
    (tmp_path / "checkpoint").mkdir()
    one.save(tmp_path / "checkpoint" / "state", {}, {})
    base = tmp_path / journal.FOLDER / "base_000001.safetensors"
    assert base.samefile(tmp_path / "checkpoint" / "state")
    run_step(one, 2)
    shutil.rmtree(tmp_path / "checkpoint")  # it failed, or is too old to be kept
    two = make(tmp_path)
    two.recover(None, 2)
    assert same(run_step(two, 3), run_step(make_at(tmp_path / "other", 2), 3))


def make_at(run: Path, step: int) -> Batcher:
    one = make(run)
    for each in range(1, step + 1):
        run_step(one, each)
    return one


def test_a_file_system_without_links_gets_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no links")

    monkeypatch.setattr(os, "link", refuse)
    one = make(tmp_path)
    run_step(one, 1)
    one.save(tmp_path / "state", {}, {})
    assert not (tmp_path / journal.FOLDER / "base_000001.safetensors").samefile(tmp_path / "state")
    two = make(tmp_path)
    two.recover(None, 1)
    assert same(run_step(two, 2), run_step(one, 2))


# ---------------------------------------------------------------- a disk that is full


def test_on_a_full_disk_the_run_goes_on_says_so_and_is_safe_again_when_there_is_room(tmp_path: Path) -> None:
    one, never = make_at(tmp_path, 2), make("")
    wanted = [never.exchange(step, step - 1, groups_of(step)) for step in range(1, 8)]
    size = log_of(tmp_path).stat().st_size

    def full(file: Any, content: bytes) -> None:
        file.write(content[:7])
        raise OSError(errno.ENOSPC, "No space left on device")

    with (
        patch.object(journal, "_write_all", full),
        patch.object(saved, "save_file", side_effect=OSError(errno.ENOSPC, "No space left on device")),
    ):
        reports = [one.exchange(step, step - 1, groups_of(step)) for step in (3, 4, 5)]
    (said,) = reports[0][1].notes
    assert re.search(
        r"can't write step 3 to .*buffer: .*No space .* GB are free there.*end it, and it could be resumed", said
    )
    assert not reports[1][1].notes and not reports[2][1].notes  # once
    assert log_of(tmp_path).stat().st_size == size  # what could be written of it takes no room
    two = make(tmp_path)
    with pytest.raises(SkyrlError, match="can't go back to step 5"):
        two.recover(None, 5)
    reports += [one.exchange(6, 5, groups_of(6))]
    assert all(
        same(saved.pack((batch, report.metrics)), saved.pack((want, told.metrics)))
        for (batch, report), (want, told) in zip(reports, wanted[2:6], strict=True)
    )
    two.recover(None, 6)
    assert same(run_step(two, 7), saved.pack(wanted[6]))


def test_a_checkpoint_that_fails_leaves_the_log_of_the_one_before(tmp_path: Path) -> None:
    one = make_at(tmp_path, 2)
    full = patch.object(saved, "save_file", side_effect=OSError(errno.ENOSPC, "full"))
    with full, pytest.raises(OSError, match="full"):
        one.save(tmp_path / "state", {}, {})
    assert not list(tmp_path.glob("state*"))
    two = make(tmp_path)
    two.recover(None, 2)
    assert same(state(two), state(one)) and same(run_step(two, 3), run_step(one, 3))


# ---------------------------------------------------------------- which state it is


def test_a_rewind_forgets_later_steps_and_a_fresh_run_forgets_all(tmp_path: Path) -> None:
    one, checkpoint = make_at(tmp_path, 2), tmp_path / "state"
    one.save(checkpoint, {}, {})
    wanted = {step: run_step(one, step) for step in (3, 4, 5)}
    one.load(checkpoint)  # in the same process, because a learner rank was lost
    assert same(run_step(one, 3), wanted[3])
    two = make(tmp_path)
    two.recover(checkpoint, 2)
    assert [same(run_step(two, step), wanted[step]) for step in (3, 4, 5)] == [True] * 3
    with pytest.raises(SkyrlError, match=r"can't go back to step 6: .*buffer does not reach it, and the newest checkp"):
        make(tmp_path).recover(checkpoint, 6)
    with pytest.raises(SkyrlError, match="can't go back to step 1"):
        make(tmp_path).recover(checkpoint, 1)
    # The log belongs to this life of the run, a checkpoint of the same step may be of the one before.
    two.recover(checkpoint, 5)
    three = make(tmp_path)
    three.recover(checkpoint, 0)
    assert same(run_step(three, 1), run_step(make(tmp_path / "fresh"), 1))
    assert log_of(tmp_path).name == "log_000000"
    with pytest.raises(SkyrlError, match="can't go back to step 5"):
        make(tmp_path).recover(None, 5)


def test_without_its_folder_the_checkpoint_serves(tmp_path: Path) -> None:
    one, checkpoint = make_at(tmp_path, 4), tmp_path / "state"
    one.save(checkpoint, {}, {})
    shutil.rmtree(tmp_path / journal.FOLDER)  # built anew on another host
    two = make(tmp_path)
    two.recover(checkpoint, 4)
    assert same(run_step(two, 5), run_step(one, 5))
    make("").recover(checkpoint, 4)


def test_what_was_asked_ahead_is_there_as_long_as_its_step_may_come(tmp_path: Path) -> None:
    begun = Begun(7, "row", 4, np.zeros(0, np.int32), groups_of(9)[0].samples, (1,), lag=1)
    one, checkpoint = make_at(tmp_path, 2), tmp_path / "state"
    one.save(checkpoint, {3: 2, 4: 1}, {2: 1, 3: 1}, [groups_of(3)[0]], [], groups_of(4), [begun], [begun, begun])
    one.load(checkpoint)
    assert one.pending(3, 0)[0].prompt.id == "3/0"
    run_step(one, 3)
    two = make(tmp_path)
    two.recover(checkpoint, 3)
    assert [each.prompt.id for each in two.pending(4, 0)] == ["4/0", "4/1", "4/2"]
    assert same(saved.pack(two.begun(3)), saved.pack([begun, begun]))
    for gone in (lambda: two.pending(3, 0), lambda: two.begun(2)):
        with pytest.raises(SkyrlError):
            gone()
    run_step(two, 4)
    assert not two._pending and not two._begun


class Pairs:
    """Offline pairs: two rows of ten a step."""

    def __init__(self) -> None:
        self.stream = PromptStream(10, seed=4)

    def batch(self, step: int, version: int, weights: dict[str, float]) -> TrainBatch:
        return TrainBatch(step, version, {str(row): 1.0 for row in self.stream.take(2)}, [], [], 0, 0)


def test_the_position_in_offline_pairs_is_in_the_log(tmp_path: Path) -> None:
    def offline(run: Path) -> Batcher:
        one = make(run)
        one.pairs = Pairs()  # type: ignore[assignment]
        one._first_pair = one.pairs.stream.state_dict()
        return one

    one = offline(tmp_path)
    wanted = [one.offline(step, step - 1)[0].weights for step in range(1, 9)]
    for step in (5, 0):
        two = offline(tmp_path)
        two.pairs.stream.take(3)
        two.recover(None, step)
        assert [two.offline(each, each - 1)[0].weights for each in range(step + 1, 9)] == wanted[step:]


def test_a_damaged_record_ends_what_is_known_and_a_damaged_base_is_named(tmp_path: Path) -> None:
    make_at(tmp_path, 3)
    log = log_of(tmp_path)
    content = bytearray(log.read_bytes())
    (_, first), (_, second), _ = journal._records(log)
    content[first + HEAD.size + 5] ^= 1
    log.write_bytes(content)
    assert Journal(str(tmp_path)).recover(2) is None
    found = Journal(str(tmp_path)).recover(1)
    assert found is not None and [record.step for record in found[1]] == [1] and log.stat().st_size == first < second
    log.write_bytes(HEAD.pack(2**63, 0) + b"x")  # a length that is none
    assert Journal(str(tmp_path)).recover(1) is None
    base = tmp_path / journal.FOLDER / "base_000000.safetensors"
    base.write_bytes(base.read_bytes()[:100])
    with pytest.raises(DataError, match=r"base_000000\.safetensors"):
        Journal(str(tmp_path)).recover(1)


@pytest.fixture(autouse=True)
def synced_fast() -> Iterator[None]:
    """The disk of the machine that tests is not what is tested."""
    with patch.object(os, "fsync"):
        yield
