"""A frozen vision tower runs once for each picture, and nobody sees a difference."""

from __future__ import annotations

import logging
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from learner_cases import build_policy, make_batch
from learner_plain import joined, plain_settings, recorded_gradients, weights_of
from test_freezing import small
from torch import Tensor, nn

from skyrl.policy.encode import EncodedBatch
from skyrl.policy.lora import add_lora
from skyrl.policy.module import PolicyModule, freeze
from skyrl.policy.rounding import rounding_errors
from skyrl.policy.tower import TowerFeatures
from skyrl.settings import LoraConfig, Trainable

ENCODER = tiny_models.encoder()
FEATURES = 16 * 96 * 4
"""Bytes that the tiny tower makes of a picture: 16 patches."""


def policy(trainable: Trainable = Trainable.adapter) -> PolicyModule:
    model = tiny_models.random_model()
    freeze(model.named_parameters(), trainable)
    return PolicyModule(model, ENCODER.forbidden_token_ids())


def batch(*pictures: int) -> EncodedBatch:
    """A row for each picture, named by its seed."""
    prompts = [tiny_models.prompt(f"{seed}", tiny_models.noise(seed)) for seed in pictures]
    answer = tiny_models.answer_ids("<think>3 + 4</think><answer>7</answer>")
    return ENCODER.collate([(prompt, ENCODER.encode(prompt)[0], answer) for prompt in prompts])


def watched(module: PolicyModule) -> list[int]:
    """Pictures of each run of the tower's own forward from now on; before the memory is put there."""
    tower, runs = module.model.model.vision_model, list[int]()
    own = tower.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        runs.append(len(kwargs["pixel_values"]))
        return own(*args, **kwargs)

    tower.forward = forward
    return runs


def passes(module: PolicyModule, rows: EncodedBatch) -> tuple[Tensor, dict[str, Tensor]]:
    module.zero_grad()
    logprobs = module(rows)[0]
    (logprobs * torch.linspace(-1, 2, len(logprobs))).sum().backward()
    return logprobs.detach(), {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("trainable", [Trainable.adapter, Trainable.language_and_adapter])
def test_values_and_gradients_are_those_of_the_plain_tower(trainable: Trainable) -> None:
    module, rows = policy(trainable), batch(1, 2, 1)
    want, gradients = passes(module, rows)
    runs, features = watched(module), TowerFeatures(1e6)
    assert features.serve(module.model)
    for _ in range(2):
        got, found = passes(module, rows)
        # A picture runs alone: that may round differently from running all together, but never by more.
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
        assert found.keys() == gradients.keys()
        assert any("connector" in name for name in found)
        for name, gradient in gradients.items():
            assert (found[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name
    assert runs == [1, 1, 3]  # the last is the trial whether pictures may run alone
    assert features.counts() == (6, 2)
    assert features.counts() == (0, 0)


def test_features_do_not_depend_on_neighbours_or_on_what_was_kept() -> None:
    warm, cold = policy(), policy()
    TowerFeatures(1e6).serve(warm.model)
    TowerFeatures(0).serve(cold.model)
    with torch.no_grad():
        warm(batch(3, 1, 2))
        for rows in (batch(1), batch(2, 1), batch(4, 3, 2, 1)):
            assert torch.equal(warm(rows)[0], cold(rows)[0])


def test_the_reference_finds_what_the_policy_left() -> None:
    module, twin = policy(), policy()
    runs, twin_runs, features = watched(module), watched(twin), TowerFeatures(1e6)
    features.serve(module.model)
    features.serve(twin.model)
    got, want = module(batch(1, 2))[0], twin(batch(1, 2))[0]
    assert (len(runs), twin_runs) == (3, [])
    assert torch.equal(got, want)


def test_a_changed_picture_is_another_one() -> None:
    module, plain = policy(), policy()
    TowerFeatures(1e6).serve(module.model)
    rows = batch(1, 2)
    with torch.no_grad():
        before = module(rows)[0]
        rows.pictures["pixel_values"][1, 0, 1, 20, 9] += 1.5  # one number of the second picture
        np.testing.assert_allclose(module(rows)[0], plain(rows)[0], atol=1e-6)
        assert (module(rows)[0] - before).abs().max() > 1e-4
        rows.pictures["pixel_attention_mask"][0, :, :8] = 0  # the first one's left half is padding
        np.testing.assert_allclose(module(rows)[0], plain(rows)[0], atol=1e-5)


def test_the_memory_is_bounded_and_the_least_recently_used_go_first() -> None:
    module, features = policy(), TowerFeatures(3 * FEATURES)
    runs = watched(module)
    features.serve(module.model)
    with torch.no_grad():
        for seed in (1, 2, 3, 1, 4):  # 4 drives out 2, as 1 was used since
            module(batch(seed))
        assert (features.bytes, len(features.kept), len(runs)) == (3 * FEATURES, 3, 4)
        module(batch(1))
        module(batch(3))
        assert len(runs) == 4
        module(batch(2))
        assert (features.bytes, len(runs)) == (3 * FEATURES, 5)
        module(batch(5, 6, 7, 8))  # more than there is room for
    assert features.bytes == 3 * FEATURES == sum(t.nbytes for leaves, _ in features.kept.values() for t in leaves)


@pytest.mark.parametrize("trainable", [Trainable.all, Trainable.adapter_and_vision])
def test_a_trained_tower_is_left_alone(trainable: Trainable, caplog: pytest.LogCaptureFixture) -> None:
    module = policy(trainable)
    assert not TowerFeatures(1e6).serve(module.model)
    assert "forward" not in vars(module.model.model.vision_model)
    assert not caplog.records


def test_factors_in_the_tower_train_it() -> None:
    model = policy(Trainable.all).model
    add_lora(model, LoraConfig(rank=2), ["vision"])
    assert not TowerFeatures(1e6).serve(model)


def test_who_watches_the_tower_sees_it_run_and_leaves_nothing_behind() -> None:
    module, features = policy(), TowerFeatures(1e6)
    features.serve(module.model)
    with torch.no_grad():
        with rounding_errors(module.model, 0):
            blurred = module(batch(1, 2))[0]
        assert not features.kept
        clean = module(batch(1, 2))[0]
        assert (clean - blurred).abs().max() > 0
        assert torch.equal(module(batch(1, 2))[0], clean)


# ---------------------------------------------------------------- other architectures


def test_a_vision_module_with_its_adapter_inside_is_left_alone_and_that_is_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = small("Qwen2_5_VL")
    freeze(model.named_parameters(), Trainable.adapter)
    features = TowerFeatures(1e6)
    with caplog.at_level(logging.WARNING):
        assert not features.serve(model)
        assert not features.serve(deepcopy(model))
    assert [record.message for record in caplog.records] == [
        "learner.tower_cache_gib: the frozen vision tower runs for every picture anew: it is not a module apart from "
        "the adapter"
    ]


def real(family: str) -> Any:
    torch.manual_seed(0)
    model = small(family).to_empty(device="cpu").eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    for name, buffer in model.named_buffers():
        if name.endswith("position_ids"):
            buffer.copy_(torch.arange(buffer.shape[-1]).expand_as(buffer))
    freeze(model.named_parameters(), Trainable.adapter)
    return model


def test_of_all_hidden_states_only_those_are_kept_that_the_model_reads() -> None:
    model, features = real("Llava"), TowerFeatures(1e6)
    pixels = torch.randn(2, 3, 16, 16)
    want = model.model.get_image_features(pixels).pooler_output
    assert features.serve(model)
    for _ in range(2):
        got = model.model.get_image_features(pixels).pooler_output
        torch.testing.assert_close(torch.cat(list(got)), torch.cat(list(want)))
    assert features.counts() == (4, 2)
    (kept, _), *_ = features.kept.values()
    assert {tuple(t.shape) for t in kept if t is not None} == {(1, 5, 32), (1, 32)}
    assert sum(t is None for t in kept) == 0  # one layer: its input, which is read, and the last state
    model.config.vision_feature_layer = -1
    other = TowerFeatures(1e6)
    del model.model.vision_tower.forward
    other.serve(model)
    model.model.get_image_features(pixels, vision_feature_layer=-1)
    (kept, _), *_ = other.kept.values()
    assert sum(t is None for t in kept) == 1


class Mixed(nn.Module):
    """Its tower shows each picture the mean of all."""

    class Tower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = nn.Linear(3, 3)

        def forward(self, pixels: Tensor, sizes: Any = None) -> Tensor:
            return self.part(pixels) + pixels.mean(0, keepdim=True)

    def __init__(self) -> None:
        super().__init__()
        self.vision_tower, self.connector, self.config = self.Tower().requires_grad_(False), nn.Linear(3, 3), None


def test_a_tower_in_which_pictures_see_each_other_is_found_out(caplog: pytest.LogCaptureFixture) -> None:
    model, plain, features = Mixed(), None, TowerFeatures(1e6)
    plain = deepcopy(model.vision_tower)
    features.serve(model)
    one, two = torch.randn(1, 3), torch.randn(2, 3)
    assert torch.equal(model.vision_tower(one), plain(one))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert torch.equal(model.vision_tower(two), plain(two))
    assert [r.message.rpartition(": ")[2] for r in caplog.records] == ["it does not see each picture by itself"]
    assert (features.bytes, len(features.kept)) == (0, 0)


@pytest.mark.parametrize("sizes", [[1], torch.ones(2), torch.tensor(1.0)])
def test_arguments_that_are_no_rows_of_pictures_run_plainly(sizes: Any, caplog: pytest.LogCaptureFixture) -> None:
    model, features = Mixed(), TowerFeatures(1e6)
    plain, pixels = deepcopy(model.vision_tower), torch.randn(1, 3)
    features.serve(model)
    for _ in range(2):
        assert torch.equal(model.vision_tower(pixels, sizes=sizes), plain(pixels))
    assert features.counts() == (0, 0)
    assert [r.message.rpartition(": ")[2] for r in caplog.records] == ["it does not get a row for each picture"]


# ---------------------------------------------------------------- a learner's steps


def test_steps_are_the_same_with_and_without_the_memory(tmp_path: Any) -> None:
    build_policy(tmp_path)
    runs = []
    for room in (2.0, 0.0):
        learner = joined(plain_settings(trainable=Trainable.adapter, tower_cache_gib=room), str(tmp_path))
        gradients = recorded_gradients(learner)
        metrics = [learner.train_step(make_batch(learner.encoder, step)) for step in (1, 2)]
        runs.append((weights_of(learner), gradients, metrics))
    (weights, gradients, metrics), (other_weights, other_gradients, other_metrics) = runs
    hits = [step.pop("learner/tower_hits") for step in metrics]
    assert 0.5 < hits[0] < hits[1] == 1  # the reference came first, and the second step has the same pictures
    for mine, other in zip(metrics, other_metrics, strict=True):
        assert mine == pytest.approx(other, rel=1e-5, abs=1e-6)
    for mine, other in zip(gradients, other_gradients, strict=True):
        assert mine.keys() == other.keys()
        for name in mine:
            assert np.abs(mine[name] - other[name]).max() <= 1e-5 * np.abs(other[name]).max()
    assert max(np.abs(weights[name] - other_weights[name]).max() for name in weights) < 1e-6
