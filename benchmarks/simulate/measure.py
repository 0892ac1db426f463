"""A real run of the embedded default, short and of several sizes: what the cost model is fitted to, and what its
predictions are compared with.

One Ray session, one set of members with one thread each (on two cores each side then has its own also when both are
busy), and one loop after the other over them, in turns.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from skyrl.monitoring.sink import MetricSink
from skyrl.records import Metrics
from skyrl.simulate.cost import CostModel, EngineCost, LearnerCost
from skyrl.simulate.lengths import Lengths, measured
from skyrl.simulate.world import Plan, simulate

RUNS = {"small": (8, 0), "base": (32, 0), "lag 1": (32, 1), "large": (64, 0)}
"""Prompts of a step, and lag."""
SAMPLES, STEPS, WARM_UP, ROUNDS = 8, 9, 3, 2
DRAWS = 200


def config() -> Any:
    """The embedded models without MPO, quiet, with one rollout and one reward worker and one thread a member; the
    learning rate keeps the policy as it is."""
    from skyrl.settings import Config, KeptSamples, Stage, WandbMode

    cfg = Config(name="simulation")
    cfg.rollout.samples_per_prompt, cfg.learner.lr = SAMPLES, 1e-12
    cfg.rollout.max_num_seqs = 512
    cfg.algorithm.stage = Stage.grpo  # MPO's δ takes a forward pass more of answers of an older policy
    cfg.rollout.threads = cfg.reward.threads = cfg.learner.threads = 1
    cfg.controller.lag, cfg.controller.steps = 1, STEPS
    cfg.data.eval_size, cfg.evaluation.every, cfg.checkpoint.every, cfg.hallucination.probe_prompts = 4, 0, 0, 0
    cfg.cluster.dashboard = cfg.checkpoint.export = False
    cfg.monitoring.wandb, cfg.monitoring.samples = WandbMode.off, KeptSamples.off
    return cfg


def measure() -> dict[str, Any]:
    """Medians of each run's laps, seconds; tokens of one step's answers [groups, samples]; mean tokens of a prompt."""
    from skyrl.crew.ray_executor import ray_session
    from skyrl.data.stream import PromptStream
    from skyrl.loop import Loop
    from skyrl.run import model_folders
    from skyrl.system import start_system

    cfg = config()
    found: dict[str, list[Metrics]] = {name: [] for name in RUNS}
    policy, reward = model_folders(cfg)
    promised: dict[str, list[Any]] = {name: [] for name in RUNS}
    with (
        tempfile.TemporaryDirectory() as folder,
        ray_session(cfg, "simulation"),
        start_system(cfg, policy, reward) as system,
    ):
        size, pair, version = system.sizes()["train"], system.buffer.pair, 0
        for name in list(RUNS) * ROUNDS:
            own = cfg.model_copy(deep=True)
            own.rollout.prompts_per_step, own.controller.lag = RUNS[name]
            kept = promised[name]

            def noted(*call: Any, kept: list[Any] = kept) -> Any:
                kept[:] = call[3:]  # the scored parts
                return pair(*call)

            system.buffer.pair = noted  # type: ignore[method-assign,assignment]
            loop = Loop(own, system, PromptStream(size, len(found[name])), _Sink(found[name]), Path(folder))
            loop.version = version
            loop.run()
            version = loop.version
        groups = [group for part in system.rewards.fetch(promised["base"]) for group in part]
    tokens = [[len(sample.token_ids) for sample in group.samples] for group in groups]
    prompt = round(float(np.mean([len(group.prompt_ids) for group in groups])))
    runs = {name: _medians(records) for name, records in found.items()}
    return {"runs": runs, "tokens": tokens, "prompt_tokens": prompt}


class _Sink(MetricSink):
    def __init__(self, records: list[Metrics]) -> None:
        self.records = records

    def log(self, step: int, metrics: Metrics) -> None:
        if "time/step" in metrics and WARM_UP < step < STEPS:
            self.records.append(metrics)


def _medians(records: list[Metrics]) -> dict[str, float]:
    names = sorted({name for one in records for name in one if name.startswith(("time/", "overlap/"))})
    return {name: median(one.get(name, 0.0) for one in records) for name in names}


def fitted(found: dict[str, Any]) -> tuple[CostModel, Lengths]:
    """The cost model that ``small`` and ``base`` say: a decoding step takes a + b · running; the rest of a step is that
    of ``base``."""
    small, base = found["runs"]["small"], found["runs"]["base"]
    lengths = measured(np.array(found["tokens"]), "measured: the embedded default", found["prompt_tokens"])
    prompts = RUNS["small"][0], RUNS["base"][0]
    rng = np.random.default_rng(0)
    drawn = [[lengths.draw(rng, n, SAMPLES) for _ in range(DRAWS)] for n in prompts]
    # A rollout takes a · its decoding steps + b · its tokens.
    wanted = [[np.mean([one.max() for one in size]), np.mean([one.sum() for one in size])] for size in drawn]
    start, slope = np.linalg.solve(wanted, [small["time/rollout"], base["time/rollout"]]).tolist()
    running = [1, prompts[0] * SAMPLES, prompts[1] * SAMPLES]
    rates = [n / (max(start, 0.0) + slope * n) for n in running]
    answers = prompts[1] * SAMPLES
    return CostModel(
        about="fitted to a short run of the embedded default",
        engines=[EngineCost(running=running, tokens_per_second=rates, max_running=512)],
        learner=LearnerCost(tokens_per_second=answers * (lengths.mean + lengths.prompt_tokens) / base["time/learner"]),
        reward_seconds=base["time/reward"] / answers,
        buffer_seconds=base["time/buffer"],
        sync_seconds=base["time/sync"],
    ), lengths


def compared(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Each run's measured step and the simulated one; ``small`` and ``base`` are what the cost model is fitted to."""
    costs, lengths = fitted(found)
    rows = []
    for name, (prompts, lag) in RUNS.items():
        plan = Plan(prompts, SAMPLES, 1, 1, lag, 40, replay=False)  # the share that is trained is in the learner's rate
        predicted, real = simulate(plan, costs, lengths)[0], found["runs"][name]
        laps = {lap.removeprefix("time/"): [real.get(lap, 0.0), value] for lap, value in predicted.laps.items()}
        step = real["time/step"]
        rows.append(
            {"run": name, "prompts": prompts, "lag": lag, "fitted": name in ("small", "base"), "measured": step,
             "predicted": predicted.step, "error": predicted.step / step - 1, "laps": laps}
        )  # fmt: skip
    return rows


def main() -> None:
    print(json.dumps(measure()))


if __name__ == "__main__":
    main()
