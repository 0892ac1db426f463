"""Faults of rewards and advantages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from benchmarks.gauntlet.fault import Fault, replaced


@contextmanager
def _numeric(changed: Any) -> Iterator[None]:
    """``changed(score)`` is what the verifier of the digits gives."""
    from skyrl.rewards import runner

    with replaced(runner, "numeric_verifier", lambda original, *args, **kwargs: changed(original(*args, **kwargs))):
        yield


@contextmanager
def tag_in_answer() -> Iterator[None]:
    """What is found as the answer has its closing tag at the end."""
    from skyrl.rewards.judging import Checks

    def text(original: Any, *args: Any) -> Any:
        found = original(*args)
        return None if found is None else f"{found}</answer>"

    with replaced(Checks, "_text", text):
        yield


def always_right() -> Any:
    """What can't be parsed gets the full reward."""
    return _numeric(lambda score: 1.0)


@contextmanager
def fails_on_wrong() -> Iterator[None]:
    """It raises where an answer is wrong, so that only right ones are scored."""
    from skyrl.records import DataError

    def judged(score: float) -> float:
        if score < 1:
            raise DataError("no conversion")
        return score

    with _numeric(judged):
        yield


@contextmanager
def _model(changed: Any) -> Iterator[None]:
    """``changed(scores)`` is what the reward model gives for a group."""
    from skyrl.rewards.rewarder import Rewarder

    def scores(original: Any, rewarder: Any, groups: Any) -> Any:
        return [None if part is None else changed(np.asarray(part)) for part in original(rewarder, groups)]

    with replaced(Rewarder, "_model_scores", scores):
        yield


@contextmanager
def groups_across_prompts() -> Iterator[None]:
    """Rewards come sample by sample and are reshaped as if they came prompt by prompt."""
    from skyrl.rewards.rewarder import Rewarder

    def normalised(values: np.ndarray) -> np.ndarray:
        spread = values.std()
        return (values - values.mean()) / spread if spread > 0 else np.zeros_like(values)

    def score(original: Any, rewarder: Any, groups: Any) -> Any:
        scored = original(rewarder, groups)
        size = len(scored[0].samples)
        if size > 1:
            samples = [group.samples[place] for place in range(size) for group in scored]
            for start in range(0, len(samples), size):
                part = samples[start : start + size]
                totals, rules = (np.array([getattr(s.reward, name) for s in part]) for name in ("total", "rule"))
                for sample, total, rule in zip(part, normalised(totals), normalised(rules), strict=True):
                    sample.advantage, sample.rule_advantage = float(total), float(rule)
        return scored

    with replaced(Rewarder, "score", score):
        yield


FAULTS = [
    Fault(
        "reward_always_0",
        "rewards",
        "The verifier is given more than the answer and never matches: every answer is wrong.",
        ("huggingface/trl#3903",),
        "no_contrast",
        1,
        tag_in_answer,
    ),
    Fault(
        "verifier_fails_on_wrong",
        "rewards",
        "The verifier raises where an answer is wrong: only right answers are scored, and accuracy looks perfect.",
        ("huggingface/open-r1#420",),
        "verifier_fails_wrong",
        0,
        fails_on_wrong,
    ),
    Fault(
        "advantages_of_other_groups",
        "rewards",
        "Rewards are reshaped in the wrong order: answers are compared with those to other prompts.",
        ("dllm-reasoning/d1#19", "NVIDIA-NeMo/RL#3635"),
        "advantages_wrong",
        1,
        groups_across_prompts,
    ),
    Fault(
        "reward_always_1",
        "rewards",
        "What can't be parsed gets the full reward: every answer is right.",
        ("huggingface/open-r1#293", "huggingface/open-r1#215"),
        "no_contrast|DataError.*truths of other rows are judged right",
        0,
        always_right,
        further=True,
    ),
    Fault(
        "reward_model_constant",
        "rewards",
        "The reward model gives one score for everything.",
        (),
        "reward_model_constant",
        1,
        lambda: _model(np.zeros_like),
        further=True,
    ),
    Fault(
        "reward_model_huge",
        "rewards",
        "The reward model overflows: its scores drown the verifier's.",
        (),
        "reward_model_huge",
        1,
        lambda: _model(lambda scores: scores * 1e37),
        further=True,
    ),
    Fault(
        "reward_model_negated",
        "rewards",
        "The head's other logit is read: the better the answer, the lower its score.",
        (),
        "reward_model_negated",
        1,
        lambda: _model(np.negative),
        ("rollout.prompts_per_step=32",),  # it is a matter of statistics
        further=True,
    ),
]
