"""Records in a safetensors file: no pickle, nothing that a file names is run, and nothing is as large as a file says.

A value (a record, or a type made of records, lists and plain values) becomes a few tensors::

    tree          its JSON text, in which an array stands as [type, first element, shape] and a picture as its name
    <type>        all elements of the arrays of this type, one array behind the other
    picture.<…>   one picture, named by a digest of its content, so each stands once in a file, whoever has it

JSON holds what MessagePack and safetensors' own metadata do not: any integer, nan, half a surrogate pair.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from skyrl.records import DataError

T = TypeVar("T")
Tensors = dict[str, np.ndarray]
TREE, PICTURE = "tree", "picture."
KINDS = {"|b1": "bool", "<i4": "int32", "<i8": "int64", "<f4": "float32", "<f8": "float64", "|u1": "uint8"}
"""Types of arrays that records have, as numpy and as the file calls them."""
FORMAT = "skyrl records 1"


@contextmanager
def damage(what: object) -> Iterator[None]:
    """Turn whatever a damaged (or hostile) file leads to into a :class:`DataError` that names it."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{what}: {error}") from error
    except (SafetensorError, ArithmeticError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise DataError(f"{what} is damaged, or not of this version: {type(error).__name__}: {error}") from error


# ---------------------------------------------------------------- values and tensors


def pack(value: object, known: Collection[str] = ()) -> Tensors:
    """The tensors of ``value``; pictures whose names are ``known`` are left out.

    Raises:
        TypeError: for something that is no record, array or plain value.
    """
    tensors: Tensors = {}
    flat: dict[str, list[np.ndarray]] = {kind: [] for kind in KINDS.values()}
    ends = dict.fromkeys(flat, 0)

    def plain(found: object) -> object:
        if isinstance(found, np.generic):
            return found.item()
        if not isinstance(found, np.ndarray) or (kind := KINDS.get(found.dtype.str)) is None:
            raise TypeError(f"a saved state holds no {getattr(found, 'dtype', type(found).__name__)}")
        if _is_picture(found):
            whole = np.ascontiguousarray(found)
            name = PICTURE + blake2b(whole.data, digest_size=16, key=repr(whole.shape).encode()).hexdigest()
            if name not in known:
                tensors[name] = whole
            return name
        start, ends[kind] = ends[kind], ends[kind] + found.size
        flat[kind].append(found.ravel())
        return [kind, start, list(found.shape)]

    tree = json.dumps(msgspec.to_builtins(value, enc_hook=plain), separators=(",", ":"))
    tensors[TREE] = np.frombuffer(tree.encode(), np.uint8)
    return tensors | {kind: np.concatenate(arrays) for kind, arrays in flat.items() if arrays}


def unpack(kind: type[T], tensors: Mapping[str, np.ndarray], pictures: Mapping[str, np.ndarray]) -> T:
    """The value of type ``kind`` whose :func:`pack` is ``tensors``. Its arrays are its own; pictures are those of
    ``pictures``, not copied.

    Raises:
        ValueError, LookupError, RecursionError, ArithmeticError: for tensors that are none of such a value; see
            :func:`damage`.
    """
    left = {name: tensors[name].size for name in KINDS.values() if name in tensors}

    def array(wanted: type[Any], found: object) -> Any:
        if wanted is not np.ndarray:
            raise TypeError(f"no {wanted.__name__} can be saved")
        if isinstance(found, str):
            return _picture(found, pictures)
        name, start, shape = msgspec.convert(found, tuple[str, int, list[int]])
        size = math.prod(shape)
        left[name] -= size  # no element is used twice: what is read is never larger than the file
        if min([start, *shape], default=0) < 0 or left[name] < 0:
            raise ValueError(f"an array begins at {start} and has the shape {shape}")
        return tensors[name].reshape(-1)[start : start + size].reshape(shape).copy()

    return msgspec.convert(json.loads(tensors[TREE].tobytes()), kind, dec_hook=array)


def _is_picture(array: np.ndarray) -> bool:
    return array.ndim == 3 and array.dtype == np.uint8 and array.shape[2] == 3


def _picture(name: str, pictures: Mapping[str, np.ndarray]) -> np.ndarray:
    if not _is_picture(pictures[name]):
        raise ValueError(f"picture {name!r} has the shape {pictures[name].shape}")
    return pictures[name]


# ---------------------------------------------------------------- files


def write(path: Path, value: object, step: int) -> None:
    """Write ``value``, the state after ``step``; the file appears as a whole, and on the disk.

    Raises:
        OSError: if it can't be written. The file that was there before is then still there.
    """
    temporary = path.with_name(f"{path.name}.writing")
    tensors = pack(value)
    try:
        save_file(tensors, temporary, metadata={"format": FORMAT, "step": str(step)})
        synced(temporary)
        os.replace(temporary, path)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    finally:
        temporary.unlink(missing_ok=True)
    synced(path.parent)


def read(path: Path, kind: type[T]) -> tuple[T, Tensors]:
    """What :func:`write` wrote, and its pictures by name.

    Raises:
        DataError: if it is no such file, or is damaged; nothing in it is run.
    """
    with _opened(path) as file, damage(path):
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        # Copies own their memory, so that prompts which show one picture go on sharing it.
        pictures = {name: array.copy() for name, array in tensors.items() if name.startswith(PICTURE)}
        return unpack(kind, tensors, pictures), pictures


def step_of(path: Path) -> int:
    """The step after which the state in the file was written. Errors as :func:`read`; reads the head of the file."""
    with _opened(path) as file, damage(path):
        return int(file.metadata()["step"])


def picture_names(path: Path) -> set[str]:
    """Names of the pictures that the file holds. Errors as :func:`read`; reads the head of the file."""
    with _opened(path) as file:
        return {name for name in file.keys() if name.startswith(PICTURE)}  # noqa: SIM118


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if not path.is_file():  # a pipe would never end, a device neither
        raise DataError(f"{path} is no file")
    refusal = (
        f"{path} is no state of this version's sample buffer: checkpoints of older versions can't be loaded; start a "
        "new run from the policy that the old one exported"
    )
    try:
        opened = safe_open(path, "np")
    except (SafetensorError, OSError) as error:
        raise DataError(f"{refusal} ({error})") from error
    with opened as file:
        if (file.metadata() or {}).get("format") != FORMAT:
            raise DataError(refusal)
        yield file


def synced(path: Path) -> None:
    """Let a file's content, or the names in a folder, reach the disk; not every file system can do it for folders."""
    handle = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError) if path.is_dir() else nullcontext():
            os.fsync(handle)
    finally:
        os.close(handle)
