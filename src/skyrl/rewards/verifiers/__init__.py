"""Rule verifiers by name.

A verifier is a function ``(answer, truth) -> score in [0, 1]`` (:class:`skyrl.interfaces.Verifier`). It is known by
an import path, ``package.module:function``, and not as an object: the process that runs it imports it by that path.
"""

from __future__ import annotations

from importlib import import_module

from skyrl.interfaces import Verifier
from skyrl.records import DataError

BUILTIN = ("exact", "numeric", "math", "choice")
VERIFIERS: dict[str, str] = {name: f"skyrl.rewards.verifiers.{name}:{name}_verifier" for name in BUILTIN}
"""Name of a verifier → ``package.module:function``."""


def register_verifier(name: str, verifier: str | Verifier) -> None:
    """Make a verifier of your own known as ``name`` in this process.

    Without this call a data set can also name it directly as ``package.module:function``.

    Args:
        name: Not one of the built-in names.
        verifier: ``package.module:function``, or a function at the top level of an importable module.

    Raises:
        DataError: if the name is built in or holds a colon, or if the function can't be imported by its path (a lambda,
            an inner function, or one of the ``__main__`` script).
    """
    if name in BUILTIN or ":" in name:
        raise DataError(f"verifier name {name!r} can't be registered; built in: {', '.join(BUILTIN)}; no ':' allowed")
    if isinstance(verifier, str):
        reference = verifier
    else:
        module, qualname = getattr(verifier, "__module__", ""), getattr(verifier, "__qualname__", "")
        reference = f"{module}:{qualname}"
        if module == "__main__" or "." in qualname or load_verifier(reference) is not verifier:
            raise DataError(f"verifier {name!r} is {reference}; allowed: a top-level function of an importable module")
    if ":" not in reference:
        raise DataError(f"verifier {name!r} is {reference!r}; allowed: 'package.module:function'")
    VERIFIERS[name] = reference


def verifier_reference(name: str) -> str:
    """Import path of the verifier ``name``; a name with a colon is taken as one. Imports nothing.

    Raises:
        DataError: for an unknown name.
    """
    if ":" in name:
        return name
    if name not in VERIFIERS:
        raise DataError(f"unknown verifier {name!r}; allowed: {', '.join(VERIFIERS)}, or 'package.module:function'")
    return VERIFIERS[name]


def load_verifier(reference: str) -> Verifier:
    """Import a verifier by its path.

    Raises:
        DataError: if the module can't be found or has no such function.
    """
    module, _, function = reference.partition(":")
    try:
        verifier = getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise DataError(f"verifier {reference!r} can't be imported: {error}") from error
    if not callable(verifier):
        raise DataError(f"verifier {reference!r} is a {type(verifier).__name__}; allowed: a function (answer, truth)")
    return verifier


def get_verifier(name: str) -> Verifier:
    """The verifier ``name``, imported into this process.

    Raises:
        DataError: for an unknown name or one that can't be imported.
    """
    return load_verifier(verifier_reference(name))
