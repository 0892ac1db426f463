"""Answers that a policy could write to hang, crash or fool a verifier, made from a seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

_CODE = (
    "__import__('os').system('touch {mark}')",
    "exec(\"open('{mark}', 'w')\")",
    "().__class__.__bases__[0].__subclasses__()",
    "lambda: open('{mark}', 'w')",
    "{{{{7*7}}}} ${{{{7*7}}}} <% 7*7 %>",
    "`touch {mark}` $(touch {mark})",
    "\\input{{/etc/passwd}} \\write18{{touch {mark}}}",
    "!!python/object/apply:os.system ['touch {mark}']",
    "sympify(\"open('{mark}', 'w')\")",
    "@{mark} #{{mark}} %s %n \\x00",
)
_LATEX = (
    "\\frac{",
    "\\sqrt[",
    "\\begin{pmatrix}1&",
    "\\left(",
    "\\boxed{",
    "x^{",
    "\\text{",
    "{",
    "}",
    "\\\\",
    "&",
    "$",
    "\\",
)
_ENDS = (
    "\\frac",
    "^",
    "_",
    "+",
    "\\sum_{k=0}^{",
    "\\int_0^",
    "\\lim_{x\\to",
    "\\binom{5}",
    "1e",
    "2^^3",
    "\\over",
    "''",
    "--",
)


def _nested(rng: random.Random) -> str:
    left, right = rng.choice(
        [("(", ")"), ("{", "}"), ("[", "]"), ("\\frac{1}{", "}"), ("\\sqrt{", "}"), ("\\{", "\\}"), ("|", "|")]
    )
    depth = rng.choice([5, 20, 60, 300, 2000, 20000])
    return left * depth + "1" + right * (depth if rng.random() < 0.7 else depth - 1)


def _power(rng: random.Random) -> str:
    tower = "9" + "^{9" * rng.randint(1, 6)
    tower += "}" * tower.count("{")
    return rng.choice(
        [tower, "9**9**9**9", "10^(10^10)", "2^{10^{12}}", f"{rng.randint(10**5, 10**7)}!", "1e999999999", "((9!)!)!"]
    )


def _code(rng: random.Random) -> str:
    return rng.choice(_CODE).format(mark="{mark}")


def _broken(rng: random.Random) -> str:
    return "".join(rng.choice((*_LATEX, *_ENDS, "x", "1", " ", "2")) for _ in range(rng.randint(1, 60)))


def _unicode(rng: random.Random) -> str:
    points = [
        *range(0x20, 0x7F),
        *range(0x300, 0x330),
        0x200B,
        0x202E,
        0xFEFF,
        0x661,
        0xFF12,
        0xBD,
        0x2162,
        0x1D7D8,
        0x1F600,
        0xFFFD,
    ]
    return "".join(chr(rng.choice(points)) for _ in range(rng.randint(1, 200)))


def _control(rng: random.Random) -> str:
    return "".join(
        chr(rng.choice([0, 1, 7, 8, 9, 10, 12, 13, 27, 127, 133, 0x2028, 50, 51])) for _ in range(rng.randint(1, 80))
    )


def _long(rng: random.Random) -> str:
    unit = rng.choice(
        [
            *"9(,*`$_ .-{aA",
            "1,",
            "**",
            "1 ",
            "\u0301\u0316",
            "$1$ ",
            "\\frac",
            "(A)",
            "A or ",
            "½",
            "the answer is ",
            "\\boxed{1}",
        ]
    )
    return unit * (rng.choice([10_000, 300_000, 1_000_000]) // len(unit))


def _heavy(rng: random.Random) -> str:
    return rng.choice(
        [
            f"\\int_0^{{\\infty}} \\frac{{\\sin(x^{rng.randint(3, 40)})}}{{x^3+\\cos x}} dx",
            f"\\sum_{{k=1}}^{{{10 ** rng.randint(3, 12)}}} \\frac{{1}}{{k^3+k}}",
            f"(x+y+z)^{{{rng.randint(50, 5000)}}}",
            f"\\sqrt{{x+{'+'.join(f'{chr(92)}sqrt{{x+{k}}}' for k in range(rng.randint(5, 40)))}}}",
            f"\\sin({'x^2+' * rng.randint(5, 200)}1)",
            "\\lim_{n\\to\\infty} (1+\\frac{1}{n})^{n^{n}}",
            f"\\begin{{pmatrix}}{'1&' * rng.randint(50, 500)}1\\end{{pmatrix}}",
            ",".join(f"x^{k}" for k in range(rng.randint(20, 300))),
            "x=" * rng.randint(5, 500) + "1",
        ]
    )


KINDS: tuple[Callable[[random.Random], str], ...] = (
    *(_nested, _power, _code, _broken, _unicode, _control, _long, _heavy),
)
TRUTHS = ("9", "x^2+1", "\\frac{1}{2}", "(1,2)", "x>3", "B", "red", "\\{1,2\\}", "2x+y=3", "5 cm")


def hostile(count: int, mark: str, seed: int = 0) -> Iterator[tuple[str, str]]:
    """``count`` pairs (answer, truth). Code that is run would make the file ``mark``."""
    rng = random.Random(seed)
    for place in range(count):
        yield KINDS[place % len(KINDS)](rng).replace("{mark}", mark), rng.choice(TRUTHS)
