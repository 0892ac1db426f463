"""The command itself: a run that is interrupted and goes on to its end, and what it leaves behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from .conftest import TINY

pytestmark = pytest.mark.integration
ROOT = Path(__file__).parents[2]


def command(folder: Path, cache: Path, *overrides: str) -> list[str]:
    settings = [f"digits.{name}={value}" for name, value in TINY.items()]
    small = [
        *("experiment=smoke", "controller.steps=2", "rollout.prompts_per_step=4", "rollout.samples_per_prompt=4"),
        *("data.eval_size=8", "digits.text_share=0.3", "cluster.dashboard=false", f"digits.cache_dir={cache}"),
    ]
    return [sys.executable, "-m", "skyrl.launch", *small, *settings, f"run_dir={folder}/smoke/first", *overrides]


def processes_of(marker: str) -> list[psutil.Process]:
    """Living processes, Ray's included, whose environment carries ``marker``."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("SKYRL_TEST_MARKER") == marker and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def assert_none_left(marker: str) -> None:
    deadline = time.monotonic() + 30
    while processes_of(marker) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert [process.cmdline()[:3] for process in processes_of(marker)] == []


def start(command: list[str], marker: str, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        cwd=folder,
        env=os.environ | {"SKYRL_TEST_MARKER": marker, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A test run in the background of a plain shell ignores SIGINT, and its children would, too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def interrupt(process: subprocess.Popen[str], run: Path, how: signal.Signals) -> int:
    """Send ``how`` when the first checkpoint is there; the number of the last checkpoint that was written."""
    deadline = time.monotonic() + 240
    try:
        while not list(run.glob("checkpoints/step_*/COMPLETE.json")) and time.monotonic() < deadline:
            assert process.poll() is None, process.stdout and process.stdout.read()
            time.sleep(0.1)
        process.send_signal(how)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, output[-2000:]
    assert "resume=auto" in output
    newest = max(path.parent.name for path in run.glob("checkpoints/step_*/COMPLETE.json"))
    return int(newest.removeprefix("step_"))


def test_an_interrupted_run_is_resumed_and_writes_everything_it_promises(model_cache: Path, tmp_path: Path) -> None:
    marker, run = f"whole-{os.getpid()}", tmp_path / "smoke" / "first"
    endless = ("controller.steps=500", "checkpoint.every=1", "checkpoint.export=false")
    step = interrupt(start(command(tmp_path, model_cache, *endless), marker, tmp_path), run, signal.SIGINT)
    assert_none_left(marker)
    assert not (run / "summary.json").exists() and not (run / "policy").exists()

    rest = (f"controller.steps={step + 1}", "resume=auto", "monitoring.wandb=offline")
    with start(command(tmp_path, model_cache, *rest), marker, tmp_path) as process:
        output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-3000:]
    assert_none_left(marker)
    assert "resuming from" in output
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == step + 1
    assert summary["sync_logprob_gap_max"] < 1e-4
    assert summary["config"]["rollout"]["prompts_per_step"] == 4
    for key in ("accuracy_before", "accuracy_after", "hallucination_before", "hallucination_after", "effective_share"):
        assert 0 <= summary[key] <= 1, key
    assert {"ray", "torch", "transformers", "deepspeed"} <= set(summary["versions"])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {line["step"] for line in lines} == set(range(step + 2))
    assert [line["step"] for line in lines if "loss/total" in line] == list(range(1, step + 2))
    assert "<svg" in (run / "report.html").read_text()
    assert list((run / "wandb").glob("offline-run-*"))
    assert str(run / "report.html") in output.replace("\n", "")
    _exported_policy_serves(run / "policy")


def _exported_policy_serves(folder: Path) -> None:
    """The exported folder loads in transformers and is itself a legal ``model.policy``."""
    import torch

    from skyrl.digits.scenes import DigitScenes
    from skyrl.policy.encode import PromptEncoder
    from skyrl.policy.module import load_policy

    model, encoder = load_policy(str(folder), "float32"), PromptEncoder.from_pretrained(str(folder))
    prompt, answer = DigitScenes("eval", 4, 0.0, 0).with_reasoning(0)
    ids = torch.tensor([encoder.tokenizer(answer)["input_ids"]], dtype=torch.int32)[0].numpy()
    batch = encoder.collate([(prompt, encoder.encode(prompt)[0], ids)])
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **batch.pictures).logits
    assert torch.isfinite(logits).all()


def test_a_terminated_run_ends_as_an_interrupted_one(model_cache: Path, tmp_path: Path) -> None:
    """Only the signal is another one, and what it stops is the same: stand-ins take the place of the engine and the
    training library, which take long to start."""
    plain = ("rollout.engine=tests.plain_engine:PlainEngine", "learner.backend=tests.plain_backend:PlainBackend")
    endless = ("controller.steps=500", "checkpoint.every=1", "checkpoint.export=false", "evaluation.every=0")
    marker, run = f"cut-{os.getpid()}", tmp_path / "smoke" / "first"
    assert interrupt(start(command(tmp_path, model_cache, *endless, *plain), marker, tmp_path), run, signal.SIGTERM)
    assert_none_left(marker)
