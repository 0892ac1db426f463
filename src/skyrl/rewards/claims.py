"""Exact checks of what an answer claims to see, against what the picture is known to show.

No judge model is involved: a claim is checked only if a fact about it is known. The rates over many answers follow
CHAIR (Rohrbach et al. 2018); ``rewards/metrics.py`` takes them.
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
    """First character of the claim in the answer text."""
    end: int
    """One past its last character."""
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
    """Check claims about the fact ``name`` with a function or ``package.module:function``. Replaces an earlier one.

    The registry is that of this process: register wherever answers are scored (docs/data.md).
    """
    CHECKERS[name] = checker


def check_claims(text: str, facts: Mapping[str, Any]) -> list[Claim]:
    """All checkable claims of an answer, sorted by their place in it.

    Args:
        text: The answer, tags included.
        facts: ``Prompt.facts``. ``{}`` gives ``[]``; a fact without a checker is ignored.

    Raises:
        DataError: if a fact is malformed.
    """
    claims = [claim for name, fact in facts.items() if name in CHECKERS for claim in _checker(name)(text, fact)]
    return sorted(claims, key=lambda claim: (claim.start, claim.end))


def _checker(name: str) -> Checker:
    known = CHECKERS[name]
    if isinstance(known, str):
        CHECKERS[name] = known = resolve_name(known)
    return known
