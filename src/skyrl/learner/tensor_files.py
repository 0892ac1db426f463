"""State dictionaries of a training library in a safetensors file: no pickle, so a file runs nothing.

The file's metadata has the tree as JSON. Numbers, texts, ``None`` and lists stand for themselves; everything else is an
object with one key that says what it is: ``dict`` and ``ordered`` (pairs), ``tuple``, ``size``, ``dtype``, ``tensor``
(its name in the file), or the name of a class whose fields it gives. Only classes that the reader names are built, and
no constructor runs.
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from skyrl.records import SkyrlError

PLAIN = (bool, int, float, str, type(None))
PAIRS: dict[type, str] = {dict: "dict", OrderedDict: "ordered"}
ROWS: dict[type, str] = {tuple: "tuple", torch.Size: "size"}


def write_tree(path: Path, tree: Any, classes: Sequence[type]) -> None:
    """Write ``tree``: plain values, tensors, dictionaries, lists, tuples, and objects of ``classes``.

    Raises:
        SkyrlError: for anything else.
        OSError: if the file can't be written.
    """
    tensors = _Tensors()
    text = json.dumps(_node(tree, tensors, {kind: kind.__name__ for kind in classes}, path))
    try:
        save_file(tensors.named, path, metadata={"tree": text})
    except SafetensorError as error:
        raise OSError(str(error)) from error


class _Tensors:
    """The tensors of a tree, by a name in the file."""

    def __init__(self) -> None:
        self.named: dict[str, torch.Tensor] = {}
        self._names: dict[int, str] = {}
        self._storages: set[int] = set()

    def name(self, found: torch.Tensor) -> str:
        if id(found) not in self._names:
            whole, name = found.detach().contiguous(), f"tensor_{len(self.named)}"
            storage = whole.untyped_storage().data_ptr()
            # The format has no two names for one piece of memory.
            self.named[name] = whole.clone() if storage in self._storages else whole
            self._storages.add(storage)
            self._names[id(found)] = name
        return self._names[id(found)]


def _node(found: Any, tensors: _Tensors, known: dict[type, str], path: Path) -> Any:
    kind = type(found)

    def inner(values: Iterable[Any]) -> list[Any]:
        return [_node(one, tensors, known, path) for one in values]

    if kind in PLAIN:
        return found
    if kind is list:
        return inner(found)
    if kind in PAIRS:
        return {PAIRS[kind]: [inner(pair) for pair in found.items()]}
    if kind in ROWS:
        return {ROWS[kind]: inner(found)}
    if kind in known:
        return {known[kind]: _node(vars(found), tensors, known, path)}
    if kind is torch.dtype:
        return {"dtype": str(found).removeprefix("torch.")}
    if isinstance(found, torch.Tensor):
        return {"tensor": tensors.name(found)}
    if isinstance(found, int):  # an enumeration
        return int(found)
    raise SkyrlError(f"{path}: a checkpoint holds no {kind.__module__}.{kind.__qualname__}")


def read_tree(path: Path, classes: Sequence[type], device: Any = "cpu") -> Any:
    """What :func:`write_tree` wrote.

    Raises:
        SkyrlError: if it is no such file, or is damaged.
    """
    if not os.path.isfile(path):  # a pipe would never end, a device neither
        raise SkyrlError(f"{path} is no file")
    known = {kind.__name__: kind for kind in classes}
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name).to(device) for name in file.keys()}  # noqa: SIM118
            return _value(json.loads(file.metadata()["tree"]), tensors, known)
    except (SafetensorError, OSError, LookupError, RecursionError, TypeError, ValueError, AttributeError) as error:
        raise SkyrlError(
            f"{path} is damaged, or no checkpoint of this version of skyrl: {type(error).__name__}: {error}"
        ) from error


def _value(node: Any, tensors: dict[str, torch.Tensor], known: dict[str, type]) -> Any:
    if isinstance(node, list):
        return [_value(one, tensors, known) for one in node]
    if not isinstance(node, dict):
        return node
    ((kind, content),) = node.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dtype":
        if not isinstance(found := getattr(torch, content), torch.dtype):
            raise ValueError(f"{content!r} is no type of tensors")
        return found
    inner = _value(content, tensors, known)
    for plain, name in (PAIRS | ROWS).items():
        if kind == name:
            return plain(inner)
    made: Any = object.__new__(known[kind])
    for name, value in inner.items():
        setattr(made, name, value)
    return made
