"""How a reward function wants to be called, by the names of its parameters: skyrl's own way, TRL's, verl's or EasyR1's.

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

from skyrl.records import Check, DataError, Prompt, Sample, SampleGroup, Turn

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
    verl_batch = "verl_batch"
    """``compute_score(data_sources, solution_strs, ground_truths, extra_infos)``, once for a whole group."""
    easyr1 = "easyr1"
    """``compute_score(reward_input)``; in older versions ``(predict, ground_truth)``."""
    easyr1_batch = "easyr1_batch"
    """``compute_score(reward_inputs)``, in older versions ``(predicts, ground_truths)``, once for a whole group."""
    trl = "trl"
    """``f(prompts, completions, **columns)``, once for a whole group."""


GROUPED = (Takes.trl, Takes.verl_batch, Takes.easyr1_batch)
"""Those that are called once for all answers of a group."""
_WORDS = {
    Takes.trl: TRL_WORDS,
    Takes.verl: {"solution_str"},
    Takes.verl_batch: {"solution_strs"},
    Takes.easyr1: {"reward_input", "predict", "predict_str"},
    Takes.easyr1_batch: {"reward_inputs", "predicts"},
}
"""Parameters that tell whose a function is."""
_GIVEN = {
    Takes.verl: {"data_source", "solution_str", "ground_truth", "extra_info"},
    Takes.easyr1: {"reward_input", "predict", "predict_str", "ground_truth"},
}
_GIVEN |= {
    Takes.verl_batch: {f"{name}s" for name in _GIVEN[Takes.verl]},
    Takes.easyr1_batch: {f"{name}s" for name in _GIVEN[Takes.easyr1]},
}
"""All that they are given; TRL's functions also get the columns of the row."""
_SCORE = {Takes.verl: "score", Takes.verl_batch: "score", Takes.easyr1: "overall", Takes.easyr1_batch: "overall"}
"""Where the reward stands, if a function returns several numbers by name."""


def convention(function: Callable[..., Any], reference: str) -> Takes:
    """How to call a function; :class:`DataError` if its parameters follow none of the conventions."""
    try:
        parameters = inspect.signature(function).parameters
    except ValueError as error:  # some functions written in C
        raise DataError(f"verifier {reference!r} does not say what it takes: {error}") from error
    takes = next((takes for takes, words in _WORDS.items() if words & parameters.keys()), None)
    if takes is not None:
        if takes in _GIVEN and (lacking := sorted({*_needed(parameters)} - _GIVEN[takes])):
            raise DataError(
                f"verifier {reference!r} needs {', '.join(lacking)}, which {takes.value} doesn't give: allowed are "
                f"{', '.join(sorted(_GIVEN[takes]))}; the others need a default (functools.partial sets one)"
            )
        return takes
    more = list(parameters.values())[2:]
    optional = all(one.default is not one.empty or one.kind in (one.VAR_POSITIONAL, one.VAR_KEYWORD) for one in more)
    if list(parameters)[:2] == ["answer", "truth"] and optional:
        return Takes.text if getattr(function, "wants_text", False) is True else Takes.answer
    raise DataError(
        f"verifier {reference!r} takes ({', '.join(parameters)}); allowed: (answer, truth), verl's (data_source, "
        "solution_str, ground_truth, extra_info), EasyR1's (reward_inputs) or (reward_input), or TRL's (prompts, "
        "completions, **columns)"
    )


# ---------------------------------------------------------------- what they are given


def arguments(takes: Takes, prompt: Prompt, check: Check, sample: Sample) -> dict[str, Any]:
    """What a function of verl or EasyR1 that judges one answer is given."""
    return _verl_arguments(prompt, check, sample.text) if takes is Takes.verl else _easyr1_arguments(check, sample)


def group_arguments(takes: Takes, group: SampleGroup, check: Check, max_steps: int) -> dict[str, Any]:
    """What a function is given that judges the G answers of a group at once: lists of length G."""
    if takes is Takes.trl:
        return _trl_arguments(group, check, max_steps)
    one = Takes.verl if takes is Takes.verl_batch else Takes.easyr1
    each = [arguments(one, group.prompt, check, sample) for sample in group.samples]
    return {f"{name}s": [given[name] for given in each] for name in each[0]}


def _easyr1_arguments(check: Check, sample: Sample) -> dict[str, Any]:
    one = {"response": sample.text, "response_length": len(sample.token_ids), "ground_truth": check.truth}
    return {"reward_input": one, "predict": sample.text, "predict_str": sample.text, "ground_truth": check.truth}


def _verl_arguments(prompt: Prompt, check: Check, text: str) -> dict[str, Any]:
    """``data_source``, ``extra_info`` and the truth are the row's own, as its file has them; where it has no
    ``data_source``, the kind of its question."""
    given, truth = prompt.extra.get("reward_model"), check.truth
    if isinstance(given, Mapping) and "ground_truth" in given and truth == prompt.answer:
        truth = given["ground_truth"]  # not always a text there
    more = prompt.extra.get("extra_info") or {}
    return {
        "data_source": prompt.extra.get("data_source", prompt.kind),
        "solution_str": text,
        "ground_truth": truth,
        "extra_info": dict(more) if isinstance(more, Mapping) else more,
    }


def _trl_arguments(group: SampleGroup, check: Check, max_steps: int) -> dict[str, Any]:
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
        One score; of :data:`GROUPED` functions one for each answer, of TRL's ``None`` where it has nothing to say.

    Raises:
        DataError: if it needs what the row does not have, or returns anything else.
    """
    if takes in (Takes.answer, Takes.text):
        limit = {k: given[k] for k in ("seconds",) if k in inspect.signature(function).parameters and k in given}
        return [checked_score(_result(function(given["answer"], given["truth"], **limit)))]
    if takes is Takes.trl:
        loggers = dict.fromkeys(("log_metric", "log_extra"), _nothing)  # what they would log, nobody asked for here
        given = given | loggers | {"trainer_state": SimpleNamespace(**given["trainer_state"])}
    found = _result(function(**_accepted(function, given)))
    if takes not in GROUPED:
        return [_number(found, _SCORE[takes])]
    count = next(len(given[word]) for word in _WORDS[takes] if word in given)
    if not hasattr(found, "__len__") or isinstance(found, (str, bytes, Mapping)) or len(found) != count:
        raise DataError(
            f"the function returned {str(found)[:80]!r}; needed: a list of {count} numbers, one for each answer"
        )
    if takes is Takes.trl:
        return [None if score is None else finite_score(score) for score in found]
    return [_number(score, _SCORE[takes]) for score in found]


def _number(found: Any, name: str) -> float:
    """A score that may stand among others, under its name."""
    if isinstance(found, Mapping):
        if name not in found:
            raise DataError(f"the function returned a mapping with {', '.join(map(str, found))}; needed: {name}")
        found = found[name]
    return finite_score(found)


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
    parameters = inspect.signature(function).parameters
    if missing := [name for name in _needed(parameters) if name not in given]:
        raise DataError(f"the function needs {', '.join(missing)}; of this row it can get {', '.join(sorted(given))}")
    if any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
        return given
    return {name: given[name] for name in parameters if name in given}


def _needed(parameters: Mapping[str, inspect.Parameter]) -> list[str]:
    """Names of those without a default."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [name for name, one in parameters.items() if one.default is one.empty and one.kind in kinds]
