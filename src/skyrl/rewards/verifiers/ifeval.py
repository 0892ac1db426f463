"""Instructions that can be checked without a judge, in the format of IFEval (arXiv 2311.07911): all of its 25 kinds.

Each check is a function of the whole answer text and the instruction's own arguments. Where IFEval uses NLTK, to cut
sentences and words, plain rules stand here.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from typing import Any

from skyrl.records import DataError

Check = Callable[..., bool]
INSTRUCTIONS: dict[str, Check] = {}
"""Name of the instruction → its check; the parameters behind the text have the names of the official arguments."""
_SHORT = re.compile(r"[(\"'“]*(mr|mrs|ms|dr|prof|sr|jr|st|vs|etc|e\.g|i\.e|cf|vol|fig|al|inc|ltd|co|corp|dept|approx)")
_SENTENCE_END = re.compile(r"""(?<![.!?…])([.!?…]+)["'”’)\]*_]*(?=\s|$)|[。！？]""")
_CAPITAL = re.compile(r"[^\W\d_][\w.&'’-]*")
_YES_NO = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


def _instruction(name: str) -> Callable[[Check], Check]:
    def known(check: Check) -> Check:
        INSTRUCTIONS[name] = check
        return check

    return known


def ifeval_verifier(answer: str, truth: str) -> float:
    """1.0 if the text follows all instructions, else 0.0; with ``"score": "share"`` the share that it follows.

    Args:
        answer: The whole text, without the reasoning.
        truth: JSON ``{"instruction_id_list": ["punctuation:no_comma", …], "kwargs": [{}, …]}`` as IFEval's files have
            them; arguments that are null count as not given.

    Raises:
        DataError: for another form, an unknown instruction, or arguments that are missing, unknown or of a wrong kind.
    """
    try:
        asked = json.loads(truth)
        names, kwargs, score = asked["instruction_id_list"], asked["kwargs"], asked.get("score", "strict")
        given = [{k: v for k, v in (one or {}).items() if v is not None} for one in kwargs]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"the truth {truth[:100]!r} of an 'ifeval' prompt is no JSON with instruction_id_list and kwargs: {error!r}"
        ) from None
    if not names or len(names) != len(given) or score not in ("strict", "share"):
        raise DataError(
            f"an 'ifeval' prompt has {len(names)} instructions, {len(given)} kwargs and score {score!r}; allowed: as "
            "many of the one as of the other, and strict or share"
        )
    followed = [_follows(answer, name, arguments) for name, arguments in zip(names, given, strict=True)]
    return sum(followed) / len(followed) if score == "share" else float(all(followed))


ifeval_verifier.wants_text = True  # type: ignore[attr-defined]


def _follows(text: str, name: str, arguments: dict[str, Any]) -> bool:
    check = INSTRUCTIONS.get(name)
    if check is None:
        raise DataError(
            f"unknown instruction {name!r} of an 'ifeval' prompt; allowed: {', '.join(sorted(INSTRUCTIONS))}"
        )
    parameters = list(inspect.signature(check).parameters.values())[1:]
    needed = {one.name for one in parameters if one.default is one.empty}
    allowed = {one.name for one in parameters}
    if not needed <= arguments.keys() <= allowed:
        got = ", ".join(sorted(arguments)) or "no arguments"
        raise DataError(f"instruction {name!r} of an 'ifeval' prompt has {got}; it needs {', '.join(sorted(needed))}")
    usable = {key: _usable(name, key, value) for key, value in arguments.items()}
    return bool(text.strip()) and check(text, **usable)


def _usable(name: str, key: str, value: Any) -> Any:
    """An argument of the kind that its name says: a whole number, a list of texts, or a text."""
    if key.startswith(("num_", "nth_")) or key.endswith("frequency"):
        fits, allowed = (
            not isinstance(value, bool) and isinstance(value, (int, float)) and value == int(value),
            "a number",
        )
    elif key in ("keywords", "forbidden_words"):
        fits = isinstance(value, list) and value != [] and all(isinstance(one, str) and one for one in value)
        allowed = "a list of texts"
    else:
        fits, allowed = isinstance(value, str) and value.strip() != "", "a text"
    if not fits:
        raise DataError(f"instruction {name!r} of an 'ifeval' prompt: {key} is {value!r}; allowed: {allowed}")
    return value


def _holds(count: int, relation: str, limit: int) -> bool:
    if relation not in ("less than", "at least"):
        raise DataError(f"the relation of an 'ifeval' instruction is {relation!r}; allowed: less than, at least")
    return count < limit if relation == "less than" else count >= limit


# ---------------------------------------------------------------- keywords


@_instruction("keywords:existence")
def has_keywords(text: str, keywords: list[str]) -> bool:
    """All of them occur, in any case, also inside of words."""
    return all(word.lower() in text.lower() for word in keywords)


@_instruction("keywords:frequency")
def keyword_frequency(text: str, keyword: str, frequency: int, relation: str) -> bool:
    return _holds(text.lower().count(keyword.lower()), relation, frequency)


@_instruction("keywords:forbidden_words")
def lacks_words(text: str, forbidden_words: list[str]) -> bool:
    """None of them occurs as a word of its own."""
    return not any(re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) for word in forbidden_words)


@_instruction("keywords:letter_frequency")
def letter_frequency(text: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return _holds(text.lower().count(letter.lower()), let_relation, let_frequency)


# ---------------------------------------------------------------- language and case


def language_of(text: str) -> str:
    """ISO 639-1 code by py3langid; :class:`DataError` where that is not installed."""
    try:
        from py3langid import classify
    except ImportError:
        raise DataError(
            "IFEval's language:… and change_case:english_… need a package that tells languages apart; run: "
            "pip install py3langid"
        ) from None
    return str(classify(text)[0])


@_instruction("language:response_language")
def is_in_language(text: str, language: str) -> bool:
    return language_of(text) == language.lower()


@_instruction("change_case:english_capital")
def is_english_capital(text: str) -> bool:
    return text.isupper() and language_of(text.lower()) == "en"


@_instruction("change_case:english_lowercase")
def is_english_lowercase(text: str) -> bool:
    return text.islower() and language_of(text) == "en"


@_instruction("change_case:capital_word_frequency")
def capital_words(text: str, capital_frequency: int, capital_relation: str) -> bool:
    """Counts words in capitals; a hyphen, an apostrophe or a full stop inside does not end a word."""
    return _holds(sum(word.isupper() for word in _CAPITAL.findall(text)), capital_relation, capital_frequency)


# ---------------------------------------------------------------- length


def sentences(text: str) -> int:
    """Sentences end with a mark and white space; not with the full stop of an abbreviation, an initial, a list's
    number, or before a small letter."""
    count = rest = 0
    for end in _SENTENCE_END.finditer(text):
        start = end.start()
        before = text[max(0, start - 24) : start]
        word = re.split(r"\s", before)[-1]
        behind = text[end.end() : end.end() + 8].lstrip()[:1]
        initial = len(word) == 1 and word.isupper() and word != "I"
        listed = word.isdecimal() and not before.rpartition("\n")[2].removesuffix(word).strip()
        short = _SHORT.fullmatch(word.lower()) is not None
        marks = end.group(1) or ""
        if marks.strip(".…") == "" != marks and behind.islower():
            continue
        if marks == "." and behind and (short or initial or listed):
            continue
        count, rest = count + 1, end.end()
    return count + bool(text[rest:].strip())


@_instruction("length_constraints:number_sentences")
def number_of_sentences(text: str, num_sentences: int, relation: str) -> bool:
    return _holds(sentences(text), relation, num_sentences)


@_instruction("length_constraints:number_words")
def number_of_words(text: str, num_words: int, relation: str) -> bool:
    """Words are runs of letters, digits and underscores."""
    return _holds(len(re.findall(r"\w+", text)), relation, num_words)


@_instruction("length_constraints:number_paragraphs")
def number_of_paragraphs(text: str, num_paragraphs: int) -> bool:
    """Paragraphs are divided by ``***``; an empty one counts for nothing at the beginning or the end, and breaks the
    form elsewhere."""
    parts = [part.strip() for part in text.split("***")]
    return all(parts[1:-1]) and sum(map(bool, parts)) == num_paragraphs


@_instruction("length_constraints:nth_paragraph_first_word")
def nth_paragraph_first_word(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Paragraphs are divided by an empty line."""
    parts = text.split("\n\n")
    full = sum(bool(part.strip()) for part in parts)
    if not 1 <= nth_paragraph <= full or not parts[nth_paragraph - 1].strip():
        return False
    word = parts[nth_paragraph - 1].split()[0].lstrip("'\"")
    return full == num_paragraphs and re.split(r"[.,?!'\"]", word)[0].lower() == first_word.lower()


# ---------------------------------------------------------------- content and form


@_instruction("detectable_content:number_placeholders")
def placeholders(text: str, num_placeholders: int) -> bool:
    """At least so many ``[…]`` within a line."""
    return len(re.findall(r"\[[^\n\[\]]*\]", text)) >= num_placeholders


@_instruction("detectable_content:postscript")
def postscript(text: str, postscript_marker: str) -> bool:
    """Holds the marker, in any case; within ``P.S.`` and ``P.P.S`` there may be spaces."""
    gaps = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    return re.search(gaps.get(postscript_marker, re.escape(postscript_marker.lower())), text.lower()) is not None


@_instruction("detectable_format:number_bullet_lists")
def bullets(text: str, num_bullets: int) -> bool:
    """Exactly so many lines that begin with ``*``, but not with two, or with ``-``."""
    marks = [line.strip() for line in text.splitlines()]
    return sum(line.startswith("-") or re.match(r"\*[^*]", line) is not None for line in marks) == num_bullets


@_instruction("detectable_format:constrained_response")
def constrained(text: str) -> bool:
    return any(one in text for one in _YES_NO)


@_instruction("detectable_format:number_highlighted_sections")
def highlights(text: str, num_highlights: int) -> bool:
    """At least so many ``*…*`` or ``**…**`` with content, within a line."""
    single = [one.strip("*").strip() for one in re.findall(r"\*[^\n*]*\*", text)]
    double = [one.strip("*").strip() for one in re.findall(r"\*\*[^\n*]*\*\*", text)]
    return sum(map(bool, single + double)) >= num_highlights


@_instruction("detectable_format:multiple_sections")
def sections(text: str, section_spliter: str, num_sections: int) -> bool:
    """At least so many marks such as ``Section 1``."""
    return len(re.findall(rf"{re.escape(section_spliter)}\s?\d+", text)) >= num_sections


@_instruction("detectable_format:json_format")
def is_json(text: str) -> bool:
    """All of it is JSON, perhaps in a fenced block."""
    bare = re.sub(r"^```(?:json|Json|JSON)?", "", text.strip()).removesuffix("```")
    try:
        json.loads(bare)
    except (ValueError, RecursionError):
        return False
    return True


@_instruction("detectable_format:title")
def has_title(text: str) -> bool:
    """``<<…>>`` with content, within a line."""
    insides = (line[line.find("<<") : line.rfind(">>") + 2] for line in text.splitlines() if "<<" in line)
    return any(inside.endswith(">>") and inside.strip("<> \t") for inside in insides)


@_instruction("combination:two_responses")
def two_responses(text: str) -> bool:
    """Two different texts, divided by ``******``; an empty part counts for nothing at the beginning or the end."""
    parts = [part.strip() for part in text.split("******")]
    full = [part for part in parts if part]
    return all(parts[1:-1]) and len(full) == 2 and full[0] != full[1]


@_instruction("combination:repeat_prompt")
def repeats_prompt(text: str, prompt_to_repeat: str) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


@_instruction("startend:end_checker")
def ends_with(text: str, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


@_instruction("startend:quotation")
def is_quoted(text: str) -> bool:
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


@_instruction("punctuation:no_comma")
def no_comma(text: str) -> bool:
    return "," not in text
