"""What an optimizer step did to the weights, and what the learner refuses because of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from skyrl.learner.motion import LOOKED_AT, Motion
from skyrl.settings import LearnerConfig, Trainable
from skyrl.settings.system import LoraConfig

LR = 1e-3


def alone(counts: torch.Tensor) -> torch.Tensor:
    """The sum over one rank."""
    return counts


def parameters() -> dict[str, nn.Parameter]:
    torch.manual_seed(0)
    shapes = {"vision_model.layer.weight": (40, 5), "connector.weight": (3, 3), "text_model.layer.weight": (100,)}
    return {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}


def step(named: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in named.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


def test_the_first_step_of_adam_moves_all_by_the_learning_rate_and_no_later_one() -> None:
    named = parameters()
    motion, optimizer = Motion(named.items(), LearnerConfig()), torch.optim.AdamW(named.values(), lr=LR)
    whole = []
    for seed in range(3):
        before = motion.look()
        step(named, optimizer, seed)
        found = motion.since(before, LR, alone)
        assert {found[f"learner/moved/{module}"] for module in ("vision", "adapter", "language")} == {1.0}
        whole.append(found["learner/whole_steps"])
    assert whole[0] > 0.95 and max(whole[1:]) < 0.2
    optimizer.state.clear()  # as after a checkpoint without it
    before = motion.look()
    step(named, optimizer, seed=9)
    assert motion.since(before, LR, alone)["learner/whole_steps"] > 0.95


def test_a_module_that_shall_train_and_does_not_move() -> None:
    named = parameters()
    named["vision_model.layer.weight"].requires_grad_(False)  # somebody froze it
    motion = Motion(named.items(), LearnerConfig())
    before = motion.look()
    with torch.no_grad():
        named["text_model.layer.weight"].add_(LR)
    found = motion.since(before, LR, alone)
    assert (found["learner/moved/vision"], found["learner/moved/language"]) == (0.0, 1.0)
    language = LearnerConfig(trainable=Trainable.language_and_adapter)
    assert "learner/moved/vision" not in Motion(named.items(), language).since(before[LOOKED_AT:], LR, alone)
    still = motion.since(motion.look(), LR, alone)
    assert "learner/whole_steps" not in still and still["learner/moved/language"] == 0


def test_the_first_picture_of_a_run_looks_like_no_lost_optimizer() -> None:
    named = parameters()
    motion, optimizer = Motion(named.items(), LearnerConfig()), torch.optim.AdamW(named.values(), lr=LR)
    text = {name: parameter for name, parameter in named.items() if "text" in name}
    for seed in range(3):
        step(text, optimizer, seed)  # without a picture the others have no gradient
    before = motion.look()
    step(named, optimizer, seed=3)
    assert motion.since(before, LR, alone)["learner/whole_steps"] < 0.2


def test_with_lora_only_the_factors_count() -> None:
    names = (
        "text_model.q.base_layer.weight",
        "text_model.q.lora_A.default.weight",
        "text_model.q.lora_B.default.weight",
    )
    named = {name: nn.Parameter(torch.zeros(4, 4)) for name in names}
    motion = Motion(named.items(), LearnerConfig(lora=LoraConfig(rank=4)))
    before = motion.look()
    assert len(before) == 2 * 16
    with torch.no_grad():
        named[names[2]].add_(LR)
    assert motion.since(before, LR, alone) == {"learner/moved/language": 0.5, "learner/whole_steps": 1.0}


@pytest.mark.parametrize("size", [1, LOOKED_AT - 1, LOOKED_AT, 10 * LOOKED_AT])
def test_weights_of_both_ends_are_looked_at(size: int) -> None:
    weights = nn.Parameter(torch.arange(size, dtype=torch.float32))
    looked = Motion([("text_model.weight", weights)], LearnerConfig()).look().tolist()
    assert len(looked) == len(set(looked)) == min(size, LOOKED_AT) and {0.0, size - 1.0} <= set(looked)


def test_weights_whose_last_place_is_coarser_than_the_step_say_nothing() -> None:
    weights = nn.Parameter(torch.full((8,), 1e4))
    motion = Motion([("text_model.weight", weights)], LearnerConfig())
    before = motion.look()
    with torch.no_grad():
        weights.add_(LR)
    assert motion.since(before, LR, alone) == {"learner/moved/language": 1.0}
