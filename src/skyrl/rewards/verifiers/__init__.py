"""Rule verifiers by name.

A verifier is a function ``(answer, truth) -> score in [0, 1]``; it raises on a broken truth and never guesses. It is
known by its path, ``package.module:function``: the process that runs it imports it by that. One of your own gets its
name in the setting ``reward.verifiers``, so that every process of a run knows it.
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
    """Import path of the verifier ``name``, which is built in, one of ``own`` (``reward.verifiers``), or such a path
    itself; :class:`DataError` for another one. Imports nothing."""
    known = BUILTIN | dict(own or {})
    if ":" not in name and name not in known:
        raise DataError(
            f"unknown verifier {name!r}; allowed: {', '.join(known)}, 'package.module:function', or a name that the "
            "setting reward.verifiers gives to one"
        )
    return name if ":" in name else known[name]


def load_verifier(reference: str) -> Verifier:
    """Import a verifier by its path; :class:`DataError` if the module can't be found or has no such function."""
    module, _, function = reference.partition(":")
    try:
        verifier: Verifier = getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise DataError(f"verifier {reference!r} can't be imported: {error}") from error
    if not callable(verifier):
        raise DataError(f"verifier {reference!r} is a {type(verifier).__name__}; allowed: a function (answer, truth)")
    return verifier


def get_verifier(name: str) -> Verifier:
    """The built-in verifier ``name`` or that of a path, imported into this process. Errors are those of
    :func:`verifier_reference` and :func:`load_verifier`."""
    return load_verifier(verifier_reference(name))
