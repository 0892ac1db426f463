"""Rows, their truths, their lengths."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

from skyrl.checks.subject import Subject
from skyrl.data.datasets import check_size, verifier_names
from skyrl.records import DataError
from skyrl.rewards.conventions import Takes
from skyrl.rewards.runner import VerifierRunner
from skyrl.settings import Overlong

SELF_TESTED = ("exact", "numeric", "math", "choice")
"""Verifiers whose truths are answers themselves."""


def rows(subject: Subject) -> str:
    """The data sets open, there are enough rows for a step, and some of them can be made."""
    sizes = {split: len(dataset) for split, dataset in subject.datasets.items()}
    check_size(sizes["train"], subject.cfg)
    subject.prompts  # noqa: B018 -- decodes their pictures
    return ", ".join(f"{size} {split} prompts" for split, size in sizes.items())


def verifiers(subject: Subject) -> str:
    """The verifiers that rows name can be run; the built-in ones judge a row's own truth right, and the truth of
    another row wrong."""
    cfg = subject.cfg.reward
    runner = VerifierRunner(cfg.verifier_timeout, cfg.numeric_tolerance, cfg.verifiers, cfg.verifier_environment)
    rows = [(f"{split} row {row}", prompt) for split, some in subject.prompts.items() for row, prompt in some]
    truths: defaultdict[str, list[tuple[str, str]]] = defaultdict(list)
    for where, prompt in rows:
        for check in prompt.all_checks:
            truths[check.verifier or cfg.verifier or ""].append((where, check.truth))
    names = {*truths, *verifier_names(subject.datasets.values()), cfg.verifier or ""} - {""}
    said = []
    try:
        for name in sorted(names):
            takes = runner.takes(name)
            tried = name in SELF_TESTED
            said.append(f"{name}: {self_test(runner.verify, name, truths[name]) if tried else _not_tried(takes)}")
    finally:
        runner.close()
    return "; ".join(said)


def _not_tried(takes: Takes) -> str:
    return f"can be called with {takes.value}; its truths are not tried as answers"


def self_test(verify: Callable[[str, str, str], Any], name: str, truths: list[tuple[str, str]]) -> str:
    """Judge each truth against itself and against the next one that is written otherwise.

    Raises:
        DataError: naming the rows whose own truth is not judged right, or cannot be judged; or if more than a quarter
            of other truths are judged right.
    """
    own, equal, tried = list[str](), list[str](), 0
    for place, (where, truth) in enumerate(truths):
        verdict = verify(name, truth, truth)
        if verdict.score != 1.0:
            own.append(f"{where}: truth {truth[:60]!r}: {verdict.error or f'score {verdict.score:g}'}")
        others = [other for _, other in (*truths[place + 1 :], *truths[:place]) if _plain(other) != _plain(truth)]
        if others:
            tried += 1
            judged = verify(name, others[0], truth)
            if judged.score is not None and judged.score > 0:
                equal.append(f"{where}: {others[0][:60]!r} for {truth[:60]!r}")
    if own:
        raise DataError(f"{name}: {len(own)} of {len(truths)} truths are not right by their own verifier; {own[0]}")
    if len(equal) > tried / 4:
        raise DataError(f"{name}: {len(equal)} of {tried} truths of other rows are judged right; {equal[0]}")
    note = f"; judged equal: {equal[0]}" if equal else ""
    return f"{len(truths)} truths right, {tried - len(equal)} of {tried} of other rows wrong{note}"


def _plain(truth: str) -> str:
    """So that two ways to write one truth are mostly one."""
    text = "".join(truth.split()).casefold()
    try:
        return repr(float(text))
    except ValueError:
        return text


def lengths(subject: Subject) -> str:
    """Prompts are no longer than the settings allow."""
    limit, longest, over = subject.cfg.rollout.max_prompt_tokens, 0, list[str]()
    for split, some in subject.prompts.items():
        for row, prompt in some:
            length = len(subject.encoder.encode(prompt)[0])
            longest = max(longest, length)
            over += [f"{split} row {row}, prompt {prompt.id!r}, has {length}"] if length > limit else []
    looked = sum(map(len, subject.prompts.values()))
    said = f"{looked} prompts, the longest has {longest} of {limit} tokens"
    if over and subject.cfg.data.overlong is Overlong.error:
        raise DataError(
            f"{len(over)} of {looked} prompts have more tokens than rollout.max_prompt_tokens={limit}: {over[0]}"
        )
    return said + (f"; data.overlong={subject.cfg.data.overlong.value} for {len(over)}: {over[0]}" if over else "")
