"""Forward passes without gradient: the same values however they are cut."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tiny_models
import torch

from skyrl.data.pictures import mask_picture
from skyrl.evaluation.picture_drop import masked_group
from skyrl.learner.passes import Share, distinct_share, score_groups, score_share
from skyrl.policy.attention import share_prompts
from skyrl.policy.encode import EncodedBatch
from skyrl.policy.forest import Rows
from skyrl.policy.module import PolicyModule
from skyrl.records import PreferencePair, Prompt, Sample, SampleGroup, TrainBatch, TrainItem
from skyrl.settings import HallucinationConfig

CPU = torch.device("cpu")


def sample(text: str) -> Sample:
    ids = tiny_models.answer_ids(text)
    return Sample(0, ids, np.zeros(len(ids), np.float32), text, False, 0)


def prompts() -> list[Prompt]:
    return [
        tiny_models.prompt("a", tiny_models.noise(0)),
        tiny_models.prompt("b"),
        tiny_models.prompt("c", tiny_models.noise(1)),
        tiny_models.prompt("d"),
    ]


ANSWERS = ("<answer>12</answer>", "7", "<think>I see 1</think>", "<answer>9")


class Policy:
    """Log-probabilities of a real tiny model, and how many answers each pass had."""

    def __init__(self) -> None:
        self.encoder = tiny_models.encoder()
        model = tiny_models.random_model()
        share_prompts(model)
        self.module = PolicyModule(model, self.encoder.forbidden_token_ids())
        self.passes: list[int] = []

    def __call__(self, rows: EncodedBatch) -> torch.Tensor:
        starts = rows.answer_mask[:, 1:] & ~rows.answer_mask[:, :-1]
        if rows.parents is not None:  # branches that begin behind a trunk; no two answers here begin alike
            starts = rows.answer_mask[0] & ~rows.answer_mask[0, rows.parents]
        self.passes.append(int(starts.sum()))
        return self.module(rows)[0]

    def groups(self) -> list[SampleGroup]:
        return [
            SampleGroup(prompt, self.encoder.encode(prompt)[0], [sample(ANSWERS[i]), sample("3")])
            for i, prompt in enumerate(prompts())
        ]


@pytest.fixture(scope="module")
def policy() -> Policy:
    return Policy()


@pytest.fixture(params=[False, True], ids=["plain", "forest"])
def forest(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def one_by_one(policy: Policy, group: SampleGroup) -> np.ndarray:
    """The first sample of the group, in a pass of its own."""
    return score_groups(policy, [replace(group, samples=group.samples[:1])], policy.encoder, CPU, 1)[0]


def test_groups_are_scored_within_the_token_budget(policy: Policy, forest: bool) -> None:
    groups = policy.groups()
    policy.passes.clear()
    alone = [one_by_one(policy, replace(g, samples=[s])) for g in groups for s in g.samples]
    assert policy.passes == [1] * 8
    policy.passes.clear()
    longest = max(len(g.prompt_ids) + len(s.token_ids) for g in groups for s in g.samples)
    cut = score_groups(policy, groups, policy.encoder, CPU, 3 * longest, forest)
    assert max(policy.passes) >= 3 and len(policy.passes) > 1 and sum(policy.passes) == 8
    for got, want in zip(cut, alone, strict=True):
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, want, atol=2e-5)
    assert score_groups(policy, [], policy.encoder, CPU, 100, forest) == []


def share(policy: Policy, parts: list[list[int]], forest: bool) -> Share:
    items = [TrainItem(g.prompt, g.prompt_ids, g.samples[0], 0.0) for g in policy.groups()]
    return Share.of(step_of(items, [PreferencePair(0, 3, 1.0)]), parts, policy.encoder, CPU, forest)


def step_of(items: list[TrainItem], pairs: list[PreferencePair] | None = None) -> TrainBatch:
    return TrainBatch(1, 0, {"mpo": 1.0}, items, pairs or [], 0, 0)


def repeated(policy: Policy) -> list[TrainItem]:
    """Items a, b, a, a, c: the same answer to the same prompt three times."""
    groups = policy.groups()
    return [TrainItem(g.prompt, g.prompt_ids, g.samples[0], 0.0) for g in (groups[i] for i in (0, 1, 0, 0, 2))]


def test_equal_rows_run_once_and_keep_their_places(policy: Policy, forest: bool) -> None:
    batch = step_of(repeated(policy))
    step = Share.of(batch, [[0, 1, 2], [3, 4]], policy.encoder, CPU, forest)
    every = [one_by_one(policy, g) for g in policy.groups()]
    for collective in (False, True):
        policy.passes.clear()
        found = score_share(policy, step, set(range(5)), policy.encoder, CPU, collective)
        assert policy.passes == [2, 2]
        np.testing.assert_allclose(found[0], np.concatenate([every[0], every[1], every[0]]), atol=2e-5)
        np.testing.assert_allclose(found[1], np.concatenate([every[0], every[2]]), atol=2e-5)
    policy.passes.clear()
    found = score_share(policy, step, {0, 2}, policy.encoder, CPU, False)
    assert policy.passes == [1]
    np.testing.assert_allclose(found[0], np.concatenate([every[0], 0 * every[1], every[0]]), atol=2e-5)
    assert distinct_share(batch) == pytest.approx(3 / 5)
    policy.passes.clear()
    groups = [policy.groups()[0]] * 3
    scored = score_groups(policy, groups, policy.encoder, CPU, 10_000, forest)
    assert policy.passes == [2]
    assert all(np.array_equal(scored[i], scored[i % 2]) for i in range(6))


def test_gradients_of_equal_rows_add_up(policy: Policy, forest: bool) -> None:
    """Σ w_i log π(row i) has the same gradient whether equal rows run once or each by itself."""
    items, weights = repeated(policy), [1.0, -2.0, 0.5, 3.0, 1.0]
    rows = [(item.prompt, item.prompt_ids, item.sample.token_ids) for item in items]
    lengths = torch.tensor([len(row[2]) for row in rows])
    per_token = torch.tensor(weights).repeat_interleave(lengths)
    once = Rows.of(rows, policy.encoder, CPU, forest)
    gradients = []
    for encoded, places in ((once.encoded, once.places), (policy.encoder.collate(rows), slice(None))):
        policy.module.zero_grad()
        (per_token * policy.module(encoded)[0][places]).sum().backward()
        gradients.append({n: p.grad.clone() for n, p in policy.module.named_parameters() if p.grad is not None})
    assert len(once.encoded.input_ids) == (1 if forest else 3) and gradients[0]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("collective", [False, True])
def test_only_wanted_items_are_sure_to_be_scored(policy: Policy, collective: bool, forest: bool) -> None:
    every = [one_by_one(policy, g) for g in policy.groups()]
    step = share(policy, [[2, 0], [3, 1], []], forest)
    policy.passes.clear()
    found = score_share(policy, step, {0, 3}, policy.encoder, CPU, collective)
    # Whole micro-batches with their ghosts (the text-only and the empty one have one), or single rows.
    assert policy.passes == ([2, 3, 1] if collective else [1, 1])
    for part, got in zip(step.parts, found, strict=True):
        assert got is not None and len(got) == step.tokens(part)
        parts = np.split(got.numpy(), np.cumsum([len(every[i]) for i in part])[:-1]) if part else []
        for i, values in zip(part, parts, strict=True):
            if collective or i in (0, 3):
                np.testing.assert_allclose(values, every[i], atol=2e-5)
            else:
                assert not values.any()
    policy.passes.clear()
    assert score_share(policy, step, set(), policy.encoder, CPU, collective) == [None] * 3
    assert policy.passes == []


# ---------------------------------------------------------------- masked pictures


def test_mask_blackens_whole_patches_and_nothing_else() -> None:
    picture = np.full((32, 45, 3), 200, np.uint8)
    masked = mask_picture(picture, "train/7", 0.6, 14)
    assert masked.shape == picture.shape and masked.dtype == np.uint8 and (picture == 200).all()
    states = set()
    for top in range(0, 32, 14):
        for left in range(0, 45, 14):
            patch = masked[top : top + 14, left : left + 14]
            assert (patch == patch[0, 0]).all()
            states.add(int(patch[0, 0, 0]))
    assert states == {0, 200}


def test_mask_is_a_function_of_the_prompt() -> None:
    picture = tiny_models.noise(0)
    assert np.array_equal(mask_picture(picture, "a", 0.6, 4), mask_picture(picture, "a", 0.6, 4))
    assert not np.array_equal(mask_picture(picture, "a", 0.6, 4), mask_picture(picture, "b", 0.6, 4))
    # Another machine must draw the same patches: these are recorded.
    recorded = [[0, 0, 0], [1, 0, 1], [0, 1, 0]]
    assert mask_picture(np.ones((6, 6, 3), np.uint8), "a", 0.6, 2)[::2, ::2, 0].tolist() == recorded


@pytest.mark.parametrize(("share_", "kept"), [(0.0, 1.0), (1.0, 0.0), (0.6, 0.4)])
def test_mask_share(share_: float, kept: float) -> None:
    masked = [mask_picture(np.ones((64, 64, 3), np.uint8), f"p{i}", share_, 4) for i in range(20)]
    assert np.mean(masked) == pytest.approx(kept, abs=0.03)


@pytest.mark.parametrize(("share_", "patch"), [(1.1, 4), (-0.1, 4), (0.5, 0)])
def test_mask_refuses(share_: float, patch: int) -> None:
    with pytest.raises(ValueError, match=rf"share is {share_}, patch {patch}"):
        mask_picture(tiny_models.noise(0), "a", share_, patch)


def test_masked_group_keeps_question_and_answers_and_marks_the_prompt(policy: Policy) -> None:
    cfg = HallucinationConfig(mask_patch=8)
    two = replace(policy.groups()[0], prompt=tiny_models.prompt("x", tiny_models.noise(0), tiny_models.noise(0)))
    masked = masked_group(two, cfg)
    assert masked.prompt.key == ("x", "masked") and masked.prompt.question == two.prompt.question
    assert masked.samples is two.samples
    first, second = masked.prompt.images
    assert not np.array_equal(first, two.prompt.images[0])
    assert not np.array_equal(first, second)  # each picture has patches of its own
