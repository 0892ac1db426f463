"""How many of the GPUs sample, and how many train.

The time of a step is worked out for every split that the loop could run: engines of each kind that the cost file has,
in numbers that share the prompts evenly, and the rest of the GPUs for the learner; with and without lag; and, if asked
for, both roles on all GPUs in turns. These are few (the divisors of the prompts), so that nothing is searched blindly.
Lengths are drawn several times, the same for all splits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from skyrl.records import ConfigError
from skyrl.simulate.cost import CostModel, EngineCost, learner_seconds, rollout_seconds
from skyrl.simulate.lengths import Lengths


@dataclass(slots=True, frozen=True)
class Job:
    """What a step asks for."""

    prompts: int
    """``rollout.prompts_per_step``."""
    samples: int
    """``rollout.samples_per_prompt``."""
    trained_share: float = 1.0
    """Share of the answers that reach the learner (with replay about 1; without, the share that is effective)."""
    reward_workers: int = 1
    lags: tuple[int, ...] = (0, 1)
    """``controller.lag`` that may be chosen. More than 1 gains nothing: new weights wait for a batch's last answer."""
    colocated: bool = False
    """Both roles may also share all GPUs (``rollout.weight_sync=ipc``)."""


@dataclass(slots=True, frozen=True)
class Split:
    """A way to share the GPUs, and what a step takes then, in seconds (means over the draws)."""

    engine: EngineCost
    engines: int
    learner_gpus: int
    lag: int
    colocated: bool
    step: float
    rollout: float
    learner: float
    """With scoring and the buffer, which the engines do not wait for."""

    @property
    def rollout_gpus(self) -> int:
        return self.engines * self.engine.gpus

    @property
    def tokens_share(self) -> float:
        """Share of the step in which the engines sample."""
        return self.rollout / self.step


def candidates(gpus: int, job: Job, costs: CostModel) -> Iterator[tuple[EngineCost, int, int, int, bool]]:
    """Engine, number of engines, GPUs of the learner, lag, colocated: every split that could run."""
    for engine in costs.engines:
        for engines in range(1, gpus // engine.gpus + 1):
            if job.prompts % engines:
                continue
            left = gpus - engines * engine.gpus
            if left >= costs.learner.min_gpus:
                for lag in job.lags:
                    yield engine, engines, left, lag, False
            if job.colocated and left == 0 and engine.gpus == 1 and gpus >= costs.learner.min_gpus:
                yield engine, engines, gpus, 0, True


def splits(gpus: int, job: Job, costs: CostModel, lengths: Lengths, draws: int = 16, seed: int = 0) -> list[Split]:
    """Every split that could run, the fastest first; among equals the one with the smaller lag.

    Raises:
        ConfigError: if there is none.
    """
    rng = np.random.default_rng(seed)
    drawn = [lengths.draw(rng, job.prompts, job.samples) for _ in range(draws)]
    rollouts: dict[tuple[int, int], list[float]] = {}
    learners: dict[int, list[float]] = {}
    found = []
    for engine, engines, left, lag, colocated in candidates(gpus, job, costs):
        place = costs.engines.index(engine)
        if (place, engines) not in rollouts:
            rollouts[place, engines] = [rollout_seconds(one, lengths.prompt_tokens, engine, engines) for one in drawn]
        if left not in learners:
            learners[left] = [_learner(one, job, costs, lengths.prompt_tokens, left) for one in drawn]
        found.append(
            _split(engine, engines, left, lag, colocated, job, costs, rollouts[place, engines], learners[left])
        )
    if not found:
        kinds = ", ".join(str(engine.gpus) for engine in costs.engines)
        raise ConfigError(
            f"--gpus {gpus} with --prompts {job.prompts}: no split; engines take {kinds} GPUs, their number must "
            f"divide the prompts, and the learner needs {costs.learner.min_gpus}"
        )
    return sorted(found, key=lambda one: (round(one.step, 9), one.lag))


def expected(
    job: Job, costs: CostModel, lengths: Lengths, engine: EngineCost, engines: int, learner_gpus: int, draws: int = 4
) -> tuple[float, float]:
    """Mean seconds of a rollout, and of a train step with scoring and buffer."""
    rng = np.random.default_rng(0)
    drawn = [lengths.draw(rng, job.prompts, job.samples) for _ in range(draws)]
    rollout = [rollout_seconds(one, lengths.prompt_tokens, engine, engines) for one in drawn]
    learner = [_learner(one, job, costs, lengths.prompt_tokens, learner_gpus) for one in drawn]
    return float(np.mean(rollout)), float(np.mean(learner))


def _learner(drawn: np.ndarray, job: Job, costs: CostModel, prompt_tokens: int, gpus: int) -> float:
    sizes = drawn.ravel() + prompt_tokens
    trained = sizes[: max(1, round(job.trained_share * sizes.size))]
    scoring = sizes.size * costs.reward_seconds / job.reward_workers
    return learner_seconds(trained, costs.learner, gpus) + costs.buffer_seconds + scoring


def _split(
    engine: EngineCost,
    engines: int,
    left: int,
    lag: int,
    colocated: bool,
    job: Job,
    costs: CostModel,
    rollouts: Sequence[float],
    learners: Sequence[float],
) -> Split:
    """Lag 0: one after the other. Lag 1: side by side, and the weights go out when both have ended; scoring begins when
    the rollout has ended, and is over before the learner is."""
    both = np.array(rollouts), np.array(learners)
    step = float((both[0] + both[1] if lag == 0 else np.maximum(*both)).mean())
    step += costs.sync_seconds + (costs.switch_seconds if colocated else 0.0)
    return Split(engine, engines, left, lag, colocated, step, float(both[0].mean()), float(both[1].mean()))
