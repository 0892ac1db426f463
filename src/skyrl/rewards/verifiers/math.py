"""Mathematical equality. Imported only in the verifier process (see formulas.py).

An answer is read in three steps: decoration off (normalise.py), parts and what joins them (structure.py), and each
part as a number, words or a formula (formulas.py). Structures are compared here.
"""

from __future__ import annotations

import re

from skyrl.records import DataError
from skyrl.rewards.verifiers.arithmetic import exact
from skyrl.rewards.verifiers.formulas import proportion, readable, same_formula
from skyrl.rewards.verifiers.nodes import Group, Leaf, Named, Node, Relation, Words, bounded, is_constant
from skyrl.rewards.verifiers.normalise import bare, canonical, fold
from skyrl.rewards.verifiers.structure import QUANTITIES, read

MAX_CHARACTERS = 5000
"""Longer answers are wrong: bounds the work before sympy."""
_AS_TEXT = re.compile(r"[^\\^_{}]*[^\W\d_]{3}[^\\^_{}]*|.*(?:\.\.\.|\\equiv|≡|\\pmod).*")
"""Truths that are no formula but fine, and compared as text: words ("3 hours 20 minutes"), 1+2+…+n, congruences."""
_FLIPPED = {"<": ">", ">": "<", "≤": "≥", "≥": "≤", "≠": "≠", "=": "="}
_CLOCK = re.compile(r"([01]?\d|2[0-4]):([0-5]\d)(?::([0-5]\d))?(?:\s*([ap])\.?\s?m\.?)?", re.IGNORECASE)


def math_verifier(answer: str, truth: str) -> float:
    """1.0 if both are mathematically equal (``\\frac{1}{2}`` and ``0.5``, ``(x+1)^2`` expanded…), else 0.0.

    Decoration, a lead-in such as "The answer is" and a unit that the truth doesn't have count for nothing; ``30%``
    equals 0.3 and 30. Words are compared as text. An answer that can't be read is wrong, such a truth a
    :class:`DataError`. A failure inside the comparison is raised, not scored.
    """
    text = prepared(truth)
    expected = read(text)
    readable_truth = is_readable(expected)
    as_text = not readable_truth and _AS_TEXT.fullmatch(text) is not None
    if not readable_truth and not as_text:
        raise DataError(f"the truth {truth[:100]!r} of a 'math' prompt can't be read as a mathematical expression")
    if len(answer) > max(MAX_CHARACTERS, 2 * len(truth)):
        return 0.0
    if answer.strip() == truth.strip():
        return 1.0
    given = prepared(answer)
    return float(_squeezed(given) == _squeezed(text) if as_text else same(read(given), expected))


def _squeezed(text: str) -> str:
    return "".join(text.casefold().split())


def prepared(text: str) -> str:
    """The text without decoration, in canonical notation; a time of day in 24 hours: ``7:05 pm`` is ``19:05``."""
    text = canonical(bare(fold(text)))
    if match := _CLOCK.fullmatch(text):
        hour, minute, second, half = match.groups()
        shift = 12 * (half.lower() == "p") - 12 * (hour == "12") if half else 0
        return f"{int(hour) + shift}:{minute}" + (f":{second}" if second else "")
    return text


def is_readable(node: Node) -> bool:
    """Whether a truth can be compared with at all."""
    if isinstance(node, Leaf):
        return bool(node.text) and (node.text in ("∞", "-∞", "+∞", "∅") or readable(node.text))
    if isinstance(node, Group):
        return all(map(is_readable, node.items))
    if isinstance(node, Named):
        return is_readable(node.value)
    if isinstance(node, Relation):
        return all(is_readable(Leaf(side)) or isinstance(read(side), Group) for side in node.sides)
    return bool(node.text)


def same(answer: Node, truth: Node) -> bool:
    """Whether two structures are equal. The truth decides what is asked: names, order, brackets."""
    if any(isinstance(node, Relation) or (isinstance(node, Group) and node.kind == "both") for node in (answer, truth)):
        return _same_relation(answer, truth)
    if isinstance(truth, Named) and isinstance(answer, Named):
        if _same_name(answer.name, truth.name):
            return same(answer.value, truth.value)
        equations = truth.text and answer.text and isinstance(truth.value, Leaf) and isinstance(answer.value, Leaf)
        return bool(equations) and _same_relation(answer, truth)
    if isinstance(answer, Named):
        return same(answer.value, truth)
    if isinstance(truth, Named):
        return same(answer, truth.value)
    if isinstance(answer, Group) or isinstance(truth, Group):
        empty = Leaf("∅") in (answer, truth)  # {∅} is not ∅
        return not empty and _same_group(_as_group(answer), _as_group(truth))
    if isinstance(answer, Words) or isinstance(truth, Words):
        return answer == truth or _same_letters(answer, truth)
    assert isinstance(answer, Leaf) and isinstance(truth, Leaf)
    return same_formula(_number(answer.text), _number(truth.text))


def _number(text: str) -> str:
    return text.replace("+∞", "∞").strip()


def _same_letters(answer: Node, truth: Node) -> bool:
    """``xyz`` as words and as a formula: equal only if written alike."""
    texts = [re.sub(r"[\s*.()]", "", node.text) for node in (answer, truth) if isinstance(node, Words | Leaf)]
    return len(texts) == 2 and bool(texts[0]) and texts[0] == texts[1]


def _same_name(answer: str, truth: str) -> bool:
    """Names of variables must agree; words such as ``Area`` say nothing, and ``y`` may stand for ``f(x)``."""
    answer, truth = (re.sub(r"\\text|[{}\s\\]", "", name) for name in (answer, truth))
    if answer == truth or {answer.casefold(), truth.casefold()} & QUANTITIES:
        return True
    return {answer, truth} in ({"y", "f(x)"},)


# ---------------------------------------------------------------- groups


def _as_group(node: Node) -> Group:
    return node if isinstance(node, Group) else Group("list", (node,))


def _same_group(answer: Group, truth: Group) -> bool:
    if len(answer.items) != len(truth.items) or not _joint(answer) & _joint(truth):
        return False
    if {answer.kind, truth.kind} & {"matrix", "row", "ratio", "both"}:
        if answer.kind != truth.kind:
            return False
        if truth.kind == "ratio":
            return _same_ratio(answer, truth)
        return _unordered(answer, truth) if truth.kind == "both" else _ordered(answer, truth)
    if answer.kind == truth.kind == "tuple":
        return answer.brackets == truth.brackets and _ordered(answer, truth)
    names = [[item.name for item in group.items if isinstance(item, Named)] for group in (answer, truth)]
    all_named = [len(set(found)) == len(truth.items) for found in names]
    if all(all_named):
        return _by_name(answer, truth)
    if "tuple" in (answer.kind, truth.kind):
        brackets = answer.brackets + truth.brackets
        plain = "set" not in (answer.kind, truth.kind) and (
            brackets == "()" or (brackets == "[]" and len(truth.items) > 2)
        )
        return plain and _ordered(*map(_in_order, (answer, truth)))
    if all_named[1] and len({re.sub(r"_.*", "", name) for name in names[1]}) > 1:
        return _ordered(answer, truth)  # x = 1, y = 2 asks for 1, 2 in this order; x_1, x_2 in any
    return _unordered(answer, truth)


def _same_ratio(answer: Group, truth: Group) -> bool:
    """``4:6`` is ``2:3``, but a time of day is only itself."""
    parts = [[item.text for item in group.items if isinstance(item, Leaf)] for group in (answer, truth)]
    if _ordered(answer, truth) or any(_CLOCK.fullmatch(":".join(texts)) for texts in parts):
        return _ordered(answer, truth)
    values = [[exact(text) for text in texts] for texts in parts]
    pairs = [(one, other) for one, other in zip(*values, strict=False) if one and other]
    return len(pairs) == len(truth.items) and len({one / other for one, other in pairs}) == 1


def _joint(group: Group) -> set[str]:
    """How the parts of a list may hold together: ``∪`` and ``or`` are one of them, "" all of them, or any."""
    names = {item.name if isinstance(item, Named) else bounded(item) for item in group.items} - {None}
    if group.kind != "list" or group.joint == "∪":
        return {group.joint}
    if len(names) > 1:
        return {group.joint.replace("and", "")}
    if all(isinstance(item, Relation) and bounded(item) for item in group.items):
        return {"∪"}
    pairs = any(isinstance(item, Group) and item.kind == "tuple" for item in group.items)
    return {"∪", ""} if pairs and group.joint == "or" else {""}  # two intervals, or two points


def _in_order(group: Group) -> Group:
    """``y = 3, x = 2`` as x, y; other names keep the order in which they stand."""
    if all(isinstance(item, Named) and item.name in ("x", "y", "z") for item in group.items):
        return Group(
            group.kind, tuple(sorted(group.items, key=lambda item: getattr(item, "name", ""))), joint=group.joint
        )
    return group


def _same_item(answer: Node, truth: Node) -> bool:
    """Like :func:`same`, but {2} among others is not 2."""
    sets = [isinstance(node, Group) and node.kind == "set" for node in (answer, truth)]
    return sets[0] == sets[1] and same(answer, truth)


def _ordered(answer: Group, truth: Group) -> bool:
    return all(_same_item(one, other) for one, other in zip(answer.items, truth.items, strict=True))


def _by_name(answer: Group, truth: Group) -> bool:
    values = {item.name: item for item in answer.items if isinstance(item, Named)}
    return all(
        item.name in values and same(values[item.name].value, item.value)
        for item in truth.items
        if isinstance(item, Named)
    )


def _unordered(answer: Group, truth: Group) -> bool:
    left = list(answer.items)
    for item in truth.items:
        place = next((place for place, one in enumerate(left) if _same_item(one, item)), None)
        if place is None:
            return False
        del left[place]
    return True


# ---------------------------------------------------------------- equations and inequalities


def _same_relation(answer: Node, truth: Node) -> bool:
    """Equations are equal if one is a multiple of the other, inequalities also if the signs agree; those that bound one
    variable are intervals. A chain of equal numbers is its last one."""
    if len({name for name in (bounded(answer), bounded(truth)) if name}) > 1:
        return False  # x > 2 is not y > 2
    answer, truth = _range(answer, truth), _range(truth, answer)
    one, other = _interval(answer), _interval(truth)
    if isinstance(one, Group) and isinstance(other, Group):
        return _same_group(one, other)
    if isinstance(answer, Group) or isinstance(truth, Group):
        return isinstance(answer, Group) and isinstance(truth, Group) and _same_group(answer, truth)
    one, other = (_value(node) if isinstance(node, Relation) else node for node in (answer, truth))
    if not isinstance(one, Relation) and not isinstance(other, Relation) and (one, other) != (answer, truth):
        return same(one, other)
    links, expected = _links(answer), _links(truth)
    if links is None or expected is None or len(links) != len(expected):
        return False
    return all(any(_same_link(link, wanted) for link in links) for wanted in expected)


def _range(node: Node, other: Node) -> Node:
    """``x ∈ (2, 5)`` as the interval, where the other one bounds x."""
    ranged = isinstance(node, Named) and isinstance(node.value, Group) and node.name == bounded(other)
    return node.value if ranged and isinstance(node, Named) else node


def _value(node: Relation) -> Node:
    """The last side of a chain of equations whose sides are all equal, else the relation."""
    if set(node.signs) <= {"=", "≈"}:
        *others, last = map(read, node.sides)
        rounds = node.signs[-1] == "≈"
        if all(same(side, last) or (rounds and _rounds(last, side)) for side in others):
            return last
    return node


def _rounds(decimal: Node, full: Node) -> bool:
    """Whether the first is the second, rounded at its last place: 3.33 and 10/3."""
    if not isinstance(decimal, Leaf) or not isinstance(full, Leaf) or not re.fullmatch(r"-?\d+(\.\d+)?", decimal.text):
        return False
    value, exactly = exact(decimal.text), exact(full.text)
    places = len(decimal.text.partition(".")[2])
    return value is not None and exactly is not None and 2 * abs(value - exactly) * 10**places <= 1


def _interval(node: Node) -> Node:
    """``1 < x ≤ 4``, ``x > 3`` as an interval; other nodes as they are."""
    if isinstance(node, Group) and node.kind == "both" and len(node.items) == 2:
        return _both(node)
    if not isinstance(node, Relation) or not set(node.signs) <= set("<>≤≥"):
        return node
    sides, signs = list(node.sides), list(node.signs)
    if signs[0] in ">≥":
        sides, signs = sides[::-1], [_FLIPPED[sign] for sign in signs[::-1]]
    if set(signs) & set(">≥"):
        return node
    name = bounded(node)
    if name is None or not all(side == name or is_constant(side) for side in sides):
        return node  # x < y is no interval
    if len(sides) == 2:
        sides, signs = (["-∞", *sides], ["<", *signs]) if sides[0] == name else ([*sides, "∞"], [*signs, "<"])
    if len(sides) != 3 or sides[1] != name:
        return node
    brackets = ("(" if signs[0] == "<" else "[") + (")" if signs[1] == "<" else "]")
    return Group("tuple", (read(sides[0]), read(sides[2])), brackets)


def _both(node: Group) -> Node:
    """``x > 0 and x < 5`` as one interval; other pairs as they are."""
    for one, other in (node.items, node.items[::-1]):
        low, high = _interval(one), _interval(other)
        if not isinstance(low, Group) or not isinstance(high, Group) or not bounded(node):
            continue
        if (low.items[1], high.items[0]) == (Leaf("∞"), Leaf("-∞")):
            return Group("tuple", (low.items[0], high.items[1]), low.brackets[0] + high.brackets[1])
    return node


_Link = tuple[str, str]


def _links(node: Node) -> list[_Link] | None:
    """Each link of a relation as (left − right, sign); the greater side comes first. ``None`` if it can't be read."""
    if isinstance(node, Named) and node.text:
        left, _, right = node.text.partition("=")
        node = Relation((left, right), ("=",))
    if not isinstance(node, Relation):
        return None
    links: list[_Link] = []
    for left, sign, right in zip(node.sides, node.signs, node.sides[1:], strict=False):
        if sign in "<≤":
            left, right, sign = right, left, _FLIPPED[sign]
        if sign not in _FLIPPED or not readable(left) or not readable(right):
            return None
        links.append((f"({left})-({right})", sign))
    return links


def _same_link(link: _Link, wanted: _Link) -> bool:
    if link[1] != wanted[1]:
        return False
    factor = proportion(link[0], wanted[0])
    return factor is not None and bool(link[1] in "=≠" or factor > 0)
