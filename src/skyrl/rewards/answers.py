"""Where the answer stands in what the policy wrote (``reward.answer``), and whether the form asked for is kept.

The text comes from the policy: everything here is linear in its length, whatever it is. Only ``at=regex`` runs a
pattern of the user's, which may be exponential; so it has a time limit, which the library ``regex`` keeps inside its C
code. (The verifier process could be killed as well, but what the answer is must be known before a verifier is asked.)
"""

from __future__ import annotations

import re

import regex

from skyrl.records import DataError
from skyrl.settings import AnswerConfig, AnswerPlace, Think

_BRACES = re.compile(r"\\{1,2}(?:boxed|fbox)\s*\{|\\[\\{}]|[{}]")
"""Openings of ``\\boxed{…}`` (and ``\\fbox{…}``), escaped characters, braces."""
_DIGITS = r"(?:[0-9]{1,3}(?:(?:,[0-9]{3})+|(?: [0-9]{3}){2,})(?![0-9])|[0-9]+)"
_VALUE = rf"(?:{_DIGITS}(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
_BRACED = r"\{(?:[^{}\n]|\{[^{}\n]{1,30}\}){1,60}\}"
_POWER = rf"(?:\^(?:[+-]?[0-9]+|{_BRACED})|[⁺⁻]?[⁰¹²³⁴-⁹]+)"
_ROOT = r"(?:√[0-9]+|√\([0-9]+\)|\\?sqrt(?:\{[0-9]+\}|\([0-9]+\)|[0-9]))"
_FRACTION = rf"\\[dtc]?frac{_BRACED}{_BRACED}"
_PI = r"(?:\\pi(?![A-Za-z])|π)"
_NUMBER = re.compile(
    # Not inside a word, and no exponent or index of something else: cm^2, x_1. A minus with a space behind it is a sign
    # where no number stands before it.
    r"(?<![\w.^_])(?<![\^_]\{)(?<![\^_]-)"
    r"(?:(?:(?<![\w)\]}])[+−–-]|(?<![\w)\]}] )(?<![\w)\]}])[−–-] |(?<=is )[−–-] )\\?\$?)?"
    rf"(?:(?:{_VALUE} ?)?{_FRACTION}"
    r"|(?:[0-9]+ )?[0-9]+ ?/ ?[0-9]+(?![0-9]*\.[0-9])"
    rf"|{_VALUE} ?(?:×|\\times|·|\\cdot|\*) ?10{_POWER}"
    rf"|{_ROOT}|{_VALUE}(?:[½⅓⅔¼¾⅕-⅞]| ?\*? ?{_ROOT})?|[½⅓⅔¼¾⅕-⅞])"
    rf"(?:{_POWER})?!?(?: ?{_PI})?(?: ?/ ?{_VALUE})?(?:\s?\\?%)?"
    r"(?: (?:hundred|thousand|million|billion|trillion|dozen)\b)?"
)
"""A number as one writes it in a sentence: sign, commas before thousands, decimals, exponent, fraction or mixed number,
power of ten, root, per cent. It is taken whole: its last digits alone would be another number."""


class AnswerForm:
    """Finds the answer in a text of the policy.

    Args:
        cfg: ``reward.answer``.
        prefix: What the chat template writes at the beginning of each answer, ``<think>`` or "": a part of its form
            that no text of the policy has.
        timeout: Seconds that a pattern of the user's may take on one text.
    """

    def __init__(self, cfg: AnswerConfig, prefix: str = "", timeout: float = 5.0) -> None:
        self.cfg, self.prefix, self.timeout = cfg, prefix, timeout
        self.opening, self.closing, *self._answer = cfg.tags
        self._pattern = regex.compile(cfg.pattern) if cfg.at is AnswerPlace.regex and cfg.pattern else None

    def behind(self, text: str) -> str | None:
        """What the policy wrote behind its reasoning, which is everything if it wrote no think tag; ``None`` if the
        reasoning never ends: it was cut off, and there is no answer. With ``think=none`` tags mean nothing."""
        if self.cfg.thinks is Think.none:
            return text
        text = self.prefix + text
        end = text.rfind(self.closing)
        if text.rfind(self.opening) > end:
            return None
        return text if end < 0 else text[end + len(self.closing) :]

    def find(self, text: str) -> str | None:
        """The answer, without whitespace around it; ``None`` if there is none, for example because it was cut off. The
        policy then gave no answer: its rule reward is an honest 0, no error. ``tags`` looks in the whole text, the
        others :meth:`behind` the reasoning.

        Raises:
            DataError: if the user's pattern takes longer than the limit.
        """
        if self.cfg.at is AnswerPlace.tags:
            return _between(text, *self._answer)
        said = self.behind(text)
        found = None if said is None else self._find(said)
        return None if found is None else found.strip()

    def _find(self, said: str) -> str | None:
        at = self.cfg.at
        if at is AnswerPlace.boxed:
            return _boxed(said)
        if at is AnswerPlace.hashes:
            _, mark, rest = said.rpartition("####")
            return rest.strip().partition("\n")[0] or None if mark else None
        if at is AnswerPlace.last_number:
            return next((match[0] for match in reversed(list(_NUMBER.finditer(said)))), None)
        if at is AnswerPlace.whole:
            return said.strip() or None
        return self._matched(said)

    def _matched(self, said: str) -> str | None:
        assert self._pattern is not None  # the settings ask for one
        last = None
        try:
            for last in self._pattern.finditer(said, timeout=self.timeout):  # noqa: B007
                pass
        except TimeoutError as error:
            raise DataError(f"reward.answer.pattern took longer than {self.timeout:g} s on an answer") from error
        return None if last is None else last[1 if self._pattern.groups else 0]

    def kept(self, text: str, answer: str | None) -> float:
        """1.0 if the form is kept, else 0.0: an ``answer`` (of :meth:`find`) with content, and before it the reasoning
        that ``reward.answer.think`` asks for.

        That is one ``<think>…</think>`` at the very beginning and no other think tag; with ``optional`` there may be
        none at all. With ``tags`` nothing but whitespace may stand outside of the two pairs, nor a second answer tag
        anywhere; with ``tags`` and ``none`` the reasoning is free, and one pair of answer tags ends the text.
        """
        cfg, text = self.cfg, (self.prefix + text).strip()
        if not answer:
            return 0.0
        thinks = cfg.thinks
        tags = [text.count(tag) for tag in (self.opening, self.closing)]
        begin = 0
        if thinks is Think.required or (thinks is Think.optional and any(tags)):
            if tags != [1, 1] or not text.startswith(self.opening):
                return 0.0
            begin = text.find(self.closing) + len(self.closing)
        if cfg.at is not AnswerPlace.tags:
            return 1.0
        first, last = self._answer
        start = text.find(first)
        alone = [text.count(tag) for tag in self._answer] == [1, 1] and begin <= start and text.endswith(last)
        return float(alone and (thinks is Think.none or not text[begin:start].strip()))

    def wanted(self) -> str:
        """What :meth:`find` looks for, in words."""
        first, last = self._answer
        said = {
            AnswerPlace.tags: f"what stands between {first} and {last}",
            AnswerPlace.boxed: r"the content of the last \boxed{…}",
            AnswerPlace.hashes: "what follows the last ####",
            AnswerPlace.last_number: "the last number",
            AnswerPlace.whole: "the whole text",
            AnswerPlace.regex: f"the last match of reward.answer.pattern, {self.cfg.pattern}",
        }[self.cfg.at]
        thinks = self.cfg.at is not AnswerPlace.tags and self.cfg.thinks is not Think.none
        return said + (f" behind {self.closing}" if thinks else "")


def _between(text: str, first: str, last: str) -> str | None:
    """Content of the last complete pair of tags, stripped."""
    start = text.rfind(first, 0, max(text.rfind(last), 0))
    end = text.find(last, start + len(first))
    return text[start + len(first) : end].strip() if start >= 0 else None


def _boxed(text: str) -> str | None:
    r"""Content of the last ``\boxed{…}`` whose braces balance; of nested ones the inner."""
    found, start = None, -1
    open_ones: list[int] = []  # braces: where a box's content begins, -1 for the others
    for match in _BRACES.finditer(text):
        if match[0] == "}":
            begin = open_ones.pop() if open_ones else -1
            if begin > start:
                found, start = text[begin : match.start()], begin
        elif match[0] == "{":
            open_ones.append(-1)
        elif match[0].endswith("{") and "box" in match[0]:
            open_ones.append(match.end())
    return found
