"""Several hosts on this one machine: each is a network namespace on a common bridge, with processes, a host name, a
``/tmp``, a shared memory, a ``/etc/hosts`` and a home of its own. Only the project and the Python installation are the
same everywhere, as the documentation asks for."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

PROJECT = Path(__file__).parents[1]
NETWORK = "10.77.0"
OWN = ("RAY_", "WANDB_", "XDG_")
"""Beginnings of variables that a host does not take from the process that runs the tests."""
HOLD = """
set -e
hostname {name}
mount --bind {root}/etc_hosts /etc/hosts
mount -t tmpfs tmpfs /dev/shm
mount --bind {root}/home /mnt
mkdir /dev/shm/tmp
mount -t tmpfs tmpfs /dev/shm/tmp
case {project} in /tmp/*)
  mkdir -p /dev/shm{project}
  mount --bind {project} /dev/shm{project};;
esac
mount --rbind /dev/shm/tmp /tmp
echo up > /mnt/.up
trap : TERM
while :; do sleep 1 & wait; done
"""
"""The first process of a host: it ends the processes that lose their parents, and all others end with it."""


def missing() -> str:
    """Why such hosts can't be made here, or ''."""
    for tool in ("ip", "unshare", "nsenter"):
        if shutil.which(tool) is None:
            return f"there is no {tool}"
    tried = subprocess.run(
        [
            "unshare",
            "--net",
            "--mount",
            "--uts",
            "--pid",
            "--fork",
            "sh",
            "-c",
            "ip link add name a type veth peer name b",
        ],
        capture_output=True,
        text=True,
    )
    return tried.stderr.strip()


@dataclass
class Host:
    """One of them. Its home folder, ``/mnt`` inside, is ``home`` outside."""

    name: str
    address: str
    home: Path
    pid: int
    env: dict[str, str] = field(default_factory=dict)

    def inside(self, arguments: Sequence[str]) -> list[str]:
        """The command that runs ``arguments`` there."""
        return [
            "nsenter",
            "--target",
            str(self.pid),
            "--net",
            "--mount",
            "--uts",
            "--pid",
            f"--wd={PROJECT}",
            *arguments,
        ]

    def environment(self, **env: str) -> dict[str, str]:
        common = {key: value for key, value in os.environ.items() if not key.startswith(OWN)}
        return common | {"HOME": "/mnt", "TMPDIR": "/tmp"} | self.env | env

    def run(self, *arguments: str, timeout: float = 120.0, **env: str) -> subprocess.CompletedProcess[str]:
        """Run there, to its end; output and errors together."""
        return subprocess.run(
            self.inside(arguments),
            env=self.environment(**env),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout,
        )

    def start(self, log: Path, *arguments: str, **env: str) -> subprocess.Popen[str]:
        """Run there, beside the caller; it writes to ``log``."""
        with log.open("w") as file:
            return subprocess.Popen(
                self.inside(arguments), env=self.environment(**env), text=True, stdout=file, stderr=subprocess.STDOUT
            )

    def link(self, up: bool) -> None:
        """Plug its cable in or out."""
        _ip("link", "set", f"sk-{self.name}", "up" if up else "down")


@contextmanager
def network(folder: Path, names: Sequence[str], hosts_line: str = "{address} {name}") -> Iterator[list[Host]]:
    """Hosts with these names (up to 8 letters), on a network that only they are on.

    Args:
        folder: Gets a folder for each host.
        hosts_line: How a host's name stands in its own ``/etc/hosts``.
    """
    bridge, holders, found = "sk-bridge", list[subprocess.Popen[bytes]](), list[Host]()
    _remove(names)
    try:
        _ip("link", "add", bridge, "type", "bridge")
        _ip("address", "add", f"{NETWORK}.254/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        for number, name in enumerate(names, 1):
            address, root = f"{NETWORK}.{number}", folder / name
            (root / "home").mkdir(parents=True)
            lines = ["127.0.0.1 localhost", hosts_line.format(address=address, name=name)]
            (root / "etc_hosts").write_text("\n".join(lines) + "\n")
            _ip("netns", "add", f"sk-{name}")
            within = ["ip", "netns", "exec", f"sk-{name}"]
            _ip("link", "add", f"sk-{name}", "type", "veth", "peer", "name", "eth0", "netns", f"sk-{name}")
            _ip("link", "set", f"sk-{name}", "master", bridge, "up")
            for arguments in (
                ["link", "set", "lo", "up"],
                ["address", "add", f"{address}/24", "dev", "eth0"],
                ["link", "set", "eth0", "up"],
                ["route", "add", "default", "via", f"{NETWORK}.254"],
            ):
                _ip("-n", f"sk-{name}", *arguments)
            hold = ["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc", "bash", "-c"]
            holders.append(subprocess.Popen([*within, *hold, HOLD.format(name=name, root=root, project=PROJECT)]))
            while not (root / "home" / ".up").exists():
                if holders[-1].poll() is not None:
                    raise RuntimeError(f"host {name} could not be made")
                time.sleep(0.02)
            children = Path(f"/proc/{holders[-1].pid}/task/{holders[-1].pid}/children").read_text().split()
            found.append(Host(name, address, root / "home", int(children[0])))
        yield found
    finally:
        for host in found:
            os.kill(host.pid, signal.SIGKILL)  # the first process of its own: all others go with it
        for holder in holders:
            holder.kill()
            holder.wait()
        _remove(names)


def _remove(names: Sequence[str]) -> None:
    """What a run before that was killed may have left, too."""
    for name in names:
        subprocess.run(["ip", "netns", "delete", f"sk-{name}"], capture_output=True)
        subprocess.run(["ip", "link", "delete", f"sk-{name}"], capture_output=True)
    subprocess.run(["ip", "link", "delete", "sk-bridge"], capture_output=True)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
