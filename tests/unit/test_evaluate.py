"""Whole evaluations in one process: every part is the real one, but a plain engine stands in for vLLM."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from plain_engine import PlainEngine
from rich.console import Console
from tiny_runs import config, policy_folder, run_loop

from skyrl.crew.local_executor import LocalExecutor
from skyrl.evaluate import evaluate
from skyrl.evaluation.answers import Answer, AnswerStore, judged
from skyrl.evaluation.outcome import task_numbers
from skyrl.evaluation.tasks.graders import GRADERS
from skyrl.evaluation.tasks.mathematics import gsm8k
from skyrl.evaluation.tasks.table import TASKS
from skyrl.records import ConfigError, DataError, Prompt, Sample, SampleGroup
from skyrl.rewards.rewarder import Rewarder
from skyrl.rollout.engine import Completion, EngineRequest
from skyrl.settings import AnswerPlace, Config, Overlong, checked


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return policy_folder(tmp_path_factory.getbasetemp())


class Scripted:
    """An engine that answers each question with the texts that :attr:`says` has for a part of it."""

    vocabulary = 10_000
    says: dict[str, list[str]] = {}  # noqa: RUF012 -- each test sets its own
    asked: list[str] = []  # noqa: RUF012
    stop_after: int | None = None

    def __init__(self, cfg: Config, policy_folder: str) -> None:
        from transformers import AutoProcessor

        self.tokenizer: Any = AutoProcessor.from_pretrained(policy_folder).tokenizer

    def generate(self, requests: list[EngineRequest]) -> list[list[Completion]]:
        return [self._answers(request) for request in requests]

    def _answers(self, request: EngineRequest) -> list[Completion]:
        if self.stop_after is not None and len(self.asked) >= self.stop_after:
            raise KeyboardInterrupt
        question = self.tokenizer.decode(request.prompt_ids)
        found = next(texts for part, texts in self.says.items() if part in question)
        Scripted.asked.append(next(part for part in self.says if part in question))
        ids, logprobs = np.array([0, request.stop_ids[0]], np.int32), np.zeros(2, np.float32)
        prompt_ids = np.array(request.prompt_ids, np.int32)
        return [Completion(prompt_ids, ids, logprobs, found[i], False) for i in range(request.n)]


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "by_hand" not in request.node.name:  # numeric needs no process, which would take seconds to start
        cheap = replace(TASKS["gsm8k"], make=lambda row: replace(gsm8k(row), verifier="numeric"))
        monkeypatch.setitem(TASKS, "gsm8k", cheap)
    monkeypatch.setattr(Scripted, "asked", [])
    monkeypatch.setattr(Scripted, "stop_after", None)


def sums(folder: Path, count: int) -> str:
    """GSM8K's test file with questions "What is 5+0?", "5+1?", … in a data folder."""
    path = folder / "gsm8k" / "test.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"question": f"What is 5+{i}?", "answer": f"5+{i}\n#### {5 + i}"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def settings(tmp_path: Path, policy: str, count: int = 5, **own: Any) -> Config:
    cfg = config(tmp_path / "runs" / "now", steps=1)
    cfg.model.policy, cfg.rollout.engine, cfg.rollout.max_prompt_tokens = policy, "test_evaluate:Scripted", 1000
    cfg.rollout.prompts_per_step = 2
    cfg.evaluate.tasks, cfg.evaluate.data_dir = ["gsm8k"], sums(tmp_path / "data", count)
    for name, value in own.items():
        setattr(cfg.evaluate, name, value)
    return cfg


def run(cfg: Config) -> tuple[dict[str, Any], str]:
    console = Console(file=io.StringIO(), width=160)
    results = evaluate(cfg, console, LocalExecutor())
    return results, console.file.getvalue()  # type: ignore[attr-defined]


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return pq.read_table(folder / "answers.parquet").to_pylist()


SAYS = {
    "5+0": ["\\boxed{5}", "It is \\boxed{5.0}.", "\\boxed{6}", "no idea"],
    "5+1": ["\\boxed{6}", "\\boxed{7}", "6", "\\boxed{8}"],
    "5+2": ["\\boxed{7}"] * 4,
    "5+3": ["\\boxed{1}", "\\boxed{1.0}", "\\boxed{8}", "\\boxed{8}"],
    "5+4": ["<b>\\boxed{<script>alert(1)</script>}</b>"] * 4,
}


def test_numbers_and_files_by_hand(policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scripted, "says", SAYS)
    results, shown = run(settings(tmp_path, policy, samples=4, temperature=1.0))
    folder = tmp_path / "runs" / "evaluation"
    found = results["tasks"]["gsm8k"]
    assert results == json.loads((folder / "results.json").read_text())
    assert (found["questions"], found["answers"], found["errors"], found["no_answer"]) == (5, 20, 0, 2)
    # Right: 2, 1, 4, 2, 0 of 4.
    assert found["avg"]["value"] == pytest.approx((2 + 1 + 4 + 2 + 0) / 20)
    assert found["avg"]["interval"] == "clustered"
    assert found["pass@1"]["value"] == found["avg"]["value"]
    assert found["pass@2"]["value"] == pytest.approx((1 - 1 / 6 + 1 - 3 / 6 + 1 + 1 - 1 / 6 + 0) / 5)
    assert found["pass@4"]["value"] == pytest.approx(4 / 5) and found["pass@4"]["interval"] == "wilson"
    # Votes: 5 = 5.0 wins; 6, 7, 8 share; 7; 1 = 1.0 and 8 share; a wrong one.
    assert found["maj"]["value"] == pytest.approx((1 + 1 / 3 + 1 + 1 / 2 + 0) / 5)
    assert "gsm8k" in shown and "45.0%" in shown and "80.0%" in shown and "2 had no answer" in shown

    rows = rows_of(folder)
    assert [row["right"] for row in rows[:4]] == [True, True, False, False]
    assert [row["answer"] for row in rows[:4]] == ["5", "5.0", "6", None]
    assert [row["vote"] for row in rows[:4]] == [0, 0, 2, None]
    assert rows[0]["id"] == "gsm8k/0" and rows[0]["truth"] == "5" and json.loads(rows[0]["rules"]) == {"math": 1.0}
    page = (folder / "report.html").read_text()
    assert "What is 5+3?" in page and "&lt;script&gt;alert(1)" in page and "<script>alert" not in page
    assert page.count('class="answer"') == 20 and page.count('data-verdict="right"') == 9
    assert re.search(r"script-src 'sha256-[\w+/=]+'", page) and "http" not in page.replace("http-equiv", "")


def test_stopped_anywhere_it_asks_what_is_missing_and_ends_the_same(
    policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Scripted, "says", SAYS)
    cfg = settings(tmp_path / "whole", policy, samples=4, temperature=1.0)
    whole, _ = run(cfg)
    asked = list(Scripted.asked)
    assert asked == ["5+0", "5+1", "5+2", "5+3", "5+4"]
    for stop in (0, 1, 3, 4):
        Scripted.asked.clear()
        monkeypatch.setattr(Scripted, "stop_after", stop)
        cfg = settings(tmp_path / str(stop), policy, samples=4, temperature=1.0)
        with pytest.raises(KeyboardInterrupt):
            run(cfg)
        folder = tmp_path / str(stop) / "runs" / "evaluation"
        kept = (folder / "answers.jsonl").read_bytes() if (folder / "answers.jsonl").exists() else b""
        # What a kill within a write leaves.
        (folder / "answers.jsonl").write_bytes(kept + b'[[{"task": "gsm8k", "id"')
        Scripted.asked.clear()
        monkeypatch.setattr(Scripted, "stop_after", None)
        results, _ = run(cfg)
        assert Scripted.asked == asked[2 * kept.count(b"\n") :]
        assert results["tasks"] == whole["tasks"] and rows_of(folder) == rows_of(tmp_path / "whole/runs/evaluation")
    Scripted.asked.clear()
    again, _ = run(cfg)
    assert Scripted.asked == [] and again == results  # nothing is missing, nothing is started


def test_other_settings_are_refused_by_name(policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scripted, "says", SAYS)
    run(settings(tmp_path, policy, limit=2))
    cfg = settings(tmp_path, policy, limit=2, samples=2, temperature=0.5)
    cfg.rollout.max_new_tokens = 7
    with pytest.raises(ConfigError) as caught:
        run(cfg)
    for text in (
        "evaluate.samples=2: the answers in",
        "evaluate.temperature=0.5",
        "rollout.max_new_tokens=7",
        "have 24",
    ):
        assert text in str(caught.value)
    assert "evaluate.limit" not in str(caught.value) and "set evaluate.output to another folder" in str(caught.value)
    # More questions and more tasks may come.
    Scripted.asked.clear()
    results, _ = run(settings(tmp_path, policy, limit=4))
    assert Scripted.asked == ["5+2", "5+3"] and results["tasks"]["gsm8k"]["questions"] == 4
    cfg = settings(tmp_path, policy)
    cfg.evaluate.data_dir = sums(tmp_path / "data", 6)  # other questions
    with pytest.raises(ConfigError, match=r"task.gsm8k=\w+: the answers in"):
        run(cfg)
    cfg = settings(tmp_path, policy)
    cfg.evaluate.output = str(tmp_path / "elsewhere")
    run(cfg)
    assert (tmp_path / "elsewhere" / "results.json").is_file()


def test_other_weights_in_the_same_folder_are_noticed(
    policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    monkeypatch.setattr(Scripted, "says", SAYS)
    copy = tmp_path / "policy"
    shutil.copytree(policy, copy)
    run(settings(tmp_path, str(copy), limit=1))
    weights = next(copy.glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ConfigError, match=r"policy.weights=\w+: the answers in"):
        run(settings(tmp_path, str(copy), limit=1))


def test_a_broken_line_is_named(policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scripted, "says", SAYS)
    run(settings(tmp_path, policy))
    path = tmp_path / "runs" / "evaluation" / "answers.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0][:9] + b"\n", *lines[1:]]))
    with pytest.raises(DataError, match=r"answers.jsonl, line 1: "):
        run(settings(tmp_path, policy))
    (path.parent / "settings.json").unlink()
    with pytest.raises(DataError, match=r"has answers.jsonl, but no settings.json"):
        AnswerStore(path.parent, {})


def test_questions_that_are_too_long(policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scripted, "says", {"5+": ["\\boxed{5}"]})
    cfg = settings(tmp_path, policy, count=3)
    path = Path(cfg.evaluate.data_dir or "", "gsm8k", "test.jsonl")
    path.write_text(path.read_text().replace("What is 5+1?", "What is 5+1?" + " please" * 900))
    with pytest.raises(
        DataError, match=r"1 of 3 gsm8k prompts can't be asked .*\nrow 1: prompt 'gsm8k/1' has \d+ tokens"
    ):
        run(cfg)
    assert Scripted.asked == []
    cfg.data.overlong, cfg.evaluate.output = Overlong.drop, str(tmp_path / "dropped")
    for _ in range(2):  # the second time nothing is missing
        results, shown = run(cfg)
        found = results["tasks"]["gsm8k"]
        assert len(Scripted.asked) == 2 and (found["questions"], found["left_out"]) == (2, 1)
        assert found["avg"]["value"] == 0.5 and "1 questions were too long" in shown
        assert [row["id"] for row in rows_of(tmp_path / "dropped")] == ["gsm8k/0", "gsm8k/2"]


def test_it_says_so_if_no_answer_was_found(policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scripted, "says", {"5+": ["<answer>5</answer>"]})
    cfg = settings(tmp_path, policy)
    assert "gsm8k: not one answer was found: evaluate.place" in run(cfg)[1]
    cfg.evaluate.place, cfg.evaluate.output = AnswerPlace.tags, str(tmp_path / "tags")
    results, shown = run(cfg)
    assert "not one answer" not in shown and results["tasks"]["gsm8k"]["avg"]["value"] == 0.2


def test_mistakes_are_told_before_anything_starts(policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scripted, "__init__", lambda *_: pytest.fail("the engine was started"))
    with pytest.raises(ConfigError, match="there is no task 'gsm'"):
        run(settings(tmp_path, policy, tasks=["gsm"]))
    (tmp_path / "data" / "gsm8k" / "test.jsonl").write_text('{"question": "Q", "answer": "5"}\n')
    with pytest.raises(DataError, match="row 0, column 'answer': nothing follows ####"):
        cfg = settings(tmp_path, policy)
        Path(cfg.evaluate.data_dir or "", "gsm8k", "test.jsonl").write_text('{"question": "Q", "answer": "5"}\n')
        run(cfg)


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"samples": 2}, "evaluate.samples=2 with evaluate.temperature=0.0: at temperature 0 all answers"),
        ({"temperature": 0.005}, "evaluate.temperature=0.005: must be 0, or 0.01 or more"),
        ({"place": "regex"}, "evaluate.place=regex with reward.answer.pattern=null: there is no pattern"),
        ({"data_dir": "/nowhere/at/all"}, "evaluate.data_dir=/nowhere/at/all: must be null or a folder"),
    ],
)
def test_settings_that_do_not_fit_together(own: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        checked({"evaluate": own})
    assert str(caught.value).startswith(said) and "\n" not in str(caught.value)
    checked({"evaluate": {"samples": 2, "temperature": 0.01, "place": "tags", "data_dir": "/"}})


# ---------------------------------------------------------------- verdicts


def group(verifier: str, truth: str, *texts: str) -> SampleGroup:
    none = np.zeros(0, np.int32)
    samples = [Sample(i, none, none.astype(np.float32), text, False, 0) for i, text in enumerate(texts)]
    return SampleGroup(Prompt("p", "?", (), truth, verifier), none, samples)


@pytest.fixture(scope="module")
def rewarder(policy: str, tmp_path_factory: pytest.TempPathFactory) -> Rewarder:
    cfg = config(tmp_path_factory.mktemp("rewarder"), steps=1)
    cfg.reward.verifiers = dict(GRADERS)
    return Rewarder(cfg, policy, None, 1)


def test_a_task_has_its_own_place_and_leaves_the_training_as_it_was(rewarder: Rewarder) -> None:
    text = "<think>\\boxed{1}</think><answer>2</answer> and \\boxed{3}"

    def found(place: AnswerPlace | None) -> str | None:
        return judged(rewarder, [group("exact", "3", text)], "t", place)[0][0].answer

    assert [found(place) for place in (AnswerPlace.boxed, None, AnswerPlace.last_number)] == ["3", "2", "3"]
    assert rewarder.form.cfg.at is AnswerPlace.tags and rewarder.checks.form is rewarder.form


def test_votes_go_by_the_verifiers_equality(rewarder: Rewarder) -> None:
    def votes(verifier: str, truth: str, *answers: str) -> list[int | None]:
        texts = [f"\\boxed{{{answer}}}" if answer else "" for answer in answers]
        return [answer.vote for answer in judged(rewarder, [group(verifier, truth, *texts)], "t", AnswerPlace.boxed)[0]]

    assert votes("math", "7", "1/2", "0.5", "2", "", "\\frac{1}{2}") == [0, 0, 2, None, 0]
    options = json.dumps({"letter": "B", "options": ["a cat", "a dog"]})
    assert votes("task_option", options, "B", "(b)", "A", "B.") == [0, 0, 2, 0]
    assert votes("exact", "x", "Red", "red ", "blue") == [0, 0, 2]
    assert votes("code", '{"tests": "assert f() == 1"}', "x", "x") == [None, None]  # no vote on programs


def test_what_could_not_be_scored_counts_in_no_number(rewarder: Rewarder) -> None:
    good, broken = (
        group("math", "7", "\\boxed{7}", "\\boxed{8}"),
        group("task_rounded", "{}", "\\boxed{7}", "\\boxed{8}"),
    )
    answers = judged(rewarder, [good, replace(broken)], "t", AnswerPlace.boxed)
    assert [answer.right for answer in answers[1]] == [None, None] and "task_rounded" in str(answers[1][0].error)
    found = task_numbers(answers)
    assert (found["questions"], found["errors"]) == (2, 2) and found["avg"].value == 0.5 and found["avg"].questions == 1
    assert "avg" not in task_numbers(answers[1:])


# ---------------------------------------------------------------- agreement with training


class Noted(LocalExecutor):
    """Keeps the groups of the last evaluation of a run."""

    def __init__(self) -> None:
        super().__init__()
        self.groups: list[SampleGroup] = []

    def call(self, member: Any, function: Any, pieces: int, args: Any, kwargs: Any) -> Any:
        if function.__name__ == "evaluate":
            self.groups = [one for part in args[2 : 2 + args[1]] for one in part]
        return super().call(member, function, pieces, args, kwargs)


def test_it_agrees_with_the_evaluation_of_a_training_run_to_the_sample(policy: str, tmp_path: Path) -> None:
    cfg, noted = config(tmp_path / "runs" / "now", steps=2), Noted()
    cfg.data.eval_size, cfg.digits.text_share = 12, 0.3
    cfg.digits.kinds = ["max", "min"]
    cfg.checkpoint.export = True
    sink = run_loop(cfg, policy, noted)
    trained = {one.prompt.id: one for one in noted.groups}
    assert len(trained) == 12

    cfg.model.policy, cfg.evaluate.tasks = str(Path(cfg.run_dir) / "policy"), ["training"]
    assert cfg.rollout.engine == f"plain_engine:{PlainEngine.__name__}"
    results, _ = run(cfg)
    last = [metrics for _, metrics in sink.all if "eval/accuracy" in metrics][-1]
    found = results["tasks"]["training"]
    assert found["avg"]["value"] == last["eval/accuracy"] and 0 < found["avg"]["value"] < 1
    assert found["hallucination"]["value"] == last["eval/hallucination"]
    kinds = {name.rpartition("/")[2]: value for name, value in last.items() if name.startswith("eval/accuracy/")}
    assert {kind: one["value"] for kind, one in found["kinds"].items()} == kinds and len(kinds) > 1
    answers = [Answer(**row) for row in rows_of(tmp_path / "runs" / "evaluation")]
    for answer in answers:
        (sample,) = trained[answer.id].samples
        assert (answer.text, answer.answer, answer.right) == (sample.text, sample.answer, sample.right)
        assert answer.tokens == len(sample.token_ids) and answer.score == sample.reward.rule  # type: ignore[union-attr]
    assert 'src="data:image/png;base64' in (tmp_path / "runs" / "evaluation" / "report.html").read_text()
