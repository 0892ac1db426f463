"""Rows, their truths, their lengths."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np

from skyrl.checks.subject import Subject
from skyrl.data.datasets import check_size, verifier_names
from skyrl.records import DataError, Prompt, Sample, SampleGroup
from skyrl.rewards.answers import AnswerForm
from skyrl.rewards.conventions import Takes
from skyrl.rewards.judging import Checks
from skyrl.rewards.runner import VerifierRunner
from skyrl.settings import AnswerPlace, Config, Overlong, Think

SELF_TESTED = ("exact", "numeric", "math", "choice")
"""Verifiers whose truths are answers themselves."""


def rows(subject: Subject) -> str:
    """The data sets open, there are enough rows for a step, and some of them can be made."""
    sizes = {split: len(dataset) for split, dataset in subject.datasets.items()}
    check_size(sizes["train"], subject.cfg)
    subject.prompts  # noqa: B018 -- decodes their pictures
    return "; ".join([", ".join(f"{size} {split} prompts" for split, size in sizes.items()), *repeated(subject)])


def repeated(subject: Subject) -> list[str]:
    """A note, if prompts to evaluate on are also trained on."""
    if (found := subject.overlap) is None:
        return []
    (one, other), held_out = found.first, len(subject.datasets["eval"])
    return [
        f"note: {found.same} of {held_out} evaluation prompts are also trained on ({one!r} of data.eval_path "
        f"is {other!r} of data.train_path); accuracy on them says what is known by heart"
    ]


def verifiers(subject: Subject) -> str:
    """The verifiers that rows name can be run; the built-in ones judge a row's own truth right, and the truth of
    another row wrong. Functions of the user's are called once."""
    cfg = subject.cfg.reward
    runner = VerifierRunner(cfg.verifier_timeout, cfg.numeric_tolerance, cfg.verifiers, cfg.verifier_environment)
    rows = [(f"{split} row {row}", prompt) for split, some in subject.prompts.items() for row, prompt in some]
    truths: defaultdict[str, list[tuple[str, str]]] = defaultdict(list)
    first = dict[str, tuple[str, Prompt]]()
    for where, prompt in rows:
        for check in prompt.all_checks:
            name = check.verifier or cfg.verifier or ""
            truths[name].append((where, check.truth))
            first.setdefault(name, (where, replace(prompt, checks=(replace(check, verifier=name),))))
    names = {*truths, *verifier_names(subject.datasets.values()), cfg.verifier or ""} - {""}
    said = []
    try:
        for name in sorted(names):
            takes = runner.takes(name)
            tried = name in SELF_TESTED
            own = name in cfg.verifiers and name in first and first[name][1].checks[0].truth != ""
            words = _called_once(subject.cfg, *first[name]) if own else _not_tried(takes)
            said.append(f"{name}: {self_test(runner.verify, name, truths[name]) if tried else words}")
    finally:
        runner.close()
    return "; ".join(said)


def _not_tried(takes: Takes) -> str:
    return f"can be called with {takes.value}; its truths are not tried as answers"


def _called_once(cfg: Config, where: str, prompt: Prompt) -> str:
    """A function of the user's judges the truth of a row, written as the policy would have to write it."""
    truth, answer = prompt.checks[0].truth, cfg.reward.answer
    think, thought, opens, closes = answer.tags
    places = {
        AnswerPlace.boxed: ("\\boxed{", "}"),
        AnswerPlace.hashes: ("#### ", ""),
        AnswerPlace.tags: (opens, closes),
    }
    before, behind = places.get(answer.at, ("", ""))
    before = f"{think}{thought}{before}" if answer.thinks is Think.required else before
    text, ids = f"{before}{truth}{behind}", np.zeros(1, np.int32)
    twice = [
        Sample(place, ids, None, text, False, 0, answer=truth) for place in range(2)
    ]  # a list of one proves little
    with closing(Checks(cfg, AnswerForm(answer, "", cfg.reward.verifier_timeout))) as checks:
        (((part,), _),) = checks.parts([SampleGroup(prompt, ids, twice)])
    if part.verdict.error is not None:
        raise DataError(f"the truth of {where}, given as an answer, can't be judged: {part.verdict.error}")
    score = part.verdict.score
    return f"{'nothing' if score is None else f'{score:g}'} for the truth of {where}, given as an answer"


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
