"""From the texts of groups to the verdicts of all their checks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from skyrl.records import Check, DataError, Prompt, Sample, SampleGroup
from skyrl.rewards.answers import AnswerForm
from skyrl.rewards.conventions import GROUPED, Takes, arguments, group_arguments
from skyrl.rewards.runner import Call, Verdict, VerifierPool
from skyrl.rewards.verifiers.judge import Case, EndpointJudge
from skyrl.settings import Config

JUDGE = "judge"
"""The built-in verifier that needs the question too: a model behind an address, asked from here."""
NO_ANSWER = Verdict(0.0, None)
"""No answer is wrong, but no error."""


class Part(NamedTuple):
    """What came of one check of one sample."""

    name: str
    """The verifier's; where a row names it again, with a number: ``math#2``."""
    weight: float
    verdict: Verdict


class Checks:
    """Makes the checks of groups.

    Args:
        cfg: All settings.
        form: Where the answer stands.
    """

    def __init__(self, cfg: Config, form: AnswerForm) -> None:
        self.cfg, self.form, self.pool = cfg, form, VerifierPool(cfg.reward)
        self._judge: EndpointJudge | None = None

    def ready(self, names: Iterable[str]) -> None:
        """Prepare the verifiers of these names and that of ``reward.verifier``, where they will run.

        Raises:
            DataError: if one is unknown or can't be imported.
            ConfigError: if one is ``judge``, and ``reward.judge`` is not complete.
        """
        for name in sorted({*names, self.cfg.reward.verifier or ""} - {""}):
            if name == JUDGE:
                self._asked_judge()
            else:
                self.pool.takes(name)

    def close(self) -> None:
        """End the verifiers' processes; later checks would start others."""
        self.pool.close()

    def parts(self, groups: Sequence[SampleGroup]) -> list[list[list[Part]]]:
        """For each group and each of its samples the parts of its rule score. Equal answers of a group are judged once.

        Raises:
            DataError: if a prompt names a verifier that is unknown or can't be imported, or names none and there is no
                default.
            SkyrlError: if a process can't be started, or if the judge's address is gone or its budget spent.
        """
        calls: list[Call | Case] = []
        asked = []
        for group in groups:
            try:
                checks = list(self._named(group.prompt))
                asked.append([(name, check.weight, self._ask(group, check, calls)) for name, check in checks])
            except DataError as error:
                raise DataError(f"prompt {group.prompt.id!r}: {error}") from error
        ours, cases = [one for one in calls if isinstance(one, Call)], [one for one in calls if isinstance(one, Case)]
        verdicts, judged = iter(self.pool.run(ours)), iter(self._judged(cases))
        found = [next(verdicts) if isinstance(one, Call) else [next(judged)] for one in calls]

        def verdict(place: tuple[int, int] | None) -> Verdict:
            return NO_ANSWER if place is None else found[place[0]][place[1]]

        return [
            [
                [Part(name, weight, verdict(places[at])) for name, weight, places in checks]
                for at in range(len(group.samples))
            ]
            for group, checks in zip(groups, asked, strict=True)
        ]

    def _named(self, prompt: Prompt) -> Iterator[tuple[str, Check]]:
        """The checks with their verifiers, and a name of its own for each."""
        seen: Counter[str] = Counter()
        for check in prompt.all_checks:
            verifier = check.verifier or self.cfg.reward.verifier
            if not verifier:
                raise DataError("it names no verifier; name one in its row, or for all such rows in reward.verifier")
            seen[verifier] += 1
            name = verifier if seen[verifier] == 1 else f"{verifier}#{seen[verifier]}"
            yield name, Check(verifier, check.truth, check.weight)

    def _ask(self, group: SampleGroup, check: Check, calls: list[Call | Case]) -> list[tuple[int, int] | None]:
        """Add the calls that one check of a group needs; for each sample the call and the place in it where its verdict
        will be, None where there is no answer to be judged."""
        prompt, judge = group.prompt, check.verifier == JUDGE
        takes = Takes.answer if judge else self.pool.takes(check.verifier)
        if takes in GROUPED:
            given = group_arguments(takes, group, check, self.cfg.controller.steps)
            calls.append(Call(check.verifier, given, len(group.samples)))
            return [(len(calls) - 1, at) for at in range(len(group.samples))]
        numbers, places = dict[tuple[str, int], int](), list[tuple[int, int] | None]()
        for sample in group.samples:
            if (text := self._text(takes, sample)) is None:
                places.append(None)
                continue
            # EasyR1's functions see the length too, and two rows of tokens may be one text.
            key = text, len(sample.token_ids) if takes is Takes.easyr1 else 0
            if key not in numbers:
                numbers[key] = len(calls)
                if judge:
                    calls.append(Case(prompt.question, text, check.truth))
                elif takes in (Takes.verl, Takes.easyr1):
                    calls.append(Call(check.verifier, arguments(takes, prompt, check, sample)))
                else:
                    calls.append(Call(check.verifier, {"answer": text, "truth": check.truth}))
            places.append((numbers[key], 0))
        return places

    def read_answers(self, groups: Iterable[SampleGroup]) -> bool:
        """Whether some verifier of these groups judges what was found as the answer, and not the whole text."""
        names = {check.verifier for group in groups for _, check in self._named(group.prompt)}
        return any(name == JUDGE or self.pool.takes(name) is Takes.answer for name in names)

    def _judged(self, cases: list[Case]) -> list[Verdict]:
        found = self._asked_judge().verdicts(cases) if cases else []
        return [Verdict(score, error and f"verifier {JUDGE!r}: {error}") for score, error in found]

    def _asked_judge(self) -> EndpointJudge:
        if self._judge is None:
            folder = Path(self.cfg.run_dir) if self.cfg.run_dir else None
            self._judge = EndpointJudge(self.cfg.reward.judge, folder)
        return self._judge

    def _text(self, takes: Takes, sample: Sample) -> str | None:
        if takes in (Takes.verl, Takes.easyr1):
            return sample.text
        return sample.answer if takes is Takes.answer else self.form.behind(sample.text)


def rule_score(parts: Sequence[Part]) -> Verdict:
    """The weighted mean of the parts that say something; an error if one of them is one, or if none says anything."""
    if error := next((part.verdict.error for part in parts if part.verdict.error is not None), None):
        return Verdict(None, error)
    said = [(part.weight, part.verdict.score) for part in parts if part.verdict.score is not None]
    if not said:
        names = ", ".join(repr(part.name) for part in parts)
        return Verdict(None, f"verifier {names}: it has nothing to say of this row (it returned None)")
    return Verdict(sum(weight * score for weight, score in said) / sum(weight for weight, _ in said), None)
