"""Reward functions in the ways of TRL, verl and EasyR1, for test_conventions.py. The verifier process imports them by
name."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import time
from pathlib import Path
from typing import Any

# ---------------------------------------------------------------- TRL


def trl_equal(completions, ground_truth, **kwargs):
    return [1.0 if said == truth else -1.0 for said, truth in zip(completions, ground_truth, strict=True)]


def trl_chat(prompts, completions, **kwargs):
    """Of a conversational data set: the last word of the question is the answer."""
    return [
        float(said[0]["content"] == asked[-1]["content"].split()[-1])
        for asked, said in zip(prompts, completions, strict=True)
    ]


def trl_tokens(completion_ids, **kwargs):
    return [float(len(ids)) for ids in completion_ids]


def trl_some(completions, task, **kwargs):
    return [2.0 if one == "sum" else None for one in task]


async def trl_waits(prompts, completions, **kwargs):
    await asyncio.sleep(0.01)
    return [0.5] * len(completions)


def trl_asks_for_everything(prompts, completions, completion_ids, trainer_state, log_metric, log_extra, **kwargs):
    log_metric("seen", 1.0)
    log_extra("text", completions)
    whole = {"prompts": prompts, "completions": completions, "ids": completion_ids, "columns": kwargs}
    Path(kwargs["file"][0]).write_text(json.dumps(whole | {"step": trainer_state.global_step}))
    return [1.0] * len(prompts)


def trl_strict(completions, answer):
    return [float(said == truth) for said, truth in zip(completions, answer, strict=True)]


def trl_wants_a_column(completions, difficulty, **kwargs):
    return [1.0] * len(completions)


def trl_too_few(completions, **kwargs):
    return [1.0]


def trl_one_number(completions, **kwargs):
    return 1.0


def trl_nan(completions, **kwargs):
    return [float("nan")] * len(completions)


# ---------------------------------------------------------------- verl


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return float(solution_str.endswith(ground_truth)) if data_source == "sums" else -1.0


def verl_parts(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    return {"score": extra_info["index"] / 4, "acc": True, "pred": solution_str}


def verl_short(solution_str, ground_truth, method="strict"):
    return 0.1 if method == "strict" else 0.0


def verl_no_score(data_source, solution_str, ground_truth, extra_info):
    return {"acc": 1.0}


def verl_truth_type(data_source, solution_str, ground_truth, extra_info):
    return float(isinstance(ground_truth, list))


async def verl_waits(data_source, solution_str, ground_truth, extra_info):
    return 0.25


def verl_lists(data_sources, solution_strs, ground_truths, extra_infos):
    rows = zip(data_sources, solution_strs, ground_truths, extra_infos, strict=True)
    return [{"score": float(said == truth) + more.get("index", 0)} for _, said, truth, more in rows]


def verl_fails(data_source, solution_str, ground_truth, extra_info):
    raise RuntimeError(f"boom {extra_info}")


# ---------------------------------------------------------------- EasyR1


def easyr1_math(reward_inputs: list[dict[str, Any]], format_weight: float = 0.1) -> list[dict[str, float]]:
    """As its examples of today are written, ``REWARD_TYPE = "batch"``."""
    if not isinstance(reward_inputs, list):
        raise ValueError("Please use `reward_type=batch`")
    scores = []
    for one in reward_inputs:
        accuracy, kept = float(one["response"].endswith(one["ground_truth"])), float("<think>" in one["response"])
        overall = (1 - format_weight) * accuracy + format_weight * kept
        scores.append({"overall": overall, "format": kept, "accuracy": accuracy})
    return scores


def easyr1_r1v(reward_input: dict[str, Any], format_weight: float = 0.5) -> dict[str, float]:
    """``REWARD_TYPE = "sequential"``"""
    if not isinstance(reward_input, dict):
        raise ValueError("Please use `reward_type=sequential`")
    return {"overall": reward_input["response_length"] / 100, "accuracy": 0.0}


def easyr1_older(predict: str, ground_truth: str, format_weight: float = 0.5) -> dict[str, float]:
    return {"overall": float(predict == ground_truth), "format": 1.0}


def easyr1_oldest(predict_str: str, ground_truth: str) -> float:
    return float(predict_str == ground_truth)


def easyr1_older_batch(predicts: list[str], ground_truths: list[str]) -> list[dict[str, float]]:
    return [{"overall": float(said == truth)} for said, truth in zip(predicts, ground_truths, strict=True)]


def easyr1_no_overall(reward_inputs):
    return [{"accuracy": 1.0} for _ in reward_inputs]


def easyr1_one_for_all(reward_inputs):
    return {"overall": 1.0}


def wants_more(reward_inputs: list[dict[str, Any]], max_response_length: int, factor: float = 1.0):
    return [{"overall": one["response_length"] / max_response_length} for one in reward_inputs]


partly = functools.partial(wants_more, max_response_length=10)

# ---------------------------------------------------------------- ours, and nobody's


def text_length(answer: str, truth: str) -> float:
    return min(1.0, len(answer) / 100)


text_length.wants_text = True  # type: ignore[attr-defined]


def slow(answer: str, truth: str) -> float:
    time.sleep(0.5)
    return 1.0


def counted(answer: str, truth: str) -> float:
    """Leaves a mark in the folder ``truth`` for each call."""
    Path(truth, f"{time.monotonic_ns()}-{os.getpid()}").touch()
    return 1.0


def surroundings(answer: str, truth: str) -> float:
    """Writes what it finds around itself into the file ``truth``."""
    Path("here").touch()
    Path(truth).write_text(json.dumps({"environment": dict(os.environ), "folder": os.getcwd()}))
    return 1.0


def fails_if_wrong(answer: str, truth: str) -> float:
    assert answer == truth, f"{answer} is not {truth}"
    return 1.0


def other_names(response: str, label: str) -> float:
    return 1.0


def three(answer: str, truth: str, third: Any) -> float:
    return 1.0


def optional(answer: str, truth: str, tolerance: float = 0.1) -> float:
    return float(answer == truth)
