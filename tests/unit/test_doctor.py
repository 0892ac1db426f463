"""The checks before a run: what each finds, on folders and data that are right and on such that are wrong."""

from __future__ import annotations

import copy
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from tiny_models import encoder
from tiny_runs import config, policy_folder

from skyrl import doctor
from skyrl.checks import all as every
from skyrl.checks import data, machine, policy
from skyrl.checks.all import CHECKS, cheap_checks, run_checks
from skyrl.checks.subject import Check, Skip, Subject
from skyrl.crew.local_executor import LocalExecutor
from skyrl.digits.scenes import DigitScenes
from skyrl.policy.encode import PromptEncoder
from skyrl.records import ConfigError, DataError, Prompt, SkyrlError, SyncError
from skyrl.rollout.sampler import Sampler
from skyrl.run import run
from skyrl.settings import AnswerPlace, Config, Overlong
from skyrl.system import start_system

SCENES = DigitScenes("train", 12, 0.5, 0)


class Rows(list[Prompt]):
    """A data set of prompts in memory."""


def subject(prompts: Sequence[Prompt] = tuple(SCENES[row] for row in range(12)), **parts: Any) -> Subject:
    made = Subject(parts.pop("cfg", None) or Config(), parts.pop("policy", ""))
    made.__dict__ |= {"datasets": {"train": Rows(prompts), "eval": Rows(prompts[:2])}, **parts}
    return made


def plain(answer: str, verifier: str = "exact", **more: Any) -> Prompt:
    return Prompt(f"p/{answer}", "Why?", (), answer, verifier, **more)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return policy_folder(tmp_path_factory.getbasetemp() / "tiny")


# ---------------------------------------------------------------- how checks are made


def test_findings_and_the_error_of_a_cheap_check(monkeypatch: pytest.MonkeyPatch) -> None:
    def skips(_: Subject) -> str:
        raise Skip("not here")

    def fails(_: Subject) -> str:
        raise DataError("row 3 is broken")

    def breaks(_: Subject) -> str:
        raise KeyError("x")

    checks = [
        Check("good", lambda _: "fine", "r0", cheap=True),
        Check("none", skips, "r1", cheap=True),
        Check("bad", fails, "mend it", cheap=True),
        Check("worse", breaks, "see there"),
        Check("after", lambda _: "never looked at", "r5", needs="bad"),
    ]
    found = list(run_checks(subject(), checks))
    assert [replace(one, seconds=0.0) for one in found] == [
        doctor.Finding("good", "pass", "fine"),
        doctor.Finding("none", "skip", "not here"),
        doctor.Finding("bad", "fail", "row 3 is broken", "mend it"),
        doctor.Finding("worse", "fail", "KeyError: 'x'", "see there"),
        doctor.Finding("after", "skip", "needs the check 'bad', which failed or could not be made"),
    ]
    monkeypatch.setattr(every, "CHECKS", checks)
    with pytest.raises(DataError, match=r"^row 3 is broken\nbad: mend it$"):
        cheap_checks(Config(), "")
    monkeypatch.setattr(every, "CHECKS", [checks[0], checks[1], checks[3]])
    assert cheap_checks(Config(), "").rows == every.CHEAP_ROWS  # what is not cheap is not done


def test_cheap_checks_import_nothing_heavy() -> None:
    code = (
        "import sys; from skyrl.checks.all import cheap_checks; from skyrl.settings import Config; "
        "cheap_checks(Config(), ''); print({'torch', 'transformers', 'vllm', 'ray'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "set()\n", done.stdout + done.stderr


def test_a_run_stops_before_anything_starts(folder: str, tmp_path: Path) -> None:
    cfg = config(tmp_path / "run", steps=1)
    cfg.model.policy, cfg.rollout.num_cpus = folder, 1000.0

    class Refuses(LocalExecutor):
        def start(self, spec: Any, lost: Any) -> Any:
            raise AssertionError("a member was started")

    with pytest.raises(ConfigError, match=r"the actors need 1000\S* CPUs.*\nresources: fewer workers"):
        run(cfg, Refuses())


def test_a_check_that_needs_another_comes_behind_it_and_few_rows_are_seen(folder: str) -> None:
    names = [check.name for check in every.CHECKS]
    assert all(check.needs in names[: names.index(check.name)] for check in every.CHECKS if check.needs)
    made = subject()
    made.cfg.rollout.prompts_per_step = 30_000
    with pytest.raises(DataError, match=r"rollout\.prompts_per_step=30000: a step would ask some of them twice"):
        next(check for check in every.CHECKS if check.name == "data").look(made)


def test_every_check_is_in_the_document() -> None:
    text = (Path(__file__).parents[2] / "docs" / "monitoring.md").read_text(encoding="utf-8")
    assert [check.name for check in CHECKS if f"| {check.name} |" not in text] == []
    assert [check.name for check in CHECKS if check.cheap] == ["packages", "resources", "data", "verifiers"]


# ---------------------------------------------------------------- machine


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "vllm" in machine.packages(subject())
    monkeypatch.setattr(machine, "find_spec", lambda name: None if name == "vllm" else 1)
    with pytest.raises(ConfigError, match=r"not installed: vllm \(rollout\.engine\)"):
        machine.packages(subject())
    own = Config()
    own.rollout.engine = "plain_engine:PlainEngine"
    assert "vllm" not in machine.packages(subject(cfg=own))


def test_a_joined_cluster_is_not_guessed_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    cfg = Config()
    cfg.rollout.num_cpus, cfg.cluster.num_cpus = 8.0, 4
    with pytest.raises(ConfigError, match="the Ray cluster has 4"):
        machine.resources(subject(cfg=cfg))
    cfg.cluster.address = "head:6379"
    with pytest.raises(Skip, match="head:6379"):
        machine.resources(subject(cfg=cfg))


def test_memory_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """1,000 + 24 numbers. Two ranks in bfloat16 at stage 1 hold weights and gradients twice, Adam and masters once."""
    save_file({"a": torch.zeros(10, 100), "b": torch.zeros(24)}, tmp_path / "model.safetensors")
    n = machine.parameters_in(str(tmp_path))
    assert n == 1024
    cfg = Config()
    cfg.model.dtype, cfg.learner.num_workers, cfg.learner.zero_stage = "bfloat16", 2, 1
    cfg.rollout.num_workers, cfg.rollout.kv_cache_gib, cfg.reward.num_workers = 2, 3, 2
    parts = machine.memory_parts(cfg, str(tmp_path), str(tmp_path))
    assert parts == {
        "engines": 2 * (n * 2 + 3 * 2**30),
        "learner": 2 * n * 2 + 2 * n * 2 + n * (8 + 4),
        "weights on their way": n * 2,
        "reference policy": 2 * n * 2,
        "reward models": 2 * n * 2,
    }
    cfg.learner.lora.rank = 8
    assert "reward models" not in machine.memory_parts(cfg, str(tmp_path), "http://host/v1")
    assert machine.memory_parts(cfg, str(tmp_path), None)["learner"] == 2 * n * 2
    one = subject(cfg=cfg, policy=str(tmp_path))
    monkeypatch.setattr(machine, "machine_memory", lambda: 7 * 2**30)
    assert "about 6.0 GiB of 7.0 GiB" in machine.memory(one)
    monkeypatch.setattr(machine, "machine_memory", lambda: 5 * 2**30)
    with pytest.raises(ConfigError, match=r"about 6\.0 GiB of 5\.0 GiB"):
        machine.memory(one)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(ConfigError, match=r"model\.safetensors is no safetensors file"):
        machine.memory(one)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(Skip, match="can't be counted"):
        machine.memory(one)


# ---------------------------------------------------------------- data


def test_verifiers_judge_their_own_truths() -> None:
    rows = [plain(text, name) for text, name in [("a", "exact"), ("b", "exact"), ("3", "numeric"), ("4", "numeric")]]
    assert data.verifiers(subject(rows)) == (
        "exact: 4 truths right, 4 of 4 of other rows wrong; numeric: 2 truths right, 2 of 2 of other rows wrong"
    )


def test_a_truth_that_its_verifier_does_not_accept_is_named_by_row() -> None:
    rows = [plain("3", "numeric"), plain("a dozen", "numeric"), plain("12", "numeric")]
    with pytest.raises(DataError, match=r"numeric: \d of \d truths .* train row 1: truth 'a dozen': "):
        data.verifiers(subject(rows))


def verdicts(judge: Any) -> Any:
    return lambda name, answer, truth: SimpleNamespace(score=judge(answer, truth), error=None)


def test_self_test_finds_verifiers_that_say_right_too_often() -> None:
    truths = [(f"row {i}", str(i)) for i in range(8)]
    with pytest.raises(DataError, match=r"kind: 8 of 8 truths of other rows are judged right; row 0: '1' for '0'"):
        data.self_test(verdicts(lambda answer, truth: 1.0), "kind", truths)
    with pytest.raises(DataError, match=r"kind: 8 of 8 truths are not right .* row 0: truth '0': score 0\.5"):
        data.self_test(verdicts(lambda answer, truth: 0.5), "kind", truths)
    ok = data.self_test(verdicts(lambda a, t: float(a == t or {a, t} == {"3", "4"})), "kind", truths)
    assert ok == "8 truths right, 7 of 8 of other rows wrong; judged equal: row 3: '4' for '3'"
    same = [("row 0", "1"), ("row 1", "1.0"), ("row 2", " 1 ")]  # one number, however it is written
    assert data.self_test(verdicts(lambda *_: 1.0), "kind", same) == "3 truths right, 0 of 0 of other rows wrong"


def test_own_verifiers_are_called_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "graders.py").write_text(
        "def close(answer, truth):\n    return 0.5 if answer == truth else 2.0\n"
        "def text(answer, truth):\n    return '1'\n"
        "def trl(completions, answer, **kw):\n"
        "    return [None if truth == '2' else float(len(text)) for text, truth in zip(completions, answer)]\n"
        "def short(completions, **kw):\n    return [1.0]\n"
        "def verl(solution_str, ground_truth):\n    raise RuntimeError(solution_str)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    cfg = Config()

    def said(name: str, *truths: str) -> str:
        cfg.reward.verifiers = {name: f"graders:{name}"}
        return data.verifiers(subject([plain(truth, name) for truth in truths], cfg=cfg))

    assert said("close", "1", "2") == "close: 0.5 for the truth of train row 0, given as an answer"
    assert said("close", "") == "close: can be called with answer; its truths are not tried as answers"
    assert (
        said("trl", "1")
        == f"trl: {len('<think></think><answer>1</answer>')} for the truth of train row 0, given as an answer"
    )
    assert said("trl", "2") == "trl: nothing for the truth of train row 0, given as an answer"
    cfg.reward.answer.at = AnswerPlace.boxed
    assert said("trl", "1").startswith("trl: 9 for")  # \\boxed{1}
    for name, message in (("text", "verifier 'text': DataError: .*'1' .str"), ("verl", r"RuntimeError: .boxed\{1\}")):
        with pytest.raises(
            DataError, match=f"^the truth of train row 0, given as an answer, can't be judged: .*{message}"
        ):
            said(name, "1")
    with pytest.raises(DataError, match=r"'short': .*needed: a list of 2 numbers"):
        said("short", "1")
    with pytest.raises(DataError, match=r"'lost'.*lost"):
        said("lost", "1")


def test_long_prompts_are_named_by_row() -> None:
    cfg = Config()
    assert "the longest has" in data.lengths(subject(cfg=cfg, encoder=encoder()))
    cfg.rollout.max_prompt_tokens = 14
    with pytest.raises(
        DataError, match=r"of 14 prompts have more tokens than rollout\.max_prompt_tokens=14: \w+ row \d+"
    ):
        data.lengths(subject(cfg=cfg, encoder=encoder()))
    cfg.data.overlong = Overlong.drop
    assert "of 14 tokens; data.overlong=drop for " in data.lengths(subject(cfg=cfg, encoder=encoder()))


# ---------------------------------------------------------------- the policy's processor


def test_chat_template_stop_tokens_and_pictures_of_the_embedded_policy(folder: str) -> None:
    one = Subject(Config(), folder, rows=8)
    assert "<think></think>" in policy.chat_template(one)
    assert policy.stop_tokens(one).startswith("<end_of_utterance> (")
    assert policy.picture_tokens(one).endswith("in 8 prompts, as the processor counts them")
    with pytest.raises(Skip):
        policy.picture_tokens(subject([plain("1")], encoder=one.encoder))


def test_prompts_that_are_written_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    made = encoder()
    assert policy.prompt_form(subject(encoder=made)) == "14 prompts are written once, with one beginning"
    for text in ("Why?<assistant>", "<user>Why?<assistant>\n"):
        with pytest.raises(
            DataError, match=r"^prompt 'q' ends with '<assistant>' twice: the chat template was applied"
        ):
            policy.prompt_form(subject([Prompt("q", text, (), "1", "exact")], encoder=made))
    fine = Prompt("q", "What does <assistant> mean?", (), "1", "exact")
    policy.prompt_form(subject([fine], encoder=made))
    encode, end = made.encode, made.stop_token_ids[0]
    for begins, twice in (([end], False), ([end, end], True), ([made.image_token_id] * 2, False)):
        monkeypatch.setattr(
            made, "encode", lambda one, b=begins: (np.concatenate([b, encode(one)[0]]).astype(np.int32), {})
        )
        with pytest.raises(DataError, match="begins with '<end_of_utterance>' twice") if twice else nullcontext():
            policy.prompt_form(subject([fine], encoder=made))


def test_a_policy_of_text_gets_no_pictures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made, cfg = encoder(), Config()
    assert "the policy takes them; 9 of" in policy.pictures(subject(encoder=made))
    policy.readable(subject(encoder=made, policy=str(tmp_path)))
    monkeypatch.setattr(made, "image_token", None)
    for look in (policy.pictures, policy.readable):
        with pytest.raises(
            ConfigError, match=r"^model\.policy=\S+ takes text only, but prompt 'train/0' has 1 picture"
        ):
            look(subject(encoder=made, policy=str(tmp_path)))
    with pytest.raises(Skip):
        policy.pictures(subject([plain("1")], encoder=made))
    # What the picture tokens and the lengths would say once more, with another remedy, is not said.
    cfg.rollout.prompts_per_step = 4
    one = subject(cfg=cfg, encoder=made, policy=str(tmp_path))
    found = {finding.name: finding.status for finding in run_checks(one, CHECKS[2:])}
    assert [found[name] for name in ("data", "pictures", "chat template", "picture tokens", "prompt lengths")] == [
        *("pass", "fail", "skip", "skip", "skip")
    ]
    # Before anything starts, but only where vLLM would refuse it.
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 100}))
    cfg.rollout.max_prompt_tokens, cfg.rollout.max_new_tokens = 60, 41
    with pytest.raises(ConfigError, match=r"max_prompt_tokens=60 \+ rollout\.max_new_tokens=41 = 101 .*; lower one of"):
        policy.fits(cfg, str(tmp_path))
    cfg.rollout.engine = "plain_engine:PlainEngine"
    policy.fits(cfg, str(tmp_path))


def test_an_answer_that_does_not_come_back_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    made = encoder()
    monkeypatch.setattr(made, "decode_answer", lambda ids: "<think>1+1 is 2</think>")
    with pytest.raises(ConfigError, match="comes back from the tokenizer as '<think>1"):
        policy.chat_template(subject(encoder=made))


def test_a_prompt_that_the_tokenizer_has_no_token_for_is_named() -> None:
    made = PromptEncoder(copy.deepcopy(encoder().processor))  # the shared one must stay as it is
    made.tokenizer.unk_token = made.tokenizer.convert_ids_to_tokens(made.text_ids(SCENES[0])[2])
    with pytest.raises(ConfigError, match=r"no token for a part of prompt 'train/0'"):
        policy.chat_template(subject(encoder=made))


def test_stop_tokens_beyond_the_output_layer(tmp_path: Path) -> None:
    made = encoder()
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 9, "text_config": {"vocab_size": 3}}))
    assert policy.vocabulary_of(str(tmp_path)) == 3
    with pytest.raises(ConfigError, match="beyond the 3 tokens"):
        policy.stop_tokens(subject(encoder=made, policy=str(tmp_path)))
    (tmp_path / "config.json").unlink()
    assert policy.stop_tokens(subject(encoder=made, policy=str(tmp_path)))  # nothing says how large it is


def test_prompt_and_answer_have_positions(tmp_path: Path) -> None:
    cfg = Config()
    cfg.rollout.max_prompt_tokens, cfg.rollout.max_new_tokens = 60, 41
    one, file = subject(cfg=cfg, policy=str(tmp_path)), tmp_path / "config.json"
    with pytest.raises(Skip):
        policy.context(one)
    file.write_text(json.dumps({"max_position_embeddings": 999, "text_config": {"max_position_embeddings": 100}}))
    with pytest.raises(ConfigError, match="= 101 of 100 positions"):
        policy.context(one)
    for scaling in ({"factor": 2.0}, {"rope_type": "default"}, {"factor": None}):
        file.write_text(json.dumps({"max_position_embeddings": 60, "rope_parameters": scaling}))
        if scaling.get("factor"):
            assert policy.context(one).endswith("= 101 of 120 positions")
        else:
            with pytest.raises(ConfigError, match="of 60 positions"):
                policy.context(one)
    file.write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json is no JSON"):
        policy.context(one)


def test_a_processor_that_writes_other_counts_than_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    made = encoder()
    one = subject([SCENES[row] for row in range(12) if SCENES[row].images], encoder=made)
    right = made.encode(one.datasets["train"][0])
    marks = right[0][right[0] != made.image_token_id], right[1]
    monkeypatch.setattr(made, "encode", lambda prompt: (np.append(right[0], made.image_token_id), right[1]))
    with pytest.raises(ConfigError, match=r"5 picture tokens are in the prompt, 8 with .* counts 7 for .*\(32, 32\)"):
        policy.picture_tokens(one)
    monkeypatch.setattr(made, "encode", lambda prompt: marks)
    with pytest.raises(ConfigError, match="made 0 picture tokens"):
        policy.picture_tokens(one)


# ---------------------------------------------------------------- the command


def small(folder: str) -> list[str]:
    return [
        *("model=huggingface", f"model.policy={folder}", "digits.train_size=50", "data.eval_size=20"),
        *("rollout.max_prompt_tokens=96", "rollout.max_new_tokens=64", "rollout.prompts_per_step=8"),
    ]


def test_every_check_of_a_good_setup_passes(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    found = doctor.examine(small(folder), False, Console(stderr=True))
    assert found is not None and [(one.name, one.status) for one in found] == [
        ("settings", "pass"),
        *((check.name, "pass") for check in CHECKS),
    ], found
    console = Console(record=True, width=100, file=io.StringIO())
    console.print(doctor.table_of([*found, doctor.Finding("x [b]", "fail", "[red]said", "do [i]this")]))
    text = console.export_text()
    assert "stop tokens" in text and "[red]said" in text and "what helps: do [i]this" in text


def test_the_command_tells_and_exits_1(folder: str, tmp_path: Path) -> None:
    broken = tmp_path / "policy"
    shutil.copytree(folder, broken)
    (broken / "chat_template.jinja").unlink()
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-m", "skyrl.doctor", "--json", *arguments]
        return subprocess.run(words, capture_output=True, text=True, timeout=240, env=environment)

    done = command(*small(str(broken)))
    found = {one["name"]: one for one in json.loads(done.stdout)}
    assert done.returncode == 1 and found["chat template"]["status"] == "fail", done.stderr
    assert "chat_template.jinja" in found["chat template"]["remedy"] and found["verifiers"]["status"] == "pass"
    done = command("rollout.nonsense=3")
    assert done.returncode == 1 and "rollout.nonsense" in json.loads(done.stdout)[0]["said"]


def test_what_an_engine_and_a_learner_say(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config(tmp_path / "run", steps=1)
    cfg.model.policy = folder
    one = Subject(cfg, folder, rows=4)
    with start_system(cfg, folder, None, LocalExecutor()) as system:
        checks = doctor.full_checks(system)
        assert [found.status for found in run_checks(one, checks)] == ["pass", "pass"]
        real, called = doctor.logprobs_at, list[int]()

        def depends_on_neighbours(learner: Any, groups: Any, tokens: int) -> list[np.ndarray]:
            called.append(tokens)
            return [values + 0.01 * (tokens > 1) for values in real(learner, groups, tokens)]

        monkeypatch.setattr(doctor, "logprobs_at", depends_on_neighbours)
        with pytest.raises(SyncError, match=r"one by one and together differ by up to 0\.01 nats"):
            checks[1].look(one)
        assert called == [1, cfg.learner.micro_batch_tokens]
        monkeypatch.setattr(system.syncer, "_send", lambda version, base: (0.0, system.rollouts.ask(Sampler.probe)))
        system.rollouts.members[0].build().engine.model.get_output_embeddings().weight.data += 0.5 * torch.randn(1)
        system.rollouts.members[0].build().engine.model.get_output_embeddings().weight.data *= 2
        with pytest.raises(SkyrlError, match="differ in log-probability"):
            checks[0].look(one)
