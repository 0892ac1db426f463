"""Programs, judged by running them in a sandbox.

What is expected never enters the process that runs the program: its printed text and its functions' values come out,
and are compared here or, for tests written in Python, in a second sandbox. So a program can't forge a verdict; it can
only give the right value.
"""

from __future__ import annotations

import json
import math
import re
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from skyrl.records import DataError
from skyrl.rewards.verifiers.jail import encoded
from skyrl.rewards.verifiers.sandbox import Clock, Program, ProgramFault

SECONDS = 4.0
"""Wall-clock limit of all test cases of one answer; ``reward.verifier_timeout`` is above it and would make an error."""
_FENCE = re.compile(r"[ \t]{0,3}```[ \t]*([\w+-]*)[ \t]*")
_PYTHON = ("python", "python3", "py")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Text(_Strict):
    input: str
    output: str


class _Call(_Strict):
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    result: Any


class _Truth(_Strict):
    """One of ``stdin``, ``function`` with ``cases``, or ``tests``."""

    stdin: Annotated[list[_Text], Field(min_length=1)] | None = None
    function: str | None = None
    cases: Annotated[list[_Call], Field(min_length=1)] | None = None
    tests: Annotated[list[str], Field(min_length=1)] | str | None = None
    entry: str | None = None
    setup: str = ""
    partial: bool = False


def program_of(answer: str) -> str:
    """The last complete fenced block that says it is Python; else the last complete one that says nothing; else the
    whole text."""
    found: dict[bool, str] = {}
    language: str | None = None
    lines: list[str] = []
    for line in answer.splitlines():
        fence = _FENCE.fullmatch(line)
        if language is None:
            if fence:
                language, lines = fence.group(1).lower(), []
        elif fence and not fence.group(1):
            if language == "" or language in _PYTHON:
                found[language != ""] = "\n".join(lines) + "\n"
            language = None
        else:
            lines.append(line)
    return found.get(True, found.get(False, answer))


def code_verifier(answer: str, truth: str, seconds: float = SECONDS) -> float:
    """1.0 if the program passes every test, else 0.0; with ``"partial": true`` the share of tests that it passes.

    Args:
        answer: Holds the program, see :func:`program_of`.
        truth: JSON, one of

            - ``{"stdin": [{"input": "3 4\\n", "output": "7\\n"}, …]}``: a script that reads and prints. Equal but for
              whitespace at the ends of lines and empty lines at the end; it must end with exit status 0.
            - ``{"function": "add", "cases": [{"args": [3, 4], "kwargs": {}, "result": 7}, …]}``: values are compared by
              :func:`same_value`.
            - ``{"tests": "assert add(3, 4) == 7", "entry": "add"}``, or a list of such texts: Python that calls the
              program. A function ``check`` in it is called with the entry (HumanEval). Without an entry any name that
              the tests don't define is the program's.

            ``setup``, Python, runs before the program and before the tests.
        seconds: Wall-clock limit of all tests together. A program that is not done is wrong from there on.

    Raises:
        DataError: for a truth of another form, or tests that are themselves at fault.
        SandboxError: if this machine has no sandbox, or was too busy to start it.
    """
    wanted = _read(truth)
    program, clock = program_of(answer), Clock(seconds)
    if not program.strip() or "\0" in program:
        return 0.0
    if wanted.stdin is not None:
        passed = _scripts(program, wanted.stdin, wanted.partial, clock)
    elif wanted.cases is not None:
        passed = _calls(program, wanted, clock)
    else:
        passed = _tests(program, wanted, clock)
    return sum(passed) / len(passed) if wanted.partial else float(all(passed))


def _read(truth: str) -> _Truth:
    allowed = 'JSON with "stdin", with "function" and "cases", or with "tests"; docs/verifiers.md has examples'
    try:
        wanted = _Truth.model_validate_json(truth)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the text"
        raise DataError(f"the truth of a 'code' prompt: {place}: {first['msg']}; allowed: {allowed}") from None
    forms = [wanted.stdin is not None, wanted.function is not None, wanted.tests is not None]
    if sum(forms) != 1 or (wanted.function is None) != (wanted.cases is None):
        raise DataError(f"the truth of a 'code' prompt {truth[:100]!r} has not exactly one form; allowed: {allowed}")
    if wanted.entry is not None and wanted.tests is None:
        raise DataError("the truth of a 'code' prompt has an entry without tests; use function")
    return wanted


def _scripts(program: str, cases: list[_Text], partial: bool, clock: Clock) -> list[bool]:
    passed: list[bool] = []
    for case in cases:
        passed.append(_prints(program, case, clock))
        if not partial and not passed[-1]:
            break
    return passed


def _prints(program: str, case: _Text, clock: Clock) -> bool:
    try:
        with Program("script", clock, case.input, source=program) as running:
            return _lines(running.output()) == _lines(case.output)
    except ProgramFault:
        return False


def _lines(text: str) -> list[str]:
    return "\n".join(line.rstrip() for line in text.splitlines()).rstrip("\n").split("\n")


def _calls(program: str, wanted: _Truth, clock: Clock) -> list[bool]:
    cases, passed = wanted.cases or [], []
    try:
        with Program("calls", clock, source=program, setup=wanted.setup) as running:
            if problem := _setup(running):
                raise DataError(f"the setup of a 'code' prompt can't run: {problem}")

            def right(case: _Call) -> bool:
                kwargs = {key: encoded(item, _nothing_else) for key, item in case.kwargs.items()}
                args = [encoded(item, _nothing_else) for item in case.args]
                running.send({"name": wanted.function, "do": "call", "args": args, "kwargs": kwargs})
                reply = _parsed(running.receive())
                return isinstance(reply, dict) and "value" in reply and same_value(reply["value"], case.result)

            for case in cases:
                passed.append(right(case))
                if not passed[-1] and not wanted.partial:
                    break
    except ProgramFault:
        pass
    return passed + [False] * (len(cases) - len(passed))


def _tests(program: str, wanted: _Truth, clock: Clock) -> list[bool]:
    texts = [wanted.tests] if isinstance(wanted.tests, str) else wanted.tests or []
    calls = 0
    try:
        with (
            Program("tests", clock, tests=texts, setup=wanted.setup, entry=wanted.entry) as judge,
            Program("calls", clock, source=program, setup=wanted.setup) as running,
        ):
            _setup(running)  # an error is one of the tests' process, too, unless the program gave what it lacks
            while True:
                said = _parsed(judge.receive())
                if "broken" in said:
                    raise DataError(f"the tests of a 'code' prompt can't run: {said['broken']}")
                if "passed" in said:
                    return [bool(one) for one in said["passed"]]
                calls += 1
                judge.send(_reply(running, said))
    except ProgramFault as fault:
        if not calls:
            raise DataError(f"the tests of a 'code' prompt never call the program: {fault}") from None
    return [False] * len(texts)


def _setup(running: Program) -> str | None:
    """What went wrong in the setup; the program has not run before this line."""
    try:
        problem: str | None = _parsed(running.receive())["setup"]
    except ProgramFault as fault:
        raise DataError(f"the setup of a 'code' prompt can't run: {fault}") from None
    return problem


def _reply(running: Program, asked: dict[str, Any]) -> bytes:
    """The program's answer to one call; from a program that has ended, an error to each call."""
    try:
        running.send(asked)
        return running.receive() + b"\n"
    except ProgramFault:
        if running.clock.left() <= 0:
            raise
        return b'{"raised": "ended"}\n'


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ProgramFault(f"its reply is no JSON: {error}") from None


def _nothing_else(value: Any) -> Any:
    raise TypeError(f"{value!r} is no value of JSON")


def same_value(wire: Any, expected: Any) -> bool:
    """Whether a value of the program, as :func:`encoded` wrote it, equals one that was read from JSON.

    A tuple equals a list, a dictionary one whose keys were written as texts, as JSON writes them. True and False equal
    no number. Where a float is expected, the number may differ by 1e-9 of the larger one.
    """
    if isinstance(wire, list):
        kind, *items = wire or [None]
        if kind in ("list", "tuple") and isinstance(expected, list):
            return len(items) == len(expected) and all(map(same_value, items, expected))
        if kind == "dict" and isinstance(expected, dict):
            keys = [_key(item) for item in items]
            pairs = dict(zip(keys, items, strict=True))
            whole = len(pairs) == len(items) and pairs.keys() == expected.keys()
            return whole and all(same_value(item[1], expected[key]) for key, item in pairs.items() if key is not None)
        return False
    if type(wire) in (int, float) and type(expected) is float:
        try:
            return math.isclose(wire, expected, rel_tol=1e-9) or (math.isnan(wire) and math.isnan(expected))
        except OverflowError:  # an integer beyond all floats
            return False
    if type(wire) in (int, float) and type(expected) is int:
        return bool(wire == expected)
    return type(wire) is type(expected) and wire == expected


def _key(item: Any) -> str | None:
    """A dictionary's key as JSON would write it; None if it could not."""
    if not isinstance(item, list) or len(item) != 2 or isinstance(item[0], list):
        return None
    return item[0] if isinstance(item[0], str) else json.dumps(item[0])
