"""Files on their way to other hosts and back. A folder stands for each host: its paths lie below that."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import ray
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from skyrl.crew import host_files as module
from skyrl.crew.hosts import Host, Hosts
from skyrl.records import ConfigError

PIECE = 64
SIZES = st.sampled_from([0, 1, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE, 3 * PIECE + 5])
NAMES = st.sampled_from(["a", "b", "sub/a", "sub/deep/c", "ü d", ".hidden"])


class Folders(Hosts):
    """Runs what is asked of a host on the paths below that host's folder; pieces are small, so that files are cut."""

    def __init__(self, root: Path, run_dir: Path | None = None, **needed: list[Path]) -> None:
        super().__init__(run_dir, needed, 1.0, say=lambda line: self.said.append(line))
        self.root, self.said = root, list[str]()

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _all(self, hosts: Sequence[Host], function: Callable[..., Any], *args: Any) -> list[Any]:
        def there(host: Host, value: Any) -> Any:
            return self.root / host.address / value.relative_to("/") if isinstance(value, Path) else value

        return [function(*(there(host, value) for value in args)) for host in hosts]

    def below(self, address: str, path: Path) -> Path:
        return self.root / address / path.relative_to("/")


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE", PIECE)
    monkeypatch.setattr(module, "READ_TO_COMPARE", 8)
    monkeypatch.setattr(ray, "put", lambda value: value)


def write(folder: Path, files: dict[str, int]) -> None:
    for number, (name, size) in enumerate(files.items()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(bytes((number + place) % 251 for place in range(size)))


def content(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def two(root: Path) -> list[Host]:
    for address in ("one", "two"):
        (root / address).mkdir(exist_ok=True)
    return [Host("one", "1"), Host("two", "2")]


@given(files=st.dictionaries(NAMES, SIZES, min_size=1), there=st.sets(NAMES))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_each_host_has_all_files_afterwards_and_gets_none_that_it_has(
    files: dict[str, int], there: set[str], tmp_path: Path
) -> None:
    root = tmp_path / "hosts"
    shutil.rmtree(root, ignore_errors=True)
    model = root / "here" / "model"
    write(model, files)
    hosts = Folders(root)
    others = two(root)
    own = hosts.below("one", model)
    for name in there & files.keys():
        (own / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(model / name, own / name)
    before = {name: (own / name).stat().st_ino for name in there & files.keys()}
    hosts._give(others, model, "model.policy")
    for host in others:
        assert content(hosts.below(host.address, model)) == content(model)
    assert {name: (own / name).stat().st_ino for name in before} == before
    hosts.said.clear()
    hosts._give(others, model, "model.policy")
    assert hosts.said == []


def test_a_single_file_is_copied(tmp_path: Path) -> None:
    hosts, others = Folders(tmp_path), two(tmp_path)
    file = tmp_path / "here" / "train.parquet"
    write(file.parent, {file.name: 3 * PIECE + 1})
    hosts._give(others, file, "data.train_path")
    assert hosts.below("two", file).read_bytes() == file.read_bytes()
    assert hosts.said[0] == f"copying {file} to one: 1 files, 0.0 MB"


@pytest.mark.parametrize("change", [lambda data: data + b"x", lambda data: data[:-1] + b"\xff"])
def test_another_file_of_the_same_name_is_named_and_left_alone(
    change: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    hosts, others = Folders(tmp_path), two(tmp_path)
    model = tmp_path / "here" / "model"
    write(model, {"config.json": 20, "model.safetensors": 500})
    other = hosts.below("two", model) / "model.safetensors"
    other.parent.mkdir(parents=True)
    other.write_bytes(kept := change((model / other.name).read_bytes()))
    with pytest.raises(ConfigError, match=f"^model.policy={model}: host two has another model.safetensors there than"):
        hosts._give(others, model, "model.policy")
    assert other.read_bytes() == kept
    assert not hosts.below("one", model).exists()  # nothing travels before all was looked at


def test_no_room_and_no_right_to_write_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hosts, others = Folders(tmp_path), two(tmp_path)
    model = tmp_path / "here" / "model"
    write(model, {"a": 100})
    blocking = hosts.below("two", model).parent
    blocking.parent.mkdir(parents=True)
    blocking.write_text("a file where a folder should be")
    with pytest.raises(ConfigError, match=f"^model.policy={model} can't be copied to host two: .*Not a directory"):
        hosts._give(others, model, "model.policy")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
    with pytest.raises(ConfigError, match=f"^model.policy={model} is not on host two, and 0.0 GB are free there"):
        hosts._give(others[1:], model, "model.policy")


def test_what_was_written_elsewhere_comes_here_and_is_deleted_there(tmp_path: Path) -> None:
    run = tmp_path / "here" / "run"
    hosts, others = Folders(tmp_path, run), two(tmp_path)
    folder = run / "checkpoints" / ".writing_000001" / "learner"
    write(folder, {"rank_0": 10})
    write(hosts.below("one", folder), {"rank_1": 3 * PIECE})
    write(hosts.below("two", folder), {"deep/rank_2": 1, "empty": 0})
    expected = content(folder) | content(hosts.below("one", folder)) | content(hosts.below("two", folder))
    hosts.known = {host.node: host for host in others}
    for host in others:
        host.shares_run_dir = False
    with hosts.gathered(folder, Crew("one", "two", "here")):  # type: ignore[arg-type]
        pass
    assert content(folder) == expected and len(expected) == 4
    assert not hosts.below("one", folder).exists() and not hosts.below("two", folder).exists()


def test_a_checkpoint_is_lent_for_the_time_of_loading(tmp_path: Path) -> None:
    run = tmp_path / "here" / "run"
    hosts, others = Folders(tmp_path, run), two(tmp_path)
    folder = run / "checkpoints" / "step_000001" / "learner"
    write(folder, {"rank_0": 10, "deep/rank_1": 200})
    write(hosts.below("two", folder), {"rank_0": 11})  # left by a run that was killed
    hosts.known = {host.node: host for host in others}
    others[1].shares_run_dir = False
    with hosts.lent(folder, Crew("one", "two")):  # type: ignore[arg-type]
        assert content(hosts.below("two", folder)) == content(folder)
        assert not hosts.below("one", folder).exists()  # sees the run's folder
    assert not hosts.below("two", folder).exists()
    assert len(content(folder)) == 2


class Crew:
    """Members on these hosts."""

    def __init__(self, *addresses: str) -> None:
        self.addresses = list(addresses)

    def hosts(self) -> list[str]:
        return self.addresses
