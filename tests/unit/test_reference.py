"""When a reference is needed and replaced, and what it keeps over a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from skyrl.learner.reference import FILE, Reference, compared_items, needs_reference, refresh_due
from skyrl.records import PreferencePair, Prompt, Sample, SkyrlError, TrainBatch, TrainItem
from skyrl.settings import AlgorithmConfig, GrpoConfig, MpoConfig, Stage


@pytest.mark.parametrize(
    ("every", "limit", "age", "kl", "due"),
    [
        (0, None, 100, 9.0, False),
        (3, None, 2, 9.0, False),
        (3, None, 3, None, True),
        (3, None, 4, None, True),  # the step that would have done it trained nothing
        (0, 0.1, 1, 0.11, True),
        (0, 0.1, 1, 0.1, False),
        (0, 0.1, 100, None, False),
        (3, 0.1, 1, 0.2, True),
        (3, 0.1, 3, 0.0, True),
    ],
)
def test_refresh_due(every: int, limit: float | None, age: int, kl: float | None, due: bool) -> None:
    assert refresh_due(MpoConfig(reference_every=every, reference_kl=limit), age, kl) is due


SFT = {"preference_weight": 0.0, "quality_weight": 0.0}


@pytest.mark.parametrize(
    ("stage", "kl_weight", "mpo", "needed"),
    [
        (Stage.joint, 0.0, {}, True),
        (Stage.mpo_then_grpo, 0.0, {}, True),
        (Stage.grpo, 0.0, {}, False),
        (Stage.grpo, 0.1, {}, True),
        (Stage.mpo, 0.1, SFT, False),  # the penalty belongs to GRPO, which is not trained
        (Stage.joint, 0.1, SFT, True),
        (Stage.joint, 0.0, SFT, False),
        (Stage.joint, 0.0, {"reference_free": True}, False),
        (Stage.joint, 0.1, {"reference_free": True}, True),
        (Stage.joint, 0.0, {"weight": 0.0}, False),
    ],
)
def test_needs_reference(stage: Stage, kl_weight: float, mpo: dict[str, Any], needed: bool) -> None:
    cfg = AlgorithmConfig(stage=stage, grpo=GrpoConfig(kl_weight=kl_weight), mpo=MpoConfig(**mpo))
    assert needs_reference(cfg) is needed


@pytest.mark.parametrize(
    ("step", "kl_weight", "mpo", "items"),
    [
        (2, 0.0, {}, {0, 2}),
        (3, 0.0, {}, set()),  # from here on only GRPO is trained
        (2, 0.1, {}, {0, 2}),
        (3, 0.1, {}, {0, 1, 2}),
        (2, 0.1, {"reference_free": True}, set()),
    ],
)
def test_items_compared_with_the_reference(step: int, kl_weight: float, mpo: dict[str, Any], items: set[int]) -> None:
    cfg = AlgorithmConfig(
        stage=Stage.mpo_then_grpo, mpo_steps=2, grpo=GrpoConfig(kl_weight=kl_weight), mpo=MpoConfig(**mpo)
    )
    sample = Sample(0, np.zeros(1, np.int32), np.zeros(1, np.float32), "", False, 0)
    item = TrainItem(Prompt("p", "q", (), "1", "exact"), np.zeros(1, np.int32), sample, 1.0)
    assert compared_items(TrainBatch(step, [item] * 3, [PreferencePair(0, 2, 1.0)], 3, 3), cfg) == items


class Policy(torch.nn.Module):
    """What a PolicyModule is to a reference: something with a ``model``."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))

    def forward(self, rows: torch.Tensor) -> tuple[torch.Tensor, None]:
        return self.model(rows)[:, 0], None


TRAINED = ("1.weight", "1.bias")


def reference(seed: int = 0) -> Reference:
    policy: Any = Policy(seed)
    return Reference(policy, {}, 0, TRAINED)


def state(policy: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in policy.named_parameters()}


def test_replacing_takes_the_trained_parameters_and_keeps_its_own() -> None:
    ours, rows = reference(), torch.randn(4, 3)
    policy = Policy(1)
    policy.model[0].load_state_dict(ours.module.model[0].state_dict())  # the frozen half is the same
    before = ours(rows)
    assert not torch.allclose(before, policy(rows)[0])
    ours.replace(((name, p) for name, p in policy.model.named_parameters() if name in TRAINED), 4)
    assert torch.equal(ours(rows), policy(rows)[0]) and ours.step == 4
    assert not ours(rows).requires_grad
    with torch.no_grad():
        policy.model[1].weight.add_(1.0)
    assert not torch.equal(ours(rows), policy(rows)[0])  # a copy, not the policy itself


def test_replacing_refuses_other_parameters() -> None:
    ours = reference()
    with pytest.raises(SkyrlError, match=r"1 parameters are missing, for example '1\.bias'"):
        ours.replace([("1.weight", torch.zeros(1, 2))], 4)
    with pytest.raises(SkyrlError, match=r"'0\.bias' came twice or is not a trained one"):
        ours.replace([("0.bias", torch.zeros(2))], 4)
    assert ours.step == 0


def nothing() -> Any:
    raise AssertionError("the starting policy is not needed here")


def test_a_refreshed_reference_comes_back_from_its_file(tmp_path: Path) -> None:
    ours = reference()
    ours.save(tmp_path, 0)
    assert not list(tmp_path.iterdir())  # nothing that a restart would not have anyway
    new = state(Policy(1).model)
    ours.replace(((name, new[name]) for name in TRAINED), 4)
    ours.save(tmp_path, 1)
    assert not list(tmp_path.iterdir())  # rank 0 writes
    ours.save(tmp_path, 0)
    again = reference()
    again.load(tmp_path, 4, nothing)
    assert again.step == 4
    mine, theirs = state(again.module.model), state(ours.module.model)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    with pytest.raises(SkyrlError, match="was written after step 4; expected: 6"):
        reference().load(tmp_path, 6, nothing)
    (tmp_path / FILE).unlink()
    with pytest.raises(SkyrlError, match=r"refreshed after step 4, but .* has no reference\.safetensors"):
        reference().load(tmp_path, 4, nothing)


def test_loading_an_older_checkpoint_brings_the_starting_policy_back(tmp_path: Path) -> None:
    ours = reference()
    ours.load(tmp_path, 0, nothing)
    start = state(ours.module.model)
    ours.replace(((name, p) for name, p in state(Policy(1).model).items() if name in TRAINED), 4)
    ours.load(tmp_path, 0, lambda: start.items())
    assert ours.step == 0
    assert all(torch.equal(p, start[name]) for name, p in state(ours.module.model).items())
