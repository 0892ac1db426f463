"""The evaluation that the loop asks for on schedule, and what it says: greedy answers to held-out prompts, scored like
any others, and the picture probes."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from skyrl.evaluation.monitors import Monitor, blind_metrics, build_monitors
from skyrl.evaluation.picture_drop import picture_drop
from skyrl.monitoring.gallery import add_after, gallery_entries
from skyrl.monitoring.records import read_json, write_json
from skyrl.monitoring.samples import SampleFiles
from skyrl.records import DataError, Metrics, RolloutRequest, SampleGroup, SkyrlError, flatten
from skyrl.rewards.metrics import answer_metrics, failures, means, model_agreement, refuse_all_failed
from skyrl.rewards.rewarder import Rewarder
from skyrl.rewards.scorers import score_metrics, score_remark
from skyrl.settings import Config
from skyrl.system import System

logger = logging.getLogger(__name__)
GALLERY = "gallery.json"
SHOWN = 300
"""Characters of an answer in a message."""


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
    found, gallery = system.rewards.one(evaluate, chosen, len(scored), *scored, *blind, step=step)
    try:
        write_json(path, gallery)
    except SkyrlError as error:  # a full disk: the run is worth more than a picture book of it
        logger.warning(error)
    for note in system.rewards.one(remarks, *scored) if step == 0 else ():
        logger.warning(note)
    return metrics | found | {"eval/seconds": clock() - started}


def _answers(system: System, request: RolloutRequest) -> list[list[SampleGroup]]:
    """Promises of the scored groups; waits for them."""
    _, scored = system.ask(request)
    system.rewards.wait(scored)
    return scored


NAMES = {
    "reward/accuracy": "eval/accuracy",
    "reward/scored": "eval/scored",
    "reward/format": "eval/format",
    "reward/format_of_right": "eval/format_of_right",
    "reward/model": "eval/reward_model",
    "reward/model_std": "eval/reward_model_std",
    "reward/model_largest": "eval/reward_model_largest",
    "reward/errors": "eval/errors",
    "response/length_mean": "eval/length_mean",
    "response/truncated_share": "eval/truncated_share",
    "response/repetition": "eval/repetition",
    "response/answer_share": "eval/answer_share",
}


def evaluate(
    rewarder: Rewarder,
    gallery: list[dict[str, Any]] | None,
    shown: int,
    *parts: list[SampleGroup],
    step: int | None = None,
) -> tuple[Metrics, list[dict[str, Any]]]:
    """Metrics of an evaluation and the report's gallery.

    Args:
        rewarder: Where the groups were scored: its settings and its process, in which plug-ins have registered.
        gallery: The one chosen before training, whose "after" side is filled in; ``None`` chooses it now.
        parts: Scored groups of one greedy sample each, in the order of the rows: first ``shown`` parts that were asked
            with their pictures, then those asked again without, if any.
        step: After which their samples are kept in the run's folder; None keeps none.

    Raises:
        SkyrlError: if no answer could be scored.
        DataError: as :func:`evaluation_metrics` and :func:`~skyrl.evaluation.monitors.blind_metrics`, or if a prompt of
            the gallery was not evaluated again.
    """
    groups = [group for part in parts[:shown] for group in part]
    blind = [group for part in parts[shown:] for group in part]
    cfg = rewarder.cfg
    if step is not None:
        SampleFiles(cfg).evaluation(step, [*groups, *blind])
    refuse_all_failed(groups, "evaluation")
    entries = gallery_entries(groups, cfg.evaluation.gallery) if gallery is None else add_after(gallery, groups)
    return evaluation_metrics(groups, [*build_monitors(cfg), partial(blind_metrics, blind=blind)]), entries


def remarks(rewarder: Rewarder, *parts: list[SampleGroup]) -> list[str]:
    """What the user should read of the first evaluation's scored groups: that no answer was found, that verifiers
    failed."""
    groups = [group for part in parts for group in part]
    samples = flatten(groups)
    notes = [failures(groups, "first evaluation"), score_remark(groups, rewarder.cfg.reward)]
    if samples and not any(sample.answer for sample in samples) and rewarder.checks.read_answers(groups):
        text = samples[0].text
        shown = text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} … {text[-SHOWN // 2 :]}"
        notes.append(
            f"no answer was found in any of the {len(samples)} texts of the first evaluation: looked for "
            f"{rewarder.form.wanted()} (reward.answer.at={rewarder.cfg.reward.answer.at.value}). Let the questions ask "
            f"for that form, or say where the answer stands (docs/verifiers.md). The first text: {shown!r}"
        )
    return [note for note in notes if note is not None]


def evaluation_metrics(groups: list[SampleGroup], monitors: Sequence[Monitor]) -> Metrics:
    """``eval/…`` over scored groups of one greedy sample each, the accuracy of each kind of question, and what the
    monitors say (``skyrl.evaluation.monitors``; without them nothing is said about hallucination).

    Raises:
        DataError: if two monitors, or a monitor and the evaluation, give the same metric.
    """
    overall = answer_metrics(groups)
    metrics = {new: overall[old] for old, new in NAMES.items() if old in overall}
    metrics |= {f"eval{n.removeprefix('reward')}": v for n, v in overall.items() if n.startswith("reward/rule/")}
    metrics |= score_metrics(groups) | model_agreement([flatten(groups)], "eval/model_agreement")
    right: defaultdict[str, list[bool]] = defaultdict(list)
    for group in groups:
        right[f"eval/accuracy/{group.prompt.kind}"] += [s.right for s in group.samples if s.reward is not None]
    metrics |= means(dict(sorted(right.items())))
    for monitor in monitors:
        found = monitor(groups)
        if twice := sorted(metrics.keys() & found.keys()):
            raise DataError(f"a monitor gives {', '.join(twice)} once more; every metric must come from one place")
        metrics |= found
    return metrics
