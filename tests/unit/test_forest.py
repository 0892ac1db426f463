"""One row for all answers to a prompt: its structure, its attention, and that nothing but rounding is between it and
the plain rows. A mask, a position or a parent that is off by one must be seen."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skyrl.policy import attention
from skyrl.policy.forest import Forest, collate_forest
from skyrl.policy.packing import Row, forest_tokens
from skyrl.records import DataError, Prompt


def row(name: str, prompt: list[int], answer: list[int]) -> Row:
    return Prompt(name, "q", (), "1", "exact"), np.array(prompt, np.int32), np.array(answer, np.int32)


# ---------------------------------------------------------------- structure


def test_by_hand() -> None:
    rows = [row("a", [1, 2], [5, 8]), row("b", [3], [4]), row("a", [1, 2], [5, 6, 7]), row("a", [1, 2], [5, 8])]
    forest = Forest.of(rows)
    assert [(prompt.id, ids.tolist(), branches.tolist()) for prompt, ids, branches in forest.trees] == [
        ("a", [1, 2], [5, 6, 7, 8]),
        ("b", [3], [4]),
    ]
    assert forest.ends.tolist() == [6, 6, 6, 5, 5, 6, 8, 8]
    assert forest.depths.tolist() == [0, 1, 2, 3, 4, 3, 0, 1]
    assert forest.parents.tolist() == [0, 0, 1, 2, 3, 2, 6, 6]
    assert forest.places.tolist() == [0, 3, 4, 0, 1, 2, 0, 3]
    assert forest_tokens(rows) == 8 and forest_tokens([]) == 0


tokens = st.lists(st.integers(256, 258), min_size=1, max_size=6)  # two bytes, so that their order is not the numbers'


@st.composite
def groups(draw: st.DrawFn) -> list[Row]:
    prompts = [draw(tokens) for _ in range(3)]
    asked = draw(st.lists(st.tuples(st.integers(0, 2), tokens), min_size=1, max_size=12))
    return [row(str(which), prompts[which], answer) for which, answer in asked]


@settings(deadline=None)
@given(groups())
def test_what_a_token_sees_is_its_plain_row(rows: list[Row]) -> None:
    forest = Forest.of(rows)
    ids = np.concatenate([part for _, *parts in forest.trees for part in parts])
    answers = np.concatenate([np.repeat([False, True], [len(p), len(a)]) for _, p, a in forest.trees])
    every = np.arange(len(ids))
    number, at = np.flatnonzero(answers), 0
    for _, prompt_ids, answer_ids in rows:
        plain = np.concatenate([prompt_ids, answer_ids])
        for t in range(len(answer_ids)):
            column = number[forest.places[at + t]]
            seen = every[(every <= column) & (forest.ends > column)]
            assert ids[seen].tolist() == plain[: len(prompt_ids) + t + 1].tolist()
            assert forest.depths[seen].tolist() == list(range(len(seen)))
            assert forest.parents[column] == seen[-2]
        at += len(answer_ids)
    assert at == len(forest.places)
    beginnings = {(r[0].key, r[2][:t].tobytes()) for r in rows for t in range(1, len(r[2]) + 1)}
    assert answers.sum() == len(beginnings)  # nothing runs twice
    assert len(ids) == len(forest.ends) == forest_tokens(rows)


@given(groups(), st.sampled_from([None, 1, 3]), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_attention_in_chunks_equals_a_mask_of_the_whole(rows: list[Row], window: int | None, chunk: int) -> None:
    forest = Forest.of(rows)
    ends, depths = torch.from_numpy(forest.ends), torch.from_numpy(forest.depths)
    every = torch.arange(len(ends))
    mask = (every <= every[:, None]) & (every[:, None] < ends)
    if window is not None:
        mask &= depths[:, None] - depths < window
    random = torch.Generator().manual_seed(0)
    q = torch.randn(1, 4, len(ends), 8, generator=random)
    k, v = (torch.randn(1, 2, len(ends), 8, generator=random).repeat_interleave(2, 1) for _ in range(2))
    want = torch.softmax((q @ k.transpose(2, 3) / 3).masked_fill(~mask, -torch.inf), -1) @ v
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "CHUNK", chunk)
        patch.setattr(attention, "SHARE", 1)
        got, _ = attention.forest_attention(
            None, q, k[:, ::2], v[:, ::2], ends[None, None, None], scaling=1 / 3, sliding_window=window
        )
    torch.testing.assert_close(got, want.transpose(1, 2))


def test_chunks_grow_with_what_they_see_and_end_with_their_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "CHUNK", 128)
    ends = torch.tensor([970] * 970 + [2000] * 1030)
    _, queries, keys, masks = attention._cut(ends, None)
    assert queries == [*[128] * 5, 160, 170, *[128] * 5, 160, 200, 30]
    assert keys == [128, 256, 384, 512, 640, 800, 970, 128, 256, 384, 512, 640, 800, 1000, 1030]
    assert [mask.shape for mask in masks] == list(zip(queries, keys, strict=True))
    trees = np.repeat(np.cumsum([100, 20, 50, 150, 12, 200]), [100, 20, 50, 150, 12, 200])
    _, queries, keys, _ = attention._cut(torch.from_numpy(trees), None)
    # Two small trees, one, most of one; the rest of it is too little for a chunk of its own, but not with the next one.
    assert (queries, keys) == ([120, 50, 128, 34, 128, 72], [120, 50, 128, 162, 128, 200])


def test_what_a_forest_cannot_have_is_refused() -> None:
    heads, ends = torch.zeros(1, 1, 2, 8), torch.tensor([[[[2, 2]]]])
    for option in ({"position_bias": heads}, {"dropout": 0.1}, {"is_causal": False}):
        with pytest.raises(NotImplementedError):
            attention.forest_attention(None, heads, heads, heads, ends, **option)


def test_the_same_is_refused_as_in_plain_rows() -> None:
    encoder = tiny_models.encoder()
    asked = tiny_models.prompt("p", tiny_models.noise(0))
    ids = encoder.encode(asked)[0]
    with pytest.raises(DataError, match="prompt 'p': the rollout saw"):
        collate_forest([(asked, ids, ids[:1]), (asked, ids[1:], ids[:1])], encoder)
    picture = np.array([encoder.image_token_id], np.int32)
    with pytest.raises(DataError, match="an answer contains picture placeholders"):
        collate_forest([(asked, ids, picture)], encoder)


def test_architectures() -> None:
    """:mod:`forests` in a process of its own, where a stand-in for torchvision comes before transformers."""
    tests = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(tests / "models" / "forests.py")],
        capture_output=True, text=True, timeout=300, cwd=tests.parent, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
