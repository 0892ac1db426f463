"""``python -m skyrl.doctor``: would a run with these settings start, and would it judge and train what it should?"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from skyrl.checks.all import CAUGHT, CHECKS, run_checks
from skyrl.checks.subject import Check, Finding, Subject
from skyrl.cli import read_settings, run_command
from skyrl.monitoring.records import jsonable
from skyrl.records import ConfigError, SampleGroup, SyncError
from skyrl.sync.syncer import FLOOR, limit_of, rounding_gap

if TYPE_CHECKING:
    from skyrl.learner.step import LearnerStep
    from skyrl.system import System

HELP = """\
Checks settings, data, model and machine before a run: what passes, what fails, and what helps.

Usage: python -m skyrl.doctor [group=option ...] [key=value ...] [--full] [--json] [options]

Settings are those of python -m skyrl.launch. Exit status 0 if nothing fails, else 1.
  --full    also start one engine and one learner: do their log-probabilities agree, and do those of micro-batches of
            two sizes?
  --json    print the findings as JSON instead of a table

Examples:
  python -m skyrl.doctor
  python -m skyrl.doctor model=huggingface model.policy=/path/to/model data=files data.train_path=train.parquet \\
      data.eval_path=eval.parquet --full
docs/monitoring.md says what each check looks at.
"""
COLOURS = {"pass": "green", "fail": "bold red", "skip": "dim"}


def main() -> None:
    """Entry point; an interruption ends as :func:`skyrl.cli.run_command` says."""
    run_command(_work, "interrupted")


def _work() -> None:
    own = [word for word in sys.argv[1:] if word in ("--full", "--json")]
    rest = [word for word in sys.argv[1:] if word not in own]
    console = Console(stderr="--json" in own)
    findings = examine(rest, "--full" in own, console)
    if findings is None:
        return
    if "--json" in own:
        import json

        print(json.dumps([jsonable(asdict(finding)) for finding in findings], indent=2, ensure_ascii=False))
    else:
        console.print(table_of(findings))
    if any(finding.status == "fail" for finding in findings):
        sys.exit(1)


def examine(arguments: Sequence[str], full: bool, console: Console) -> list[Finding] | None:
    """Make all checks; None if the arguments only asked to print something.

    Args:
        arguments: As of the command line, without the doctor's own.
        full: Start an engine and a learner too.
        console: Where it is shown what is being done.
    """
    try:
        cfg = read_settings(arguments, HELP)
    except ConfigError as error:
        return [Finding("settings", "fail", str(error), "docs/configuration.md explains every setting")]
    if cfg is None:
        return None
    from skyrl.run import model_folders, with_absolute_paths

    cfg = with_absolute_paths(cfg)
    findings = [Finding("settings", "pass", "every key is known, and they fit together")]
    try:
        policy, reward = model_folders(cfg)
    except CAUGHT as error:
        failed = Finding("models", "fail", f"{type(error).__name__}: {error}", "see docs/models.md")
        return [*findings, failed]
    subject = Subject(cfg, policy, reward)
    findings += run_checks(subject, CHECKS)
    if full:
        findings += _full(subject, console) if all(f.status != "fail" for f in findings) else [
            Finding("system", "skip", "not started: mend first what fails")
        ]  # fmt: skip
    return findings


def table_of(findings: Sequence[Finding]) -> Table:
    """The findings, with their remedies."""
    table = Table(box=None, padding=(0, 2), pad_edge=False)
    for name in ("check", "result", "what was found"):
        table.add_column(name, no_wrap=name != "what was found")
    for finding in findings:
        said = Text(finding.said)
        if finding.remedy:
            said.append(f"\nwhat helps: {finding.remedy}", "yellow")
        table.add_row(finding.name, Text(finding.status, COLOURS[finding.status]), said)
    return table


# ---------------------------------------------------------------- with an engine and a learner


def _full(subject: Subject, console: Console) -> list[Finding]:
    """Start one engine and one learner with the run's settings, and compare them."""
    from skyrl.crew.ray_executor import ray_session
    from skyrl.system import start_system

    cfg = subject.cfg.model_copy(deep=True)
    cfg.rollout.num_workers = cfg.learner.num_workers = cfg.reward.num_workers = 1
    cfg.cluster.dashboard, cfg.run_dir = False, ""
    console.print("starting one engine and one learner")
    try:
        with (
            ray_session(cfg, namespace=f"skyrl-doctor-{os.getpid()}"),
            start_system(cfg, subject.policy, subject.reward) as system,
        ):
            return list(run_checks(subject, full_checks(system)))
    except CAUGHT as error:
        remedy = "the message is the member's own; docs/models.md lists the models that were tried"
        return [Finding("system", "fail", f"{type(error).__name__}: {error}", remedy)]


def full_checks(system: System) -> list[Check]:
    """What can be seen of a system that has started."""
    gap = "two programs compute this model differently: see docs/models.md, and rollout.logprob_gap_limit"
    cut = "the model's answers depend on their neighbours in a batch: a padding or attention fault of its code"
    return [
        Check("log-probability gap", partial(_gap, system), gap),
        Check("micro-batches", partial(_micro_batches, system), cut),
    ]


def _gap(system: System, subject: Subject) -> str:
    """The learner's weights reach the engine, and both give the same log-probabilities."""
    metrics = system.syncer.sync(0)
    return f"{metrics['sync/logprob_gap']:.2g} nats at most, allowed {system.syncer.limit.largest:.2g}"


def _micro_batches(system: System, subject: Subject) -> str:
    """Each answer alone, and as many together as ``learner.micro_batch_tokens`` allows: the same log-probabilities."""
    from skyrl.rollout.sampler import Sampler

    groups, budget = system.rollouts.one(Sampler.probe), subject.cfg.learner.micro_batch_tokens
    alone, together = (system.learners.each(logprobs_at, groups, size)[0] for size in (1, budget))
    gap = max((float(np.abs(a - b).max()) for a, b in zip(alone, together, strict=True) if len(a)), default=0.0)
    limit = FLOOR
    if gap > limit:
        limit = limit_of(system.learners.each(rounding_gap, groups)[0]).largest
    if gap > limit:
        raise SyncError(f"one by one and together differ by up to {gap:.2g} nats; allowed {limit:.2g}")
    return f"{len(alone)} answers one by one and together differ by {gap:.2g} nats at most, allowed {limit:.2g}"


def logprobs_at(learner: LearnerStep, groups: list[SampleGroup], tokens: int) -> list[np.ndarray]:
    """Log-probabilities float32 [T] of every answer, in forward passes of so many tokens, at least one row."""
    from skyrl.learner.passes import score_groups

    backend = learner.backend
    return score_groups(backend.score, groups, learner.encoder, backend.device, tokens, learner.forests)


if __name__ == "__main__":
    main()
