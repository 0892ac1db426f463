"""What all built-in verifiers do before they compare: one form for each character, no decoration, no lead-in.

Pure functions of a text, linear in its length. Callers bound that length first.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from functools import lru_cache

_SAME_CHARACTER = {"<wide>", "<narrow>", "<compat>", "<noBreak>", "<font>"}
"""Compatibility forms that mean the plain character. Superscripts and fractions aren't among them: ``x²`` is no x2."""


@lru_cache(maxsize=4096)
def _folded(character: str) -> str:
    if unicodedata.category(character) == "Cf":  # zero-width spaces and joiners, marks of direction, soft hyphens
        return ""
    tag, _, rest = unicodedata.decomposition(character).partition(" ")
    return unicodedata.normalize("NFKC", character) if rest and tag in _SAME_CHARACTER else character


_MARKS = 30
"""Accents on one letter, as in Unicode's stream-safe texts. Sorting longer runs of them takes quadratic time."""


def composed(text: str) -> str:
    """NFC. A letter with more than 30 accents is cut there, and its rest is composed for itself."""
    if text.isascii():
        return text
    pieces, start, marks = [], 0, 0
    for place, character in enumerate(text):
        marks = marks + 1 if unicodedata.combining(character) else 0
        if marks == _MARKS:
            pieces.append(text[start:place])
            start, marks = place, 0
    return "".join(unicodedata.normalize("NFC", piece) for piece in [*pieces, text[start:]])


def fold(text: str) -> str:
    """One spelling for each text: NFC, full-width and mathematical letters as plain ones, nothing invisible, and each
    run of whitespace one space, with none at the ends."""
    if not text.isascii():
        text = composed("".join(map(_folded, composed("".join(map(_folded, text))))))
    return " ".join(text.split())


_MINUS = dict.fromkeys(map(ord, "−–—‐‑‒―﹣－"), "-")
_BOLD = re.compile(r"(?<![\w)\]}*\\])(\*\*|\*)(?=[^\s*])([^*]*[^\s*])\1(?![\w*])")
_DOLLARS = re.compile(r"(?<!\\)\$\$([^$]*)\$\$|(?<!\\)\$(?=\S)([^$]*[^\s$\\])\$(?!\d)")
"""Mathematics between dollar signs, by the usual rule: no space inside them, no digit after. So $5 and $7 is money."""
_PAIRS = (
    ("$", "$"),
    ("__", "__"),
    ("\\(", "\\)"),
    ("\\[", "\\]"),
    ("```", "```"),
    ("`", "`"),
    ('"', '"'),
    ("'", "'"),
    ("“", "”"),
)
_GROUP = re.compile(r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|math(?:rm|bf|it|sf|tt)|boldsymbol|mbox|boxed|fbox)\s*(?=\{)")
_LEAD = re.compile(
    r"(?:(?:so|thus|hence|therefore|then|ok(?:ay)?|finally)\b[\s,:]*)?"
    r"(?:(?:the|my|our)\s+)?(?:final\s+|correct\s+|exact\s+|right\s+|numerical\s+)?"
    r"(?:answer|result|solution|value|total|ans)s?\b(?:\s+(?:of|to|for)\s+[\w ]{1,40}?)?"
    r"\s*(?:(?:is|are|would be|must be|equals|was)\b|[:=])[\s:=]*"
    r"|(?:(?:so|thus|hence|therefore)\b[\s,:]*)?(?:it|this|that)(?:\s+(?:is|equals)\b|'s\b)[\s:]*"
    r"|(?:so|thus|hence|therefore|approximately|about|roughly|exactly|approx\.?)\b[\s,:]+"
    r"|(?:=>|⇒|→|∴|≈|=|:|~|\\(?:approx|therefore|implies|Rightarrow|quad|displaystyle)\b)\s*"
    r"|(?:所以|因此|故)?(?:正确|最终|最后)?(?:的)?(?:答案|结果)\s*(?:是|为|[:：=])[\s:：=]*"
    r"|(?:####)\s*",
    re.IGNORECASE,
)
"""What may stand before an answer and says nothing about it."""
_TEXT_LEAD = re.compile(r"^\\text\{([^{}]*\b(?:is|are|answer:?)\s*)\}\s*(?=\S)")
_SPACE_AT_END = re.compile(r"(?<!\\)(?:\\[,;:!> ]\s*)+$")
_TAIL = re.compile(r"\s+is (?:the|my) (?:final |correct |right )?(?:answer|result|solution)$", re.IGNORECASE)


def close_of(text: str, start: int) -> int:
    """Index of the bracket that closes the ``{`` at ``start``, or -1."""
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] == "{") - (text[place] == "}")
        if not depth:
            return place
    return -1


def depths(text: str) -> Iterator[tuple[int, int]]:
    """Place and depth of each character that is no bracket; a closing bracket has the depth outside it."""
    depth = 0
    for place, sign in enumerate(text):
        if sign == "\\":
            depth += text.startswith("\\begin{", place) - text.startswith("\\end{", place)
        if sign in "([{":
            yield place, depth
            depth += 1
        elif sign in ")]}":
            depth -= 1
            yield place, depth
        else:
            yield place, depth


def split(text: str, pattern: re.Pattern[str]) -> tuple[list[str], list[str]]:
    """The parts between matches of ``pattern`` outside all brackets, and the matches."""
    outside = {place for place, depth in depths(text) if depth == 0}
    parts, marks, start = [], [], 0
    for match in pattern.finditer(text):
        if match.start() in outside and match.end() > match.start():
            parts.append(text[start : match.start()].strip())
            marks.append(match.group().strip())
            start = match.end()
    return [*parts, text[start:].strip()], marks


def enclosed(text: str) -> bool:
    """Whether the first character is a bracket and the last one closes it, of whatever kind."""
    if len(text) < 2 or text[0] not in "([{" or text[-1] not in ")]}":
        return False
    return all(depth > 0 for place, depth in depths(text) if 0 < place < len(text) - 1)


def boxed(text: str) -> list[str] | None:
    r"""Contents of all ``\boxed{…}`` and ``\fbox{…}``, each one once; ``None`` if there are no such commands. One that
    is never closed ends them: what stands in it is unknown."""
    if "\\boxed" not in text and "\\fbox" not in text:
        return None
    found: list[str] = []
    place = 0
    while match := re.compile(r"\\f?box(?:ed)?\s*").search(text, place):
        start = match.end()
        end = close_of(text, start) if text[start : start + 1] == "{" else -1
        if end < 0:
            return []
        content = text[start + 1 : end].strip()
        if content not in found:
            found.append(content)
        place = end + 1
    return found


def _strip_pair(text: str) -> str:
    for left, right in _PAIRS:
        inside = text[len(left) : -len(right)]
        if len(text) > len(left) + len(right) and text.startswith(left) and text.endswith(right) and left not in inside:
            return inside.strip()
    match = _GROUP.match(text)
    start = match.end() if match else 0
    if text[start : start + 1] == "{" and close_of(text, start) == len(text) - 1:
        inside = text[start + 1 : -1].strip()
        return inside if match or "," not in inside.replace("{,}", "") else text  # {1, 2} is a set
    return text


def strip_lead(text: str) -> str:
    """Without one lead-in such as ``The answer is``, ``= `` or ``答案是``, or such an end as ``is the answer``."""
    text = _TEXT_LEAD.sub(r"\1 ", _TAIL.sub("", text))
    match = _LEAD.match(text)
    return text[match.end() :] if match else text


def bare(text: str) -> str:
    """Without decoration: Markdown, quotes, dollar signs and other marks of mathematics, ``\\text`` and ``\\boxed``
    around all of it, lead-ins, and marks at the end of a sentence. The text must be folded.

    Several different boxes are a list, with commas between them. An answer that is only such decoration is ``""``.
    """
    text = text.translate(_MINUS)
    boxes = boxed(text)
    if boxes is not None:
        text = ", ".join(boxes)
    for _ in range(8):  # decoration inside decoration: **\boxed{\text{B}}.**
        before = text
        text = _BOLD.sub(r"\2", text)
        text = _DOLLARS.sub(lambda match: (match[1] or match[2] or "").strip(), text)
        text = strip_lead(_strip_pair(text)).strip()
        text = _SPACE_AT_END.sub("", text)
        if not text.endswith(("..", "\\.")):
            text = text.rstrip(".,;:。，；").rstrip()
        text = text.removesuffix("\\").strip() if text.endswith(" \\") else text
        if text == before:
            break
    return text


_SUPER = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱˣ", "0123456789+-()nix", strict=True))
_SUB = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋", "0123456789+-", strict=True))
_RAISED = re.compile(f"[{''.join(_SUPER)}]+|[{''.join(_SUB)}]+")
_VULGAR = re.compile(r"[¼-¾⅐-⅞↉]|(\d+)⁄(\d+)")
_COMMAND = re.compile(r"\\([A-Za-z]+|[,;:!> %&#_])")
_MEANS = {
    **dict.fromkeys(("dfrac", "tfrac", "cfrac", "sfrac"), "\\frac"),
    **dict.fromkeys(("leq", "le", "leqslant", "leqq"), "≤"),
    **dict.fromkeys(("geq", "ge", "geqslant", "geqq"), "≥"),
    **dict.fromkeys(("neq", "ne"), "≠"),
    **dict.fromkeys(("lt",), "<"),
    **dict.fromkeys(("gt",), ">"),
    **dict.fromkeys(("approx", "simeq", "approxeq"), "≈"),
    **dict.fromkeys(("times", "cdot", "ast"), "*"),
    **dict.fromkeys(("div",), "/"),
    **dict.fromkeys(("cup", "bigcup"), "∪"),
    **dict.fromkeys(("in",), "∈"),
    **{"pm": "±", "mp": "∓"},
    **dict.fromkeys(("infty", "infinity"), "∞"),
    **dict.fromkeys(("emptyset", "varnothing"), "∅"),
    **dict.fromkeys(("mid", "vert"), "|"),
    **dict.fromkeys(("ldots", "dots", "cdots", "dotsc", "hdots"), "..."),
    **dict.fromkeys(("degree", "textdegree", "deg"), "°"),
    **dict.fromkeys(("angle", "measuredangle"), "∠"),
    **dict.fromkeys(("colon", "ratio"), ":"),
    **dict.fromkeys(("lbrace",), "\\{"),
    **dict.fromkeys(("rbrace",), "\\}"),
    **dict.fromkeys(("langle", "lparen"), "("),
    **dict.fromkeys(("rangle", "rparen"), ")"),
    **dict.fromkeys(("lbrack",), "["),
    **dict.fromkeys(("rbrack",), "]"),
    **dict.fromkeys(("textdollar", "dollar"), "$"),
    **dict.fromkeys(("euro", "texteuro"), "€"),
    **dict.fromkeys(("pounds", "textsterling"), "£"),
    **dict.fromkeys(("lor", "vee"), "∨"),
    **dict.fromkeys(("land", "wedge"), "∧"),
    **dict.fromkeys(("left", "right", "big", "Big", "bigl", "bigr", "Bigl", "Bigr", "bigg", "Bigg", "limits"), ""),
    **dict.fromkeys(("displaystyle", "textstyle", "mathopen", "mathclose", "!"), ""),
    **dict.fromkeys(("quad", "qquad", "space", "thinspace", ",", ";", ":", ">", " "), " "),
    **{sign: sign for sign in "%&#_"},
}
_SIGNS = str.maketrans(
    {
        **{"×": "*", "⋅": "*", "·": "*", "∙": "*", "∗": "*", "•": "*", "÷": "/", "∕": "/", "⁄": "/", "º": "°"},
        **{"⩽": "≤", "⩾": "≥", "≦": "≤", "≧": "≥", "∣": "|", "∶": ":", "⟨": "(", "⟩": ")", "’": "'"},
        **{"π": "\\pi ", "θ": "\\theta ", "α": "\\alpha ", "β": "\\beta ", "γ": "\\gamma ", "φ": "\\phi "},
        **{"λ": "\\lambda ", "ω": "\\omega ", "σ": "\\sigma ", "δ": "\\delta ", "√": "\\sqrt ", "∛": "\\sqrt[3] "},
        **{"，": ",", "；": ";", "：": ":", "（": "(", "）": ")", "ℝ": "\\mathbb{R}", "↦": "=", "、": ","},
    }
)
_INFINITY = re.compile(r"(?<![A-Za-z\\])(?:infinity|inf|oo)(?![A-Za-z])")
_UNION = re.compile(r"(?<=[)\]}]) ?U ?(?=[(\[{\\])")
_UPRIGHT = re.compile(r"\\(?:mathrm|mathit|operatorname|rm|text)\s*\{([eidT])\}")
_DEGREE = re.compile(r"\^\s*(?:\{\s*)?(?:\\circ|∘|°|\\degree)(?:\s*\})?|\\circ(?=\s*$)")


def _raise(match: re.Match[str]) -> str:
    text, up = match.group(), match.group()[0] in _SUPER
    return ("^{" if up else "_{") + "".join((_SUPER if up else _SUB)[sign] for sign in text) + "}"


def _fraction(match: re.Match[str]) -> str:
    top, _, bottom = unicodedata.normalize("NFKC", match.group()).partition("⁄")
    return f"\\frac{{{top}}}{{{bottom}}}"


def canonical(text: str) -> str:
    r"""One notation for mathematics: ``\dfrac``, ``≤`` and ``\leq``, ``x²``, ``½``, ``\,``, ``**``… each as one form.

    What LaTeX writes with a command and Unicode with one character becomes the character where it separates parts
    (``≤ ∪ ∈ ± ∞ °``), and the command elsewhere (``\frac``, ``\sqrt``, ``\pi``). The text must be bare.
    """
    text = _DEGREE.sub("°", text.replace("\\\\", "\0"))
    text = _VULGAR.sub(_fraction, _RAISED.sub(_raise, text)).translate(_SIGNS)
    text = _UPRIGHT.sub(r"\1", text)
    text = _COMMAND.sub(lambda match: _MEANS.get(match[1], match[0]), text)
    text = text.replace("\\$", "$").replace("{,}", ",").replace("**", "^").replace("~", " ").replace("\0", "\\\\")
    text = re.sub(r"\\not\s*=", "≠", _INFINITY.sub("∞", _UNION.sub("∪", text)))
    text = text.replace("<=", "≤").replace(">=", "≥").replace("!=", "≠").replace("==", "=")
    return " ".join(text.replace("\\left", "").replace("\\right", "").split())
