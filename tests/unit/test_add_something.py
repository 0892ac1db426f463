"""Follows rows of the table "I want to add …" in docs/architecture.md: a term, a statistic and a setting take one file
each, and everything else follows from what stands there. Whole runs in one process show it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import config, policy_folder, run_loop

from skyrl.monitoring.metrics import metric_table
from skyrl.monitoring.sinks import JsonlSink, Sinks
from skyrl.objective.grpo import Grpo
from skyrl.objective.term import BatchView, Stat, Stats, Term
from skyrl.records import ConfigError
from skyrl.schema import Count, Settings, settings_of
from skyrl.settings import Config, GrpoConfig, checked
from skyrl.settings.algorithm import OwnTerm

DECLARE = """
from skyrl.objective.grpo import Grpo
from skyrl.objective.term import Stat
text = "Tokens of answers below the mean, of the GRPO tokens."
Grpo.stats = (*Grpo.stats, Stat("grpo/punished", "grpo_tokens", "share", text))
from skyrl.monitoring.metrics import check_names, markdown
check_names(["grpo/punished"])
print(markdown())
"""


class BrevitySettings(Settings):
    limit: Count = 8
    """Tokens that an answer may have before the term acts."""


class Brevity(Term):
    """A third term, of a user's own: makes long answers less likely."""

    name, per = "brevity", "samples"
    text = "Log-likelihood of answers above the limit, mean over the step's samples."
    Settings = BrevitySettings
    stats = (Stat("brevity/over", "samples", "share", "Answers above the limit, of the step's samples."),)

    def loss(self, view: BatchView) -> tuple[torch.Tensor, Stats]:
        over = view.mask.sum(1) > self.settings.limit
        return (view.row_sums(view.logprobs) * over).sum(), {"brevity/over": over.sum()}


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return policy_folder(tmp_path_factory.getbasetemp())


def with_term(cfg: Config, weight: float = 0.01, **settings: Any) -> Config:
    cfg.algorithm.terms = [OwnTerm(path="test_add_something:Brevity", weight=weight, settings=settings)]
    return cfg


def written(run_dir: Path, cfg: Config, step: int, metrics: dict[str, float]) -> dict[str, Any]:
    """The line that a run of these settings writes; every name must be in its table."""
    sinks = Sinks([JsonlSink(run_dir / "metrics.jsonl")], metric_table(cfg))
    sinks.log(step, metrics)
    sinks.close()
    return json.loads((run_dir / "metrics.jsonl").read_text())


def test_a_term_is_one_class_named_by_its_path(policy: str, tmp_path: Path) -> None:
    cfg = with_term(config(tmp_path / "with", 2), limit=4)
    sink, plain = run_loop(cfg, policy), run_loop(config(tmp_path / "without", 2), policy)
    first = sink.steps[1]
    assert first["brevity/over"] > 0.9 and first["loss/brevity"] < -1  # logged …
    parts = first["loss/grpo"] + 0.25 * first.get("loss/mpo", 0.0) + 0.01 * first["loss/brevity"]
    assert first["loss/total"] == pytest.approx(parts, rel=1e-6)
    # … trained: the first steps see the same batch, the gradient differs, and so do the answers that follow …
    assert first["loss/grpo"] == plain.steps[1]["loss/grpo"]
    assert first["learner/grad_norm"] != plain.steps[1]["learner/grad_norm"]
    assert sink.steps[2]["response/length_mean"] != plain.steps[2]["response/length_mean"]
    # … and in the table, so that it is written like any other.
    assert metric_table(cfg)["brevity/over"].description.startswith("Answers above the limit")
    assert written(tmp_path, cfg, 1, first)["brevity/over"] == first["brevity/over"]
    with pytest.raises(ConfigError, match=r"algorithm\.terms\[0\]\.settings of .*Brevity.*limit=0"):
        run_loop(with_term(config(tmp_path / "wrong", 1), limit=0), policy)


def test_a_statistic_is_one_declaration_beside_the_terms_others(
    policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = Grpo.loss

    def with_statistic(self: Grpo, view: BatchView) -> tuple[torch.Tensor, Stats]:
        total, stats = loss(self, view)
        punished = view.mask & (view.advantages < 0).unsqueeze(1) & (view.weights != 0).unsqueeze(1)
        return total, stats | {"grpo/punished": punished.sum()}

    monkeypatch.setattr(Grpo, "loss", with_statistic)
    declared = Stat("grpo/punished", "grpo_tokens", "share", "Tokens of answers below the mean, of the GRPO tokens.")
    monkeypatch.setattr(Grpo, "stats", (*Grpo.stats, declared))
    cfg = config(tmp_path, 1)
    cfg.learner.micro_batch_tokens = 128  # several micro-batches: the share is over the whole step all the same
    metrics = run_loop(cfg, policy).steps[1]
    assert metrics["learner/micro_batches"] > 1 and 0 < metrics["grpo/punished"] < 1
    # The table and docs/metrics.md are made from the declarations when they are imported.
    done = subprocess.run([sys.executable, "-c", DECLARE], capture_output=True, text=True, check=True)
    assert "| `grpo/punished` | share | Tokens of answers below the mean, of the GRPO tokens. |" in done.stdout


def test_a_setting_is_one_field_with_its_limits_and_its_text() -> None:
    class Extended(GrpoConfig):
        patience: Count = 3
        """Steps that something waits."""

    found = {setting.key: setting for setting in settings_of(Extended(), "algorithm.grpo.")}
    mine = found["algorithm.grpo.patience"]
    assert (mine.default, mine.allowed, mine.text) == (3, "a whole number, 1 or more", "Steps that something waits.")
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        Extended(patience=0)
    # What a real one gives a user: its key, what was got, what is allowed, and the nearest name for a mistyped one.
    with pytest.raises(ConfigError) as wrong:
        checked({"algorithm": {"grpo": {"clip_high": -1, "wieght": 2}}})
    assert "algorithm.grpo.clip_high=-1: must be a number, 0 or more" in str(wrong.value)
    assert "algorithm.grpo.wieght: there is no such setting; did you mean algorithm.grpo.weight" in str(wrong.value)
