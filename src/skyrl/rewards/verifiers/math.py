"""Mathematical equality with math-verify. Imported only in the verifier process: it loads sympy, which some expressions
(``9^{9^{9}}``) keep busy for ever, so that the process has to be killed.
"""

from __future__ import annotations

import logging
import re
from typing import Any

from math_verify import LatexExtractionConfig, parse, verify

from skyrl.records import DataError

# It would warn on every start that its time limits are off; they are, on purpose (see _parse).
logging.getLogger("math_verify").setLevel(logging.ERROR)

_SIGNS = re.compile(r"\\?%|°")
"""Signs that the grammar does not know; ``^\\circ`` and units in ``\\text`` it leaves out by itself."""
_DELIMITERS = ("$", "\\(", "\\[", "\\boxed", "\\begin{")


def _parse(text: str) -> list[Any]:
    """Sympy expressions of a text; ``[]`` if none can be read.

    Only the LaTeX grammar is used; it evaluates no Python, as sympy's own parser does. Text without delimiters is
    taken as one formula, so ``x^2`` reads like ``$x^2$``. math-verify's own limits are off: they use SIGALRM, which
    works in a main thread only and can't end a loop in C. The runner kills this process instead.
    """
    text = _SIGNS.sub("", text)
    formula = text if any(mark in text for mark in _DELIMITERS) else f"${text}$"
    # Without the fall-back: an unreadable truth would become a text that hardly any answer equals.
    return parse(formula, [LatexExtractionConfig()], fallback_mode="no_fallback", parsing_timeout=None)


def math_verifier(answer: str, truth: str) -> float:
    """1.0 if both are mathematically equal (``\\frac{1}{2}`` and ``0.5``, ``(x+1)^2`` expanded…), else 0.0.

    Signs of per cent and degree count for nothing on either side. An answer that can't be read as mathematics is wrong,
    such a truth a :class:`DataError`. A failure inside the comparison is raised, not scored.
    """
    expected = _parse(truth)
    if not expected:
        raise DataError(f"the truth {truth[:100]!r} of a 'math' prompt can't be read as a mathematical expression")
    if answer.strip() == truth.strip():
        return 1.0
    return float(verify(expected, _parse(answer), timeout_seconds=None, raise_on_error=True))
