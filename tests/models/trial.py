"""One architecture through everything, in a process of its own: ``python trial.py NAME FOLDER`` prints a JSON line.

The engine is vLLM in this process, the learner the plain backend (vLLM and DeepSpeed can't share a process group);
the sync, the proof, both losses and the export are those of a run.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

STAGES = ("starts", "rollout", "logprobs", "losses", "sync", "export")


@dataclass
class Result:
    """Of each stage "yes", or why not; later ones are empty."""

    starts: str = ""
    rollout: str = ""
    logprobs: str = ""
    losses: str = ""
    sync: str = ""
    export: str = ""
    gap: float = float("nan")
    """Largest |log π_vLLM − log π_learner| over all answers of the first rollout."""
    limit: float = float("nan")
    gap_after: float = float("nan")
    """Of the probe after the step was synced."""
    stale: float = float("nan")
    """What the probe says before the sync: the engine is one step old."""
    gap_export: float = float("nan")
    """Exported folder in transformers and in vLLM against the learner."""


def prompts(pictures: bool) -> list[Any]:
    from skyrl.records import Prompt

    rng = np.random.default_rng(0)

    def picture() -> np.ndarray:
        return rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)

    made = [Prompt("text", "What is the sum?", (), "1", "exact")]
    if pictures:
        made += [Prompt(f"picture/{i}", "What is the sum of the digits?", (picture(),), "1", "exact") for i in range(4)]
        made += [Prompt("two", "Which?", (picture(), picture()), "1", "exact")]
    else:
        made += [Prompt(f"text/{i}", f"Is it {i}?", (), "1", "exact") for i in range(4)]
    return made


def config(dtype: str = "float32") -> Any:
    from skyrl.settings import Config

    cfg = Config()
    cfg.model.dtype, cfg.model.reward = dtype, None
    cfg.rollout.max_prompt_tokens, cfg.rollout.max_new_tokens = 160, 16
    cfg.rollout.probe_prompts, cfg.rollout.max_num_seqs = 6, 32
    cfg.rollout.threads = cfg.learner.threads = 1
    cfg.learner.backend = "plain_backend:PlainBackend"
    cfg.learner.lr, cfg.learner.warmup_steps = 3e-3, 0
    if dtype != "float32":
        cfg.learner.zero_stage = 1
    return cfg


def train_batch(groups: list[Any]) -> Any:
    """Every answer with an advantage, and a preference pair of each group."""
    from skyrl.records import PreferencePair, TrainBatch, TrainItem

    items, pairs = [], []
    for group in groups:
        first = len(items)
        for place, sample in enumerate(group.samples):
            sample.advantage = 1.0 if place % 2 == 0 else -1.0
            items.append(TrainItem(group.prompt, group.prompt_ids, sample, 1.0))
        pairs.append(PreferencePair(first, first + 1, None))
    tokens = sum(item.sample.trained_tokens for item in items)
    return TrainBatch(1, 0, {"grpo": 1.0, "mpo": 1.0}, items, pairs, len(items), tokens)


def largest_gap(groups: list[Any], own: list[np.ndarray]) -> float:
    recorded = [sample.logprobs for group in groups for sample in group.samples]
    return max(float(np.abs(a - b).max()) for a, b in zip(recorded, own, strict=True))


def run(folder: str, pictures: bool, dtype: str = "float32", work: Path | None = None) -> Result:
    from skyrl.records import SkyrlError

    result = Result()
    done: dict[str, Any] = {}
    stages: list[Callable[..., None]] = [_starts, _rollout, _logprobs, _losses, _sync, _export]
    for name, stage in zip(STAGES, stages, strict=True):
        try:
            stage(result, done, folder, pictures, dtype, work)
            setattr(result, name, "yes")
        except Exception as error:  # noqa: BLE001 (the table says what it was)
            clear = "" if isinstance(error, SkyrlError) else f"{type(error).__name__}: "
            setattr(result, name, f"no: {clear}{' '.join(str(error).split())[:300]}")
            if os.environ.get("SKYRL_TRIAL_TRACEBACK"):
                import traceback

                traceback.print_exc()
            break
    return result


def _starts(result: Result, done: dict[str, Any], folder: str, pictures: bool, dtype: str, work: Any) -> None:
    import skyrl.data.datasets as datasets
    from skyrl.rollout.sampler import Sampler

    cfg, made = config(dtype), prompts(pictures)
    datasets.build_datasets = lambda _: {"train": made, "eval": made}
    done["cfg"], done["sampler"] = cfg, Sampler(cfg, folder)


def _rollout(result: Result, done: dict[str, Any], folder: str, pictures: bool, dtype: str, work: Any) -> None:
    from skyrl.records import RolloutRequest

    sampler = done["sampler"]
    request = RolloutRequest("train", tuple(range(6 if pictures else 5)), 1, 4, False, 0)
    done["groups"] = sampler.generate(request)


def _logprobs(result: Result, done: dict[str, Any], folder: str, pictures: bool, dtype: str, work: Any) -> None:
    from skyrl.crew.crew import Crew
    from skyrl.crew.executor import MemberSpec
    from skyrl.crew.local_executor import LocalExecutor
    from skyrl.learner.step import LearnerStep
    from skyrl.records import SkyrlError
    from skyrl.rollout.sampler import Sampler
    from skyrl.sync.syncer import Syncer

    cfg, executor = done["cfg"], LocalExecutor()
    learners: Crew[LearnerStep] = Crew(executor, [MemberSpec("learner", LearnerStep, (cfg, folder, 0, 1))], 300.0)
    learners.each(LearnerStep.join, "127.0.0.1", learners.one(LearnerStep.free_port))
    rollouts: Crew[Sampler] = Crew(executor, [MemberSpec("rollout", lambda: done["sampler"], ())], 300.0)
    done["learners"], done["rollouts"] = learners, rollouts
    result.gap = largest_gap(done["groups"], learners.one(LearnerStep.logprobs, done["groups"]))
    done["syncer"] = Syncer(learners, rollouts, cfg)
    metrics = done["syncer"].sync(0)
    result.limit = done["syncer"].limit.largest
    again = done["sampler"].generate(_request(pictures))
    gap = largest_gap(again, learners.one(LearnerStep.logprobs, again))
    if not max(result.gap, gap) <= max(result.limit, 1e-4):
        raise SkyrlError(f"gap {result.gap:.2g} from the folder, {gap:.2g} after a sync ({metrics})")


def _request(pictures: bool) -> Any:
    from skyrl.records import RolloutRequest

    return RolloutRequest("train", tuple(range(6 if pictures else 5)), 1, 4, False, 0)


def _losses(result: Result, done: dict[str, Any], folder: str, pictures: bool, dtype: str, work: Any) -> None:
    from skyrl.learner.step import LearnerStep
    from skyrl.records import SkyrlError

    metrics = done["learners"].one(LearnerStep.train_step, train_batch(done["groups"]))
    if not metrics["learner/grad_norm"] > 0 or not metrics["mpo/pairs"]:
        raise SkyrlError(f"nothing was trained: {metrics}")


def _sync(result: Result, done: dict[str, Any], folder: str, pictures: bool, dtype: str, work: Any) -> None:
    from skyrl.learner.step import LearnerStep
    from skyrl.records import SkyrlError, WeightSnapshot
    from skyrl.sync.snapshot import with_neighbours

    result.stale = done["syncer"].gap().largest
    result.gap_after = done["syncer"].sync(1)["sync/logprob_gap"]
    result.limit = max(result.limit, done["syncer"].limit.largest)
    if not result.stale > result.limit:
        raise SkyrlError(f"a policy that is one step old passes: gap {result.stale:.2g}, limit {result.limit:.2g}")
    part = done["learners"].one(LearnerStep.snapshot, 2)
    chosen = with_neighbours(part.names, [name for name in part.names if ".layers.1.self_attn." in name])
    kept = [place for place, name in enumerate(part.names) if name in chosen]
    columns = (part.names, part.shapes, part.dtypes, part.parts)
    done["sampler"].load_weights(WeightSnapshot(2, *([own[i] for i in kept] for own in columns), base=1))
    gap = done["syncer"].gap().largest
    if not (kept and gap <= max(result.limit, 1e-4)):
        raise SkyrlError(f"after {len(kept)} weights that it has already were sent alone: gap {gap:.2g}")


def _export(result: Result, done: dict[str, Any], folder: str, pictures: bool, dtype: str, work: Path | None) -> None:
    from skyrl.learner.step import LearnerStep
    from skyrl.records import SkyrlError
    from skyrl.rollout.sampler import Sampler

    target = (work or Path(folder).parent) / f"{Path(folder).name}-export"
    learners = done["learners"]
    learners.one(LearnerStep.export, target)
    groups = done["sampler"].generate(_request(pictures))
    own = learners.one(LearnerStep.logprobs, groups)
    fresh = LearnerStep(done["cfg"], str(target), 0, 1)
    fresh.join("127.0.0.1", 0)
    loaded = fresh.logprobs(groups)
    result.gap_export = max(float(np.abs(a - b).max()) for a, b in zip(own, loaded, strict=True))
    if result.gap_export > 1e-6 and dtype == "float32":
        raise SkyrlError(f"transformers reads other weights: gap {result.gap_export:.2g}")
    done.pop("sampler")
    done.pop("rollouts")
    done.pop("syncer")
    gc.collect()
    served = Sampler(done["cfg"], str(target)).generate(_request(pictures))
    result.gap_export = largest_gap(served, fresh.logprobs(served))
    if not result.gap_export <= max(result.limit, 1e-4):
        raise SkyrlError(f"vLLM reads other weights: gap {result.gap_export:.2g}")


def main(name: str, folder: str, dtype: str = "float32") -> None:
    from skyrl.rollout.engine import rollout_environment

    os.environ.update(rollout_environment(config().rollout, 1))
    from zoo import ARCHITECTURES

    architecture = ARCHITECTURES[name]
    try:
        architecture.build(Path(folder))
    except Exception as error:  # noqa: BLE001
        result = Result(starts=f"no: {' '.join(str(error).split())[:300]}")
    else:
        result = run(folder, architecture.pictures, dtype)
    print("RESULT " + json.dumps(asdict(result)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
