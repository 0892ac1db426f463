"""Names of verifiers, and functions of TRL, verl and EasyR1 run unchanged, through the real verifier process."""

from __future__ import annotations

import inspect
import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import foreign_rewards
import numpy as np
import pytest

from skyrl.records import Check, ConfigError, DataError, Prompt, Sample, SampleGroup, Turn
from skyrl.rewards.answers import AnswerForm
from skyrl.rewards.conventions import Takes
from skyrl.rewards.judging import Checks, Part, rule_score
from skyrl.rewards.runner import Verdict
from skyrl.rewards.verifiers import BUILTIN, get_verifier, load_verifier, verifier_reference
from skyrl.rewards.verifiers.exact import exact_verifier
from skyrl.rewards.verifiers.judge import Case, EndpointJudge
from skyrl.settings import AnswerConfig, Config

NAMES = [name for name, one in vars(foreign_rewards).items() if inspect.isfunction(one)]
OWN = {name: f"foreign_rewards:{name}" for name in (*NAMES, "partly")}


def make(**reward: Any) -> Checks:
    return Checks(Config(reward={"verifiers": OWN, "verifier_timeout": 20.0} | reward), AnswerForm(AnswerConfig()))


@pytest.fixture(scope="module")
def checks() -> Iterator[Checks]:
    made = make(verifier_processes=3)
    yield made
    made.close()


def group(verifier: str, *texts: str, **changes: Any) -> SampleGroup:
    fields = {"id": "p/1", "question": "What is 2+2? 4", "images": (), "answer": "4", "verifier": verifier}
    samples = [
        Sample(i, np.arange(3 + i, dtype=np.int32), None, text, False, policy_version=7) for i, text in enumerate(texts)
    ]
    for sample in samples:
        sample.answer = AnswerForm(AnswerConfig()).find(sample.text)
    return SampleGroup(Prompt(**(fields | changes)), np.zeros(3, np.int32), samples)


def parts(checks: Checks, *groups: SampleGroup) -> list[list[list[Part]]]:
    return checks.parts(groups)


def scores(checks: Checks, asked: SampleGroup) -> list[float | None]:
    (samples,) = parts(checks, asked)
    found = [rule_score(sample) for sample in samples]
    assert not any(verdict.error for verdict in found), found
    return [verdict.score for verdict in found]


def problem(checks: Checks, asked: SampleGroup) -> str:
    (samples,) = parts(checks, asked)
    (error,) = {rule_score(sample).error for sample in samples}
    return str(error)


# ---------------------------------------------------------------- names


def test_unknown_name_is_named() -> None:
    with pytest.raises(DataError, match=r"'nope'.*exact, numeric, math, choice"):
        get_verifier("nope")


def test_names() -> None:
    own = {"mine": "hostile_verifiers:right"}
    assert get_verifier("exact") is exact_verifier
    assert verifier_reference("mine", own) == own["mine"]
    assert [verifier_reference(name, own) for name in BUILTIN] == list(BUILTIN.values())
    with pytest.raises(DataError, match=r"'yours'; allowed: exact, numeric, math, choice.* mine, .*reward\.verifiers"):
        verifier_reference("yours", own)
    with pytest.raises(DataError, match="'mine'"):
        verifier_reference("mine")


@pytest.mark.parametrize("path", ["builtins:eval", "timeit:timeit", "os:popen", "my_verifiers:close_enough", ":"])
def test_data_can_not_name_code(path: str, checks: Checks) -> None:
    for own in (None, {"mine": path}):  # a path is no name, even where the settings know it
        with pytest.raises(DataError, match=r"data can't name code: set reward\.verifiers=\{\w+: "):
            verifier_reference(path, own)
    with pytest.raises(DataError, match=r"prompt 'p/1': unknown verifier .* can't name code"):
        parts(checks, group(path, "<answer>4</answer>"))


@pytest.mark.parametrize(
    "path", ["no_such_module:f", "hostile_verifiers:no_such", "hostile_verifiers:not_a_function", "a.b"]
)
def test_bad_path_of_the_settings(path: str) -> None:
    with pytest.raises(DataError, match="verifier"):
        load_verifier(path)


# ---------------------------------------------------------------- conventions


@pytest.mark.parametrize(
    ("name", "takes"),
    [
        *((name, Takes.trl) for name in NAMES if name.startswith("trl")),
        *((name, Takes.verl) for name in NAMES if name.startswith(("verl", "compute")) and name != "verl_lists"),
        ("verl_lists", Takes.verl_batch),
        *((name, Takes.easyr1) for name in ("easyr1_r1v", "easyr1_older", "easyr1_oldest")),
        *((name, Takes.easyr1_batch) for name in ("easyr1_math", "easyr1_older_batch", "partly")),
        ("text_length", Takes.text),
        ("optional", Takes.answer),
        ("exact", Takes.answer),
        ("math", Takes.answer),
    ],
)
def test_convention_is_found_from_the_parameters(checks: Checks, name: str, takes: Takes) -> None:
    assert checks.pool.takes(name) is takes


@pytest.mark.parametrize("name", ["other_names", "three"])
def test_a_function_of_no_convention_is_refused(checks: Checks, name: str) -> None:
    with pytest.raises(
        DataError, match=rf"verifier '{name}'.*takes \(.*allowed: \(answer, truth\), verl's .*EasyR1's .*TRL's"
    ):
        checks.pool.takes(name)


def test_trl(checks: Checks) -> None:
    assert scores(checks, group("trl_equal", "4", "<answer>4</answer>", "5")) == [1.0, -1.0, -1.0]
    assert scores(checks, group("trl_strict", "4", "5")) == [1.0, 0.0]
    assert scores(checks, group("trl_tokens", "a", "b")) == [3.0, 4.0]
    assert scores(checks, group("trl_waits", "a", "b")) == [0.5, 0.5]
    assert scores(checks, group("trl_some", "a", "b", extra={"task": "sum"})) == [2.0, 2.0]
    turns = (Turn("system", ("Be short.",)), Turn("user", ("What is 2+2?", " 4")))
    assert scores(checks, group("trl_chat", "4", "5", turns=turns)) == [1.0, 0.0]


def test_trl_gets_the_columns_as_lists(checks: Checks, tmp_path: Path) -> None:
    picture = np.zeros((2, 2, 3), dtype=np.uint8)
    extra = {"file": str(tmp_path / "seen.json"), "level": {"n": [1, None]}, "answer": "four", "prompts": "not this"}
    turns = (Turn("user", ("Look: ", None, " How many?")),)
    asked = group("trl_asks_for_everything", "4", "5", extra=extra, turns=turns, images=(picture,))
    assert scores(checks, asked) == [1.0, 1.0]
    seen = json.loads((tmp_path / "seen.json").read_text())
    content = [{"type": "text", "text": "Look: "}, {"type": "image"}, {"type": "text", "text": " How many?"}]
    assert seen["prompts"] == [[{"role": "user", "content": content}]] * 2
    assert seen["completions"] == [[{"role": "assistant", "content": text}] for text in ("4", "5")]
    assert seen["ids"] == [[0, 1, 2], [0, 1, 2, 3]] and seen["step"] == 7
    columns = seen["columns"]
    assert (columns["level"], columns["answer"], columns["solution"]) == (
        [{"n": [1, None]}] * 2,
        ["four"] * 2,
        ["4"] * 2,
    )


def test_verl(checks: Checks) -> None:
    sums = {"data_source": "sums", "extra_info": {"index": 2}}
    assert scores(checks, group("compute_score", "it is 4", "5", extra=sums)) == [1.0, 0.0]
    assert scores(checks, group("compute_score", "it is 4", kind="other")) == [-1.0]
    assert scores(checks, group("compute_score", "it is 4", kind="sums")) == [1.0]
    assert scores(checks, group("verl_parts", "4", extra=sums)) == [0.5]
    assert scores(checks, group("verl_short", "4")) == [0.1]
    assert scores(checks, group("verl_waits", "4")) == [0.25]


def test_verl_in_batches(checks: Checks) -> None:
    asked = group("verl_lists", "4", "5", "4", extra={"extra_info": {"index": 2}})
    assert scores(checks, asked) == [3.0, 2.0, 3.0]
    assert scores(checks, group("verl_lists", "4", extra={"extra_info": None})) == [1.0]


def test_easyr1(checks: Checks) -> None:
    texts = ["<think>?</think> 4", "it is 4", "<think>?</think> 5", "5"]
    assert scores(checks, group("easyr1_math", *texts)) == pytest.approx([1.0, 0.9, 0.1, 0.0])
    assert scores(checks, group("easyr1_r1v", "4", "4", "5")) == [0.03, 0.04, 0.05]  # equal texts of other tokens
    for name in ("easyr1_older", "easyr1_oldest", "easyr1_older_batch"):
        assert scores(checks, group(name, "4", "5", "4")) == [1.0, 0.0, 1.0]
    assert scores(checks, group("partly", "4", "5")) == [0.3, 0.4]
    with pytest.raises(DataError, match=r"needs max_response_length, which easyr1_batch doesn't give: .*reward_inputs"):
        checks.pool.takes("wants_more")


def test_a_truth_that_is_no_text_can_be_told(checks: Checks) -> None:
    for truth, shown in ((7, "7"), (None, "None"), (["4"] * 99, "['4', '4'")):
        extra = {"reward_model": {"ground_truth": truth}, "extra_info": ["not", "a", "mapping"]}
        found = problem(checks, group("verl_fails", "4", extra=extra))
        assert "boom ['not', 'a', 'mapping']" in found and f"; ground_truth {shown}" in found
        assert len(found) < 250


def test_verl_gets_the_truth_as_its_file_has_it(checks: Checks) -> None:
    extra = {"reward_model": {"ground_truth": ["4", "four"]}}
    assert scores(checks, group("verl_truth_type", "4", extra=extra)) == [1.0]
    several = (Check("verl_truth_type", "5"),)  # another truth than the row's
    assert scores(checks, group("verl_truth_type", "4", extra=extra, checks=several)) == [0.0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("trl_wants_a_column", "the function needs difficulty; of this row it can get answer, "),
        ("trl_some", "the function needs task"),
        ("trl_too_few", "needed: a list of 2 numbers"),
        ("trl_one_number", "needed: a list of 2 numbers"),
        ("trl_nan", "allowed: a finite number"),
        ("verl_no_score", "a mapping with acc; needed: score"),
        ("easyr1_no_overall", "a mapping with accuracy; needed: overall"),
        ("easyr1_one_for_all", "needed: a list of 2 numbers"),
        ("verl_parts", "KeyError: 'index'"),
    ],
)
def test_what_they_can_not_do_is_an_error_and_no_zero(checks: Checks, name: str, message: str) -> None:
    found = problem(checks, group(name, "4", "4"))
    assert found.startswith(f"verifier {name!r}: ") and message in found
    assert "; answer" not in found  # of TRL's that is a column of truths


def test_columns_that_json_can_not_hold_are_named_as_the_problem(checks: Checks) -> None:
    assert "can't be handed to it as JSON" in problem(checks, group("trl_tokens", "4", extra={"when": object()}))
    assert scores(checks, group("trl_tokens", "4")) == [3.0]


def test_none_for_a_row_that_is_not_its_own(checks: Checks) -> None:
    other = {"task": "code"}
    assert problem(checks, group("trl_some", "4", extra=other)).startswith("verifier 'trl_some': it has nothing to say")
    several = (Check("trl_some", "4", 5.0), Check("exact", "4"))
    both = group("", "<answer>4</answer>", "<answer>5</answer>", extra=other, checks=several)
    assert scores(checks, both) == [1.0, 0.0]


def test_whether_answers_are_read_at_all(checks: Checks) -> None:
    whole = [group("compute_score", "4"), group("trl_equal", "4"), group("text_length", "4"), group("easyr1_math", "4")]
    assert not checks.read_answers(whole)
    for name in ("exact", "optional", "judge"):
        assert checks.read_answers([*whole, group(name, "4")])
    assert checks.read_answers([group("", "4", checks=(Check("trl_equal", "4"), Check("exact", "4")))])


def test_text_that_a_verifier_wants(checks: Checks) -> None:
    texts = ["<think>x</think>" + "y" * 50, "y" * 50, "<think>never ends"]
    assert scores(checks, group("text_length", *texts)) == [0.5, 0.5, 0.0]


# ---------------------------------------------------------------- several checks


def test_weighted_mean(checks: Checks) -> None:
    several = (Check("exact", "4", 3.0), Check("exact", "four", 1.0), Check("text_length", "4", 2.0))
    asked = group("", "<answer>4</answer>", "<answer>four</answer>", "nothing", checks=several)
    (samples,) = parts(checks, asked)
    assert [part.name for part in samples[0]] == ["exact", "exact#2", "text_length"]
    length = len("<answer>4</answer>") / 100
    assert [rule_score(sample).score for sample in samples] == pytest.approx(
        [(3 + 2 * length) / 6, (1 + 2 * (length + 0.03)) / 6, 2 * 0.07 / 6]
    )


def test_one_error_makes_the_sample_an_error(checks: Checks) -> None:
    several = (Check("exact", "4"), Check("fails_if_wrong", "4"))
    (samples,) = parts(checks, group("", "<answer>4</answer>", "<answer>5</answer>", checks=several))
    right, wrong = [rule_score(sample) for sample in samples]
    assert right == Verdict(1.0, None)
    assert wrong.score is None and "'fails_if_wrong': AssertionError: 5 is not 4" in str(wrong.error)


def test_rows_that_name_no_verifier(checks: Checks) -> None:
    asked = group("", "<answer>4</answer>")
    (((part,),),) = parts(make(verifier="exact"), asked)
    assert part == Part("exact", 1.0, Verdict(1.0, None))
    with pytest.raises(DataError, match=r"prompt 'p/1': it names no verifier; .* reward\.verifier"):
        parts(checks, asked)


def test_the_judge_is_asked_with_the_question(checks: Checks, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def verdicts(self: EndpointJudge, cases: list[Case]) -> list[tuple[float | None, str | None]]:
        asked.extend(cases)
        return [(None, "gone") if case.answer == "5" else (1.0, None) for case in cases]

    monkeypatch.setattr(EndpointJudge, "verdicts", verdicts)
    several = (Check("judge", "4", 3.0), Check("exact", "4"))
    texts = [f"<answer>{said}</answer>" for said in ("four", "4", "5", "4")] + ["none"]
    own = make(judge={"url": "http://nowhere/v1", "model": "m"})
    own.ready(["judge"])
    ((*samples,),) = own.parts([group("", *texts, checks=several)])
    own.close()
    assert asked == [Case("What is 2+2? 4", said, "4") for said in ("four", "4", "5")]
    found = [rule_score(sample) for sample in samples]
    assert [verdict.score for verdict in found] == [0.75, 1.0, None, 1.0, 0.0]
    assert found[2].error == "verifier 'judge': gone"
    with pytest.raises(ConfigError, match=r"reward\.judge\.url is null"):
        checks.ready(["judge"])


# ---------------------------------------------------------------- the processes


def test_equal_answers_of_a_group_are_judged_once(checks: Checks, tmp_path: Path) -> None:
    texts = [f"<answer>{said}</answer>" for said in "4454"] + ["no answer"]
    asked = group("counted", *texts, answer=str(tmp_path))
    assert scores(checks, asked) == [1.0] * 4 + [0.0]
    assert len(list(tmp_path.iterdir())) == 2
    parts(checks, asked, asked)
    assert len(list(tmp_path.iterdir())) == 2 + 4  # groups do not share: their truths are others


def test_answers_are_judged_side_by_side(checks: Checks) -> None:
    warm = group("slow", *(f"<answer>{n}</answer>" for n in range(3)))
    scores(checks, warm)  # starts the processes
    start = time.monotonic()
    assert scores(checks, group("slow", *(f"<answer>{n}</answer>" for n in range(6)))) == [1.0] * 6
    assert 1.0 <= time.monotonic() - start < 2.8  # two rounds of half a second; one after the other it would be 3 s


def test_a_process_gets_no_secrets_and_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    monkeypatch.setenv("JUDGE_KEY", "key")
    monkeypatch.setenv("LANG", "C.UTF-8")
    checks = make(verifier_environment=["JUDGE_KEY", "NOT_SET"])
    assert scores(checks, group("surroundings", "<answer>4</answer>", answer=str(tmp_path / "seen"))) == [1.0]
    seen = json.loads((tmp_path / "seen").read_text())
    folder, environment = Path(seen["folder"]), seen["environment"]
    assert "secret" not in environment.values()
    assert environment.keys() <= {
        *("PATH", "LANG", "LANGUAGE", "LC_ALL", "LC_CTYPE", "TZ", "LD_LIBRARY_PATH", "PYTHONHOME", "PYTHONHASHSEED"),
        *("PYTHONUTF8", "PYTHONDONTWRITEBYTECODE", "HOME", "TMPDIR", "JUDGE_KEY"),
    }
    assert (environment["JUDGE_KEY"], environment["LANG"]) == ("key", "C.UTF-8")
    assert environment["HOME"] == environment["TMPDIR"] == str(folder) != os.getcwd()
    assert (folder / "here").is_file()
    checks.close()
    assert not folder.exists()


def test_the_examples_of_the_documentation_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[2] / "docs" / "verifiers.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text.partition("## Your own function")[2], re.DOTALL | re.MULTILINE)
    (tmp_path / "documented_rewards.py").write_text("\n".join(blocks))
    monkeypatch.syspath_prepend(tmp_path)
    names = ("close_enough", "short", "ends_well", "compute_score", "graded")
    checks = make(verifiers={name: f"documented_rewards:{name}" for name in names})
    asked = [f"<answer>{said}</answer>" for said in ("Red", "rose", "blue")]
    assert scores(checks, group("close_enough", *asked, answer="red")) == [1.0, 0.5, 0.0]
    assert scores(checks, group("short", "a b c", "<think>a b c</think> a b", answer="2")) == [0.0, 1.0]
    assert scores(checks, group("ends_well", "it is 4", "it is 5")) == [2.0, 0.0]
    assert scores(checks, group("compute_score", "it is 4", "it is 5")) == [1.0, 0.0]
    assert scores(checks, group("graded", "it is 4", "it is 5")) == [0.9, 0.0]
    checks.close()
