"""How long a verifier takes for one answer: ``python -m benchmarks.verifiers`` (docs/verifiers.md has the figures).

Medians over the answers below, each judged anew in this process; ``math`` without its caches, as a new answer finds it.
"""

from __future__ import annotations

import json
import statistics
import sys
from time import perf_counter

from skyrl.rewards.verifiers import load_verifier, verifier_reference

CASES = {
    "exact": ("exact", [("a red car", "A red  car"), ("blue", "red")]),
    "choice": ("choice", [("The answer is B.", "B"), ("(C) a dog", "C"), ("A or B", "A")]),
    "numeric": ("numeric", [("1,234.5", "1234.5"), ("$72.00", "72"), ("3/4", "0.75")]),
    "math, numbers and lists": ("math", [("\\frac{22}{7}", "3\\frac17"), ("1, 2, 3", "3, 2, 1"), ("5 cm", "0.05 m")]),
    "math, polynomials": ("math", [("(x+1)^2", "x^2+2x+1"), ("2x+3y=6", "4x+6y=12"), ("x^2-1", "(x-1)(x+1)")]),
    "math, roots and functions": (
        "math",
        [("\\sqrt{8}", "2\\sqrt{2}"), ("\\sin^2 x", "1-\\cos^2 x"), ("√3", "3^{1/2}")],
    ),
    "code, a script": ("code", [("print(input())", json.dumps({"stdin": [{"input": "3\n", "output": "3\n"}]}))]),
    "code, a function": (
        "code",
        [("def f(x): return x", json.dumps({"function": "f", "cases": [{"args": [1], "result": 1}] * 3}))],
    ),
    "code, tests in Python": (
        "code",
        [("def f(x): return x", json.dumps({"tests": "def check(f):\n    assert f(1) == 1", "entry": "f"}))],
    ),
}
ROUNDS = 7


def main() -> int:
    for label, (name, cases) in CASES.items():
        verify = load_verifier(verifier_reference(name))
        verify(*cases[0])  # what is imported once
        times = []
        for _ in range(ROUNDS):
            for answer, truth in cases:
                _forget()
                started = perf_counter()
                verify(answer, truth)
                times.append(perf_counter() - started)
        print(f"{label}: {1000 * statistics.median(times):.2f} ms")
    return 0


def _forget() -> None:
    """Empty every cache of the verifiers' modules and of sympy."""
    from sympy.core.cache import clear_cache

    clear_cache()
    for name, module in list(sys.modules.items()):
        if name.startswith("skyrl.rewards.verifiers."):
            for value in vars(module).values():
                getattr(value, "cache_clear", lambda: None)()


if __name__ == "__main__":
    sys.exit(main())
