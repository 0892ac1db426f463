"""Secrets are planted in settings, environment, files and errors; nothing that a run writes or prints holds them."""

from __future__ import annotations

import html
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from urllib.parse import quote

import pyarrow.parquet as pq
import pytest
from test_add_something import Brevity, BrevitySettings
from tiny_runs import config, policy_folder

from skyrl.cli import run_command
from skyrl.crew.local_executor import LocalExecutor
from skyrl.monitoring.events import EVENTS, EventSink
from skyrl.monitoring.records import jsonable, write_json
from skyrl.records import Event, SkyrlError
from skyrl.redaction import HIDDEN, RedactingFormatter, hide_variables, redact, redacted
from skyrl.rewards.judging import Part, rule_score
from skyrl.rewards.runner import Verdict
from skyrl.run import run
from skyrl.settings import WandbMode
from skyrl.settings.algorithm import OwnTerm

PLANTED = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "HF_TOKEN": "hf_PlantedPlantedPlantedPlanted",
    "RAY_AUTH_TOKEN": "ray-planted-token-5f2e",
    "AWS_ACCESS_KEY_ID": "AKIAPLANTEDPLANTED00",
    "AWS_SECRET_ACCESS_KEY": "aws/planted+secret==",
    "MY_SECRET": 'quotes"and<angles>&\\slashes',
    "DB_PASSWORD": "correct-horse-battery",
    "JUDGE": "named-by-a-setting-only",
}
IN_FILES = {"hub": "hf_fromTheFileOfTheHub00", "ray": "from-the-file-of-ray", "netrc": "from-the-netrc-file"}


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """All secrets."""
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    home = tmp_path / "home"
    for name, text in (
        ("hub/token", IN_FILES["hub"] + "\n"),
        (".ray/auth_token", IN_FILES["ray"]),
        (".netrc", f"machine api.wandb.ai login user password {IN_FILES['netrc']}\n"),
    ):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(text)
        (home / name).chmod(0o600)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("HF_HOME", str(home / "hub"))
    monkeypatch.delenv("NETRC", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    monkeypatch.delenv("HF_TOKEN_PATH", raising=False)
    hide_variables(["JUDGE"])
    yield [*PLANTED.values(), *IN_FILES.values()]


def test_every_secret_goes_whatever_the_form(planted: list[str]) -> None:
    for secret in planted:
        for form in (secret, json.dumps(secret), html.escape(secret), quote(secret, safe="")):
            text = redact(f"before {form} after")
            assert text.replace('"', "") == f"before {HIDDEN} after", form


def test_what_is_no_secret_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHORT_KEY", "1")
    monkeypatch.setenv("USE_TOKEN", "true")
    monkeypatch.setenv("PLAIN_VARIABLE", "a value of some length")
    for text in ("true 1 a value of some length", "http://host:8000/path?q=a@b", "git@host:path", "a://b/c:d@e"):
        assert redact(text) == text


def test_passwords_in_addresses_and_texts_under_telling_names_go() -> None:
    assert redact("http://me:pa55@host/v1, ws://a:b@c") == f"http://{HIDDEN}@host/v1, ws://{HIDDEN}@c"
    told = {"api_key": "x", "judge": {"token": "y", "tokens": 3, "note": "z"}, "list": [{"password": "p"}]}
    kept = {"api_key": HIDDEN, "judge": {"token": HIDDEN, "tokens": 3, "note": "z"}, "list": [{"password": HIDDEN}]}
    assert redacted(told) == kept
    assert redacted({"key": None, "secret": "", "max_tokens": 5}) == {"key": None, "secret": "", "max_tokens": 5}


def test_files_events_logs_and_errors(
    planted: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = " ".join(planted)
    write_json(tmp_path / "x.json", {"a": whole, "b": [planted]})
    assert json.loads((tmp_path / "x.json").read_text())["b"] == [[HIDDEN] * len(planted)]
    sink = EventSink(tmp_path / EVENTS)
    sink.event(Event(0.0, 1, "replaced", "rollout-0", whole))
    sink.close()
    line = RedactingFormatter("%(message)s").format(logging.makeLogRecord({"msg": "%s", "args": (whole,)}))
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    for error in (SkyrlError(whole), OSError(whole)):

        def work(error: Exception = error) -> None:
            raise error

        with pytest.raises(SystemExit):
            run_command(work, "")
    sys.excepthook(ValueError, ValueError(whole), None)
    printed = capsys.readouterr().err
    assert printed.count(HIDDEN) == 3 * len(planted) and "ValueError" in printed
    texts = [(tmp_path / "x.json").read_text(), (tmp_path / EVENTS).read_text(), line, printed]
    assert [secret for secret in planted for text in texts if secret in text] == []


class KeyedSettings(BrevitySettings):
    api_key: str = ""
    """One that should be an environment variable."""


class Keyed(Brevity):
    """A term of a user's own that wants a key."""

    name = "keyed"
    Settings = KeyedSettings


ASKED = count()


def tells(parts: Sequence[Part]) -> Verdict:
    """Every third call of the verifier raises, with secrets in its message."""
    message = f"verifier 'numeric': 401 for {' '.join(PLANTED.values())}"
    return rule_score(parts) if next(ASKED) % 3 else Verdict(None, message)


def test_a_run_writes_no_secret(
    planted: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A whole run in this process, with secrets in its settings and a verifier that tells them; then every byte of its
    folder is looked at."""
    cfg = config(tmp_path / "run", steps=1)
    cfg.model.policy = policy_folder(tmp_path_factory.getbasetemp())
    cfg.monitoring.wandb, cfg.monitoring.wandb_project = WandbMode.offline, f"project-{PLANTED['HF_TOKEN']}"
    cfg.reward.judge.url = "http://me:pa55word-in-url@127.0.0.1:9/v1"
    cfg.reward.judge.api_key_env = "JUDGE"
    cfg.hallucination.phrases = [f"{PLANTED['DB_PASSWORD']}|{PLANTED['JUDGE']}|{IN_FILES['ray']}"]
    cfg.algorithm.terms = [OwnTerm(path="test_redaction:Keyed", settings={"api_key": "under-a-telling-name"})]
    monkeypatch.setattr("skyrl.rewards.rewarder.rule_score", tells)
    monkeypatch.setattr(sys, "argv", ["launch", "reward.judge.url=http://me:pa55word-in-url@127.0.0.1:9/v1", *planted])
    run(cfg, LocalExecutor())
    secrets = [*planted, "pa55word-in-url", "under-a-telling-name"]
    folder = tmp_path / "run"
    files = [file for file in folder.rglob("*") if file.is_file()]
    expected = {"config.json", "metrics.jsonl", "report.html", "summary.json", "steps_000001.json", "events.jsonl"}
    assert expected <= {file.name for file in files}
    assert any(file.suffix == ".wandb" for file in files)
    found = []
    for file in files:
        content = file.read_bytes()
        if file.suffix == ".parquet":  # compressed
            content = json.dumps(jsonable(pq.read_table(file).to_pylist()), ensure_ascii=False).encode()
        found += [(file.name, secret) for secret in secrets if secret.encode() in content]
    assert found == []
    assert HIDDEN in (folder / "config.json").read_text() and HIDDEN in (folder / "summary.json").read_text()
