"""What engines and learners take: a cost model, read from a YAML file, and the time of a rollout and of a train step by
it. Nothing here knows of the loop."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated

import numpy as np
import yaml
from pydantic import Field, NonNegativeFloat, PositiveFloat, ValidationError, model_validator

from skyrl.records import ConfigError
from skyrl.schema import Count, Settings

FOLDER = Path(__file__).parent / "costs"


class EngineCost(Settings):
    """One rollout engine."""

    gpus: Count = 1
    """GPUs of one engine (``rollout.tensor_parallel_size``)."""
    running: Annotated[list[Count], Field(min_length=1)]
    """Numbers of sequences decoded together at which the rate was measured, ascending from 1."""
    tokens_per_second: Annotated[list[PositiveFloat], Field(min_length=1)]
    """New tokens a second of the whole engine at each of them, with short contexts. Between two of them the time of a
    decoding step is interpolated; beyond the last it grows as between the last two (or with one, in proportion)."""
    context_seconds: NonNegativeFloat = 0.0
    """Time that one more token of context, of any running sequence, adds to each decoding step: the bytes of its keys
    and values by the memory's bandwidth."""
    prefill_tokens_per_second: PositiveFloat = 1e12
    """Prompt tokens read a second; the prompt of a group is read once."""
    max_running: Count = 256
    """Sequences decoded together at most (``rollout.max_num_seqs``); the others wait."""

    @model_validator(mode="after")
    def _table(self) -> EngineCost:
        ascending = all(a < b for a, b in zip(self.running, self.running[1:], strict=False))
        if self.running[0] != 1 or not ascending or len(self.running) != len(self.tokens_per_second):
            raise ValueError("running must ascend from 1 and have one entry in tokens_per_second each")
        return self

    @cached_property
    def steps(self) -> np.ndarray:
        """float64 [max_running]: seconds of a decoding step of 1, 2 … sequences with empty contexts."""
        places = np.arange(1, self.max_running + 1)
        known = np.array(self.running) / np.array(self.tokens_per_second)
        steps: np.ndarray = np.interp(places, self.running, known)
        beyond = places > self.running[-1]
        one = self.running[-1] - (self.running[-2] if len(known) > 1 else 0)
        slope = (known[-1] - (known[-2] if len(known) > 1 else 0.0)) / one
        steps[beyond] = known[-1] + (places[beyond] - self.running[-1]) * slope
        return steps


class LearnerCost(Settings):
    """All ranks together."""

    tokens_per_second: PositiveFloat
    """Tokens of the batch (prompts and answers) that one GPU trains a second, all passes included, where attention
    costs nothing."""
    attention_tokens: PositiveFloat | None = None
    """Length of a sequence at which attention doubles its cost; null means that it costs nothing."""
    fixed_seconds: NonNegativeFloat = 0.0
    """What a step takes whatever the number of GPUs: optimizer, collectives."""
    min_gpus: Count = 1
    """Fewer can't hold the model and its optimizer."""


class CostModel(Settings):
    """A model on a kind of GPU."""

    about: str
    """Where the numbers come from."""
    engines: Annotated[list[EngineCost], Field(min_length=1)]
    """The ways in which an engine can be built; the search chooses one."""
    learner: LearnerCost
    reward_seconds: NonNegativeFloat = 0.0
    """Scoring one answer, in one reward worker."""
    buffer_seconds: NonNegativeFloat = 0.0
    """Making the batch of a step."""
    sync_seconds: NonNegativeFloat = 0.0
    """Sending the weights and proving it, however many engines."""
    switch_seconds: NonNegativeFloat = 0.0
    """With engines and learner on the same GPUs: unloading the one and loading the other, both ways together."""


def read_costs(name: str) -> CostModel:
    """A cost model by its name in ``skyrl/simulate/costs``, or of a YAML file.

    Raises:
        ConfigError: naming the file and what is wrong with it.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(one.stem for one in FOLDER.glob("*.yaml")))
        raise ConfigError(f"--costs {name}: no such file; allowed: a YAML file, or one of {known}")
    try:
        return CostModel.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        raise ConfigError(f"{path}: {problems(error)}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: {error}") from error


def problems(error: ValidationError) -> str:
    """What is wrong with which field, in one line."""
    return "; ".join(f"{'.'.join(map(str, one['loc'])) or 'the file'}: {one['msg']}" for one in error.errors())


@dataclass(slots=True)
class Decoded:
    """When each sequence of one engine ends, and how far each is at any time before."""

    finish: np.ndarray
    """float64 [n]: seconds."""
    admitted: np.ndarray
    """float64 [n]: value of the counter when it was let in."""
    times: np.ndarray
    """float64 [k]: seconds at which a sequence ended, ascending from 0 …"""
    counter: np.ndarray
    """… float64 [k]: and decoding steps made until then."""

    def done(self, seconds: float) -> np.ndarray:
        """float64 [n]: tokens that each has after so many seconds, in whole decoding steps."""
        steps = np.interp(seconds, self.times, self.counter)
        return np.floor(np.clip(steps - self.admitted, 0.0, None) + 1e-6)


def decode(lengths: np.ndarray, context: np.ndarray, engine: EngineCost) -> Decoded:
    """Continuous batching: every running sequence gets one token a decoding step, and where one ends the next begins.

    Args:
        lengths: [n] tokens still to come, 1 or more.
        context: [n] tokens that are there already (prompt, and what was decoded before).
    """
    n, slots = len(lengths), engine.max_running
    if n <= slots:
        return _together(np.asarray(lengths, np.float64), np.asarray(context, np.float64), engine)
    finish, admitted, steps_of = np.zeros(n), np.zeros(n), engine.steps
    # While so many run, a step takes base + context_seconds · Σ (context + counter − admitted).
    queue = [(float(lengths[i]), i) for i in range(slots)]
    heapq.heapify(queue)
    counter, now, waiting = 0.0, 0.0, slots
    offset = float(context[:slots].sum())  # Σ (context − admitted) of those that run
    times, counters = [0.0], [0.0]
    while queue:
        end, one = heapq.heappop(queue)
        running = len(queue) + 1
        steps = end - counter
        held = offset + running * (counter + steps / 2)
        now += steps * (float(steps_of[running - 1]) + engine.context_seconds * held)
        counter = end
        finish[one] = now
        offset -= float(context[one]) - admitted[one]
        times.append(now)
        counters.append(counter)
        if waiting < n:
            admitted[waiting] = counter
            offset += float(context[waiting]) - counter
            heapq.heappush(queue, (counter + float(lengths[waiting]), waiting))
            waiting += 1
    return Decoded(finish, admitted, np.array(times), np.array(counters))


def _together(lengths: np.ndarray, context: np.ndarray, engine: EngineCost) -> Decoded:
    """All of them run from the beginning."""
    order = np.argsort(lengths, kind="stable")
    ends = lengths[order]
    steps = np.diff(ends, prepend=0.0)
    running = np.arange(len(ends), 0, -1)
    left = np.cumsum(context[order][::-1])[::-1]  # of those that run
    held = left + running * (ends - steps / 2)
    times = np.cumsum(steps * (engine.steps[running - 1] + engine.context_seconds * held))
    finish = np.empty(len(ends))
    finish[order] = times
    return Decoded(finish, np.zeros(len(ends)), np.append(0.0, times), np.append(0.0, ends))


def rollout_seconds(lengths: np.ndarray, prompt_tokens: int, engine: EngineCost, engines: int) -> float:
    """Time until the last of a step's answers is there.

    Args:
        lengths: [prompts, samples] tokens of each answer; the engines share the prompts as in the loop.
    """
    size, slowest = -(-len(lengths) // engines), 0.0
    for start in range(0, len(lengths), size):
        own = lengths[start : start + size]
        decoded = decode(own.ravel(), np.full(own.size, prompt_tokens), engine)
        slowest = max(slowest, decoded.finish.max() + len(own) * prompt_tokens / engine.prefill_tokens_per_second)
    return float(slowest)


def learner_seconds(tokens: Sequence[int] | np.ndarray, cost: LearnerCost, gpus: int) -> float:
    """One train step.

    Args:
        tokens: [n] of each sequence, prompt and answer. A sequence is not cut: a step takes at least as long as its
            longest one takes on one GPU.
    """
    lengths = np.asarray(tokens, np.float64)
    if not len(lengths):
        return 0.0
    weights = lengths * (1 + (lengths / cost.attention_tokens if cost.attention_tokens else 0.0))
    busiest = max(float(weights.sum()) / gpus, float(weights.max()))
    return cost.fixed_seconds + busiest / cost.tokens_per_second
