"""What stands in for the roles that would need a model: they take time and make records of the right shape. The
buffer's role is the real one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from skyrl.crew.executor import cut
from skyrl.records import Begun, Prompt, RewardParts, RolloutRequest, Sample, SampleGroup, TrainBatch, WeightSnapshot
from skyrl.rewards.hybrid import group_advantages
from skyrl.settings import Config
from skyrl.simulate.cost import CostModel, EngineCost, decode, learner_seconds
from skyrl.simulate.executor import Took
from skyrl.simulate.lengths import Lengths
from skyrl.sync.syncer import Gap

LONGEST = 1 << 20
_IDS = np.zeros(LONGEST, dtype=np.int32)
_LOGPROBS = np.zeros(LONGEST, dtype=np.float32)
_MASK = np.ones(LONGEST, dtype=bool)
KEPT_STEPS = 8
EVALUATED = 4
"""Prompts of an evaluation; it is no part of a step."""


@dataclass(slots=True)
class World:
    """What the stand-ins share. Lengths and rewards depend on seed, step and row only: whoever asks, and with whatever
    split, gets the same answers."""

    cfg: Config
    costs: CostModel
    engine: EngineCost
    lengths: Lengths
    learner_gpus: int
    rows: int
    """Prompts of the data set."""
    mixed: bool
    """Every other answer of each group is right, so that all train; else each prompt has a chance of its own, and some
    groups tie."""
    colocated: bool = False
    tokens: int = 0
    """Of all answers handed out for training."""
    trained: list[tuple[int, list[str]]] = field(default_factory=list)
    """Steps, and ids of the prompts in their batches, one for each item."""
    _steps: dict[int, np.ndarray] = field(default_factory=dict)
    _learned: tuple[int, float] = (-1, 0.0)

    def tokens_of(self, step: int) -> np.ndarray:
        """int64 [rows, G]: tokens of the answers that a step would get for each row."""
        if step not in self._steps:
            for old in [one for one in self._steps if one < step - KEPT_STEPS]:
                del self._steps[old]
            rng = np.random.default_rng([self.cfg.controller.seed, step])
            self._steps[step] = self.lengths.draw(rng, self.rows, self.cfg.rollout.samples_per_prompt)
        return self._steps[step]

    def learned(self, batch: TrainBatch) -> float:
        """Seconds of a train step; the ranks ask one after the other, and it is worked out once."""
        if self._learned[0] != batch.step:
            sizes = [len(item.prompt_ids) + len(item.sample.token_ids) for item in batch.items]
            self._learned = (batch.step, learner_seconds(sizes, self.costs.learner, self.learner_gpus))
            self.trained.append((batch.step, [item.prompt.id for item in batch.items]))
        return self._learned[1]


class TimedSampler:
    """Stands in for ``Sampler``."""

    def __init__(self, world: World) -> None:
        self.world, self.version = world, 0

    def sizes(self) -> dict[str, int]:
        return {"train": self.world.rows, "eval": EVALUATED}

    def probe(self) -> list[SampleGroup]:
        return []

    def update(self, snapshot: WeightSnapshot) -> Took:
        self.version, costs = snapshot.version, self.world.costs
        return Took(([], 0.0), costs.sync_seconds + (costs.switch_seconds if self.world.colocated else 0.0))

    def generate(self, request: RolloutRequest) -> Took:
        if request.split == "eval":
            return Took([self._group(f"eval/{row}", np.array([16])) for row in request.rows])
        groups, seconds = self._sampled(request, [], len(request.rows))[::2]
        return Took(groups, seconds)

    def generate_enough(self, request: RolloutRequest, begun: list[Begun], enough: int, pieces: int) -> Took:
        """Stops and goes on by the rule of the real one."""
        groups, left, seconds = self._sampled(request, begun, enough)
        return Took((*cut(groups, pieces), left), seconds)

    def _sampled(
        self, request: RolloutRequest, begun: list[Begun], enough: int
    ) -> tuple[list[SampleGroup], list[Begun], float]:
        """Complete groups, begun ones, and the time that sampling takes."""
        world, prompt, step = self.world, self.world.lengths.prompt_tokens, request.step
        earlier = sorted(begun, key=lambda one: -one.carried)
        going = [(one.row, one.step, one.carried) for one in earlier]
        done = [[len(sample.token_ids) for sample in one.samples] for one in earlier]
        going += [(row, step, 0) for row in request.rows]
        tokens = np.stack([world.tokens_of(first)[row] for row, first, _ in going])
        had = np.array(done + [[0] * tokens.shape[1]] * len(request.rows))
        ends, seconds = np.zeros(len(going)), 0.0
        running = tokens > had
        missing = enough - int((~running.any(axis=1)).sum())
        due = [place for place, one in enumerate(going) if one[2] >= world.cfg.rollout.max_carried]
        if missing > 0 or running[due].any():
            decoded = decode((tokens - had)[running], (prompt + had)[running], world.engine)
            finish = np.zeros(tokens.shape)
            finish[running] = decoded.finish
            ends = finish.max(axis=1)
            seconds = float(max([*np.sort(ends[running.any(axis=1)])[: max(missing, 0)], *ends[due]]))
            made = had + np.zeros(had.shape)
            made[running] += np.minimum(decoded.done(seconds), (tokens - had)[running])
            made[ends <= seconds] = tokens[ends <= seconds]
            # Weights of a new version have forgotten all: what was there is read again.
            read = prompt * int(running.any(axis=1).sum()) + int(had[running].sum())
            had, seconds = made.astype(np.int64), seconds + read / world.engine.prefill_tokens_per_second
        complete = [place for place in range(len(going)) if (had[place] == tokens[place]).all()][:enough]
        world.tokens += int(tokens[complete].sum())
        groups = [self._group(f"train/{going[p][0]}", tokens[p], going[p][2]) for p in complete]
        left = [self._begun(going[p], had[p], tokens[p]) for p in range(len(going)) if p not in set(complete)]
        return groups, left, seconds

    def _begun(self, going: tuple[int, int, int], had: np.ndarray, tokens: np.ndarray) -> Begun:
        row, step, carried = going
        samples = self._group(f"train/{row}", had).samples
        still = tuple(np.flatnonzero(had < tokens).tolist())
        return Begun(
            row, f"train/{row}", step, _IDS[:0], samples, still, carried=carried + 1, lag=self.world.cfg.controller.lag
        )

    def _group(self, prompt: str, tokens: np.ndarray, carried: int = 0) -> SampleGroup:
        most = self.world.cfg.rollout.max_new_tokens
        samples = [
            Sample(place, _IDS[:n], _LOGPROBS[:n], "", n >= most, self.version, mask=_MASK[:n])
            for place, n in enumerate(tokens.tolist())
        ]
        ids = _IDS[: self.world.lengths.prompt_tokens]
        return SampleGroup(Prompt(prompt, "?", (), "", "exact"), ids, samples, carried=carried)


class TimedRewarder:
    """Stands in for ``Rewarder``: rewards by chance, advantages by the real rule."""

    def __init__(self, world: World, seed: int) -> None:
        self.world, self.rng = world, np.random.default_rng([world.cfg.controller.seed, 7, seed])

    def ready(self) -> None:
        """Nothing is to be built."""

    def score(self, groups: list[SampleGroup]) -> Took:
        world, answers = self.world, 0
        for group in groups:
            answers += len(group.samples)
            n = len(group.samples)
            rules = (np.arange(n) % 2 if world.mixed else self.rng.random(n) < self.rng.random()).astype(np.float64)
            alone = len(rules) < 2
            advantages = np.zeros(1) if alone else group_advantages(rules, world.cfg.algorithm.grpo.std)
            for sample, rule, advantage in zip(group.samples, rules.tolist(), advantages.tolist(), strict=True):
                sample.reward = RewardParts(rule, 1.0, None, rule, {"exact": rule})
                sample.advantage = sample.rule_advantage = advantage
        return Took(groups, answers * world.costs.reward_seconds)

    def evaluate(self, *_: Any, **__: Any) -> Took:
        return Took(({}, []))

    def remarks(self, *_: Any) -> Took:
        return Took([])


class TimedLearner:
    """Stands in for one rank of ``LearnerStep``."""

    def __init__(self, world: World) -> None:
        self.world = world

    def free_port(self) -> int:
        return 1

    def join(self, host: str, port: int) -> None:
        """Nothing is to be built."""

    def train_step(self, batch: TrainBatch) -> Took:
        return Took({"learner/tokens": float(batch.grpo_tokens)}, self.world.learned(batch))

    def snapshot(self, version: int, *_: Any) -> WeightSnapshot:
        return WeightSnapshot(version, names=[], shapes=[], dtypes=[], parts=[])

    def probe_gap(self, *_: Any) -> Gap:
        return Gap(0.0, 0.0)

    def save(self, folder: Any) -> None:
        """There is nothing to be saved."""

    def load(self, folder: Any) -> None:
        """There is nothing to be loaded."""
