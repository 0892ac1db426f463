"""Console, file and Weights & Biases."""

from __future__ import annotations

import io
import json
import logging
import math
import re
import sys
import threading
import time
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from skyrl.monitoring.metrics import METRICS, MetricError, MetricInfo
from skyrl.monitoring.records import jsonable, read_metrics
from skyrl.monitoring.sinks import (
    ConsoleSink,
    JsonlSink,
    RayGaugeSink,
    Sinks,
    TensorboardSink,
    WandbSink,
    check_tensorboard,
    wandb_mode,
)
from skyrl.records import ConfigError, DataError, Event
from skyrl.settings import Config, WandbMode

STEP = {
    "reward/total": 0.712,
    "reward/rule": 0.5,
    "reward/format": 1.0,
    "reward/accuracy": 0.5,
    "buffer/effective_share_fresh": 0.31,
    "buffer/effective_share": 0.5,
    "buffer/size": 812.0,
    "hallucination/rate": 0.22,
    "throughput/samples_per_second": 240.0,
    "time/rollout": 1.25,
    "time/learner": 2.0,
    "time/step": 3.5,
}


class Recorder:
    """Remembers its calls; may fail on closing."""

    def __init__(self, fails: bool = False) -> None:
        self.calls: list[tuple[int, dict[str, float]]] = []
        self.closed = False
        self.fails = fails

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.calls.append((step, metrics))

    def close(self) -> None:
        self.closed = True
        if self.fails:
            raise OSError("disk full")


def test_fan_out_checks_names_and_closes_all() -> None:
    first, second = Recorder(fails=True), Recorder()
    sinks = Sinks([first, second])
    sinks.log(1, {"loss/total": 1.0})
    assert first.calls == second.calls == [(1, {"loss/total": 1.0})]
    with pytest.raises(MetricError):
        sinks.log(2, {"loss/nonsense": 1.0})
    assert len(first.calls) == 1
    own = Sinks([second], METRICS | {"loss/nonsense": MetricInfo("-", "A term of one's own.")})
    own.log(2, {"loss/nonsense": 1.0, "eval/accuracy/sum": 0.5})
    assert second.calls[1:] == [(2, {"loss/nonsense": 1.0, "eval/accuracy/sum": 0.5})]
    with pytest.raises(OSError, match="disk full"):
        sinks.close()
    assert first.closed and second.closed


def test_jsonl_writes_flushed_lines_without_nan(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    sink = JsonlSink(path)
    sink.log(1, {"reward/model": float("nan"), "loss/total": float("inf"), "reward/rule": 0.5})  # a broken monitor's
    # Read before closing: a killed process must have lost nothing.
    assert json.loads(path.read_text()) == {"step": 1, "reward/model": None, "loss/total": None, "reward/rule": 0.5}
    sink.close()


def test_jsonl_resumes(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path)
    for step in range(5):
        sink.log(step, {"loss/total": float(step)})
    sink.close()
    with path.open("a") as file:
        file.write('{"step": 5, "loss/to')  # killed in the middle of a line
    sink = JsonlSink(path, resume_step=2)
    sink.log(3, {"loss/total": 30.0})
    sink.close()
    assert [(r["step"], r["loss/total"]) for r in read_metrics(path)] == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 30.0)]


def test_jsonl_starts_anew_without_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 9}\n')
    JsonlSink(path).close()
    assert path.read_text() == ""


def test_jsonl_resumes_without_a_file(tmp_path: Path) -> None:
    JsonlSink(tmp_path / "metrics.jsonl", resume_step=4).close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_read_metrics_merges_a_step_and_names_broken_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": 1}\n{"step": 0, "a": 0}\n{"step": 1, "b": 2}\n')
    assert read_metrics(path) == [{"step": 0, "a": 0}, {"step": 1, "a": 1, "b": 2}]
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(DataError, match="line 2"):
        read_metrics(path)
    path.write_text('{"a": 1}\n{"step": 2}\n')
    with pytest.raises(DataError, match="line 1"):
        read_metrics(path)


def test_jsonable() -> None:
    assert jsonable({"a": np.float32(0.5), "b": (1, True), "c": WandbMode.auto, "d": Path("x"), 3: float("-inf")}) == {
        "a": 0.5,
        "b": [1, True],
        "c": "auto",
        "d": "x",
        "3": None,
    }
    with pytest.raises(DataError, match="object"):
        jsonable(object())
    with pytest.raises(DataError, match="numbers, text, lists"):
        jsonable({"a": [np.zeros(2)]})
    settings = Config()
    settings.learner.max_grad_norm = math.inf
    text = json.dumps(jsonable(settings))
    assert json.loads(text)["learner"]["max_grad_norm"] is None and "Infinity" not in text


def test_console_prints_one_plain_line_per_step() -> None:
    file = io.StringIO()
    sink = ConsoleSink(steps=70, console=Console(file=file, width=80))
    sink.log(0, {"eval/accuracy": 0.5, "eval/hallucination": 0.25})
    sink.log(1, STEP)
    sink.close()
    first, second = file.getvalue().splitlines()
    assert first == "step 0/70 | evaluation: accuracy 50.0% | hallucination 25.0%"
    assert second.startswith("step 1/70 | reward 0.712 (rule 0.5, format 1) | accuracy 50.0%")
    assert "effective 31.0% → 50.0%" in second and "SSB 812" in second and "rollout 1.2, learner 2.0" in second
    assert "\x1b" not in file.getvalue()


def test_console_shows_a_table_on_a_terminal() -> None:
    file = io.StringIO()
    sink = ConsoleSink(steps=4, console=Console(file=file, width=100, force_terminal=True, color_system=None))
    sink.log(1, STEP)
    sink.log(2, {**STEP, "reward/rule": 0.75})
    sink.close()
    shown = file.getvalue()
    for text in ("step 2/4", "75.0%", "effective share, with SSB", "left", "rollout 1.2"):
        assert text in shown
    assert re.search(r"rule +50\.0% +75\.0%", shown)  # first and now


def logged_out(monkeypatch: pytest.MonkeyPatch, **environment: str) -> None:
    """Nothing of this machine's own wandb settings, only these variables."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, WandbMode.offline),
        ({"WANDB_API_KEY": "x"}, WandbMode.online),
        ({"WANDB_API_KEY": "x", "WANDB_MODE": "offline"}, WandbMode.offline),
        ({"WANDB_MODE": "disabled"}, WandbMode.off),
    ],
)
def test_wandb_auto_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: WandbMode
) -> None:
    logged_out(monkeypatch, NETRC=str(tmp_path / "netrc"), **environment)
    assert wandb_mode(WandbMode.auto) is expected
    assert wandb_mode(WandbMode.offline) is WandbMode.offline


def test_wandb_reads_netrc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "netrc"
    file.write_text("machine api.wandb.ai\n  login user\n  password " + "0" * 40 + "\n")
    file.chmod(0o600)
    logged_out(monkeypatch, NETRC=str(file))
    assert wandb_mode(WandbMode.auto) is WandbMode.online
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert wandb_mode(WandbMode.auto) is WandbMode.offline


def test_wandb_refuses_off(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="off"):
        WandbSink(tmp_path, project="p", name="n", mode=WandbMode.off)


def test_wandb_online_without_network_becomes_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No server listens at this address: the run must go on, in the run folder."""
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    with caplog.at_level(logging.WARNING):
        config = {"lr": 1e-3, "mode": WandbMode.auto}
        sink = WandbSink(tmp_path, project="p", name="n", mode=WandbMode.auto, config=config, timeout=10.0)
    sink.log(1, {"reward/rule": 0.5, "grpo/ratio_max": float("inf")})
    sink.close()
    sink.log(2, {"reward/rule": 0.5})  # after closing: nothing happens
    assert "no online Weights & Biases run" in caplog.text
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    end = time.monotonic() + 30
    while b"reward/rule" not in file.read_bytes():  # wandb's own process writes it, and may still be at it
        assert time.monotonic() < end
        time.sleep(0.05)


class Writer:
    """Stands for tensorboardX's, of one folder: what TensorBoard would show of all its files. As there, starting with
    ``purge_step`` hides what was written of that step and of later ones."""

    shown: list[tuple[int, str, float]]

    def __init__(self, logdir: str, max_queue: int, purge_step: int | None = None) -> None:
        assert Path(logdir).name == "tensorboard" and max_queue == 0
        self.full, self.left = threading.Event(), list[str]()
        queue = SimpleNamespace(cancel_join_thread=lambda: self.left.append("left"))
        self.file_writer = SimpleNamespace(event_writer=SimpleNamespace(_event_queue=queue))
        threading.Thread(target=self.full.wait, daemon=True).start()
        if purge_step is not None:
            Writer.shown = [one for one in Writer.shown if one[0] < purge_step]

    def add_scalar(self, name: str, value: float, step: int) -> None:
        Writer.shown.append((step, name, value))

    def close(self) -> None:
        """As there, it would wait for ever for a thread that has died."""
        assert not self.full.is_set()
        self.full.set()


@pytest.fixture
def tensorboard(monkeypatch: pytest.MonkeyPatch) -> type[Writer]:
    module: Any = ModuleType("tensorboardX")
    module.SummaryWriter, module.__spec__ = Writer, ModuleSpec("tensorboardX", None)
    monkeypatch.setitem(sys.modules, "tensorboardX", module)
    Writer.shown = []
    return Writer


def test_tensorboard_resumes_with_one_value_a_step(tmp_path: Path, tensorboard: type[Writer]) -> None:
    """A run that goes on from step 2 logs that step's sync again, and the steps behind it."""
    check_tensorboard(True)
    file, sink = JsonlSink(tmp_path / "metrics.jsonl"), TensorboardSink(tmp_path)
    for step in range(5):
        for metrics in ({"sync/seconds": 1.0}, {"loss/total": float(step), "time/step": 3.0}):
            file.log(step, metrics)
            sink.log(step, metrics)
    sink.close()
    assert len(Writer.shown) == 15
    file = JsonlSink(tmp_path / "metrics.jsonl", resume_step=2)
    sink = TensorboardSink(tmp_path, 2, read_metrics(tmp_path / "metrics.jsonl"))
    sink.log(2, {"sync/seconds": 9.0})
    sink.log(3, {"loss/total": 30.0})
    sink.close()
    assert len({(step, name) for step, name, _ in Writer.shown}) == len(Writer.shown)
    shown = {(step, name): value for step, name, value in Writer.shown if step >= 2}
    assert shown == {(2, "sync/seconds"): 9.0, (2, "loss/total"): 2.0, (2, "time/step"): 3.0, (3, "loss/total"): 30.0}


def test_tensorboard_goes_back_with_the_run(tmp_path: Path, tensorboard: type[Writer]) -> None:
    sink = TensorboardSink(tmp_path)
    for step in range(4):
        sink.log(step, {"loss/total": float(step)})
    sink.rewind(1)
    sink.log(2, {"loss/total": 20.0})
    sink.close()
    assert Writer.shown == [(0, "loss/total", 0.0), (1, "loss/total", 1.0), (2, "loss/total", 20.0)]


def test_tensorboard_whose_writer_died_of_a_full_disk_holds_up_nothing(
    tmp_path: Path, tensorboard: type[Writer], caplog: pytest.LogCaptureFixture
) -> None:
    sink = TensorboardSink(tmp_path)
    sink.log(1, {"loss/total": 1.0})
    writer = sink._writer
    writer.full.set()
    for thread in sink._threads:
        thread.join()
    with caplog.at_level(logging.WARNING):
        sink.log(2, {"loss/total": 2.0})
        sink.log(3, {"loss/total": 3.0})
        sink.close()
    assert Writer.shown == [(1, "loss/total", 1.0)] and writer.left == ["left"]
    assert caplog.text.count(f"nothing more is written to {tmp_path / 'tensorboard'}: its disk is full") == 1


def test_tensorboard_that_is_resumed_and_stopped_at_once_loses_nothing(
    tmp_path: Path, tensorboard: type[Writer]
) -> None:
    TensorboardSink(tmp_path, 1, [{"step": 0, "loss/total": 0.0}, {"step": 1, "loss/total": 1.0, "x": None}]).close()
    assert Writer.shown == [(1, "loss/total", 1.0)]


def test_tensorboard_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skyrl.monitoring.sinks.find_spec", lambda name: None)
    check_tensorboard(False)
    with pytest.raises(ConfigError, match=r"^monitoring\.tensorboard=True: .*pip install tensorboardX$"):
        check_tensorboard(True)


def test_gauges_follow_the_numbers_and_count_the_alarms_that_are_on(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: dict[str, float] = {}

    class Gauge:
        def __init__(self, name: str, tag_keys: tuple[str, ...]) -> None:
            self.name = name

        def set(self, value: float, tags: dict[str, str]) -> None:
            shown[self.name] = value

    monkeypatch.setitem(sys.modules, "ray.util.metrics", ModuleType("ray.util.metrics"))
    sys.modules["ray.util.metrics"].Gauge = Gauge  # type: ignore[attr-defined]
    sink = RayGaugeSink("tiny/first")
    sink.log(3, {"reward/rule/close-by": 0.5})
    assert shown == {"skyrl_step": 3.0, "skyrl_alarms": 0.0, "skyrl_reward_rule_close_by": 0.5}
    for kind, member, on in (("alarm", "a", 1), ("alarm", "b", 2), ("alarm", "a", 2), ("alarm over", "a", 1)):
        sink.event(Event(0.0, 3, kind, member, ""))
        assert shown["skyrl_alarms"] == on
    sink.event(Event(0.0, 3, "replaced", "rollout-0", ""))
    sink.log(4, {})
    assert shown["skyrl_alarms"] == 1 and shown["skyrl_step"] == 4
