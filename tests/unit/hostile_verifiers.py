"""Verifiers that misbehave, for test_verifier_runner.py. Imported in the verifier process by name."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time


def right(answer: str, truth: str) -> float:
    return float(answer == truth)


def process_id(answer: str, truth: str) -> float:
    """A score that tells the processes apart."""
    return 1.0 / os.getpid()


def hang(answer: str, truth: str) -> float:
    while True:
        time.sleep(1)


def hang_in_c(answer: str, truth: str) -> float:
    """Exponential backtracking in one C call that no signal handler or thread can interrupt."""
    return float(bool(re.match(r"(a+)+$", "a" * 60 + "b")))


def hang_with_child(answer: str, truth: str) -> float:
    """Starts a process of its own, writes its id to the file ``answer``, and hangs."""
    sleeper = subprocess.Popen(["sleep", "300"])
    with open(answer, "w") as file:
        file.write(str(sleeper.pid))
    return hang(answer, truth)


def crash(answer: str, truth: str) -> float:
    os._exit(3)


def leave(answer: str, truth: str) -> float:
    sys.exit(4)


def fail(answer: str, truth: str) -> float:
    raise KeyError("no such thing")


def hoard(answer: str, truth: str) -> float:
    return float(len(bytearray(8 << 30)) > 0)


def chatter(answer: str, truth: str) -> float:
    print("noise on stdout", flush=True)
    return 1.0


def too_high(answer: str, truth: str) -> float:
    return 1.5


def not_a_number(answer: str, truth: str) -> float:
    return float("nan")


def a_word(answer: str, truth: str) -> float:
    return "right"  # type: ignore[return-value]


def heavy_modules(answer: str, truth: str) -> float:
    return 0.0 if {"torch", "ray", "vllm"} & set(sys.modules) else 1.0


not_a_function = 7
