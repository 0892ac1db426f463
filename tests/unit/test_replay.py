"""How much is replayed, and what the weights make of the replayed gradient."""

import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from skyrl.records import Prompt, Sample, SampleGroup
from skyrl.replay.amount import importance_weights, replay_places, replay_weights
from skyrl.replay.ssb import SelectiveSampleBuffer
from skyrl.settings import BufferConfig, Unit

ADVANTAGES = [2.0, -0.5, 1.0, -3.0, 0.1]
CORRECTED = BufferConfig(importance_correction=True)


def buffer_of(advantages, seed=0, groups=None, **options):
    """One sample per advantage, in groups of the given sizes."""
    buffer = SelectiveSampleBuffer(BufferConfig(capacity=len(advantages), **options), seed)
    rest, ids, logprobs = list(enumerate(advantages)), np.zeros(1, dtype=np.int32), np.zeros(1, dtype=np.float32)
    for number, size in enumerate(groups or [len(advantages)]):
        samples = [Sample(i, ids, logprobs, "", False, 0, None, a, 1.0) for i, a in rest[:size]]
        rest = rest[size:]
        buffer.add([SampleGroup(Prompt(str(number), "?", (), "", "exact"), ids, samples)], 0)
    return buffer


# ---------------------------------------------------------------- how many


@pytest.mark.parametrize(
    ("fresh", "effective", "mix", "target", "places"),
    [
        (24, 8, 0.25, None, 6),  # a quarter of the batch
        (24, 22, 0.25, None, 2),  # no more than is free
        (24, 8, 1.0, None, 16),
        (24, 8, 0.0, None, 0),
        (0, 0, 0.25, 0.5, 0),
        (24, 8, 1.0, 0.5, 4),  # 12 of 24
        (24, 8, 1.0, 0.51, 5),  # 12.24, so 13
        (24, 12, 1.0, 0.5, 0),  # reached
        (24, 20, 1.0, 0.5, 0),  # exceeded
        (24, 8, 0.1, 0.5, 2),  # mix is the limit
        (24, 8, 1.0, 1.0, 16),
        (24, 0, 1.0, 0.0, 0),
        (100, 0, 1.0, 0.07, 7),  # in floats 0.07 · 100 is a little more than 7
    ],
)
def test_places_by_hand(fresh, effective, mix, target, places):
    assert replay_places(fresh, effective, BufferConfig(mix=mix, fill_target=target)) == places
    assert replay_places(fresh, effective, BufferConfig(enabled=False, mix=mix, fill_target=target)) == 0


@given(st.integers(0, 600), st.integers(0, 600), st.integers(0, 100), st.integers(0, 100))
def test_a_target_is_reached_with_the_fewest_samples_that_mix_allows(fresh, effective, mix, target):
    effective = min(effective, fresh)
    free = replay_places(fresh, effective, BufferConfig(mix=mix / 100))
    places = replay_places(fresh, effective, BufferConfig(mix=mix / 100, fill_target=target / 100))
    assert 0 <= places <= free <= fresh - effective
    share = Fraction(target, 100)
    assert places == free or effective + places >= share * fresh
    assert places == 0 or effective + places - 1 < share * fresh


def test_refuses_impossible_counts():
    for fresh, effective in ((3, 4), (3, -1)):
        with pytest.raises(ValueError, match=f"{effective} effective of 3 fresh samples; allowed: 0 … fresh"):
            replay_places(fresh, effective, BufferConfig())
    drawn = buffer_of([1.0]).draw(1, 0)
    with pytest.raises(ValueError, match="1 samples drawn from a buffer of size 0"):
        replay_weights(drawn, 0, CORRECTED)


# ---------------------------------------------------------------- what they weigh


def test_with_exponent_1_every_weighted_advantage_is_the_mean():
    drawn = buffer_of(ADVANTAGES).draw(5, 0)
    own = np.array([one.sample.advantage for one in drawn])
    assert importance_weights(drawn, 5) * own == pytest.approx(np.sign(own) * np.mean(np.abs(ADVANTAGES)))


def test_normalised_weights_have_mean_one_and_level_the_advantages():
    drawn = buffer_of([3.0, -1.0, -1.0, -1.0]).draw(4, 0)
    weights = {one.sample.index: weight for one, weight in zip(drawn, replay_weights(drawn, 4, CORRECTED), strict=True)}
    # 1/P = 2, 6, 6, 6; mean 5.
    assert weights == pytest.approx({0: 0.4, 1: 1.2, 2: 1.2, 3: 1.2})
    assert replay_weights(drawn, 99, CORRECTED) == pytest.approx(replay_weights(drawn, 4, CORRECTED))  # N drops out
    assert replay_weights(drawn, 4, BufferConfig()).tolist() == [1.0] * 4
    for cfg in (CORRECTED, BufferConfig()):
        none = replay_weights([], 0, cfg)
        assert none.shape == (0,) and none.dtype == np.float64


@pytest.mark.parametrize("options", [{}, {"alpha": 2.0}, {"alpha": 0.0}, {"uniform_share": 0.3, "alpha": 0.5}], ids=str)
def test_one_corrected_draw_has_the_mean_over_the_buffer_as_its_expectation(options):
    values = np.array([1.0, -2.0, 4.0, 0.5, 3.0])  # any gradient
    drawn = buffer_of(ADVANTAGES, **options).draw(5, 0)
    chances = np.array([one.probability for one in drawn])
    own = values[[one.sample.index for one in drawn]]
    assert chances.sum() == pytest.approx(1)
    corrected = float(np.sum(chances * importance_weights(drawn, 5) * own))
    assert corrected == pytest.approx(values.mean())
    uncorrected = float(np.sum(chances * own))
    uniform = options.get("alpha") == 0.0
    assert (uncorrected == pytest.approx(values.mean())) == uniform
    if not options:  # Σ |A| x / Σ |A| = (2·1 − 0.5·2 + 1·4 + 3·0.5 + 0.1·3) / 6.6
        assert uncorrected == pytest.approx(6.8 / 6.6)


def test_in_groups_a_corrected_draw_is_the_total_over_the_buffer_per_group():
    values = np.array([1.0, -2.0, 4.0, 0.5, 3.0])
    drawn = buffer_of(ADVANTAGES, groups=[2, 3], unit=Unit.group, uniform_share=0.1).draw(5, 0)
    chances = {one.prompt.id: one.probability for one in drawn}
    assert sum(chances.values()) == pytest.approx(1)
    own = values[[one.sample.index for one in drawn]]
    expectation = sum(
        chances[one.prompt.id] * weight * value
        for one, weight, value in zip(drawn, importance_weights(drawn, 2), own, strict=True)
    )
    assert expectation == pytest.approx(values.sum() / 2)


def test_normalised_weights_are_nearly_unbiased_for_few_draws_of_many_and_not_for_all():
    """The gradient's direction is what counts, so the mean of A itself is estimated."""
    rng = np.random.default_rng(0)
    advantages = np.concatenate([rng.uniform(1, 3, 200), -rng.uniform(0.1, 0.6, 800)])
    truth = advantages.mean()
    buffer = buffer_of(advantages.tolist(), seed=1)
    estimates = {"corrected": [], "plain": []}
    for _ in range(500):
        drawn = buffer.draw(60, 0)
        own = np.array([one.sample.advantage for one in drawn])
        estimates["corrected"].append(np.mean(replay_weights(drawn, 1000, CORRECTED) * own))
        estimates["plain"].append(np.mean(own))
    error = 4 * np.std(estimates["corrected"]) / np.sqrt(500)
    assert error < 0.05
    assert abs(np.mean(estimates["corrected"]) - truth) < error + 0.02
    assert np.mean(estimates["plain"]) - truth > 0.7  # large advantages are drawn more often, here the positive ones
    # The whole buffer: without the correction the mean itself, with it small advantages count too much.
    drawn = buffer.draw(1000, 0)
    own = np.array([one.sample.advantage for one in drawn])
    assert np.mean(own) == pytest.approx(truth)
    assert np.mean(replay_weights(drawn, 1000, CORRECTED) * own) < truth - 0.1


def right_share(n, size, share, corrected):
    """Exact expectation of the weight that right answers get, in multiples of their share of the buffer, if groups of
    one right answer (|A| = √7) and seven wrong ones (1/√7) fill it. How many right ones are among those drawn
    is all that the next draw depends on."""
    groups, right, wrong = size // 8, 0.5 - 0.375 * share, (0.5 + 0.375 * share) / 7  # P · groups
    chances = {0: 1.0}  # right ones drawn: chance
    for drawn in range(n):
        later = dict.fromkeys(range(drawn + 2), 0.0)
        for count, chance in chances.items():
            if chance:
                first, second = right * (groups - count), wrong * (7 * groups - (drawn - count))
                later[count + 1] += chance * first / (first + second)
                later[count] += chance * second / (first + second)
        chances = later
    heavy, light = (1 / wrong, 1 / right) if corrected else (1.0, 1.0)
    return 8 * sum(
        chance * light * count / (light * count + heavy * (n - count)) for count, chance in chances.items() if chance
    )


DOCUMENT = Path(__file__).parents[2] / "docs/selective_sample_buffer.md"
CORRECTIONS = [(0.0, False), (0.0, True), (0.2, True)]
"""Uniform share, correction: a column each in the document's table of what the correction leaves of the bias."""


def test_the_bias_in_the_document_is_exact():
    rows = re.findall(r"^\| (\d+) of ([\d,]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", DOCUMENT.read_text(), re.M)
    assert len(rows) >= 10
    for n, size, *stated in rows:
        exact = [right_share(int(n), int(size.replace(",", "")), *how) for how in CORRECTIONS]
        assert [f"{value:.2f}" for value in exact] == stated, (n, size)


@pytest.mark.parametrize(("n", "size"), [(1, 200), (5, 200), (20, 200), (128, 512)])
@pytest.mark.parametrize(("share", "corrected"), CORRECTIONS)
def test_the_bias_of_real_draws_is_the_exact_one(n, size, share, corrected):
    """A single draw weighs 1, so it is not corrected at all; few are corrected in part, many too much."""
    group, runs = [7**0.5] + [-(7**-0.5)] * 7, 1000
    options = {"uniform_share": share, "importance_correction": corrected}
    buffer = buffer_of(group * (size // 8), groups=[8] * (size // 8), **options)
    found = []
    for _ in range(runs):
        drawn = buffer.draw(n, 0)
        weights = replay_weights(drawn, size, buffer.cfg)
        found.append(8 * np.mean(weights * [one.sample.advantage > 0 for one in drawn]))
    # 3.3 standard errors: the 0.1 % point.
    assert abs(np.mean(found) - right_share(n, size, share, corrected)) < 3.3 * np.std(found) / runs**0.5
