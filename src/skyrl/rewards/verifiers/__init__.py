"""Rule verifiers by name.

A verifier is a function ``(answer, truth) -> score in [0, 1]``; it raises on a broken truth and never guesses. It is
known by an import path, ``package.module:function``, and not as an object: the process that runs it imports it by that
path. One of your own gets its name in the setting ``reward.verifiers``, so that every process of a run knows it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module

from skyrl.records import DataError
from skyrl.settings.system import BUILTIN_VERIFIERS

Verifier = Callable[[str, str], float]

BUILTIN = {name: f"skyrl.rewards.verifiers.{name}:{name}_verifier" for name in BUILTIN_VERIFIERS}
"""Name → ``package.module:function``."""


def verifier_reference(name: str, own: Mapping[str, str] | None = None) -> str:
    """Import path of the verifier ``name``; a name with a colon is taken as one. Imports nothing.

    Args:
        own: ``reward.verifiers`` of the settings; ``None`` knows the built-in names only.

    Raises:
        DataError: for an unknown name.
    """
    if ":" in name:
        return name
    known = BUILTIN | dict(own or {})
    if name not in known:
        raise DataError(
            f"unknown verifier {name!r}; allowed: {', '.join(known)}, 'package.module:function', or a name that the "
            "setting reward.verifiers gives to one"
        )
    return known[name]


def load_verifier(reference: str) -> Verifier:
    """Import a verifier by its path.

    Raises:
        DataError: if the module can't be found or has no such function.
    """
    module, _, function = reference.partition(":")
    try:
        verifier: Verifier = getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise DataError(f"verifier {reference!r} can't be imported: {error}") from error
    if not callable(verifier):
        raise DataError(f"verifier {reference!r} is a {type(verifier).__name__}; allowed: a function (answer, truth)")
    return verifier


def get_verifier(name: str) -> Verifier:
    """The built-in verifier ``name`` or that of a path, imported into this process.

    Raises:
        DataError: for an unknown name or one that can't be imported.
    """
    return load_verifier(verifier_reference(name))
