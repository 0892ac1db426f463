"""The other hosts of a run's cluster, and the files that members there need.

A member opens models, data and the run's folder by their paths, wherever it runs. On a file system that all hosts share
that is all there is. Without one, this module copies what a host lacks to the same path there, through Ray's object
store, before any member starts; and it brings what members wrote into the run's folder on their hosts, such as their
parts of a checkpoint, to the host that this process runs on, where the run's folder is.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from skyrl.crew import host_files
from skyrl.crew.crew import Crew
from skyrl.crew.host_files import Part, listing, outlook, parts, read, remove, source, state, write
from skyrl.records import ConfigError, MemberLost, SkyrlError
from skyrl.settings import Config
from skyrl.settings.reward_model import is_endpoint
from skyrl.settings.system import paths_of


@dataclass(slots=True)
class Host:
    """One of the others."""

    address: str
    node: str
    """Ray's id of it."""
    shares_run_dir: bool = True


@dataclass(slots=True)
class Hosts:
    """Those of this process's Ray session. Does nothing where there is only one.

    Args:
        run_dir: The run's folder, which is on this host; None if nothing is written.
        needed: Setting → files and folders that it names, which every host needs.
        seconds: That one call may take.
        say: Where a line goes for what was copied.
    """

    run_dir: Path | None
    needed: dict[str, list[Path]]
    seconds: float
    say: Callable[[str], object] = print
    known: dict[str, Host] = field(default_factory=dict)
    """By Ray's id: those that were looked at and have all that is needed."""

    def prepare(self) -> None:
        """Look at the hosts that came since the last time, and copy to them what they lack.

        Raises:
            ConfigError: naming host, path and setting, where another host has other files than this one, has no room
                for them, can't write there, or has other sources of skyrl.
        """
        while new := self._unknown():
            try:
                self._look(new)
                for setting, paths in self.needed.items():
                    for path in paths:
                        self._give(new, path, setting)
            except MemberLost:
                if len(self._unknown()) >= len(new):
                    raise
                continue  # one of them went away meanwhile, and need not have anything
            self.known |= {host.node: host for host in new}

    def _unknown(self) -> list[Host]:
        """Those that were not looked at yet; forgets those that are gone."""
        import ray

        nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
        self.known = {node: host for node, host in self.known.items() if node in nodes}
        own = _own_node()
        return [Host(at, node) for node, at in nodes.items() if node != own and node not in self.known]

    def apart(self) -> list[Host]:
        """Known hosts that don't see the run's folder."""
        return [host for host in self.known.values() if not host.shares_run_dir]

    def home(self) -> Any:
        """Ray's scheduling strategy for a member that keeps files in the run's folder: this host."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        return NodeAffinitySchedulingStrategy(_own_node(), soft=False)

    @contextmanager
    def gathered(self, folder: Path, crew: Crew[Any]) -> Iterator[None]:
        """The crew's members write files below ``folder`` within the block; at its end all of them are here.

        Raises:
            MemberLost: if a host went away with its files.
        """
        yield
        for host in self._of(crew):
            self._fetch(host, folder)

    @contextmanager
    def lent(self, folder: Path, crew: Crew[Any]) -> Iterator[None]:
        """Within the block the crew's members find below ``folder`` what is there here.

        Raises:
            MemberLost: if a host went away meanwhile.
        """
        if others := self._of(crew):
            self._all(others, remove, folder)
            self._give(others, folder, "run_dir")
        yield
        self._all(others, remove, folder)

    def hand_out(self, file: Path) -> None:
        """A file of the run's folder, that members on every host read, also on those that join later."""
        self.needed.setdefault("run_dir", [])
        if file not in self.needed["run_dir"]:
            self.needed["run_dir"].append(file)
        if others := self.apart():
            self._all(others, remove, file)
            self._give(others, file, "run_dir")

    def _of(self, crew: Crew[Any]) -> list[Host]:
        """Those apart that the crew has members on."""
        if not (others := self.apart()):
            return []
        at = set(crew.hosts())
        return [host for host in others if host.address in at]

    # ------------------------------------------------------------ one host

    def _look(self, hosts: Sequence[Host]) -> None:
        mark = None if self.run_dir is None else self.run_dir / f".seen_{uuid.uuid4().hex}"
        if mark is not None:
            mark.touch()
        try:
            for host, seen in zip(hosts, self._all(hosts, outlook, mark), strict=True):
                theirs, host.shares_run_dir, problem = seen
                if theirs != source():
                    raise ConfigError(
                        f"host {host.address} has another version of skyrl than this one: make them equal"
                    )
                if problem:
                    raise ConfigError(f"host {host.address} can't write to run_dir={self.run_dir}: {problem}")
        finally:
            if mark is not None:
                mark.unlink(missing_ok=True)
        if others := [host.address for host in hosts if not host.shares_run_dir]:
            self.say(f"{', '.join(others)}: run_dir is not shared, so what is written there is brought here")

    def _give(self, hosts: Sequence[Host], path: Path, setting: str) -> None:
        """Copy what they lack of a file or folder; one that has all of it gets nothing."""
        own = listing(path)
        lacking: dict[str, list[Host]] = {}
        for host, (theirs, free) in zip(hosts, self._all(hosts, state, path), strict=True):
            lacks = [name for name in own if name not in theirs]
            if other := [name for name in own if name in theirs and theirs[name] != own[name]]:
                raise ConfigError(
                    f"{setting}={path}: host {host.address} has another {other[0] or 'file'} there than this host; "
                    "delete it, and it is copied, or put the same there"
                )
            needs = sum(own[name][0] for name in lacks)
            if needs > free:
                raise ConfigError(
                    f"{setting}={path} is not on host {host.address}, and {free / 1e9:.1f} GB are free there for "
                    f"{needs / 1e9:.1f} GB: make room, or share a file system"
                )
            if lacks:
                self.say(f"copying {path} to {host.address}: {len(lacks)} files, {needs / 1e6:.1f} MB")
            for name in lacks:
                lacking.setdefault(name, []).append(host)
        self._send(path, lacking, setting)

    def _send(self, path: Path, lacking: dict[str, list[Host]], setting: str) -> None:
        import ray

        for to in {tuple(host.node for host in hosts): hosts for hosts in lacking.values()}.values():
            for pieces in parts(path, [name for name, hosts in lacking.items() if hosts == to]):
                packed = ray.put(pieces)  # once, for all of them
                for host, problem in zip(to, self._all(to, write, path, packed), strict=True):
                    if problem:
                        raise ConfigError(f"{setting}={path} can't be copied to host {host.address}: {problem}")

    def _fetch(self, host: Host, folder: Path) -> None:
        """Bring the files below a folder of another host here, and delete them there."""
        theirs, _ = self._call(host, state, folder, False)
        for name, (size, _) in theirs.items():
            for offset in range(0, max(size, 1), host_files.PIECE):
                part = Part(name, offset, self._call(host, read, folder / name, offset), size)
                if problem := write(folder, [part]):
                    raise SkyrlError(f"{folder / name} of host {host.address} can't be written here: {problem}")
        self._call(host, remove, folder)

    def _call(self, host: Host, function: Callable[..., Any], *args: Any) -> Any:
        return self._all([host], function, *args)[0]

    def _all(self, hosts: Sequence[Host], function: Callable[..., Any], *args: Any) -> list[Any]:
        """What a function returns on each of these hosts."""
        if not hosts:  # without another host there may be no Ray, and Ray would start by itself
            return []
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        found = []
        for host in hosts:
            where = NodeAffinitySchedulingStrategy(host.node, soft=False)
            found.append(ray.remote(function).options(num_cpus=0, scheduling_strategy=where).remote(*args))
        try:
            values: list[Any] = ray.get(found, timeout=self.seconds)
        except ray.exceptions.RayError as error:
            which = ", ".join(host.address for host in hosts)
            raise MemberLost(which, function.__name__, f"host {which} could not be asked for files: {error}") from error
        return values


def hosts_of(cfg: Config, policy: str, reward: str | None, train: bool) -> Hosts:
    """Those of a run with these models: folders, or the address of a reward model."""
    data = cfg.data
    needed = {"model.policy": [policy]}
    if reward is not None and not is_endpoint(reward):
        needed["model.reward"] = [reward]
    if data.source == "files":
        needed |= {"data.train_path": paths_of(data.train_path), "data.eval_path": paths_of(data.eval_path)}
        needed["data.picture_root"] = paths_of(data.picture_root)
    if train:  # the buffer member reads it
        needed["data.pairs_path"] = paths_of(data.pairs_path)
    run_dir = Path(cfg.run_dir) if train and cfg.run_dir and Path(cfg.run_dir).is_dir() else None
    return Hosts(
        run_dir, {key: [Path(path) for path in found] for key, found in needed.items()}, cfg.controller.timeout
    )


def _own_node() -> str:
    import ray

    return str(ray.get_runtime_context().get_node_id())
