"""The parts of an answer in mathematics, as structure.py reads them and math.py compares them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from skyrl.rewards.verifiers.expressions import GREEK, NotMathematics, tokens


@dataclass(frozen=True)
class Leaf:
    """One formula or number, in canonical notation."""

    text: str


@dataclass(frozen=True)
class Words:
    """Plain words, compared as text; lower case, single spaces."""

    text: str


@dataclass(frozen=True)
class Group:
    """Several parts.

    Attributes:
        kind: ``list`` (no brackets: order is free), ``set``, ``tuple``, ``matrix`` (its items are rows), ``row``,
            ``ratio``, ``both`` (inequalities that hold together).
        items: The parts.
        brackets: The two brackets of a tuple or interval; "" for other kinds.
        joint: What joins the parts of a list: ``and``, ``or``, ``∪``; "" for commas, and for other kinds.
    """

    kind: str
    items: tuple[Node, ...]
    brackets: str = ""
    joint: str = field(default="", compare=False)


@dataclass(frozen=True)
class Named:
    """``x = value``; ``text`` is all of it, to be read as an equation where that is what is asked."""

    name: str
    value: Node
    text: str


@dataclass(frozen=True)
class Relation:
    """``a < b ≤ c``: sides and the signs between them."""

    sides: tuple[str, ...]
    signs: tuple[str, ...]


Node = Leaf | Words | Group | Named | Relation

_VARIABLE = re.compile(r"[A-Za-z]|\\(?!pi\b|infty\b)[a-z]+")


def bounded(node: Node) -> str | None:
    """The one variable that inequalities bound, if there is one."""
    relations = node.items if isinstance(node, Group) else (node,)
    names = {
        side for item in relations if isinstance(item, Relation) for side in item.sides if _VARIABLE.fullmatch(side)
    }
    return names.pop() if len(names) == 1 else None


def is_constant(text: str) -> bool:
    """Whether a formula holds no variable."""
    try:
        found = tokens(text)
    except NotMathematics:
        return False
    return not any((token.isalpha() and token != "e") or token[1:] in GREEK - {"pi"} for token in found)
