"""What runs inside the sandbox: locks itself in, then runs one program. Imports nothing of skyrl.

Started by :mod:`skyrl.rewards.verifiers.sandbox` as a script of a bare interpreter. Messages are lines of JSON::

    parent → {"readable": [folders], "folder": …, "memory": …, "seconds": …, "file_size": …, "mode": …}
    child  → {"ready": true}  or  {"refused": "why the sandbox can't be built"}     then it is locked in
    parent → {"setup": …, "source": …, …}                                           the clock starts

``script`` runs the source as ``__main__`` with the given stdin; the pipes are closed before. ``calls`` says what came
of the setup, then answers calls of the program's functions. ``tests`` runs test code, whose calls of the program go
through the parent to a ``calls`` process. No process ever holds both the program and what is expected of it, so nothing
that a program does to its own interpreter can change the verdict.
"""

from __future__ import annotations

import builtins
import json
import os
import sys
import types
from typing import Any

# ---------------------------------------------------------------- values on the wire


class Broken(Exception):
    """The tests are at fault, not the program."""


class Unfit(Exception):
    """A value of the program that the tests can't look at."""


_TESTED = {
    kind.__name__: kind
    for kind in (ValueError, TypeError, KeyError, IndexError, LookupError, ZeroDivisionError, OverflowError,
                 ArithmeticError, AttributeError, RuntimeError, NotImplementedError, RecursionError, Exception)
}  # fmt: skip
"""Errors of the program that tests may catch by their own class. Not StopIteration, which would end a loop of the tests
early and leave the rest untested."""
_BOXES: dict[Any, str] = {list: "list", tuple: "tuple", set: "set", frozenset: "frozenset"}


def encoded(value: Any, handle: Any) -> Any:
    """JSON of a plain value; ``handle(value)`` for one that isn't. Subclasses count as what they are made of."""
    if value is None or type(value) in (bool, str, int, float):
        return value
    for kind, name in _BOXES.items():
        if type(value) is kind:
            return [name, *(encoded(item, handle) for item in value)]
    if isinstance(value, dict):
        return ["dict", *([encoded(key, handle), encoded(item, handle)] for key, item in dict.items(value))]
    if isinstance(value, (bytes, bytearray)):
        return ["bytes", bytes(value).hex()]
    if type(value) is complex:
        return ["complex", value.real, value.imag]
    for base in (int, float, str, *_BOXES):
        if isinstance(value, base):
            return encoded(base(value), handle)
    return handle(value)


def decoded(wire: Any, handle: Any) -> Any:
    """The value of :func:`encoded`; ``handle(number)`` for one that isn't plain."""
    if not isinstance(wire, list):
        return wire
    name, *items = wire
    if name == "dict":
        return {decoded(key, handle): decoded(item, handle) for key, item in items}
    if name == "bytes":
        return bytes.fromhex(items[0])
    if name == "complex":
        return complex(*items)
    if name == "handle":
        return handle(items[0])
    kind = {name: kind for kind, name in _BOXES.items()}[name]
    return kind(decoded(item, handle) for item in items)


# ---------------------------------------------------------------- the three modes


def run_script(request: dict[str, Any]) -> None:
    """Run the source as ``__main__``."""
    vars(builtins).update(exit=sys.exit, quit=sys.exit)  # as the site module, which is left out, has them
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    exec(compile(request["source"], "program.py", "exec"), main.__dict__)


def answer_calls(request: dict[str, Any], lines: Any, out: int) -> None:
    """Load the program, then answer operations on its names and objects, one line each."""
    module = sys.modules["program"] = types.ModuleType("program")
    objects: list[Any] = []

    def kept(value: Any) -> list[Any]:
        objects.append(value)
        return ["handle", len(objects) - 1]

    def named(name: str) -> Any:
        if name in module.__dict__:
            return module.__dict__[name]
        return getattr(module.__dict__["Solution"](), name)  # as some judges of programming contests have it

    def answer(ask: dict[str, Any]) -> bytes:
        target = named(ask["name"]) if "name" in ask else objects[ask["object"]]
        args = [decoded(wire, objects.__getitem__) for wire in ask["args"]]
        kwargs = {key: decoded(wire, objects.__getitem__) for key, wire in ask["kwargs"].items()}
        do = {"call": lambda: target(*args, **kwargs), "get": lambda: getattr(target, *args)}
        do |= {"set": lambda: setattr(target, *args), "list": lambda: list(target)}
        return _line({"value": encoded(do[ask["do"]](), kept)})

    failed = broken = None
    try:
        exec(compile(request["setup"], "setup.py", "exec"), module.__dict__)
    except BaseException as error:  # noqa: BLE001 - tests may have a setup that needs the program
        broken = f"{type(error).__name__}: {error}"
    _write(out, _line({"setup": broken}))  # before the program can say anything
    try:
        exec(compile(request["source"], "program.py", "exec"), module.__dict__)
    except BaseException as error:  # noqa: BLE001 - also sys.exit: the program gives no answers then
        failed = type(error).__name__
    for line in lines:
        try:
            reply = answer(json.loads(line)) if failed is None else _line({"raised": failed})
        except BaseException as error:  # noqa: BLE001 - whatever the program raises is its answer to this call
            reply = _line({"raised": type(error).__name__})
        _write(out, reply)


class _Remote:
    """A name or object of the program, as the tests see it: it can be called, read and listed, and compares with
    nothing."""

    def __init__(self, ask: Any, **where: Any) -> None:
        self.__dict__.update(_ask=ask, _where=where)

    def _do(self, what: str, *args: Any, **kwargs: Any) -> Any:
        return self._ask(self._where, what, args, kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._do("call", *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._do("get", name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._do("set", name, value)

    def __iter__(self) -> Any:
        return iter(self._do("list"))

    def __eq__(self, other: object) -> bool:
        raise Unfit("an object of the program is compared")

    def __bool__(self) -> bool:
        raise Unfit("an object of the program is taken for true or false")

    __hash__ = None  # type: ignore[assignment]


class _Names(dict[str, Any]):
    """Globals of the tests: what they don't define themselves is a module of the standard library or the program's."""

    def __init__(self, remote: Any, entry: str | None) -> None:
        super().__init__(__name__="tests")
        self.remote, self.entry = remote, entry

    def __missing__(self, name: str) -> Any:
        if hasattr(builtins, name):
            raise KeyError(name)
        if name != self.entry and name in sys.stdlib_module_names:
            return __import__(name)
        if self.entry is not None and name != self.entry:
            raise KeyError(name)
        return self.remote(name)


def _asking(lines: Any, out: int) -> Any:
    """The function with which the tests ask the program."""

    def ask(where: dict[str, Any], what: str, args: Any, kwargs: Any) -> Any:
        packed = {key: encoded(item, sent) for key, item in kwargs.items()}
        _write(out, _line(where | {"do": what, "args": [encoded(item, sent) for item in args], "kwargs": packed}))
        reply = json.loads(next(lines))
        if "raised" in reply:
            raise _TESTED.get(str(reply["raised"]), Unfit)("raised by the program")
        return decoded(reply["value"], lambda number: _Remote(ask, object=number))

    def sent(value: Any) -> Any:
        if isinstance(value, _Remote) and "object" in value._where:
            return ["handle", value._where["object"]]
        raise Broken(f"the tests hand the program a {type(value).__name__}; allowed: plain values")

    return ask


def _passes(test: str, setup: str, entry: str | None, ask: Any) -> bool:
    names = _Names(lambda name: _Remote(ask, name=name), entry)
    try:
        exec(compile(setup, "setup.py", "exec"), names)
        if entry is not None:
            names[entry] = _Remote(ask, name=entry)
        exec(compile(test, "tests.py", "exec"), names)
        if "check" in names and entry is not None:
            names["check"](names[entry])
    except (Broken, SyntaxError, ImportError, SystemExit, NameError) as error:
        place = error.__traceback__
        while place is not None and place.tb_next is not None:
            place = place.tb_next
        # But not in text that a test made of the program's values and evaluated.
        if isinstance(error, Broken) or place is None or place.tb_frame.f_code.co_filename != "<string>":
            raise Broken(f"{type(error).__name__}: {error}") from None
        return False
    except Exception:  # noqa: BLE001 - a false assertion, or a value of the program that the test can't work with
        return False
    return True


def run_tests(request: dict[str, Any], lines: Any, out: int) -> None:
    """Run each test; report ``{"passed": [bool, …]}``, or ``{"broken": "why"}`` for tests that are at fault."""
    ask = _asking(lines, out)
    try:
        passed = [_passes(test, request["setup"], request["entry"], ask) for test in request["tests"]]
        _write(out, _line({"passed": passed}))
    except Broken as error:
        _write(out, _line({"broken": str(error)}))


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _write(out: int, line: bytes) -> None:
    data = memoryview(line)
    while data:
        data = data[os.write(out, data) :]


def main(inward: int, outward: int) -> None:
    """Serve one program over two pipes."""
    lines = iter(os.fdopen(inward, encoding="utf-8"))
    request = json.loads(next(lines))
    os.chdir(request["folder"])
    names: dict[str, Any] = {}
    with open(os.path.join(os.path.dirname(__file__), "lock.py"), encoding="utf-8") as file:
        exec(compile(file.read(), "lock.py", "exec"), names)  # there is nowhere that it could be imported from
    try:
        names["lock_in"](request)
    except OSError as error:
        _write(outward, _line({"refused": str(error)}))
        return
    _write(outward, _line({"ready": True}))
    request |= json.loads(next(lines))
    if request["mode"] == "script":
        os.close(inward)
        os.close(outward)
        run_script(request)
    elif request["mode"] == "calls":
        answer_calls(request, lines, outward)
    else:
        run_tests(request, lines, outward)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
