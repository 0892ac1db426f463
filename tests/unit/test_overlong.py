"""Prompts that are too long, or that a processor refuses, are found before the first step: named, left out or cut."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from tiny_models import encoder, picture, prompt

from skyrl import run
from skyrl.crew.crew import Crew
from skyrl.crew.executor import MemberSpec
from skyrl.crew.local_executor import LocalExecutor
from skyrl.data.files import FilePrompts
from skyrl.data.parquet import write_parquet
from skyrl.data.stream import PromptStream
from skyrl.policy.lengths import PromptLengths
from skyrl.records import DataError, Prompt
from skyrl.rollout.sampler import Sampler, Unfit
from skyrl.settings import Config, Overlong
from skyrl.system import System, fitting_rows

LIMIT = 40
LONG = " ".join(f"word{n}" for n in range(40))
PROMPTS = [
    prompt("p/0", question="1+1?"),
    prompt("p/1", question=f"{LONG} 1+1?"),
    prompt("p/2", picture(0), question="Max?"),
    prompt("p/3", picture(0), question=f"{LONG} Max?"),
    prompt("p/4", question="2+2?"),
]


class Unmade(Sampler):
    """A sampler without an engine."""

    def __init__(self, cfg: Config, datasets: dict[str, Any]) -> None:
        self.cfg, self.datasets, self.encoder = cfg, datasets, encoder()
        self._lengths = PromptLengths(self.encoder, cfg.rollout.max_prompt_tokens)


def system(
    overlong: Overlong, train: Any = PROMPTS, held_out: Any = PROMPTS, members: int = 1
) -> tuple[Config, System]:
    cfg = Config()
    cfg.data.source, cfg.data.overlong, cfg.rollout.max_prompt_tokens = "own:prompts", overlong, LIMIT
    specs = [MemberSpec(f"rollout-{n}", Unmade, (cfg, {"train": train, "eval": held_out}), 0.0) for n in range(members)]
    return cfg, System(Crew(LocalExecutor(), specs, 60.0), None)  # type: ignore[arg-type]


def test_all_that_are_too_long_are_named_before_the_first_step() -> None:
    cfg, made = system(Overlong.error)
    with pytest.raises(DataError) as caught:
        fitting_rows(cfg, made, "train", range(5), Console(file=io.StringIO()))
    text = str(caught.value)
    assert "2 of 5 train prompts can't be asked (rollout.max_prompt_tokens=40; data.overlong=drop leaves" in text
    for row in (1, 3):
        assert f"row {row}: prompt 'p/{row}' has {len(encoder().encode(PROMPTS[row])[0])} tokens" in text
    assert "row 0" not in text and "row 2" not in text


def test_dropped_rows_are_counted_and_what_is_left_keeps_its_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skyrl.system.MEASURED_TOGETHER", 2)
    cfg, made = system(Overlong.drop, members=2)
    shown = Console(file=io.StringIO(), width=200)
    assert fitting_rows(cfg, made, "train", range(5), shown) == [0, 2, 4]
    assert "data.overlong=drop: 2 of 5 train prompts are left out (over 40 tokens)" in shown.file.getvalue()  # type: ignore[attr-defined]
    assert fitting_rows(cfg, made, "train", [0, 3, 4], shown) == [0, 4]  # of a pool
    assert list(fitting_rows(cfg, made, "train", [0, 4], shown)) == [0, 4]
    with pytest.raises(DataError, match="leaves no train prompt"):
        fitting_rows(cfg, made, "train", [1, 3], shown)


def test_a_run_trains_on_what_is_left_and_evaluates_what_is_left() -> None:
    cfg, made = system(Overlong.drop, members=2)
    rows = run.fitting(cfg, made, None, Console(file=io.StringIO()))
    assert rows == [0, 2, 4]
    for sizes in made.rollouts.each(Sampler.sizes):
        assert sizes == {"train": 5, "eval": 3}
    for member in made.rollouts.members:
        assert [member.build().datasets["eval"][row].id for row in range(3)] == ["p/0", "p/2", "p/4"]
    # A resumed run finds the same rows, so the position in them means the same prompts.
    again = system(Overlong.drop)
    stream, other = (
        PromptStream(len(rows), 0),
        PromptStream(len(run.fitting(*again, None, Console(file=io.StringIO())) or []), 0),
    )
    stream.take(4)
    other.load_state_dict(stream.state_dict())
    assert stream.take(5) == other.take(5)


def test_where_all_fit_nothing_changes() -> None:
    fit = [PROMPTS[0], PROMPTS[2], PROMPTS[4]]
    cfg, made = system(Overlong.drop, fit, fit)
    assert run.fitting(cfg, made, None, Console(file=io.StringIO())) is None
    assert made.rollouts.one(Sampler.sizes) == {"train": 3, "eval": 3}
    cfg.data.source = "digits"
    assert run.fitting(cfg, None, [1, 2], Console(file=io.StringIO())) == [1, 2]  # type: ignore[arg-type]


def test_cut_prompts_are_asked_cut_and_their_ends_stay() -> None:
    cfg, made = system(Overlong.cut)
    assert list(fitting_rows(cfg, made, "train", range(5), Console(file=io.StringIO()))) == [0, 1, 2, 3, 4]
    member = made.rollouts.members[0].build()
    asked = [member._prompt("train", row) for row in range(5)]
    assert asked[0] is PROMPTS[0]
    for row in (1, 3):
        assert len(encoder().encode(asked[row])[0]) <= LIMIT
        assert PROMPTS[row].question.endswith(asked[row].question) and asked[row].question.endswith("?")


@pytest.mark.parametrize("overlong", list(Overlong))
def test_what_a_processor_refuses_is_an_error_whatever_is_done_with_long_ones(
    tmp_path: Path, overlong: Overlong, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A picture of 3x900 pixels passes the check of the file; Qwen's processor refuses it."""
    flat = Prompt("flat", "Max?", (np.zeros((3, 900, 3), np.uint8),), "1", "exact")
    write_parquet(tmp_path / "p.parquet", [PROMPTS[0], flat])
    cfg, made = system(overlong, FilePrompts(tmp_path / "p.parquet"))
    member = made.rollouts.members[0].build()
    whole = member.encoder.encode_anew

    def refusing(asked: Prompt) -> Any:
        if any(max(one.shape[:2]) / min(one.shape[:2]) > 200 for one in asked.images):
            raise ValueError("absolute aspect ratio must be smaller than 200, got 300.0")
        return whole(asked)

    monkeypatch.setattr(member.encoder, "encode_anew", refusing)
    with pytest.raises(
        DataError, match="row 1: prompt 'flat': the model's processor refuses its pictures of 900x3 pix"
    ):
        fitting_rows(cfg, made, "train", range(2), Console(file=io.StringIO()))


def test_rows_that_are_made_at_a_cost_are_not_looked_at() -> None:
    class Costly:
        def __len__(self) -> int:
            return 10**9

        def __getitem__(self, row: int) -> Prompt:
            raise AssertionError

    _, made = system(Overlong.error, Costly())
    assert made.rollouts.one(Sampler.unfit, range(10), "train") == []
    assert made.rollouts.one(Sampler.unfit, [1], "eval")[0][:1] == (1,)
    assert isinstance(made.rollouts.one(Sampler.unfit, [1], "eval")[0], Unfit)
