"""How a reward function wants to be called, by the names of its parameters: skyrl's own way, TRL's or verl's.

The functions of other systems get the whole text and the row's columns, and may give any finite number.
"""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Callable, Mapping
from enum import Enum
from numbers import Real
from types import SimpleNamespace
from typing import Any

from skyrl.records import Check, DataError, Prompt, SampleGroup, Turn

TRL_WORDS = {"prompts", "completions", "completion_ids", "completions_ids"}
TRL_OWN = {*TRL_WORDS, "prompt", "completion", "trainer_state", "log_metric", "log_extra"}
"""Names that no column of a row may take over in a call of a TRL function."""
TRUTHS = ("answer", "solution", "ground_truth")
"""What other systems' data sets call the truth: a function that asks for one of these gets it, also if the row has no
such column."""


class Takes(Enum):
    """What a verifier is given."""

    answer = "answer"
    """``(answer, truth)``: what :meth:`AnswerForm.find` found."""
    text = "text"
    """The same, but all that :meth:`AnswerForm.behind` leaves: it has the attribute ``wants_text = True``."""
    verl = "verl"
    """``compute_score(data_source, solution_str, ground_truth, extra_info)``."""
    trl = "trl"
    """``f(prompts, completions, **columns)``, once for a whole group."""


def convention(function: Callable[..., Any], reference: str) -> Takes:
    """How to call a function; :class:`DataError` if its parameters follow none of the conventions."""
    try:
        parameters = inspect.signature(function).parameters
    except ValueError as error:  # some functions written in C
        raise DataError(f"verifier {reference!r} does not say what it takes: {error}") from error
    if TRL_WORDS & parameters.keys():
        return Takes.trl
    if "solution_str" in parameters:
        return Takes.verl
    more = list(parameters.values())[2:]
    optional = all(one.default is not one.empty or one.kind in (one.VAR_POSITIONAL, one.VAR_KEYWORD) for one in more)
    if list(parameters)[:2] == ["answer", "truth"] and optional:
        return Takes.text if getattr(function, "wants_text", False) is True else Takes.answer
    raise DataError(
        f"verifier {reference!r} takes ({', '.join(parameters)}); allowed: (answer, truth), verl's (data_source, "
        "solution_str, ground_truth, extra_info), or TRL's (prompts, completions, **columns)"
    )


# ---------------------------------------------------------------- what they are given


def verl_arguments(prompt: Prompt, check: Check, text: str) -> dict[str, Any]:
    """``data_source``, ``extra_info`` and the truth are the row's own, as its file has them; where it has no
    ``data_source``, the kind of its question."""
    given, truth = prompt.extra.get("reward_model"), check.truth
    if isinstance(given, Mapping) and "ground_truth" in given and truth == prompt.answer:
        truth = given["ground_truth"]  # not always a text there
    return {
        "data_source": prompt.extra.get("data_source", prompt.kind),
        "solution_str": text,
        "ground_truth": truth,
        "extra_info": dict(prompt.extra.get("extra_info") or {}),
    }


def trl_arguments(group: SampleGroup, check: Check, max_steps: int) -> dict[str, Any]:
    """What TRL gives, for the G answers of one group; every column is a list of length G."""
    prompt, samples = group.prompt, group.samples
    # As the row has it: TRL tells a conversation from a text by that, and gives completions in the same form.
    asked: Any = prompt.extra.get("prompt")
    if asked is None:
        asked = [_message(turn) for turn in prompt.conversation] if prompt.turns else prompt.question
    columns = dict.fromkeys(TRUTHS, check.truth) | {k: v for k, v in prompt.extra.items() if k not in TRL_OWN}
    said = [s.text if isinstance(asked, str) else [{"role": "assistant", "content": s.text}] for s in samples]
    ids = [sample.token_ids.tolist() for sample in samples]
    return {name: [value] * len(samples) for name, value in columns.items()} | {
        "prompts": [asked] * len(samples),
        "completions": said,
        "completion_ids": ids,
        "completions_ids": ids,
        "trainer_state": {"global_step": max(s.policy_version for s in samples), "max_steps": max_steps},
    }


def _message(turn: Turn) -> dict[str, Any]:
    if None not in turn.parts:
        return {"role": turn.role, "content": "".join(part or "" for part in turn.parts)}
    parts = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in turn.parts]
    return {"role": turn.role, "content": parts}


# ---------------------------------------------------------------- the call, in the verifier process


def scores(function: Callable[..., Any], takes: Takes, given: dict[str, Any]) -> list[float | None]:
    """Call a verifier.

    Returns:
        One score; of a TRL function one for each completion, ``None`` where it has nothing to say of this row.

    Raises:
        DataError: if it needs what the row does not have, or returns anything else.
    """
    if takes in (Takes.answer, Takes.text):
        limit = {k: given[k] for k in ("seconds",) if k in inspect.signature(function).parameters and k in given}
        return [checked_score(_result(function(given["answer"], given["truth"], **limit)))]
    if takes is Takes.verl:
        found = _result(function(**_accepted(function, given)))
        if isinstance(found, Mapping):
            if "score" not in found:
                raise DataError(f"the function returned a mapping with {', '.join(map(str, found))}; needed: score")
            found = found["score"]
        return [finite_score(found)]
    state = SimpleNamespace(**given["trainer_state"])
    loggers = dict.fromkeys(("log_metric", "log_extra"), _nothing)  # what they would log, nobody asked for here
    found = _result(function(**_accepted(function, given | loggers | {"trainer_state": state})))
    count = len(given["completions"])
    if not hasattr(found, "__len__") or isinstance(found, (str, bytes, Mapping)) or len(found) != count:
        raise DataError(
            f"the function returned {str(found)[:80]!r}; needed: a list of {count} numbers, one for each answer"
        )
    return [None if score is None else finite_score(score) for score in found]


def checked_score(score: Any) -> float:
    """The score as a float; :class:`DataError` if it isn't a number in [0, 1]."""
    if isinstance(score, Real) and 0.0 <= float(score) <= 1.0:
        return float(score)
    got = float(score) if isinstance(score, Real) else f"{str(score)[:80]!r} ({type(score).__name__})"
    raise DataError(f"the verifier returned {got}; allowed: a number in [0, 1]")


def finite_score(score: Any) -> float:
    """The score, perhaps a tensor of one element, as a float; :class:`DataError` if it isn't a finite number."""
    number = score.item() if not isinstance(score, Real) and hasattr(score, "item") else score
    if isinstance(number, Real) and math.isfinite(number):
        return float(number)
    raise DataError(f"the function returned {str(score)[:80]!r} ({type(score).__name__}); allowed: a finite number")


def _result(found: Any) -> Any:
    """Functions written with ``async`` give something to wait for."""
    return asyncio.run(_awaited(found)) if inspect.isawaitable(found) else found


async def _awaited(found: Any) -> Any:
    return await found


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass


def _accepted(function: Callable[..., Any], given: dict[str, Any]) -> dict[str, Any]:
    """The arguments that a function has a parameter for, all if it takes any; :class:`DataError` if it needs others."""
    parameters = inspect.signature(function).parameters.values()
    plain = [one for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
    if missing := [one.name for one in plain if one.default is one.empty and one.name not in given]:
        raise DataError(f"the function needs {', '.join(missing)}; of this row it can get {', '.join(sorted(given))}")
    if any(one.kind is one.VAR_KEYWORD for one in parameters):
        return given
    return {one.name: given[one.name] for one in plain if one.name in given}
