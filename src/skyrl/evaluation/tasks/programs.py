"""LiveCodeBench, HumanEval, MBPP and IFEval."""

from __future__ import annotations

import ast
import base64
import binascii
import builtins
import json
import pickletools
import zlib
from typing import Any

from skyrl.evaluation.tasks.files import Row
from skyrl.evaluation.tasks.question import Question
from skyrl.records import DataError

FENCED = "Give the whole program in one ```python block."
STDIN = f"Write a Python program that reads the input from stdin and prints the answer. {FENCED}"
IMPORTED = (
    *(
        "string",
        "re",
        "datetime",
        "collections",
        "heapq",
        "bisect",
        "copy",
        "math",
        "random",
        "statistics",
        "itertools",
    ),
    *("functools", "operator", "io", "sys", "json", "builtins", "typing"),
)
"""What LiveCodeBench imports for a solution, as its own judge does: all names of each module, and the module."""
LARGEST = 1 << 30
"""Bytes that the hidden tests of one question may have."""
TEXT_ONLY = {
    "PROTO",
    "FRAME",
    "SHORT_BINUNICODE",
    "BINUNICODE",
    "BINUNICODE8",
    "MEMOIZE",
    "BINPUT",
    "LONG_BINPUT",
    "STOP",
}
"""What a pickle of one text is made of. Nothing of it can run code."""


def livecodebench(row: Row) -> Question:
    """``question_id``, ``question_content``, ``starter_code``, ``difficulty``, ``public_test_cases`` and
    ``private_test_cases`` (JSON; the latter also as base64 of zlib of a pickled JSON text), ``metadata``."""
    cases = row.literal("public_test_cases", list) + hidden_cases(row)
    kinds = {case["testtype"] for case in cases}
    text, starter = row.text("question_content"), row.get("starter_code")
    rest: dict[str, Any] = {"id": row.text("question_id"), "verifier": "code", "kind": row.text("difficulty")}
    if kinds == {"stdin"}:
        pairs = [{"input": case["input"], "output": case["output"]} for case in cases]
        return Question(text=text, truth=json.dumps({"stdin": pairs}), asks=STDIN, **rest)
    name = row.literal("metadata", dict).get("func_name")
    if kinds != {"functional"} or not isinstance(name, str) or not name.isidentifier():
        raise DataError(f"{row.where}: tests of {sorted(kinds)} with func_name={name!r}; allowed: stdin, or functional")
    calls = [_call(row, case) for case in cases]
    setup = "".join(
        [f"from {module} import *\n" for module in IMPORTED] + [f"import {module}\n" for module in IMPORTED]
    )
    begun = f"\n\nBegin with this:\n```python\n{starter}\n```" if starter else ""
    return Question(
        text=text + begun, truth=json.dumps({"function": name, "cases": calls, "setup": setup}), asks=FENCED, **rest
    )


def humaneval(row: Row) -> Question:
    """``task_id``, ``prompt``, ``test``, ``entry_point``."""
    entry, begun = row.text("entry_point"), row.text("prompt")
    truth = json.dumps({"tests": row.text("test"), "entry": entry, "setup": begun})
    text = f"Complete this Python function:\n\n```python\n{begun}\n```"
    asks = "Give the whole function, with its imports, in one ```python block."
    return Question(row.text("task_id").rpartition("/")[2], text, "code", truth, asks=asks)


def mbpp(row: Row) -> Question:
    """``task_id``, ``text`` (``prompt`` in the sanitized file), ``test_list``, ``test_setup_code`` or
    ``test_imports``."""
    tests = row.literal("test_list", list)
    # It may use the program's own classes, so it runs behind the program, with each test.
    setup = row.get("test_setup_code") or "\n".join(row.get("test_imports") or [])
    truth: dict[str, Any] = {"tests": [f"{setup}\n{test}" for test in tests]}
    if entry := _hidden_by_builtin(row, tests):
        truth["entry"] = entry
    listed = "\n".join(tests)
    text = f"{row.text('text', 'prompt')}\n\nIt must pass these tests:\n```python\n{listed}\n```"
    return Question(row.text("task_id"), text, "code", json.dumps(truth), asks=FENCED)


def _hidden_by_builtin(row: Row, tests: list[str]) -> str | None:
    """The function that is tested, if it has the name of one of Python's own, such as ``sum``."""
    try:
        nodes = [node for test in tests for node in ast.walk(ast.parse(test))]
    except SyntaxError as error:
        raise DataError(f"{row.where}, column 'test_list': {error}") from error
    called = {node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    return called.pop() if len(called) == 1 and hasattr(builtins, min(called)) else None


def ifeval(row: Row) -> Question:
    """``key``, ``prompt``, ``instruction_id_list``, ``kwargs`` (one object for each instruction; nulls count as not
    given)."""
    names, given = row.literal("instruction_id_list", list), row.literal("kwargs", list)
    if len(names) != len(given):
        raise DataError(f"{row.where}, column 'kwargs': got {len(given)} for {len(names)} instructions")
    kwargs = [{key: value for key, value in (one or {}).items() if value is not None} for one in given]
    truth = json.dumps({"instruction_id_list": names, "kwargs": kwargs}, ensure_ascii=False)
    return Question(row.text("key"), row.text("prompt"), "ifeval", truth)


def hidden_cases(row: Row) -> list[dict[str, str]]:
    """The tests of ``private_test_cases``; none if the file has none. The official files hold a *pickle*, which is read
    as data here and never unpickled."""
    where, stored = f"{row.where}, column 'private_test_cases'", row.get("private_test_cases") or "[]"
    try:
        if not stored.lstrip().startswith("["):
            opened = zlib.decompressobj()
            content = opened.decompress(base64.b64decode(stored, validate=True), LARGEST)
            if not opened.eof:
                raise ValueError(f"more than {LARGEST} bytes, or cut off")
            stored = _pickled_text(content)
        cases = json.loads(stored)
        if not all(isinstance(case[key], str) for case in cases for key in ("input", "output", "testtype")):
            raise ValueError("a case without texts input, output and testtype")
    except (ValueError, TypeError, LookupError, AttributeError, binascii.Error, zlib.error) as error:
        allowed = "a JSON list of cases, or base64 of zlib of its pickled text"
        raise DataError(f"{where}: {type(error).__name__}: {error}; allowed: {allowed}") from error
    return list(cases)


def _pickled_text(content: bytes) -> str:
    """The one text that a pickle holds, if it holds nothing else; ValueError otherwise."""
    texts = []
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name not in TEXT_ONLY:
            raise ValueError(f"the pickle has the instruction {opcode.name}; allowed: those of one text")
        if isinstance(argument, str):
            texts.append(argument)
    if len(texts) != 1:
        raise ValueError(f"the pickle holds {len(texts)} texts; allowed: 1")
    return texts[0]


def _call(row: Row, case: dict[str, str]) -> dict[str, Any]:
    """A call with one JSON value a line, and its result."""
    try:
        arguments = [json.loads(line) for line in case["input"].split("\n") if line.strip()]
        return {"args": arguments, "result": json.loads(case["output"])}
    except ValueError as error:
        raise DataError(f"{row.where}: a functional test that is no JSON: {error}") from error
