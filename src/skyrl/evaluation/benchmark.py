"""One evaluation on tasks, from settings to its files: asks what is missing, judges it, keeps it."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from skyrl.checkpoint import held
from skyrl.data.datasets import PromptDataset, verifier_names
from skyrl.evaluation.answers import Answer, AnswerStore, judged
from skyrl.evaluation.outcome import print_outcome, write_outcome
from skyrl.evaluation.tasks.graders import GRADERS
from skyrl.evaluation.tasks.prompts import TaskPrompts, located, open_tasks
from skyrl.monitoring.records import jsonable
from skyrl.records import ConfigError, RolloutRequest
from skyrl.rewards.rewarder import Rewarder
from skyrl.rollout.sampler import Sampler
from skyrl.settings import Config
from skyrl.system import System, fitting_rows

STEP = 0
"""Part of every sample's seed."""
IN_FLIGHT = 2
"""Chunks that are asked for at a time: one is sampled while the one before is judged."""
DECIDES = {
    "model": ("policy", "dtype", "chat_template_kwargs", "trust_remote_code"),
    "data": ("overlong",),
    "rollout": ("engine", "top_p", "max_prompt_tokens", "max_new_tokens"),
    "reward": ("answer", "verifiers", "verifier", "judge", "numeric_tolerance", "verifier_timeout"),
    "evaluate": ("samples", "temperature", "place"),
    "controller": ("seed",),
}
"""Settings that decide an answer or its verdict."""
SAMPLED_BYTES, BLOCKS = 1 << 16, 64


def prepared(cfg: Config) -> Config:
    """The settings of an evaluation: the tasks' places, the temperature and the tasks' own verifiers in theirs, and no
    reward model. Errors as :func:`~skyrl.evaluation.tasks.prompts.located`; a verifier of the user's with the name of
    a task's own is a :class:`ConfigError`."""
    if taken := sorted(cfg.reward.verifiers.keys() & GRADERS.keys()):
        raise ConfigError(f"reward.verifiers: {', '.join(taken)}: names of the tasks' own verifiers; choose others")
    cfg = located(cfg)
    rollout = cfg.rollout.model_copy(update={"temperature": cfg.evaluate.temperature or cfg.rollout.temperature})
    reward = cfg.reward.model_copy(update={"verifiers": cfg.reward.verifiers | GRADERS})
    model = cfg.model.model_copy(update={"reward": None})
    return cfg.model_copy(update={"rollout": rollout, "reward": reward, "model": model})


def output_folder(cfg: Config) -> Path:
    """Where the results lie."""
    own = cfg.evaluate.output
    return Path(own).absolute() if own is not None else Path(cfg.run_dir).absolute().parent / "evaluation"


def identity(cfg: Config, policy: str, tasks: Mapping[str, PromptDataset]) -> dict[str, Any]:
    """What decides the answers, as dotted keys: settings, the policy's weights, each task's questions."""
    settings = jsonable(cfg)
    found = {f"{group}.{name}": settings[group][name] for group, names in DECIDES.items() for name in names}
    found |= {"model.policy": policy, "policy.weights": weights_digest(Path(policy)), "skyrl": version("skyrl-r1v2")}
    for name, prompts in tasks.items():
        if isinstance(prompts, TaskPrompts):
            found[f"task.{name}"] = prompts.digest
        else:  # the run's own
            parts = [settings["data"], settings["digits"], getattr(prompts, "identity", dict)()]
            found[f"task.{name}"] = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    return found


def weights_digest(folder: Path) -> str:
    """Digest of a model folder: every small file, and of a large one its size and blocks from all over it, because
    reading hundreds of gigabytes would take minutes and one training step changes nearly every weight."""
    digest = hashlib.sha256()
    for path in sorted(file for file in folder.iterdir() if file.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.name}/{size}/".encode())
        with path.open("rb") as stream:
            for block in range(BLOCKS):
                stream.seek(size * block // BLOCKS if size > SAMPLED_BYTES * BLOCKS else SAMPLED_BYTES * block)
                digest.update(stream.read(SAMPLED_BYTES))
    return digest.hexdigest()[:16]


def add_tasks(sampler: Sampler) -> None:
    """Let a rollout member hold the tasks' prompts too, each as a split of its name."""
    sampler.datasets = sampler.datasets | open_tasks(sampler.cfg)


def check_verifiers(rewarder: Rewarder, names: list[str]) -> None:
    """Prepare the tasks' verifiers where they will run. Errors as :meth:`~skyrl.rewards.judging.Checks.ready`."""
    rewarder.checks.ready(names)


def measure(
    cfg: Config, system: System, tasks: Mapping[str, PromptDataset], store: AnswerStore, console: Console
) -> None:
    """See that all questions fit before any is asked; ``data.overlong=drop`` leaves out those that do not. Errors as
    :func:`~skyrl.system.fitting_rows`."""
    for name, prompts in tasks.items():
        ids = question_ids(cfg, prompts)
        rows = [row for row, one in enumerate(ids) if (name, one) not in store]
        fitting = set(fitting_rows(cfg, system, name, rows, console)) if rows else set()
        if left_out := [ids[row] for row in rows if row not in fitting]:
            store.leave_out(name, left_out)


def ask_missing(
    cfg: Config, system: System, tasks: Mapping[str, PromptDataset], store: AnswerStore, console: Console
) -> None:
    """Ask all that is missing, ``rollout.prompts_per_step`` questions at a time, and keep each chunk when it is judged.
    A chunk has the same questions whether the evaluation was stopped before it or not."""
    asked: deque[list[list[list[Answer]]]] = deque()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, refresh_per_second=2) as bar:

        def collect() -> None:
            chunk = [group for part in system.rewards.fetch(asked.popleft()) for group in part]
            store.add(chunk)
            bar.update(shown, advance=len(chunk))

        for name, prompts in tasks.items():
            ids, size = question_ids(cfg, prompts), cfg.rollout.prompts_per_step
            rows = [row for row, one in enumerate(ids) if (name, one) not in store]
            shown = bar.add_task(name, total=len(ids), completed=len(ids) - len(rows))
            for start in range(0, len(ids), size):
                if wanted := [row for row in rows if start <= row < start + size]:
                    asked.append(_ask(cfg, system, prompts, name, wanted))
                if len(asked) == IN_FLIGHT:
                    collect()
            while asked:
                collect()


def _ask(cfg: Config, system: System, prompts: PromptDataset, name: str, rows: list[int]) -> list[list[list[Answer]]]:
    """Promises of the judged answers to some rows, in their order."""
    own, members = cfg.evaluate, len(system.rollouts)
    request = RolloutRequest(
        name, tuple(rows), STEP, own.samples, greedy=own.temperature == 0, seed=cfg.controller.seed
    )
    pieces = -(-len(system.rewards) // members)
    fresh = system.rollouts.deal(Sampler.generate, request.shared_by(members), pieces=pieces)
    place = prompts.place if isinstance(prompts, TaskPrompts) else None
    return system.rewards.deal(judged, fresh, name, place)


def question_ids(cfg: Config, prompts: PromptDataset) -> list[str]:
    """Ids of the questions of a task that are asked, in order."""
    ids = prompts.ids() if hasattr(prompts, "ids") else [prompts[row].id for row in range(len(prompts))]
    return list(ids[: cfg.evaluate.limit])


def evaluate_on_tasks(
    cfg: Config, console: Console, start: Callable[[Config], AbstractContextManager[System]], policy: str
) -> dict[str, Any]:
    """Ask, judge and write; what is there already is not asked again, and without anything missing nothing is started.

    Args:
        cfg: Of :func:`prepared`.
        start: Starts rollout and reward members.
        policy: Folder of the policy.

    Returns:
        The content of ``results.json``.
    """
    tasks = open_tasks(cfg)
    decided = identity(cfg, policy, tasks)
    folder = output_folder(cfg)
    folder.mkdir(parents=True, exist_ok=True)
    with held(folder):
        store = AnswerStore(folder, decided)
        ids = {name: question_ids(cfg, prompts) for name, prompts in tasks.items()}
        if any((name, one) not in store for name, some in ids.items() for one in some):
            with start(cfg) as system:
                system.rewards.each(check_verifiers, verifier_names(tasks.values()))
                system.rollouts.each(add_tasks)
                measure(cfg, system, tasks, store, console)
                ask_missing(cfg, system, tasks, store, console)
        about = {"policy": policy, "settings": decided}
        results = write_outcome(store, tasks, ids, cfg.evaluate.report_answers, about)
    print_outcome(results, folder, console)
    return results
