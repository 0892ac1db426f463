"""Ray, vLLM, DeepSpeed and transformers together, with pictures and text-only prompts mixed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from skyrl.batch.batcher import Batcher
from skyrl.crew.ray_executor import ray_session
from skyrl.learner.step import LearnerStep
from skyrl.policy.encode import PromptEncoder
from skyrl.records import RolloutRequest, SampleGroup, SyncError
from skyrl.rewards.rewarder import Rewarder
from skyrl.rollout.sampler import Sampler
from skyrl.run import model_folders
from skyrl.settings import Config
from skyrl.sync.syncer import Syncer
from skyrl.system import System, start_system

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def config(make_config: Callable[..., Config]) -> Config:
    return make_config("system")


@pytest.fixture(scope="module", autouse=True)
def session(config: Config) -> Iterator[None]:
    with ray_session(config, "test-system"):
        yield


@pytest.fixture(scope="module")
def system(config: Config) -> Iterator[System]:
    with start_system(config, *model_folders(config)) as made:
        made.syncer.sync(0)
        yield made


def request(step: int = 1, rows: tuple[int, ...] = (0, 1, 2, 3, 4, 5), greedy: bool = False) -> RolloutRequest:
    return RolloutRequest("train", rows, step, 1 if greedy else 4, greedy, seed=7)


def groups_of(system: System, asked: RolloutRequest) -> list[SampleGroup]:
    return [group for part in system.rollouts.each(Sampler.generate, asked) for group in part]


def scored_parts(system: System, asked: RolloutRequest) -> list[list[SampleGroup]]:
    """Promises of the scored groups."""
    return system.rewards.deal(Rewarder.score, system.rollouts.deal(Sampler.generate, [asked]))


def tokens(groups: list[SampleGroup]) -> list[list[int]]:
    return [sample.token_ids.tolist() for group in groups for sample in group.samples]


def test_pictures_and_text_are_sampled_together_and_no_placeholder_ever(system: System, config: Config) -> None:
    groups = groups_of(system, request(rows=tuple(range(24))))
    pictured = [bool(group.prompt.images) for group in groups]
    assert any(pictured) and not all(pictured)
    forbidden = set(PromptEncoder.from_pretrained(model_folders(config)[0]).forbidden_token_ids())
    for group in groups:
        assert len(group.samples) == 4
        for sample in group.samples:
            assert not forbidden & set(sample.token_ids.tolist())
            assert np.isfinite(sample.logprobs).all() and (sample.logprobs <= 0).all()
            assert sample.truncated == (len(sample.token_ids) == config.rollout.max_new_tokens)


def test_a_request_repeats_token_by_token_whatever_stands_beside_it(system: System) -> None:
    first = groups_of(system, request())
    assert tokens(groups_of(system, request())) == tokens(first)
    alone = groups_of(system, request(rows=(3,)))
    assert tokens(alone) == tokens(first[3:4])
    assert tokens(groups_of(system, request(step=2))) != tokens(first)


def test_samples_of_a_group_differ_and_greedy_ones_do_not_depend_on_the_step(system: System) -> None:
    group = groups_of(system, request(rows=(0,)))[0]
    assert len({tuple(sample.token_ids) for sample in group.samples}) > 1
    assert tokens(groups_of(system, request(step=1, greedy=True))) == tokens(
        groups_of(system, request(step=2, greedy=True))
    )


def test_scoring_fills_every_part_of_the_reward(system: System) -> None:
    parts = system.rewards.fetch(scored_parts(system, request()))
    samples = [s for part in parts for group in part for s in group.samples]
    assert all(s.error is None and s.reward is not None for s in samples)
    assert all(np.isfinite([s.reward.rule, s.reward.format, s.reward.model, s.reward.total]).all() for s in samples)


def test_a_blind_request_leaves_out_the_picture_and_prompts_without_one(system: System, config: Config) -> None:
    asked = request(rows=tuple(range(24)), greedy=True)
    pictured = [group for group in groups_of(system, asked) if group.prompt.images]
    blind = groups_of(system, replace(asked, blind=True))
    assert [group.prompt.key for group in blind] == [(group.prompt.id, "blind") for group in pictured]
    # The embedded processor writes a picture as special tokens only.
    special = set(PromptEncoder.from_pretrained(model_folders(config)[0]).forbidden_token_ids())
    for with_picture, without in zip(pictured, blind, strict=True):
        assert without.prompt.images == () and without.prompt.question == with_picture.prompt.question
        assert without.prompt_ids.tolist() == [i for i in with_picture.prompt_ids.tolist() if i not in special]
    assert tokens(blind) != tokens(pictured)
    assert tokens(groups_of(system, replace(asked, blind=True))) == tokens(blind)


def test_the_best_answers_first_half_is_continued_without_the_picture(system: System, config: Config) -> None:
    def continued(step: int) -> list[SampleGroup]:
        scored = scored_parts(system, request(rows=tuple(range(24))))
        parts = system.rollouts.fetch(system.rollouts.deal(Sampler.continue_blind, scored, step))
        return [group for part in parts for group in part]

    groups = continued(step=1)
    found = [group for group in groups if group.blind is not None]
    assert found and all(group.prompt.images for group in found)
    encoder = PromptEncoder.from_pretrained(model_folders(config)[0])
    forbidden = set(encoder.forbidden_token_ids())
    for group in found:
        place, made_up = group.blind or (0, None)
        chosen, ids = group.samples[place], made_up.token_ids.tolist()
        ended = [sample for sample in group.samples if not sample.truncated and len(sample.token_ids) > 1]
        assert chosen.reward.model == max(sample.reward.model for sample in ended)
        half = len(chosen.token_ids) // 2
        assert ids[:half] == chosen.token_ids[:half].tolist() and half < len(ids) <= config.rollout.max_new_tokens
        assert not forbidden & set(ids) and made_up.logprobs is None
        assert made_up.truncated == (ids[-1] != encoder.tokenizer.eos_token_id)
        # Decoded as vLLM decoded the chosen answer, which begins with the same tokens.
        start = encoder.tokenizer.decode(ids[:half])
        assert chosen.text.startswith(start) and made_up.text.startswith(start)
        assert encoder.tokenizer.eos_token not in made_up.text
    assert any(len(g.blind[1].token_ids) > len(g.samples[g.blind[0]].token_ids) // 2 + 1 for g in found if g.blind)

    def said(groups: list[SampleGroup]) -> list[Any]:
        return [group.blind and group.blind[1].token_ids.tolist() for group in groups]

    assert said(continued(step=1)) == said(groups) != said(continued(step=2))


def test_a_trained_but_unsynced_policy_is_noticed_and_a_sync_mends_it(system: System) -> None:
    before = system.syncer.sync(1)
    assert before["sync/logprob_gap"] < 1e-4
    _train(system, step=1, version=1)
    assert system.syncer.gap().largest > 1e-3  # the rollout still holds the old weights
    assert system.syncer.sync(2)["sync/logprob_gap"] < 1e-4


def test_a_skipped_sync_stops_with_a_clear_error(system: System) -> None:
    class Skipping(Syncer):
        def _send(self, version: int, base: int | None) -> tuple[float, list[Any]]:
            return 0.0, self.rollouts.ask(Sampler.probe)

    _train(system, step=2, version=2)
    syncer = system.syncer
    message = r"after weight sync 3 .* at most, .* in the mean\. rollout\.logprob_gap_limit allows 0\.0001 .* rounding"
    with pytest.raises(SyncError, match=message):
        Skipping(syncer.learners, syncer.rollouts, syncer.cfg).sync(3)
    syncer.sync(3)


@pytest.mark.parametrize("part", ["lm_head", "connector", "layers.2.mlp.down_proj", "vision_model"])
def test_one_stale_module_is_caught_by_the_probe(system: System, part: str) -> None:
    """A full snapshot in which one module still has other values: nothing is missing, only wrong."""
    snapshot = copy.deepcopy(system.learners.one(LearnerStep.snapshot, 4))
    assert snapshot is not None
    names = [name for name in snapshot.names if (part if part != "lm_head" else "embed_tokens") in name]
    assert names
    rng = np.random.default_rng(0)
    for name in names:
        i = snapshot.names.index(name)
        values = snapshot.parts[i].copy().view(np.float32)
        values += rng.normal(0, 0.01, values.shape).astype(np.float32)
        snapshot.parts[i] = values.view(np.uint8)
    system.rollouts.each(Sampler.load_weights, snapshot)
    assert system.syncer.gap().largest > 1e-4
    assert system.syncer.sync(4)["sync/logprob_gap"] < 1e-4


def test_a_snapshot_without_one_layer_is_refused(system: System) -> None:
    whole = system.learners.one(LearnerStep.snapshot, 5)
    assert whole is not None
    keep = [i for i, name in enumerate(whole.names) if "layers.1." not in name]
    partial = replace(
        whole,
        names=[whole.names[i] for i in keep],
        shapes=[whole.shapes[i] for i in keep],
        dtypes=[whole.dtypes[i] for i in keep],
        parts=[whole.parts[i] for i in keep],
    )
    with pytest.raises(SyncError, match=r"weight snapshot 5 left \d+ parameter\(s\) .* unchanged"):
        system.rollouts.each(Sampler.load_weights, partial)


def _train(system: System, step: int, version: int) -> dict[str, float]:
    scored = scored_parts(system, request(step=step, rows=tuple(range(12))))
    batch, _ = system.buffer.pair(Batcher.exchange, step, version, *scored)
    metrics = system.learners.each(LearnerStep.train_step, batch)[0]
    assert metrics["learner/tokens"] > 0 and metrics["mpo/pairs"] > 0
    assert metrics["learner/logprob_gap_fresh"] < 1e-4
    return metrics
