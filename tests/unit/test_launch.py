"""The command line: composition, refusals that name the key, fast and before heavy imports, and how a command ends."""

from __future__ import annotations

import json
import logging
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from skyrl.cli import CONF, compose_config, read_settings, run_command
from skyrl.crew.placement import check_resources
from skyrl.launch import _resume_command
from skyrl.monitoring.model_card import SAID
from skyrl.records import ConfigError, DataError
from skyrl.settings import Config, PairSource, Squash, ThresholdKind, Trainable, all_settings, validate


def run(*arguments: str, module: str = "skyrl.launch") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, *arguments], capture_output=True, text=True, timeout=60, check=False
    )


def refusal(*overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        compose_config(overrides)
    return str(caught.value).splitlines()


@pytest.fixture
def own(tmp_path: Path) -> list[str]:
    """The files of somebody's own model and data."""
    (tmp_path / "model").mkdir()
    classifier = {"architectures": ["LlamaForSequenceClassification"], "num_labels": 1}  # it is the reward model, too
    (tmp_path / "model" / "config.json").write_text(json.dumps(classifier))
    (tmp_path / "rows.parquet").touch()
    data = [f"data.{name}_path={tmp_path}/rows.parquet" for name in ("train", "eval")]
    return [f"model.policy={tmp_path}/model", *data, "data=files"]


def test_the_default_is_valid_and_equals_the_settings_own_but_for_the_run_folder_and_the_workers() -> None:
    """Models of one's own have one worker of each kind again; a model card's command says what files change."""
    cfg = compose_config([])
    assert cfg.run_dir.startswith("outputs/digits/")
    cfg.run_dir = ""
    given, own = cfg.model_dump(mode="json"), Config().model_dump(mode="json")
    changed = [f"{group}.{key}" for group in given if isinstance(given[group], dict)
               for key in given[group] if given[group][key] != own[group][key]]  # fmt: skip
    assert sorted(changed) == sorted(SAID)
    cfg.rollout.num_workers -= 1
    cfg.reward.num_workers -= 1
    assert cfg == Config()
    own = compose_config(["model=huggingface", "model.policy=/own"], with_files=False)
    assert own.rollout.num_workers == own.reward.num_workers == 1
    assert compose_config(["experiment=gpu_smoke"]).rollout.num_workers == 1


def test_overrides_groups_and_enums() -> None:
    cfg = compose_config(["reward=paper_sum", "learner.trainable=adapter", "buffer=off", "controller.steps=3"])
    assert cfg.reward.squash is Squash.none and cfg.reward.model_weight == 1.0
    assert cfg.learner.trainable is Trainable.adapter
    assert not cfg.buffer.enabled and cfg.controller.steps == 3
    cfg = compose_config(
        [
            *("+controller.steps=4", "++name=2026", "learner.betas=[0,0.5]", "learner.max_grad_norm=inf"),
            "model.chat_template_kwargs.enable_thinking=false",
            "algorithm.terms=[{path:a.b:C,weight:0.5,settings:{limit:3}}]",
        ]
    )
    assert cfg.controller.steps == 4 and cfg.name == "2026" and cfg.learner.betas == (0.0, 0.5)
    assert cfg.model.chat_template_kwargs == {"enable_thinking": False}
    assert cfg.algorithm.terms[0].settings == {"limit": 3} and cfg.algorithm.weights(1)["a.b:C"] == 0.5


@pytest.mark.parametrize("option", sorted(p for p in CONF.rglob("*.yaml") if p.parent != CONF), ids=lambda p: p.stem)
def test_every_option_composes_and_is_valid(option: Path, own: list[str]) -> None:
    extra = list[str]()
    if option.stem.startswith("huggingface") or option.stem in ("r1v2_38b", "files", "smollm2"):
        extra = own if option.stem != "files" else [*own, "model=huggingface"]
    if option.stem in ("huggingface_with_reward", "r1v2_38b"):
        extra = [*extra, own[0].replace("model.policy", "model.reward")]
    if option.parent.name == "rollout" and option.stem == "gpu":
        extra = ["learner=gpu_zero3", "rollout.max_prompt_tokens=96", "rollout.max_new_tokens=64"]
    if option.stem == "gpu_zero3":
        extra = ["rollout=gpu", "rollout.max_prompt_tokens=96", "rollout.max_new_tokens=64"]
    validate(compose_config([f"{option.parent.name}={option.stem}", *extra]))


def test_gpu_smoke_fits_one_gpu_and_says_how_to_use_two() -> None:
    one, two = ([{"Resources": {"CPU": 4.0, "GPU": gpus}}] for gpus in (1.0, 2.0))
    check_resources(compose_config(["experiment=gpu_smoke"]), one, with_learner=True)
    said = (CONF / "experiment" / "gpu_smoke.yaml").read_text().split("NCCL between them: ")[1].splitlines()[0]
    apart = compose_config(["experiment=gpu_smoke", *said.split()])
    check_resources(apart, two, with_learner=True)
    with pytest.raises(ConfigError, match="need 2 GPUs, the Ray cluster has 1"):
        check_resources(apart, one, with_learner=True)


def test_a_model_of_ones_own_works_as_the_readme_says(own: list[str]) -> None:
    cfg = compose_config(["model=huggingface", *own])
    assert cfg.model.reward is None and cfg.reward.model_weight == 0.0 and cfg.learner.lr == 1e-6
    assert cfg.algorithm.mpo.pairs is PairSource.rule and cfg.algorithm.mpo.threshold.kind is ThresholdKind.off
    cfg = compose_config(["model=huggingface_with_reward", own[0].replace("policy", "reward"), *own])
    assert cfg.reward.model_weight == 1.0 and cfg.algorithm.mpo.pairs is PairSource.reward_margin
    compose_config(["model=huggingface", *own, "rollout=gpu", "learner=gpu_zero3", "model.dtype=bfloat16"])
    assert refusal("model=huggingface")[0].startswith("model.policy=: must be digits, a Hugging Face folder")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "algorithm.grpo.wieght=1",
            "algorithm.grpo.wieght: there is no such setting; did you mean algorithm.grpo.weight",
        ),
        ("+rollout.max_promt_tokens=9", "rollout.max_promt_tokens: there is no such setting; did you mean rollout."),
        ("++bufer=off", "bufer: there is no such setting; did you mean buffer?"),
        ("buffer.mxi=0.3", "buffer.mxi: there is no such setting; did you mean buffer.mix?"),
        ("hydra.run.dir=x", "hydra.run.dir: there is no such setting"),
        ("hydra/launcher=basic", "hydra/launcher: there is no such setting"),
        ("learner.lr=fast", "learner.lr=fast: must be a number, above 0"),
        ("reward.squash=foo", "reward.squash=foo: must be one of none, sigmoid, tanh, group_standardise"),
        ("buffer=foo", "buffer=foo: must be one of off, ssb"),
        ("buffer=", "buffer=: must be one of off, ssb"),
        ("buffer=null", "buffer=null: must be one of off, ssb"),
        ("controller=3", "controller=3: must be a group of settings"),
        ("run_dir=", "run_dir=: must be a folder"),
        ("name=../../x", "name=../../x: must be a name of a folder"),
        ("name=${foo}", "name: Interpolation key 'foo' not found"),
        ("controller.steps=1,2", "controller.steps=1,2: one command is one run"),
        ("name=choice(a,b)", "name=choice(a,b): one command is one run"),
        ("word", "word: must be key=value or group=option"),
        ("", "'': must be key=value or group=option"),
        ("=3", "=3: must be key=value or group=option"),
        ("~buffer", "~buffer: must be key=value or group=option"),
        ("~controller.steps=40", "~controller.steps=40: must be key=value or group=option"),
        ("name=a=b", "name=a=b: this value can't be read"),
        ("a b=3", "a b=3: this value can't be read"),
    ],
)
def test_a_mistake_is_named_with_its_mend(override: str, message: str) -> None:
    assert refusal(override)[0].startswith(message)


@pytest.mark.parametrize(
    "value", ["a=b", "(x", "a)", "[a", "~/a", "übung", "日本", "a#b", "a;b", "a'b", "a{b", 'a"b=', "a\\b="]
)
def test_the_advice_on_quoting_works(value: str) -> None:
    """What the message says to type is read as the value that was meant."""
    (message,) = refusal(f"monitoring.wandb_project={value}")
    (advice,) = shlex.split(message.rpartition(": ")[2])
    assert compose_config([advice]).monitoring.wandb_project == value


def test_all_mistakes_come_at_once() -> None:
    found = refusal(
        "learner.lr=fast", "+a.b=1", "controller.seed=-1", "rollout.prompts_per_step=7", "rollout.num_workers=2"
    )
    assert sorted(line.split(":")[0] for line in found) == [
        "a",
        "controller.seed=-1",
        "learner.lr=fast",
        "rollout.prompts_per_step=7 with rollout.num_workers=2",
    ]
    assert [line.split(":")[0] for line in refusal("word", "buffer=foo", "name=a=b")] == [
        "word",
        "buffer=foo",
        "name=a=b",
    ]


def test_files_in_a_folder_of_ones_own(tmp_path: Path) -> None:
    folder = tmp_path / "my=conf"
    (folder / "experiment").mkdir(parents=True)
    (folder / "buffer").mkdir()
    mine = folder / "experiment" / "mine.yaml"
    mine.write_text("# @package _global_\ndefaults:\n  - override /buffer: tiny\nname: mine\nrun_dir: /r\n")
    (folder / "buffer" / "tiny.yaml").write_text("capacity: 8\n")
    cfg = compose_config(["experiment=mine"], folder)
    assert (cfg.name, cfg.run_dir, cfg.buffer.capacity) == ("mine", "/r", 8)
    mine.write_text("# @package _global_\ncontroller:\n  step: 3\nmonitoring:\n  wandb: off\n")
    with pytest.raises(ConfigError) as caught:
        compose_config(["experiment=mine"], folder)
    first, second = sorted(str(caught.value).splitlines())
    assert first.startswith("controller.step: there is no such setting; did you mean controller.steps")
    assert second.startswith("monitoring.wandb=false: must be one of auto, online, offline, off; in YAML")
    for text, words in (
        ("defaults:\n  - override /buffer: huge\n", "buffer/huge"),
        ("name: [\n", "mine.yaml"),
        ("3\n", "Invalid loaded object"),
    ):
        mine.write_text(f"# @package _global_\n{text}")
        with pytest.raises(ConfigError, match=words):
            compose_config(["experiment=mine"], folder)
    with pytest.raises(ConfigError, match="there is no such folder"):
        compose_config([], tmp_path / "none")


@pytest.mark.parametrize("module", ["skyrl.launch", "skyrl.filter_prompts"])
def test_a_refusal_is_quick_and_imports_nothing_heavy(module: str) -> None:
    started = time.monotonic()
    done = run("rollout.samples_per_prompt=1", "word=", module=module)
    seconds = time.monotonic() - started
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("wrong settings:\n") and len(done.stderr.splitlines()) == 3
    assert "\nrollout.samples_per_prompt=1: must be a whole number, 2 or more\n" in done.stderr
    assert "Traceback" not in done.stderr
    assert seconds < 20  # about 1 s on an idle machine; this only notices a heavy import on a busy one
    code = f"import sys, {module}; print([m for m in ('torch', 'ray', 'vllm', 'deepspeed') if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_help_and_cfg_job_are_readable(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    shown = run("--help", "nonsense")
    assert shown.returncode == 0
    assert "buffer: off, ssb" in shown.stdout and "resume=auto" in shown.stdout and "--config-dir DIR" in shown.stdout
    assert read_settings(["--cfg", "job", "controller.steps=7"], "") is None
    settings = capsys.readouterr().out
    assert "  steps: 7\n" in settings
    # It is a file of settings itself; the run folder's date is that of the run.
    assert "run_dir: outputs/${name}/${now:" in settings
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "same.yaml").write_text(f"# @package _global_\n{settings}")
    same = compose_config(["experiment=same"], tmp_path)
    assert same.controller.steps == 7 and same.name == "digits" and len(all_settings()) > 150


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--multirun", "controller.steps=1,2"], "--multirun: one command is one run"),
        (["-m"], "--multirun: one command is one run"),
        (["--foo"], "unrecognized arguments: --foo; allowed are key=value, group=option, --cfg job"),
        (["--cfg", "hydra"], "argument -c/--cfg: invalid choice: 'hydra'"),
        (["--config-dir"], "argument -cd/--config-dir: expected one argument"),
        (["--config-dir", "/no/such/folder"], "--config-dir /no/such/folder: there is no such folder"),
    ],
)
def test_wrong_options_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_settings(arguments, "")
    assert str(caught.value).startswith(message)


def test_options_may_stand_anywhere(tmp_path: Path) -> None:
    cfg = read_settings(["controller.steps=7", "--config-dir", str(tmp_path), "buffer=off"], "")
    assert cfg is not None and cfg.controller.steps == 7 and not cfg.buffer.enabled
    half = ["rollout=gpu", "rollout.max_prompt_tokens=96", "rollout.max_new_tokens=64"]
    assert read_settings(half, "", with_learner=False) is not None  # no learner, so its device does not matter
    with pytest.raises(ConfigError, match=r"learner\.device"):
        read_settings(half, "")


@pytest.fixture
def handlers() -> Iterator[None]:
    """Puts the process's own handlers back."""
    before = {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGHUP)}
    root = list(logging.root.handlers)
    yield
    for name, handler in before.items():
        signal.signal(name, handler)
    logging.root.handlers[:] = root


def raising(error: BaseException) -> Callable[[], None]:
    def work() -> None:
        raise error

    return work


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted; nothing was written"),
        (ConfigError("name=: must be …"), 2, "wrong settings:\nname=: must be …"),
        (DataError("row 3 is broken"), 1, "failed after 0 s: DataError: row 3 is broken"),
        (
            OSError(28, "No space left on device", "/full/checkpoint"),
            1,
            "failed after 0 s: OSError: [Errno 28] No space left on device: '/full/checkpoint'",
        ),
        (
            PermissionError(13, "Permission denied", "/read/only"),
            1,
            "failed after 0 s: PermissionError: [Errno 13] Permission denied: '/read/only'",
        ),
    ],
)
def test_how_a_command_ends(error: BaseException, code: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run_command(raising(error), "interrupted; nothing was written")
    assert caught.value.code == code
    shown = capsys.readouterr()
    assert shown.err == f"{message}\n" and shown.out == ""


@pytest.mark.usefixtures("handlers")
def test_a_fault_of_the_program_keeps_its_traceback() -> None:
    run_command(lambda: None, "")
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 // 0, "")


WAITS = """
import os, signal, sys, time
from skyrl.cli import run_command
{before}
def work():
    os.kill(os.getpid(), signal.{name})
    time.sleep(5)
    print("went on")
run_command(work, "interrupted; go on with: x")
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_signals_interrupt_a_command(name: str) -> None:
    # Whatever started the tests may ignore a signal (nohup, &), and a child inherits that.
    before = "signal.signal(signal.SIGINT, signal.default_int_handler); signal.signal(signal.SIGHUP, signal.SIG_DFL)"
    code = WAITS.format(name=name, before=before)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted; go on with: x\n")


def test_nohup_keeps_its_meaning() -> None:
    code = WAITS.format(name="SIGHUP", before="signal.signal(signal.SIGHUP, signal.SIG_IGN); time.sleep = lambda s: 0")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "went on\n")


def test_the_command_that_goes_on_repeats_all_settings() -> None:
    assert _resume_command(["name=x", "resume=no", "algorithm=grpo", "digits.kinds=[max,min]"]) == (
        f"{sys.executable} -m skyrl.launch name=x algorithm=grpo 'digits.kinds=[max,min]' resume=auto"
    )
