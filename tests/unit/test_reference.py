"""When a reference is needed and replaced, and what it keeps over a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plain_backend import PlainBackend

from skyrl.learner.reference import FILE, Reference
from skyrl.objective.hybrid import active_terms, run_terms
from skyrl.records import PreferencePair, Prompt, Sample, SkyrlError, TrainBatch, TrainItem
from skyrl.settings import AlgorithmConfig, Config, GrpoConfig, MpoConfig, Stage

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
    assert any(term.uses_reference for term in run_terms(cfg)) is needed


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
    batch = TrainBatch(step, 0, cfg.weights(step), [item] * 3, [PreferencePair(0, 2, 1.0)], 3, 3)
    assert set().union(*(term.compared(batch) for term, _ in active_terms(run_terms(cfg), batch))) == items


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
    """The twin of a policy whose first half is frozen."""

    def load() -> Any:
        policy = Policy(seed)
        policy.model[0].requires_grad_(False)
        return policy

    return Reference(PlainBackend(Config(), load, 0, "", 0, reference=True))


def score(ours: Reference, rows: torch.Tensor) -> torch.Tensor:
    return ours.backend.score(rows, reference=True)


def state(policy: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in policy.named_parameters()}


def test_replacing_takes_the_trained_parameters_and_keeps_its_own() -> None:
    ours, rows = reference(), torch.randn(4, 3)
    policy = Policy(1)
    policy.model[0].load_state_dict(ours.backend.twin.model[0].state_dict())  # the frozen half is the same
    before = score(ours, rows)
    assert not torch.allclose(before, policy(rows)[0])
    ours.replace(((name, p) for name, p in policy.model.named_parameters() if name in TRAINED), 4)
    assert torch.equal(score(ours, rows), policy(rows)[0]) and ours.step == 4
    assert not score(ours, rows).requires_grad
    with torch.no_grad():
        policy.model[1].weight.add_(1.0)
    assert not torch.equal(score(ours, rows), policy(rows)[0])  # a copy, not the policy itself


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
    mine, theirs = state(again.backend.twin.model), state(ours.backend.twin.model)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    with pytest.raises(SkyrlError, match="was written after step 4; expected: 6"):
        reference().load(tmp_path, 6, nothing)
    (tmp_path / FILE).unlink()
    with pytest.raises(SkyrlError, match=r"refreshed after step 4, but .* has no reference\.safetensors"):
        reference().load(tmp_path, 4, nothing)


def test_loading_an_older_checkpoint_brings_the_starting_policy_back(tmp_path: Path) -> None:
    ours = reference()
    ours.load(tmp_path, 0, nothing)
    start = state(ours.backend.twin.model)
    ours.replace(((name, p) for name, p in state(Policy(1).model).items() if name in TRAINED), 4)
    ours.load(tmp_path, 0, lambda: start.items())
    assert ours.step == 0
    assert all(torch.equal(p, start[name]) for name, p in state(ours.backend.twin.model).items())
