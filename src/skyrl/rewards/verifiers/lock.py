"""How the sandbox's interpreter locks itself in, for good: Landlock, seccomp, resource limits, no capabilities.

Read and run by :mod:`skyrl.rewards.verifiers.jail`, in an interpreter that can import nothing but the standard library.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import struct
import sys
from typing import Any

_ALLOWED = (
    # Linux on x86-64: files (Landlock says which; no new folders), memory, time, threads, waiting; nothing else.
    *range(0, 16), *range(17, 29), 32, 33, *range(34, 40), 60, 61, 63, *range(73, 76), *range(77, 83), 84, 85, 87, 89,
    *range(95, 101), 102, 104, 107, 108, 110, 111, 115, 118, 120, 121, 124, 127, 128, 130, 131, 137, 138, 140, 143, 145,
    158, 186, 202, 204, 213, *range(217, 220), *range(228, 234), 257, 262, 263, 264, 267, 269, 270, 271, 273, 281,
    *range(290, 294), 309, 316, 318, 319, 324, 332, 334, 436, 439, 441, 449,
)  # fmt: skip
_IOCTLS = (0x5401, 0x5413, 0x5421, 0x5450, 0x5451)  # is it a terminal, how wide, close on exec, don't block
_SIGNAL_OWNERS = (8, 10, 15)  # fcntl: whom the kernel sends a signal when a pipe is ready
_READ_FILE, _READ_FOLDER, _EXECUTE, _WRITE_FILE, _TRUNCATE = 1 << 2, 1 << 3, 1 << 0, 1 << 1, 1 << 14


def _filter() -> bytes:
    """The seccomp program: a list of what is allowed. No socket, no process, no signal to others, no new limits."""
    allow, refuse, unknown = 0x7FFF0000, 0x50000 | 1, 0x50000 | 38
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    steps = [(load, 0, 0, 4), (equal, 1, 0, 0xC000003E), (give, 0, 0, 0x80000000), (load, 0, 0, 0)]
    steps += [(at_least, 0, 1, 0x40000000), (give, 0, 0, refuse)]

    def special(number: int, *body: tuple[int, int, int, int]) -> None:
        steps.extend([(equal, 0, len(body), number), *body])

    special(56, (load, 0, 0, 16), (any_bit, 0, 1, 0x10000), (give, 0, 0, allow), (give, 0, 0, refuse))  # threads only
    fcntl = [step for one in _SIGNAL_OWNERS for step in ((equal, 0, 1, one), (give, 0, 0, refuse))]
    special(72, (load, 0, 0, 24), *fcntl, (give, 0, 0, allow))
    ioctl = [step for one in _IOCTLS for step in ((equal, 0, 1, one), (give, 0, 0, allow))]
    special(16, (load, 0, 0, 24), *ioctl, (give, 0, 0, refuse))
    read_only = [step for half in (32, 36) for step in ((load, 0, 0, half), (equal, 1, 0, 0), (give, 0, 0, refuse))]
    special(302, *read_only, (give, 0, 0, allow))
    for number in _ALLOWED:
        special(number, (give, 0, 0, allow))
    steps += [(at_least, 0, 1, 424), (give, 0, 0, unknown), (give, 0, 0, refuse)]
    return b"".join(struct.pack("HBBI", *step) for step in steps)


def _checked(result: int, what: str) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def lock_in(request: dict[str, Any]) -> None:
    """Give up, for good, all that a program has no need of; OSError if this machine can't."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise OSError(f"it is written for Linux on x86-64, this is {sys.platform} on {platform.machine()}")
    c = ctypes.CDLL(None, use_errno=True)
    c.syscall.restype = ctypes.c_long
    _checked(c.prctl(1, 9, 0, 0, 0), "to die with the parent")
    if os.getppid() != request["parent"]:
        raise OSError("its parent has ended")
    limits = {"AS": request["memory"], "CPU": int(request["seconds"]) + 1, "FSIZE": request["file_size"]}
    for name, value in (limits | {"NOFILE": 64, "CORE": 0, "MSGQUEUE": 0, "MEMLOCK": 0}).items():
        kind = getattr(resource, f"RLIMIT_{name}", None)
        if kind is not None:
            hard = resource.getrlimit(kind)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(kind, (value, value))
    _checked(c.prctl(38, 1, 0, 0, 0), "no new privileges")
    none = struct.pack("Ii6I", 0x20080522, 0, *[0] * 6)
    _checked(c.syscall(126, none[:8], none[8:]), "capabilities")
    _landlock(c, request["readable"], request["folder"])
    code = ctypes.create_string_buffer(_filter())
    program = struct.pack("HxxxxxxQ", (len(code) - 1) // 8, ctypes.addressof(code))
    _checked(c.syscall(317, 1, 0, program), "seccomp")


def _landlock(c: ctypes.CDLL, readable: list[str], folder: str) -> None:
    version = _checked(c.syscall(444, None, ctypes.c_size_t(0), 1), "Landlock (Linux 5.13, switched on)")
    rights = (1 << {1: 13, 2: 14}.get(version, 15)) - 1
    rules = _checked(c.syscall(444, struct.pack("Q", rights), ctypes.c_size_t(8), 0), "Landlock")
    allowed = {path: _READ_FILE | _READ_FOLDER | _EXECUTE for path in readable}
    allowed |= {"/dev/null": _READ_FILE | _WRITE_FILE | _TRUNCATE, folder: rights}
    for path, right in allowed.items():
        if not os.path.exists(path):
            continue
        if not os.path.isdir(path):
            right &= _READ_FILE | _WRITE_FILE | _TRUNCATE | _EXECUTE
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        _checked(c.syscall(445, rules, 1, struct.pack("=Qi", right & rights, fd), 0), f"Landlock for {path}")
        os.close(fd)
    _checked(c.syscall(446, rules, 0), "Landlock")
    os.close(rules)
