"""The supervised warm start: schedule, determinism, progress, and sampling with transformers alone."""

from __future__ import annotations

import pytest
import torch
from tiny_models import answer_ids, encoder, noise, prompt, random_model

from skyrl.digits import training
from skyrl.digits.scenes import DigitScenes
from skyrl.digits.training import learning_rate_factor, sample_answers, warm_start


@pytest.mark.parametrize(
    ("step", "steps", "factor"),
    [
        (0, 120, 1 / 20),
        (9, 120, 0.5),
        (19, 120, 1.0),
        (20, 120, 1.0),  # the cosine begins at its top
        (45, 120, 0.05 + 0.95 * 0.5 * (1 + 2**-0.5)),  # a quarter of the way: cos 45°
        (70, 120, 0.525),  # half of the way
        (120, 120, 0.05),
        (4, 5, 0.25),  # a run shorter than its warm-up
        (20, 20, 1.0),
    ],
)
def test_learning_rate_rises_for_twenty_steps_and_falls_as_a_cosine(step: int, steps: int, factor: float) -> None:
    assert learning_rate_factor(step, steps) == pytest.approx(factor)


def train(steps: int, seed: int = 0) -> tuple[dict[str, torch.Tensor], list[float]]:
    losses: list[float] = []
    seen: list[int] = []

    def show(step: int, loss: float) -> None:
        seen.append(step)
        losses.append(loss)

    model = random_model(seed, scale=1.0)
    warm_start(model, encoder(), DigitScenes("train", 64, 0.2, 0), steps, show)
    assert seen == list(range(1, steps + 1))
    assert not model.training
    return model.state_dict(), losses


def test_the_same_seed_gives_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "BATCH", 8)
    (first, losses), (second, again) = train(2), train(2)
    assert losses == again
    assert all(torch.equal(first[name], second[name]) for name in first)
    other, _ = train(2, seed=1)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_the_loss_falls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "BATCH", 16)
    _, losses = train(8)
    assert losses[0] == pytest.approx(5.8, abs=0.3)  # log 332: an untrained model knows nothing of 332 tokens
    assert losses[-1] < losses[0] - 0.5


def test_the_loss_is_of_the_answers_tokens_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "BATCH", 4)
    model, maker, scenes = random_model(scale=1.0), encoder(), DigitScenes("train", 64, 0.2, 0)
    surprise: list[torch.Tensor] = []
    for i in range(4):  # one by one, without padding
        asked, text = scenes.with_reasoning(i)
        start, ids = len(maker.encode(asked)[0]), answer_ids(text)
        batch = maker.collate([(asked, maker.encode(asked)[0], ids)])
        with torch.no_grad():
            out = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **batch.pictures)
        logprobs = out.logits[0].log_softmax(-1)
        surprise += [-logprobs[start + t - 1, int(token)] for t, token in enumerate(ids)]
    _, losses = train(1)
    assert losses == [pytest.approx(float(torch.stack(surprise).mean()), abs=1e-5)]


PROMPTS = [
    prompt("picture", noise(1)),
    prompt("short", question="2?"),
    prompt("pictures", noise(2), noise(3), question="What is the difference of the row sums?"),
    prompt("long", question="What is 1+2+3+4+5+6? Use <think></think><answer></answer>."),
]


def test_a_greedy_answer_does_not_depend_on_what_else_is_asked() -> None:
    model, maker = random_model(), encoder()
    together = sample_answers(model, maker, PROMPTS, 0.0, 12, seed=0)
    assert [sample_answers(model, maker, [p], 0.0, 12, seed=1)[0] for p in PROMPTS] == together
    assert len(set(together)) == len(PROMPTS)  # else the test could not see a mix-up


def test_sampling_repeats_with_its_seed_and_leaves_the_global_generator_alone() -> None:
    model, maker = random_model(), encoder()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = sample_answers(model, maker, PROMPTS[:2], 1.0, 8, seed=3)
    assert torch.equal(torch.rand(3), expected)
    assert sample_answers(model, maker, PROMPTS[:2], 1.0, 8, seed=3) == first
    assert sample_answers(model, maker, PROMPTS[:2], 1.0, 8, seed=4) != first
