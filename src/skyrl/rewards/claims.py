"""Exact checks of what an answer claims to see, against what the picture is known to show. No judge model is involved:
a claim is checked only if a fact about it is known. ``rewards/metrics.py`` takes the rates over many answers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any


@dataclass(frozen=True, slots=True)
class Claim:
    """One checkable statement about the picture."""

    start: int
    end: int
    """First character of the claim in the answer text, and one past its last."""
    text: str
    """``answer[start:end]``."""
    true: bool
    """Whether the known facts agree with it."""


Checker = Callable[[str, Any], list[Claim]]
"""Returns the claims of an answer text about one fact, of this value; raises DataError for a malformed one."""
CHECKERS: dict[str, str | Checker] = {"grid": "skyrl.digits.claims:check_grid"}
"""Name of a fact (a key of ``Prompt.facts``) → its checker, or ``package.module:function`` of one that is imported when
such a fact is met."""


def register_checker(name: str, checker: str | Checker) -> None:
    """Check claims about the fact ``name`` with a function or ``package.module:function``. Replaces an earlier one. The
    registry is that of this process: register wherever answers are scored (docs/data.md)."""
    CHECKERS[name] = checker


def check_claims(text: str, facts: Mapping[str, Any]) -> list[Claim]:
    """All checkable claims of an answer, sorted by their place in it.

    Args:
        text: The answer, tags included.
        facts: ``Prompt.facts``. One without a checker is ignored, a malformed one is a :class:`DataError`.
    """
    claims: list[Claim] = []
    for name in (name for name in facts if name in CHECKERS):
        checker = CHECKERS[name]
        if isinstance(checker, str):
            CHECKERS[name] = checker = resolve_name(checker)
        claims += checker(text, facts[name])
    return sorted(claims, key=lambda claim: (claim.start, claim.end))
