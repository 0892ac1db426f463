"""The evaluation that the loop asks for on schedule: greedy answers to the held-out prompts, and the picture probes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from skyrl.evaluation.picture_drop import picture_drop
from skyrl.evaluation.summary import evaluate
from skyrl.monitoring.records import read_json, write_json
from skyrl.records import Metrics, RolloutRequest, SampleGroup
from skyrl.settings import Config
from skyrl.system import System

logger = logging.getLogger(__name__)
GALLERY = "gallery.json"


def evaluate_policy(cfg: Config, system: System, step: int, run_dir: Path, clock: Callable[[], float]) -> Metrics:
    """``eval/…`` of the policy that the rollout members hold, with the wall time of the whole and of the probes; brings
    the run's gallery up to date."""
    started = clock()
    rows = tuple(range(system.sizes()["eval"]))
    request = RolloutRequest("eval", rows, step, 1, greedy=True, seed=cfg.controller.seed)
    scored = _answers(system, request)
    asked = clock()
    metrics: Metrics = {}
    blind: list[list[SampleGroup]] = []
    if limit := cfg.hallucination.probe_prompts:
        # What the policy says without the picture, and how much its own answers depend on it.
        blind = _answers(system, replace(request, rows=rows[:limit], blind=True))
        metrics = system.learners.each(picture_drop, *scored)[0] | {"eval/probe_seconds": clock() - asked}
    path = run_dir / GALLERY
    chosen = read_json(path) if step > 0 and path.is_file() else None
    found, gallery = system.rewards.one(evaluate, chosen, len(scored), *scored, *blind)
    write_json(path, gallery)
    if step == 0 and found.get("eval/format") == 0:
        logger.warning(
            "no answer of the first evaluation has the form <think>…</think><answer>…</answer>, and only what "
            "stands inside the answer tags is scored: let the questions ask for it (docs/data.md)"
        )
    return metrics | found | {"eval/seconds": clock() - started}


def _answers(system: System, request: RolloutRequest) -> list[list[SampleGroup]]:
    """Promises of the scored groups; waits for them."""
    _, scored = system.ask(request)
    system.rewards.wait(scored)
    return scored
