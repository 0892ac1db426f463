"""Programs in the sandbox: right and wrong ones, and more than thirty ways to cheat, to escape or to do harm."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from skyrl.records import DataError
from skyrl.rewards.runner import Verdict, VerifierRunner
from skyrl.rewards.verifiers import sandbox
from skyrl.rewards.verifiers.code import code_verifier, program_of, same_value
from skyrl.rewards.verifiers.sandbox import SandboxError

SCRIPT = {"stdin": [{"input": "3 4\n", "output": "7\n"}, {"input": "5 6\n", "output": "11\n"}]}
CALLS = {"function": "add", "cases": [{"args": [3, 4], "result": 7}, {"args": [5], "kwargs": {"b": 6}, "result": 11}]}
CHECK = {
    "tests": "def check(candidate):\n    assert candidate(3, 4) == 7\n    assert candidate(5, b=6) == 11\n",
    "entry": "add",
}
ASSERTS = {"tests": ["assert add(3, 4) == 7", "assert add(5, b=6) == 11"]}
ADD = "def add(a, b):\n    return a + b\n"
READ = "a, b = map(int, input().split())\n"


def judged(program: str, truth: dict[str, Any], **changes: Any) -> float:
    return code_verifier(program, json.dumps(truth | changes))


# ---------------------------------------------------------------- right and wrong


@pytest.mark.parametrize("truth", [CALLS, CHECK, ASSERTS])
def test_functions(truth: dict[str, Any]) -> None:
    assert judged(ADD, truth) == 1.0
    assert judged("def add(a, b):\n    return 7\n", truth) == 0.0
    assert judged("def sub(a, b):\n    return a + b\n", truth) == 0.0
    assert judged("def add(a, b:\n    return a + b\n", truth) == 0.0
    assert judged("class Solution:\n    def add(self, a, b):\n        return a + b\n", truth) == 1.0
    share = 0.0 if truth is CHECK else 0.5  # a check is one test
    assert judged("def add(a, b):\n    return 7\n", truth, partial=True) == share


def test_scripts() -> None:
    assert judged(READ + "print(a + b)", SCRIPT) == 1.0
    assert judged(READ + "print(a + b, end='  \\n\\n')", SCRIPT) == 1.0  # white space at ends counts for nothing
    assert judged(READ + "print(' ', a + b)", SCRIPT) == 0.0
    assert judged(READ + "print(7)", SCRIPT) == 0.0
    assert judged(READ + "print(7)", SCRIPT, partial=True) == 0.5
    assert judged(READ + "print(a + b)\nraise SystemExit(1)", SCRIPT) == 0.0
    assert judged(READ + "if __name__ == '__main__':\n    print(a + b)\n    exit()", SCRIPT) == 1.0
    assert judged("", SCRIPT) == judged("print('\0')", SCRIPT) == 0.0


def test_setup_runs_before_the_program_and_before_the_tests() -> None:
    setup = "from typing import List\ndef twice(x):\n    return 2 * x\ndef size(x: List):\n    ...\n"
    truth = {"tests": "def check(f):\n    assert twice(f([1, 2])) == 4\n", "entry": "size", "setup": setup}
    assert judged("def size(x: List):\n    return len(x)", truth) == 1.0
    assert judged("def size(x):\n    return 1\ndef twice(x):\n    return 4", truth) == 0.0  # the tests have their own


def test_setup_may_build_on_the_program_where_there_are_tests() -> None:
    truth = {"tests": ["assert total(root) == 5"], "setup": "root = Node(2)\nroot.left = Node(3)"}
    program = "class Node:\n    def __init__(self, v): self.v = v\ndef total(r): return r.v + r.left.v"
    assert judged(program, truth) == 1.0
    assert judged(program.replace("+", "-"), truth) == 0.0


def test_what_tests_may_do_with_a_program() -> None:
    tests = [
        "assert set(f('list')) == {1, 2}",
        "assert f('tuple') == (1, 2) and f('tuple') != [1, 2]",
        "assert f('dict') == {(1, 2): {'x': None}}",
        "assert math.isclose(f('float'), 1 / 3)",
        "assert list(f('generator')) == [1, 2]",
        "p = Point(3)\nassert p.x == 3 and p.more(4) == 7\np.x = 5\nassert far(p) == 5",
        "try:\n    f('error')\n    assert False\nexcept ValueError:\n    pass",
        "assert f('counter') == {'a': 2}",
        "assert f('bytes') == b'\\xff' and f('complex') == 1j and f('big') == 10**1000",
    ]
    program = """
from collections import Counter
class Point:
    def __init__(self, x): self.x = x
    def more(self, y): return self.x + y
def far(p): return p.x
def f(what):
    if what == 'error': raise ValueError(what)
    return {'list': [1, 2], 'tuple': (1, 2), 'dict': {(1, 2): {'x': None}}, 'float': 1 / 3, 'bytes': b'\\xff',
            'generator': (i for i in (1, 2)), 'counter': Counter('aa'), 'complex': 1j, 'big': 10**1000}[what]
"""
    for test in tests:
        assert judged(program, {"tests": [test]}) == 1.0, test


@pytest.mark.parametrize(
    ("answer", "program"),
    [
        ("print(1)", "print(1)"),
        ("Text\n```python\nprint(1)\n```\nso `print(2)`", "print(1)\n"),
        ("```python\nprint(1)\n```\nBetter:\n```py\nprint(2)\n```\nOutput:\n```\n2\n```", "print(2)\n"),
        ("```\nprint(1)\n```", "print(1)\n"),
        ("```python\nprint(1)\n```\n```python\nprint(2", "print(1)\n"),
        ("```json\n{}\n```", "```json\n{}\n```"),
        ("```python\nx = '''```'''\n```", "x = '''```'''\n"),
    ],
)
def test_the_program_of_an_answer(answer: str, program: str) -> None:
    assert program_of(answer) == program


@pytest.mark.parametrize(
    ("wire", "expected", "same"),
    [
        (7, 7, True), (7.0, 7, True), (7, 7.0, True), (True, 1, False), (1, True, False), (None, None, True),
        (None, 0, False), (None, False, False), ("7", 7, False), (0.1 + 0.2, 0.3, True), (0.3001, 0.3, False),
        (1e12 + 0.1, 10**12, False), (10**400, 1.5, False), (float("inf"), 1e308, False), (1e-13, 0.0, False),
        (["list", 1, 2], [1, 2], True), (["tuple", 1, 2], [1, 2], True), (["set", 1, 2], [1, 2], False),
        (["list", 1], [1, 2], False), (["list"], [], True), ([], [], False), (["handle", 0], [0], False),
        (["dict", [1, "a"]], {"1": "a"}, True), (["dict", ["1", "a"]], {"1": "a"}, True),
        (["dict", [1, "a"], ["1", "a"]], {"1": "a"}, False), (["dict", [["tuple", 1], 2]], {"(1,)": 2}, False),
        (["dict", 5], {"a": 5}, False), ({"x": 1}, {"x": 1}, True), (["list", True], [1], False),
    ],
)  # fmt: skip
def test_values(wire: Any, expected: Any, same: bool) -> None:
    assert same_value(wire, expected) is same


# ---------------------------------------------------------------- forged verdicts

LIAR = "class Liar(int):\n    __eq__ = lambda *_: True\n    __ne__ = lambda *_: False\n    __hash__ = int.__hash__\n"
EVERYTHING = "class Any:\n    __eq__ = __call__ = __getattr__ = __bool__ = lambda *_: True\n"
FORGED = {
    "prints the verdict": "print('passed', '{\"passed\": [true, true]}')\ndef add(a, b): return 0",
    "ends with status 0": "import sys\nsys.exit(0)",
    "ends at once": "import os\nos._exit(0)",
    "ends in the call": "import os\ndef add(a, b): os._exit(0)",
    "exits in the call": "def add(a, b): raise SystemExit(0)",
    "equals everything": EVERYTHING + "def add(a, b): return Any()",
    "a number that equals everything": LIAR + "def add(a, b): return Liar(0)",
    "returns the candidate": "def add(a, b): return add",
    "returns an object of the test": EVERYTHING + "add = Any()",
    "patches builtins": "import builtins\nbuiltins.all = lambda *_: True\nbuiltins.isinstance = lambda *_: True\n"
    "builtins.AssertionError = type('Fine', (BaseException,), {})\ndef add(a, b): return 0",
    "patches json": "import json\njson.dumps = lambda *_, **__: '{\"value\": true}'\ndef add(a, b): return 0",
    "writes replies": "import os\nfor fd in range(3, 64):\n"
    "    try: os.write(fd, b'{\"passed\": [true, true]}\\n' * 9)\n    except OSError: pass\ndef add(a, b): return 0",
    "writes values": "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'{\"value\": true}\\n' * 9)\n"
    "    except OSError: pass\ndef add(a, b): return 0",
    "reads what comes": "import os\nseen = b''\ndef add(a, b):\n    return 11 if b'11' in seen else 0\n"
    "for fd in range(3, 64):\n    try:\n        os.set_blocking(fd, False)\n        seen += os.read(fd, 9999)\n"
    "    except OSError: pass",
    "looks into the harness": "import sys\ndef add(a, b):\n    frame = sys._getframe()\n    while frame:\n"
    "        for value in list(frame.f_locals.values()):\n            if '=' * 2 + ' 7' in repr(value): return 7\n"
    "        frame = frame.f_back\n    return 0",
    "looks through the heap": "import gc\ndef add(a, b):\n    for one in gc.get_objects():\n"
    "        if isinstance(one, dict) and ('result' in one or 'tests' in one): return a + b\n    return 0",
    "ends the loop of the tests": "def add(a, b): raise StopIteration",
    "raises what tests raise": "def add(a, b): raise AssertionError",
    "breaks the tests": "def add(a, b): raise ImportError",
    "breaks their names": "def add(a, b): raise NameError",
    "is no function": "add = 7",
    "gives nan": "def add(a, b): return float('nan')",
    "gives deep lists": "def add(a, b):\n    x = []\n    for _ in range(100000): x = [x]\n    return x",
    "gives too much": "def add(a, b): return 'x' * (1 << 26)",
    "gives a huge number": "def add(a, b): return 10 ** 10000",
    "names a handle": 'import os\nfor fd in range(3, 64):\n    try: os.write(fd, b\'{"value": ["handle", 0]}\\n\')\n'
    "    except OSError: pass\ndef add(a, b): return 0",
    "crashes": "import ctypes\nctypes.string_at(0)",
}


@pytest.mark.parametrize("program", FORGED.values(), ids=FORGED.keys())
def test_no_program_forges_a_verdict(program: str) -> None:
    for truth in (CALLS, CHECK, ASSERTS):
        assert judged(program, truth) == 0.0
        assert judged(program, truth, partial=True) == 0.0
    if "def add" not in program:
        assert judged(program, SCRIPT) == 0.0


def test_a_loop_of_the_tests_is_not_ended_by_the_program() -> None:
    truth = {"tests": "assert all(map(lambda x: f(x) == x, [1, 2, 3]))", "entry": "f"}
    assert judged("def f(x): raise StopIteration", truth) == 0.0
    assert judged("def f(x): return x", truth) == 1.0


def test_names_of_the_standard_library_are_not_the_programs() -> None:
    program = "class math:\n    isclose = lambda *_: True\ndef set(*_): return 1\ndef f(x): return 5"
    assert judged(program, {"tests": ["assert math.isclose(f(1), 2)"]}) == 0.0
    assert judged(program, {"tests": ["assert set([f(1)]) == set([2])"]}) == 0.0


# ---------------------------------------------------------------- escapes and harm


def allowed(body: str) -> bool:
    """Whether a program gets through this block without an error."""
    indented = "\n".join(f"    {line}" for line in body.splitlines())
    program = f"def f():\n{indented}\n    return 'done'"
    reported = judged(program, {"function": "f", "cases": [{"result": "done"}]})
    return reported == 1.0


def test_what_a_program_may_do() -> None:
    assert allowed("import random, decimal, heapq, itertools, re, threading, zoneinfo, hashlib, sqlite3, dataclasses")
    assert allowed("open('x', 'w').write('1')\nassert open('x').read() == '1'\nimport os\nos.remove('x')")
    assert allowed("import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()")
    assert allowed("import signal, time\nsignal.setitimer(signal.ITIMER_REAL, 9)\ntime.sleep(0.01)")


ESCAPES = {
    "socket": "import socket\nsocket.socket()",
    "unix socket": "import socket\nsocket.socketpair()",
    "name service": "import socket\nassert socket.getaddrinfo('localhost', 80)",
    "io_uring": "import ctypes, os\nc = ctypes.CDLL(None, use_errno=True)\n"
    "assert c.syscall(425, 8, ctypes.create_string_buffer(256)) >= 0",
    "x32 calls": "import ctypes\nassert ctypes.CDLL(None).syscall(0x40000000 + 41, 2, 1, 0) >= 0",
    "fork": "import os\nos.fork()",
    "subprocess": "import subprocess\nsubprocess.run(['true'])",
    "spawn": "import os\nos.posix_spawn('/bin/true', ['true'], {})",
    "shell": "import os\nassert os.system('true') == 0",
    "exec": "import os\nos.execv('/bin/true', ['true'])",
    "multiprocessing": "import multiprocessing\nmultiprocessing.Process(target=print).start()",
    "kill the parent": "import os\nos.kill(os.getppid(), 9)",
    "kill all": "import os\nos.kill(-1, 9)",
    "signal by pipe": "import fcntl, os\nr, w = os.pipe()\nfcntl.fcntl(r, fcntl.F_SETOWN, os.getppid())",
    "slow the parent": "import os\nos.sched_setaffinity(os.getppid(), {0})",
    "new session": "import os\nos.setsid()",
    "trace": "import ctypes, os\nassert ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) == 0",
    "raise limits": "import resource\nresource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))",
    "limits of the parent": "import resource, os\nresource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1))",
    "passwords": "open('/etc/passwd').read()",
    "parent's environment": "import os\nopen(f'/proc/{os.getppid()}/environ').read()",
    "parent's memory": "import os\nopen(f'/proc/{os.getppid()}/mem', 'rb')",
    "list the root": "import os\nos.listdir('/')",
    "list home": "import os\nos.listdir(os.path.expanduser('~'))",
    "write beside": "open('/tmp/skyrl-test-escape', 'w')",
    "write above": "open('../skyrl-test-escape', 'w')",
    "shared memory": "from multiprocessing import shared_memory\nshared_memory.SharedMemory(create=True, size=99)",
    "change modes": "import os\nos.chmod('/tmp', 0o777)",
    "link out": "import os\nos.symlink('/etc', 'etc')\nos.listdir('etc')",
    "big file": "f = open('x', 'wb', buffering=0)\nfor _ in range(64): assert f.write(bytes(1 << 16)) == 1 << 16",
    "much memory": "x = bytearray(1 << 31)",
    "root": "import os\nassert os.getuid() != 0\nos.setuid(0)",
    "mount": "import ctypes\nassert ctypes.CDLL(None).mount(b'none', b'/tmp', b'tmpfs', 0, None) == 0",
    "namespaces": "import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0",
    "another skyrl": "import skyrl",
    "installed packages": "import numpy",
}


@pytest.mark.parametrize("body", ESCAPES.values(), ids=ESCAPES.keys())
def test_no_program_escapes(body: str) -> None:
    assert not allowed(body)


def test_the_escapes_work_outside_of_the_sandbox() -> None:
    """So that it is the sandbox that stops them."""
    for name in ("socket", "unix socket", "fork", "passwords", "list the root", "parent's environment", "subprocess"):
        body = ESCAPES[name] + ("\nimport os" if name == "fork" else "")
        assert subprocess.run([sys.executable, "-c", body], stdin=subprocess.DEVNULL).returncode == 0, name


def test_the_environment_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "secret")
    truth = {"function": "f", "cases": [{"result": []}]}
    program = "import os\ndef f(): return sorted(k for k in os.environ if k not in {'PYTHONHASHSEED', 'LC_CTYPE'})"
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    assert judged(program, truth) == 1.0


def test_no_connection_arrives() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.3)
        port = server.getsockname()[1]
        assert not allowed(f"import socket\nsocket.create_connection(('127.0.0.1', {port}))")
        with pytest.raises(TimeoutError):
            server.accept()


HANGS = {
    "loop": "while True: pass",
    "sleep": "import time\ntime.sleep(99)",
    "in C": "int('9' * 4000) ** 10 ** 9",
    "pattern": "import re\nre.match('(a*)*b', 'a' * 99)",
    "deaf": "import signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n    except: pass\n"
    "while 1: pass",
    "thread": "import threading, time\nthreading.Thread(target=time.sleep, args=(99,)).start()",
}


@pytest.mark.parametrize("program", HANGS.values(), ids=HANGS.keys())
def test_a_program_that_hangs_is_wrong_and_gone(program: str) -> None:
    began = time.monotonic()
    assert code_verifier(program, json.dumps(SCRIPT), seconds=0.6) == 0.0
    assert time.monotonic() - began < 3
    assert children() == []


def test_a_program_that_hangs_in_a_call_is_wrong() -> None:
    for truth in (CALLS, CHECK, ASSERTS):
        assert code_verifier("def add(a, b):\n    while True: pass", json.dumps(truth), seconds=0.6) == 0.0
    assert children() == []


def test_endless_output_is_wrong() -> None:
    assert judged("while True: print('x' * 1000)", SCRIPT) == 0.0


def test_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path))
    judged("for i in range(99): open(f'{i}', 'w').write('x')", SCRIPT)
    judged(ADD, CHECK)
    with pytest.raises(DataError):
        judged(ADD, {"tests": "import nothing_such"})
    files = len(os.listdir("/proc/self/fd"))
    judged("while True: print('x' * 1000)", SCRIPT)
    assert list(tmp_path.iterdir()) == [] and children() == [] and len(os.listdir("/proc/self/fd")) == files


def children() -> list[int]:
    """Living child processes of this one that run the jail."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if b"jail.py" in (folder / "cmdline").read_bytes():
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                found += [int(folder.name)] if parent == os.getpid() else []
        except (OSError, ValueError):
            continue
    return found


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("truth", "words"),
    [
        ("no json", "JSON"),
        ("{}", "not exactly one form"),
        ('{"stdin": []}', "stdin"),
        ('{"stdin": [{"input": 5, "output": "7"}]}', "stdin.0.input"),
        ('{"function": "f"}', "not exactly one form"),
        ('{"cases": [{"result": 1}]}', "not exactly one form"),
        ('{"function": "f", "cases": [{"args": [1]}]}', "cases.0.result"),
        ('{"tests": "assert f() == 1", "entri": "f"}', "entri"),
        ('{"stdin": [{"input": "", "output": ""}], "entry": "f"}', "entry without tests"),
        ('{"function": "f", "cases": [{"result": 1}], "setup": "x = y"}', "setup .* NameError.*'y'"),
        ('{"tests": "assert f() == 1", "entry": "f", "setup": "x = y"}', "NameError.*'y'"),
        ('{"function": "f", "cases": [{"result": 1}], "setup": "import os; os._exit(0)"}', "setup .* it ended"),
        ('{"tests": "assert ("}', "SyntaxError"),
        ('{"tests": "import nothing_such"}', "nothing_such"),
        ('{"tests": "assert g(f(1)) == 1", "entry": "f"}', "'g'"),
        ('{"tests": "assert f(lambda: 1) == 1"}', "hand the program a function"),
    ],
)
def test_a_broken_truth_is_an_error_and_no_score(truth: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        code_verifier("def f(*_): return 1", truth)


def test_a_machine_without_the_sandbox_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jail = Path(sandbox._JAIL)
    broken = jail.with_name("lock.py").read_text().replace("c.syscall(444, None", "c.syscall(9999, None")
    (tmp_path / "jail.py").write_text(jail.read_text())
    (tmp_path / "lock.py").write_text(broken)
    monkeypatch.setattr(sandbox, "_JAIL", str(tmp_path / "jail.py"))
    with pytest.raises(SandboxError, match=r"can't be run safely here, so none is run: .*Landlock"):
        judged(READ + "print(a + b)", SCRIPT)


def test_an_interpreter_that_does_not_start_is_no_fault_of_the_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "jail.py").write_text("import time\ntime.sleep(9)")
    monkeypatch.setattr(sandbox, "_JAIL", str(tmp_path / "jail.py"))
    with pytest.raises(SandboxError, match=r"raise reward\.verifier_timeout"):
        code_verifier(ADD, json.dumps(CALLS), seconds=0.3)
    (tmp_path / "jail.py").write_text("raise SystemExit(3)")
    with pytest.raises(SandboxError, match="did not start"):
        judged(ADD, CALLS)


# ---------------------------------------------------------------- where verifiers run


def test_it_runs_in_the_verifier_process() -> None:
    runner = VerifierRunner(1.0)
    try:
        assert runner.verify("code", f"```python\n{ADD}```", json.dumps(CALLS)) == Verdict(1.0, None)
        # A program that hangs is wrong, not an error: its own limit is below the process's.
        assert runner.verify("code", "while True: pass", json.dumps(SCRIPT)) == Verdict(0.0, None)
        verdict = runner.verify("code", ADD, "{}")
        assert verdict.score is None and verdict.error is not None and "not exactly one form" in verdict.error
        assert runner.verify("code", READ + "print(a + b)", json.dumps(SCRIPT)) == Verdict(1.0, None)
    finally:
        runner.close()
