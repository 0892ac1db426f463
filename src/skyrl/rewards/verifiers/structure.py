"""What an answer in mathematics is made of: lists, sets, intervals, matrices, relations, ratios, words, formulas."""

from __future__ import annotations

import re
from collections.abc import Callable

from skyrl.rewards.verifiers.expressions import GREEK, KNOWN, NotMathematics, tokens
from skyrl.rewards.verifiers.nodes import Group, Leaf, Named, Node, Relation, Words, bounded
from skyrl.rewards.verifiers.normalise import bare, depths, enclosed, split
from skyrl.rewards.verifiers.quantity import GROUPED, read_quantity

MAX_DEPTH = 12
"""Of lists inside lists."""
MAX_ITEMS = 100
"""Of a list; longer ones are unreadable."""


_SEPARATOR = re.compile(
    r"\s*(?:[,;]\s*(?:\\text\{\s*)?(?:(?:and|or)\b(?:\s*\})?)?|\\text\{\s*(?:,\s*)?(?:and|or)\s*,?\s*\}|\b(?:and|or)\b|&&?"
    r"|[和或与∪∧∨])\s*"
)
_JOINTS = {"∪": re.compile("∪"), "or": re.compile("or|[或∨]"), "and": re.compile("and|[&和与∧]")}
_EMPTY = re.compile(r"(?:the )?(?:empty|null) set|\\\{\s*\\\}|\{\s*\}")
_COMMA = re.compile(r"\s*[,;]\s*")
_SIGN = re.compile(r"[=<>≤≥≠≈∈]")
_COLON, _BAR = re.compile(r":"), re.compile(r"\|")
_THOUSANDS = re.compile(rf"(?<![0-9.,])(?:{GROUPED})(?:(?=\.[0-9])|(?![.,]?[0-9]))")
_MATRIX = re.compile(
    r"[\[(]?\s*\\begin\{(?P<kind>[pbB]?matrix|smallmatrix|array)\}(?:\{[lcr|@ {}]*\}|\[[lcr]*\])?(?P<body>.*)"
    r"\\end\{(?P=kind)\}\s*[\])]?"
)
_SYSTEM = re.compile(
    r"(?:\\\{)?\s*\\begin\{(cases|aligned|align\*?|gathered|array)\}(?:\{[lcr| ]*\})?(.*)\\end\{\1\}\s*\.?"
)
_ALIGNMENT = re.compile(r"\s*&\s*(?=[=<>≤≥≠≈])|(?<=[=<>≤≥≠≈])\s*&\s*")
_CELL = re.compile(
    r"\s*,?\s*(?:&\s*)?(?:\\text\{\s*,?\s*(?:if|for|when)\s*\}|\b(?:if|for|when)\b)\s*|\s*,?\s*&\s*|\s*,\s*"
)
"""Between a piece of a function and where it holds."""
QUANTITIES = {
    *("answer", "area", "volume", "perimeter", "circumference", "length", "width", "height", "depth", "radius", "base"),
    *(
        "diameter",
        "distance",
        "speed",
        "velocity",
        "acceleration",
        "time",
        "mass",
        "weight",
        "force",
        "energy",
        "power",
    ),
    *("pressure", "density", "temperature", "sum", "total", "difference", "product", "quotient", "remainder", "ratio"),
    *("mean", "median", "mode", "range", "average", "variance", "probability", "slope", "intercept", "maximum", "rate"),
    *("minimum", "max", "min", "gcd", "lcm", "cost", "price", "profit", "age", "number", "count", "value", "result"),
    *(
        "solution",
        "work",
        "angle",
        "rank",
        "det",
        "var",
        "discriminant",
        "hypotenuse",
        "gcf",
        "hcf",
        "amount",
        "income",
    ),
}
"""Words that may stand before ``= 5`` and say nothing about it."""
_QUANTITY = "|".join(sorted(QUANTITIES))
_NAME = re.compile(
    rf"(?:[A-Z]{{3,4}}|(?!(?:{'|'.join(sorted(KNOWN))})(?![A-Za-z]))[A-Za-z]{{1,2}}|(?i:{_QUANTITY}|\\text\{{\s*(?:{_QUANTITY})\s*\}})"
    r"|\\(?:mathbf|vec|hat|overrightarrow)\s*\{[A-Za-z]{1,3}\}"
    rf"|\\?(?:{'|'.join(sorted(GREEK - {'pi'}))})(?![A-Za-z])|∠ ?[A-Z]{{1,3}})\s*'?"
    r"(?:_\s*(?:\{[^{}]*\}|[A-Za-z0-9]))?(?:\s*\([^()=]{1,40}\))?"
)
_TUPLE_NAME = re.compile(r"\(\s*([^()]+)\s*\)")
_WORDS = re.compile(r"[^\W\d_]+(?:[ ']+[^\W\d_]+)*[.!?]?")
_OF_BASE = re.compile(r"([0-9A-F]+)\s*_\s*\{?\s*([0-9]{1,2})\s*\}?")
"""``2516_8``, compared as text: its value in base 10 is what a question begins with."""
_FRENCH = re.compile(r"(?=\]|.*\[$)([\[\]])([^\[\]]*)([\[\]])")
"""``]2, 5]`` for an interval that is open on the left."""
_DATE = re.compile(r"[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}|[0-9]{1,2}([/.-])[0-9]{1,2}\1[0-9]{4}")
_MEMBER = re.compile(r"([A-Za-z])(?:\s*∈\s*\\mathbb\s*\{?\s*R\s*\}?)?")
_CASED = {"yes", "no", "odd", "all", "one", "two", "six", "ten", "up", "dne"}
"""Short words that are no product of variables, however they are written."""
_REALS = {"\\mathbb{R}", "\\mathbb R", "\\R", "all real numbers", "all reals", "all real x"}


def ungrouped(text: str) -> str:
    """Without the gaps in ``1,234`` and ``10 000``, but for those in brackets: ``(1,234)`` is a pair."""
    outside = {place for place, depth in depths(text) if depth == 0}
    return _THOUSANDS.sub(
        lambda match: re.sub("[, ]", "", match.group()) if match.start() in outside else match.group(), text
    )


def read(text: str, depth: int = 0) -> Node:
    """The structure of a text in canonical notation. Never fails: what has no structure is a :class:`Leaf`."""
    text = text.strip()
    if depth > MAX_DEPTH:
        return Leaf("")
    if depth == 0:
        text = ungrouped(text)
    for reader in (_environment, _several, _related, _bracketed, _paired):
        node = reader(text, depth)
        if node is not None:
            return node
    return _leaf(text)


def _environment(text: str, depth: int) -> Node | None:
    """Matrices, systems of equations, LaTeX groups, and the names of whole sets."""
    if _EMPTY.fullmatch(text):
        return Leaf("∅")
    if text in _REALS:
        return Group("tuple", (Leaf("-∞"), Leaf("∞")), "()")
    if text.startswith("{") and text.endswith("}") and enclosed(text):
        inside = text[1:-1]
        return _set(inside, depth) if len(split(inside, _COMMA)[0]) > 1 else read(inside, depth + 1)
    match = _MATRIX.fullmatch(text)
    if match and (match["kind"] != "array" or "=" not in match["body"]):
        rows = [row for row in match["body"].replace("\\hline", "").split("\\\\") if row.strip()]
        cells = [[read(cell, depth + 1) for cell in row.split("&")] for row in rows]
        return Group("matrix", tuple(Group("row", tuple(row)) for row in cells))
    if match := _SYSTEM.fullmatch(text):
        rows = [_ALIGNMENT.sub(" ", row).strip(" ,;") for row in match[2].split("\\\\")]
        return _list([row for row in rows if row], depth, reader=_piece)
    return None


def _several(text: str, depth: int) -> Node | None:
    """Lists: ``2, 3``, ``2 and 3``, ``x < 1 or x > 2``."""
    if match := _FRENCH.fullmatch(text):
        left, inside, right = match.groups()
        return read(("(" if left == "]" else "[") + inside + (")" if right == "[" else "]"), depth + 1)
    parts, marks = split(re.sub(r",?\s*respectively$", "", text), _SEPARATOR)
    if len(parts) == 1:
        return None
    joints = [name for name, pattern in _JOINTS.items() if any(map(pattern.search, marks))]
    if len(joints) > 1:
        return Leaf("")  # which of "and" and "or" binds first is anybody's guess
    node = _list(parts, depth, "".join(joints))
    if any(mark in "∧∨" for mark in marks) and isinstance(node, Group) and any(isinstance(i, Leaf) for i in node.items):
        return Words("".join(text.split()))  # p ∧ q
    if joints == ["and"] and isinstance(node, Group) and _are_bounds(node.items):
        return Group("both", node.items)
    return node


def _piece(row: str, depth: int) -> Node:
    """A row of a system: an equation, or a piece of a function and where it holds."""
    cells, _ = split(row, _CELL)
    return read(row, depth) if len(cells) == 1 else Group("row", tuple(read(cell, depth) for cell in cells))


def _paired(text: str, depth: int) -> Node | None:
    """``±`` as both of its signs (``∓`` then has the other), and ratios."""
    if "±" in text or "∓" in text:
        signs = (("+", "-"), ("-", "+"))
        return Group("list", tuple(Leaf(text.replace("±", one).replace("∓", other)) for one, other in signs))
    parts, _ = split(text, _COLON)
    return Group("ratio", tuple(map(_leaf, parts))) if len(parts) > 1 else None


def _are_bounds(items: tuple[Node, ...]) -> bool:
    relations = [item for item in items if isinstance(item, Relation) and set(item.signs) <= set("<>≤≥≠")]
    return len(relations) == len(items) and len({bounded(item) for item in relations} - {None}) == 1


def _leaf(text: str) -> Leaf | Words:
    plain = bare(text)
    if plain != text and not re.search(r"[\\^]|\d", plain):
        text = plain
    if text == "...":
        return Words(text)
    if _DATE.fullmatch(text):
        return Words(re.sub(r"\b0", "", text))
    if read_quantity(text) is not None:
        return Leaf(text)
    if match := _OF_BASE.fullmatch(text):
        return Words(f"{match[1]} in base {match[2]}")
    letters = sum(map(str.isalpha, text))
    if _WORDS.fullmatch(text) and letters > 1 and text not in KNOWN and not re.fullmatch("[xyz]{2,3}", text):
        word = text.rstrip(".!?")
        folds = letters > 3 or word.casefold() in _CASED or (letters == 3 and word == word.capitalize())
        return Words(word.casefold() if folds else word)  # but XY is not xy
    if re.fullmatch(
        r"(?:\\triangle|∠|△|angle|triangle|\\overline|\\overrightarrow|\\vec)\s*\{?\s*[A-Z]{1,5}\s*\}?", text
    ):
        return Words(re.sub(r"[\s{}]", "", text.replace("∠", "angle")))
    try:
        tokens(re.sub(r"\\text\{[^{}]*\}", "", text))
    except NotMathematics:
        if not re.search(r"^[+-]?[$€£]?\d|\\", text):
            return Words(" ".join(text.casefold().split()))
    return Leaf(text)


def _list(parts: list[str], depth: int, joint: str = "", reader: Callable[[str, int], Node] = read) -> Node:
    if not 0 < len(parts) <= MAX_ITEMS:
        return Leaf("")
    items: list[Node] = []
    for part in parts:
        item = reader(part, depth + 1)
        items += item.items if isinstance(item, Group) and item.kind == "list" else [item]
    first = items[0]
    if isinstance(first, Named) and not any(isinstance(item, Named | Relation) for item in items[1:]):
        return Named(first.name, Group("list", (first.value, *items[1:]), joint=joint), "")  # n = 2, 3, 4
    kind = "row" if Words("...") in items else "list"  # 1, 2, …, n goes on in a certain way
    return items[0] if len(items) == 1 else Group(kind, tuple(items), joint=joint)


def _related(text: str, depth: int) -> Node | None:
    """Equations, inequalities and names of values."""
    sides, signs = split(text, _SIGN)
    if not signs:
        return None
    if set(signs) <= {"=", "≈", "∈"}:
        name = " ".join(sides[0].split())
        if _NAME.fullmatch(name) and sides[-1]:
            chain = len(sides) > 2
            value = Relation(tuple(sides[1:]), tuple(signs[1:])) if chain else read(sides[1], depth + 1)
            return Named(name.replace(" ", ""), value, text if signs == ["="] else "")
        if (match := _TUPLE_NAME.fullmatch(name)) and len(sides) == 2:
            value, names = read(sides[1], depth + 1), [part.strip() for part in match[1].split(",")]
            if isinstance(value, Group) and value.kind == "tuple" and len(names) == len(value.items) > 1:
                named = (Named(one, item, "") for one, item in zip(names, value.items, strict=True))
                return Group("list", tuple(named))
            return value
    return Relation(tuple(sides), tuple(signs))


def _bracketed(text: str, depth: int) -> Node | None:
    """Sets, tuples, intervals, and single values in brackets."""
    if text.startswith("\\{") and text.endswith("\\}"):
        return _set(text[2:-2], depth)
    if not enclosed(text):
        return None
    inside, brackets = text[1:-1], text[0] + text[-1]
    parts, _ = split(inside, _COMMA)
    if len(parts) == 1:
        return read(inside, depth + 1) if brackets == "()" else None
    return Group("tuple", tuple(read(part, depth + 1) for part in parts), brackets)


def _set(inside: str, depth: int) -> Node:
    for mark in (_BAR, _COLON):
        condition, _ = split(inside, mark)
        if len(condition) == 2 and not inside[:1].isdigit():
            match = _MEMBER.fullmatch(condition[0])
            node = read(condition[1], depth + 1)
            if match and isinstance(node, Relation | Group) and bounded(node) == match[1]:  # {x | x > 3}
                return node
            return Words("".join(inside.split()))
    parts, _ = split(inside, _COMMA)
    node = _list([part for part in parts if part], depth)
    return Group("set", node.items if isinstance(node, Group) and node.kind == "list" else (node,))
