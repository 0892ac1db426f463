"""The samples that a run keeps: what is written, when, and what is removed."""

from __future__ import annotations

import json
import logging
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from tiny_runs import config, policy_folder, run_loop

from skyrl.monitoring import samples
from skyrl.monitoring.samples import SCHEMA, SampleFiles, sample_files
from skyrl.records import Check, Prompt, RewardParts, Sample, SampleGroup, TrainItem
from skyrl.settings import Config, KeptSamples, MonitoringConfig

PICTURE = np.zeros((2, 2, 3), np.uint8)
IDS = np.zeros(3, np.int32)


def sample(index: int = 0, text: str = "<answer>1</answer>", version: int = 0, **more: Any) -> Sample:
    reward = more.pop("reward", RewardParts(1.0, 0.5, -0.25, 1.5, {"exact": 1.0}))
    return Sample(index, IDS, None, text, False, version, reward=reward, **more)


def group(*members: Sample, prompt: Prompt | None = None, checkable: bool = False) -> SampleGroup:
    return SampleGroup(prompt or Prompt("train/7", "Why?", (), "1", "exact", "sum"), IDS, list(members), checkable)


def files(cfg: Config) -> list[str]:
    return sorted(path.name for path in (Path(cfg.run_dir) / "samples").iterdir())


def rows(cfg: Config, name: str) -> list[dict[str, Any]]:
    return pq.read_table(Path(cfg.run_dir) / "samples" / name).to_pylist()


def make(folder: Path, kept: KeptSamples = KeptSamples.last, count: int = 3) -> Config:
    cfg = Config(run_dir=str(folder / "run"))
    cfg.monitoring.samples, cfg.monitoring.samples_kept = kept, count
    return cfg


def test_every_cell_of_a_step(tmp_path: Path) -> None:
    cfg = make(tmp_path)
    writer = SampleFiles(cfg)
    pictured = Prompt("train/8", "Which?", (PICTURE,), "2", "exact", "max", {"grid": [[2]]})
    checks = (Check("math", "3", 2.0), Check("format", "", 1.0))
    several = Prompt("train/9", "How?", (), "3", "math", "both", checks=checks)
    fresh = [
        group(
            sample(advantage=0.75, rule_advantage=1.25, version=4, answer="1"), sample(1, error="killed", reward=None)
        ),
        group(sample(claims=4, false_claims=3), prompt=pictured, checkable=True),
        group(sample(), prompt=several),
    ]
    old = TrainItem(pictured, IDS, sample(2, "old", version=1, claims=2), 0.5)
    writer.step(12, 5, fresh, [old])
    writer.wait()
    found = rows(cfg, "step_000012.parquet")
    assert found[0] == {
        "step": 12, "split": "train", "id": "train/7", "kind": "sum", "variant": "", "index": 0, "origin": "fresh",
        "version": 4, "age": 1, "question": "Why?", "truth": "1", "verifier": "exact", "text": "<answer>1</answer>",
        "answer": "1", "tokens": 3, "truncated": False, "rule": 1.0, "rules": '{"exact": 1.0}', "format": 0.5,
        "model": -0.25, "total": 1.5, "advantage": 0.75, "rule_advantage": 1.25, "claims": None, "false_claims": None,
        "error": None,
    }  # fmt: skip
    assert found[1]["error"] == "killed" and found[1]["rule"] is found[1]["total"] is found[1]["rules"] is None
    assert (found[2]["claims"], found[2]["false_claims"]) == (4, 3)
    assert (found[3]["truth"], found[3]["verifier"]) == ("3\n", "math, format")
    assert [found[4][name] for name in ("origin", "age", "text", "claims", "index")] == ["replayed", 4, "old", 2, 2]
    assert len(found) == 5 and list(found[0]) == SCHEMA.names


def test_an_evaluation_and_its_blind_side(tmp_path: Path) -> None:
    cfg = make(tmp_path)
    blind = Prompt("eval/1", "Which?", (), "2", "exact", "max", {"grid": [[2]]}, "blind")
    SampleFiles(cfg).evaluation(0, [group(sample(), prompt=Prompt("eval/1", "Which?", (PICTURE,), "2", "exact")), group(
        sample(), prompt=blind)])  # fmt: skip
    found = rows(cfg, "eval_000000.parquet")
    assert [(row["split"], row["variant"], row["claims"]) for row in found] == [
        ("eval", "", None),
        ("eval", "blind", None),
    ]


def test_only_the_last_stay_and_the_evaluation_before_training(tmp_path: Path) -> None:
    cfg = make(tmp_path, count=2)
    writer = SampleFiles(cfg)
    for step in range(6):
        if step:
            writer.step(step, step, [group(sample())], [])
        writer.wait()
        writer.evaluation(step, [group(sample())])
    assert files(cfg) == [f"eval_{k:06d}.parquet" for k in (0, 4, 5)] + [f"step_{k:06d}.parquet" for k in (4, 5)]


def test_all_stay_with_all_and_none_with_off(tmp_path: Path) -> None:
    cfg = make(tmp_path, KeptSamples.all, count=1)
    writer = SampleFiles(cfg)
    for step in (1, 2, 3):
        writer.step(step, 0, [group(sample())], [])
    writer.wait()
    assert len(files(cfg)) == 3
    off = make(tmp_path / "off", KeptSamples.off)
    for one in (off, Config()):  # without a run's folder there is nowhere to write
        SampleFiles(one).step(1, 0, [group(sample())], [])
        SampleFiles(one).evaluation(1, [group(sample())])
    assert not Path(off.run_dir).exists()


def test_a_step_done_again_replaces_its_file_and_later_ones(tmp_path: Path) -> None:
    cfg = make(tmp_path, KeptSamples.all)
    writer = SampleFiles(cfg)
    for step in (1, 2, 3, 4):
        writer.step(step, 0, [group(sample(text="first"))], [])
        writer.wait()
        writer.evaluation(step, [group(sample())])
    again = SampleFiles(cfg)
    again.step(2, 0, [group(sample(text="second"))], [])
    again.wait()
    assert files(cfg) == ["eval_000001.parquet", "eval_000002.parquet", "step_000001.parquet", "step_000002.parquet"]
    assert [row["text"] for row in rows(cfg, "step_000002.parquet")] == ["second"]
    assert [number for number, _ in sample_files(Path(cfg.run_dir) / "samples", "step")] == [1, 2]


def test_writing_does_not_hold_up_and_sees_no_later_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg, may_write, real = make(tmp_path), threading.Event(), samples.pq.write_table

    def slow(*args: Any, **kwargs: Any) -> None:
        assert may_write.wait(30)
        real(*args, **kwargs)

    monkeypatch.setattr(samples.pq, "write_table", slow)
    writer, one = SampleFiles(cfg), sample(advantage=1.0)
    writer.step(1, 0, [group(one)], [])  # returns, though nothing can be written yet
    one.advantage, one.text = 9.0, "changed"
    may_write.set()
    writer.wait()
    assert [(row["advantage"], row["text"]) for row in rows(cfg, "step_000001.parquet")] == [
        (1.0, "<answer>1</answer>")
    ]


def test_hostile_texts_and_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cfg, text = make(tmp_path), "half \ud800 pair, nul \0, \u2028, 😀"
    writer = SampleFiles(cfg)
    writer.step(1, 0, [group(sample(text=text))], [])
    writer.wait()
    assert rows(cfg, "step_000001.parquet")[0]["text"] == text.replace("\ud800", "\\ud800")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(samples.pq, "write_table", full)
    with caplog.at_level(logging.WARNING):
        writer.step(2, 0, [group(sample())], [])
        writer.wait()
    assert "samples from step 2 on are not kept: " in caplog.text and files(cfg) == ["step_000001.parquet"]


def test_a_run_keeps_what_it_drew_and_resumes_without_duplicates(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A run killed in step 4 goes on from step 3: its files are those of the run that was never killed."""
    policy = policy_folder(tmp_path_factory.getbasetemp() / "tiny")
    whole, killed = config(tmp_path / "whole", steps=5, lag=1), config(tmp_path / "killed", steps=5, lag=1)
    run_loop(whole, policy)
    run_loop(killed, policy, kill_at=4)
    (tmp_path / "killed" / "samples" / "step_000009.parquet").write_bytes(b"of a longer run")
    run_loop(killed, policy, resume=True)
    assert (
        files(killed)
        == files(whole)
        == [f"eval_{k:06d}.parquet" for k in (0, 5)] + [f"step_{k:06d}.parquet" for k in range(1, 6)]
    )
    for name in files(whole):
        assert rows(killed, name) == rows(whole, name)
    drawn = [rows(whole, f"step_{step:06d}.parquet") for step in range(1, 6)]
    assert all(sum(row["origin"] == "fresh" for row in step) == 24 for step in drawn)
    assert {row["age"] for row in drawn[2] if row["origin"] == "fresh"} == {1}  # lag 1
    replayed = [row for step in drawn for row in step if row["origin"] == "replayed"]
    fresh = {(row["id"], row["index"], row["text"]) for step in drawn for row in step if row["origin"] == "fresh"}
    assert replayed and {(row["id"], row["index"], row["text"]) for row in replayed} <= fresh
    assert all(row["rule_advantage"] != 0 and row["age"] > 0 for row in replayed)
    for row in drawn[4]:
        assert row["total"] == pytest.approx(row["rule"] + 0.1 * row["format"])
    assert all(json.loads(row["rules"]) == {"numeric": row["rule"]} for row in drawn[4])


def test_every_column_is_in_the_document() -> None:
    text = (Path(__file__).parents[2] / "docs" / "monitoring.md").read_text(encoding="utf-8")
    assert [name for name in SCHEMA.names if f"`{name}`" not in text] == []
    assert f"({MonitoringConfig().samples_kept})" in text and "`last` (default)" in text
