"""Multiple choice, A to J."""

from __future__ import annotations

import re

from skyrl.records import DataError
from skyrl.rewards.verifiers.normalise import bare, boxed, canonical, fold

MAX_CHARACTERS = 2000
"""Longer answers name no choice."""

_STATEMENT = re.compile(
    r"(?:\b(?:the|my|final|correct|right|best)\s+)*\b(?:answers?|choice|option|solution)\b"
    r"\s*(?:\bis\b|\bwould be\b|:|=)[\s:=]*",
    re.IGNORECASE,
)
"""``The answer is``: what follows the last one is what an answer commits itself to."""
_CORRECTION = re.compile(r"\b(?:no|wait|actually|sorry|correction|rather|instead|hmm|oops)\b", re.IGNORECASE)
_LEAD = re.compile(
    r"(?:i|we)(?:'d| would| will|'ll)?\s+(?:think|believe|choose|chose|pick|picked|select|say|guess|go with)\s+"
    r"(?:that\s+)?"
    r"|(?:it|this|that)(?:\s+is|'s)\s+|(?:it\s+)?(?:must|should) be\s+|(?:so|thus|hence|therefore)\b[\s,:]*"
    r"|(?:the\s+)?(?:correct\s+|final\s+|right\s+|best\s+)?(?:answers?|option|choice|letter)\b(?:\s+is\b)?[\s:=]*"
    r"|(?:所以|因此|故|应)?(?:正确|最终)?(?:的)?(?:(?:答案|选项)(?:应该)?(?:是|为|选择?|[:：])*|(?:是|选择?))\s*[:：]?\s*",
    re.IGNORECASE,
)
_DECORATION = re.compile(r"\*+|`+|\\(?:text|mathrm|textbf|mathbf|rm|bf)\b")
_BRACED = re.compile(r"\{\s*(\(?[A-Ja-j][.):]?)\s*\}")
_LETTER = re.compile(r"[(\[【]\s*([A-Ja-j])\s*[)\]】]|([A-Ja-j])(?![\w'])(?!-\w)|([A-J])(?=[^\x00-\x7f])")
_MARK = re.compile(r"\s*[.:,;)。]\s*|\s+-+\s*|\s*[=→]\s*")
_ABBREVIATION = re.compile(r"[.:,;)](?:[A-Z]\b|[A-Za-z]\.)")
"""``B.A.``, ``e.g.``"""
_REASON = re.compile(
    r"\s*(?:because|since|as|for|is (?:correct|right|the (?:answer|correct|right|best))"
    r"|(?:explanation|reason)\s*:|而?不[是选]|而非|\()",
    re.IGNORECASE,
)
_OTHER = re.compile(
    r"(?<![A-Za-z0-9_'])(?<![a-z]\.)(?<![0-9] (?=[a-j]))"
    r"([(\[])?([A-Ja-j])(?![A-Za-z0-9_'])(?!-\w)([)\]]|[.:](?=\s|$)|$)?"
)
_ARTICLE = re.compile(
    r"\s+(?!(?:or|and|is|are|was|because|but|for|if|also|too|as|works?|fits?|instead|rather|seems?|looks?|then|not|might|may"
    r"|could|can|would|should|must|has|does)\b)[a-z]"
)
_NOT = re.compile(r"(?:\bnot|不是|不选|而非)\s*$", re.IGNORECASE)
_REJECTED = re.compile(
    r"\s*(?:is|was|seems|can't be|cannot be)\s+"
    r"(?:incorrect|wrong|not|false|ruled out|out|a common (?:distractor|trap|mistake))\b|(?:选项)?是?(?:不对|不正确|错)"
)
_NAMED = re.compile(
    r"\b(?:vitamins?|hepatitis|types?|plan|grade|figure|fig\.?|table|point|section|part|teams?|class|group|drug|gas|person"
    r"|angle|set|event|player|city|box|circle|line|side|edge|node|town|step|phase|region|area|container|object|sample"
    r"|substance|species|country|company|bus|train|car|machine|house|street|influenza|factor|triangle|matrix)\s+$",
    re.IGNORECASE,
)
"""What stands before a letter that is the name of something, and no choice."""
_TAKEN_BACK = re.compile(
    r"[\s(]*(?:(?:which|that|it|this)(?:'s| is)\s+|is\s+)?"
    r"(?:wrong|incorrect|not (?:correct|right|it|the (?:answer|correct|right)))"
    r"\b(?:\s+(?:answer|option|choice))?[\s).!]*$|.*\?\s*(?:no|nope|not)\b",
    re.IGNORECASE,
)
_TAKEN_BACK_CJK = re.compile(r"(?:选项)?(?:是|并)?(?:不(?![是选][A-J])|错|非|否)")


def parse_choice(text: str) -> str | None:
    """The letter A-J that an answer names, or ``None`` if it names none, or several, in a clear form.

    ``B``, ``(b)``, ``**B.** a red car``, ``\\boxed{\\text{B}}``, ``Option B``, ``The answer is B as …``, ``答案是B``
    name B. A later "No, the answer is B" replaces what was said before. ``A or B``, ``(A) (B)``, ``Not B`` name none.
    """
    text = text.strip()
    if len(text) > MAX_CHARACTERS:
        return None
    text = fold(text)
    boxes = boxed(text)
    if boxes is not None:
        text = boxes[0] if len(boxes) == 1 else ""
    text = _DECORATION.sub("", canonical(bare(text)))
    parts = _STATEMENT.split(_BRACED.sub(r"\1", text).strip())
    last = _named(parts[-1])
    earlier = {_named(part) for part in parts[:-1]} - {None, last}
    return None if earlier and not _CORRECTION.search(parts[-2]) else last


def _named(text: str) -> str | None:
    """The letter with which a text begins, after a lead-in, if no other one follows."""
    for _ in range(3):
        match = _LEAD.match(text)
        text = text[match.end() :] if match else text
    match = _LETTER.match(text)
    if match is None:
        return None
    bracketed, alone, before_cjk = match.groups()
    letter, rest = bracketed or alone or before_cjk, text[match.end() :].rstrip()
    mark = _MARK.match(rest)
    behind = rest[mark.end() :] if mark else rest
    if _TAKEN_BACK.match(behind) or (not mark and _TAKEN_BACK_CJK.match(rest)):
        return None
    if re.search(rf"\bnot\s+(?:option\s+)?\(?{letter}\b(?!')", behind, re.IGNORECASE):
        return None  # B. Not B
    if alone and rest:
        if mark is None and not _REASON.match(rest):
            return None
        if mark and _ABBREVIATION.match(rest):
            return None
        if letter.islower() and mark and mark.group().strip() == ",":
            return None  # a, the article or a letter of a word
    others = _mentions(behind) - {letter.upper()}
    return None if others else letter.upper()


def _mentions(text: str) -> set[str]:
    """Letters that a text may name as choices: all but ``A`` before a word in lower case (the article), ``I`` (the
    pronoun), names of something ("vitamin C"), letters that are ruled out, and small letters within a sentence."""
    found: set[str] = set()
    for match in _OTHER.finditer(text):
        opened, letter, closed = match.groups()
        before, after = text[max(0, match.start() - 20) : match.start()], text[match.end() :]
        marked = bool(opened or closed)
        plain = letter in "AI" and _ARTICLE.match(after)
        if (plain and not marked) or _NOT.search(before) or _REJECTED.match(after):
            continue
        named = not opened and _NAMED.search(before)
        if not named and (letter.isupper() or closed is not None):
            found.add(letter.upper())
    return found


def choice_verifier(answer: str, truth: str) -> float:
    """1.0 if the answer names the same letter as the truth, else 0.0. A truth without one is a :class:`DataError`."""
    expected = parse_choice(truth)
    if expected is None:
        raise DataError(f"the truth {truth[:100]!r} of a 'choice' prompt names no letter A-J")
    return float(parse_choice(answer) == expected)
