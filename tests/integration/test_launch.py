"""The command itself: a whole run, an interrupted one, and what they leave behind."""

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


def test_a_run_writes_everything_it_promises_and_leaves_no_process(model_cache: Path, tmp_path: Path) -> None:
    marker = f"whole-{os.getpid()}"
    done = subprocess.run(
        command(tmp_path, model_cache, "monitoring.wandb=offline"),
        cwd=tmp_path,
        env=os.environ | {"SKYRL_TEST_MARKER": marker},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert_none_left(marker)
    run = tmp_path / "smoke" / "first"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 2
    assert summary["sync_logprob_gap_max"] < 1e-4
    assert summary["config"]["rollout"]["prompts_per_step"] == 4
    for key in ("accuracy_before", "accuracy_after", "hallucination_before", "hallucination_after", "effective_share"):
        assert 0 <= summary[key] <= 1, key
    assert {"ray", "torch", "transformers", "deepspeed"} <= set(summary["versions"])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {line["step"] for line in lines} == {0, 1, 2}
    assert "<svg" in (run / "report.html").read_text()
    assert list((run / "wandb").glob("offline-run-*"))
    assert str(run / "report.html") in done.stdout.replace("\n", "")
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


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "terminate"])
def test_an_interrupted_run_ends_cleanly_and_can_be_resumed(
    model_cache: Path, tmp_path: Path, how: signal.Signals
) -> None:
    marker = f"cut-{os.getpid()}"
    with subprocess.Popen(
        command(tmp_path, model_cache, "controller.steps=500", "checkpoint.every=1", "checkpoint.export=false"),
        cwd=tmp_path,
        env=os.environ | {"SKYRL_TEST_MARKER": marker},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A test run in the background of a plain shell ignores SIGINT, and its children would, too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        checkpoints = tmp_path / "smoke" / "first" / "checkpoints"
        deadline = time.monotonic() + 240
        while not list(checkpoints.glob("step_*/COMPLETE.json")) and time.monotonic() < deadline:
            assert process.poll() is None, process.stdout and process.stdout.read()
            time.sleep(0.2)
        process.send_signal(how)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output[-2000:]
    assert "resume=auto" in output
    assert_none_left(marker)
    if how is signal.SIGTERM:  # resuming is the same for both
        return
    step = int(max(p.parent.name for p in checkpoints.glob("step_*/COMPLETE.json")).removeprefix("step_"))
    more = subprocess.run(
        command(tmp_path, model_cache, f"controller.steps={step + 1}", "resume=auto"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert more.returncode == 0, more.stderr[-3000:]
    assert "resuming from" in more.stdout
    summary = json.loads((tmp_path / "smoke" / "first" / "summary.json").read_text())
    assert summary["steps"] == step + 1
    lines = [json.loads(line) for line in (tmp_path / "smoke" / "first" / "metrics.jsonl").read_text().splitlines()]
    trained = [line["step"] for line in lines if "loss/total" in line]
    assert trained == list(range(1, step + 2))
