"""Rule verifiers by name.

A verifier is a function ``(answer, truth) -> score in [0, 1]``; it raises on a broken truth and never guesses. Data
name it: a built-in one, or one that the setting ``reward.verifiers`` gives a name. The process that runs it imports it
by its path, ``package.module:function``, which data can't name: a row that could would run any code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from skyrl.records import DataError
from skyrl.settings.reward import BUILTIN_VERIFIERS

Verifier = Callable[[str, str], float]

BUILTIN = {name: f"skyrl.rewards.verifiers.{name}:{name}_verifier" for name in BUILTIN_VERIFIERS}
"""Name → ``package.module:function``."""


def verifier_reference(name: str, own: Mapping[str, str] | None = None) -> str:
    """Import path of the verifier ``name``, which is built in or one of ``own`` (``reward.verifiers``);
    :class:`DataError` for another one. Imports nothing."""
    known = BUILTIN | dict(own or {})
    if name in known:
        return known[name]
    mend = ", or a name that the setting reward.verifiers gives to one of your own"
    if ":" in name:
        short = name.rpartition(":")[2] or "mine"
        mend = f'; data can\'t name code: set reward.verifiers={{{short}: "{name}"}} and write {short} here'
    raise DataError(f"unknown verifier {name!r}; allowed: {', '.join(known)}{mend}")


def load_verifier(reference: str) -> Callable[..., Any]:
    """Import a verifier by its path; :class:`DataError` if the module can't be found or has no such function."""
    module, _, function = reference.partition(":")
    try:
        verifier: Callable[..., Any] = getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise DataError(f"verifier {reference!r} can't be imported: {error}") from error
    if not callable(verifier):
        raise DataError(f"verifier {reference!r} is a {type(verifier).__name__}; allowed: a function")
    return verifier


def get_verifier(name: str) -> Verifier:
    """The built-in verifier ``name``, imported into this process. Errors are those of :func:`verifier_reference` and
    :func:`load_verifier`."""
    return load_verifier(verifier_reference(name))
