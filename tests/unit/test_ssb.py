import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from skyrl.buffer.ssb import SelectiveSampleBuffer
from skyrl.types import Prompt, Sample, SampleGroup


def sample(index, advantage, version=0, rule_advantage=1.0, error=None):
    ids = np.array([index, 1], dtype=np.int32)
    logprobs = np.zeros(2, dtype=np.float32)
    return Sample(
        index, ids, logprobs, "", False, version, advantage=advantage, rule_advantage=rule_advantage, error=error
    )


def group(name, *samples):
    picture = np.zeros((2, 2, 3), dtype=np.uint8)
    return SampleGroup(Prompt(name, "?", (picture,), "", "exact"), np.array([5], dtype=np.int32), list(samples))


def numbered(advantages, version=0, name="g"):
    return group(name, *(sample(index, a, version) for index, a in enumerate(advantages)))


def keys(drawn):
    return [(one.stored.prompt.id, one.sample.index) for one in drawn]


def test_one_right_of_eight_is_drawn_half_the_time():
    buffer = SelectiveSampleBuffer(100, 8, 1.0, seed=3)
    buffer.add([numbered([2.645751] + [-0.377964] * 7)], 0)
    runs = 4000
    counts = Counter()
    for _ in range(runs):
        (one,) = buffer.draw(1, 0)
        counts[one.sample.index] += 1
        assert one.probability == pytest.approx(0.5 if one.sample.index == 0 else 0.0714, abs=1e-4)
    expected = [runs * 0.5] + [runs * 0.5 / 7] * 7
    # 7 degrees of freedom: 24.3 is the 0.1 % point.
    assert sum((counts[i] - want) ** 2 / want for i, want in enumerate(expected)) < 24.3


def test_alpha_shapes_the_probability():
    for alpha, want in ((0.0, 0.5), (1.0, 0.8), (2.0, 16 / 17)):
        buffer = SelectiveSampleBuffer(10, 8, alpha, seed=0)
        buffer.add([numbered([4.0, -1.0])], 0)
        assert {one.sample.index: one.probability for one in buffer.draw(2, 0)}[0] == pytest.approx(want)


def test_importance_weight_makes_every_effective_advantage_the_mean():
    advantages = [2.0, -0.5, 1.0, -3.0]
    buffer = SelectiveSampleBuffer(10, 8, 1.0, seed=0)
    buffer.add([numbered(advantages)], 0)
    for one in buffer.draw(4, 0):
        weight = 1 / (len(buffer) * one.probability)
        assert weight * one.sample.advantage == pytest.approx(np.sign(one.sample.advantage) * np.abs(advantages).mean())


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_only_effective_samples_that_can_be_drawn_are_kept(alpha):
    buffer = SelectiveSampleBuffer(10, 2, alpha, seed=0)
    rows = group(
        "g",
        sample(0, 1.0, 5),
        sample(1, 1.0, 5, rule_advantage=0.0),
        sample(2, 0.0, 5),
        sample(3, 1.0, 5, error="timed out"),
        sample(4, -1.0, 3),
        sample(5, 1.0, 2),
    )
    assert buffer.add([rows], 5) == len(buffer) == 2
    assert sorted(keys(buffer.draw(10, 5))) == [("g", 0), ("g", 4)]


def test_capacity_drops_the_oldest_and_counts_prompts():
    buffer = SelectiveSampleBuffer(3, 8, 1.0, seed=0)
    buffer.add([numbered([1, 1], name="a"), numbered([1, 1], name="b")], 0)
    assert sorted(keys(buffer.draw(9, 0))) == [("a", 1), ("b", 0), ("b", 1)]
    assert buffer.stats(0)["prompts"] == 2
    buffer.add([numbered([1], name="c")], 0)
    assert buffer.stats(0)["prompts"] == 2 and len(buffer) == 3
    assert buffer.add([numbered([1] * 7, name="d")], 0) == 7
    assert sorted(keys(buffer.draw(9, 0))) == [("d", 4), ("d", 5), ("d", 6)]
    assert buffer.stats(0)["prompts"] == 1


def test_age_limit_with_versions_out_of_order():
    buffer = SelectiveSampleBuffer(10, 2, 1.0, seed=0)
    buffer.add([numbered([1.0], 4, "new"), numbered([1.0], 2, "old"), numbered([1.0], 3, "middle")], 4)
    assert len(buffer.draw(9, 4)) == 3
    assert buffer.stats(4) == {"size": 3, "prompts": 3, "priority_mass": 3, "age_mean": 1, "age_max": 2}
    assert sorted(keys(buffer.draw(9, 5))) == [("middle", 0), ("new", 0)]
    assert keys(buffer.draw(9, 6)) == [("new", 0)]
    assert buffer.draw(9, 7) == [] and buffer.stats(7) == {"size": 0, "prompts": 0, "priority_mass": 0}


def test_prompts_are_shared_and_views_are_copied():
    whole = np.arange(12, dtype=np.int32)
    rows = numbered([1.0, 1.0])
    rows.samples[0].token_ids = whole[2:4]
    rows.prompt_ids = whole[:3]
    buffer = SelectiveSampleBuffer(10, 8, 1.0, seed=0)
    buffer.add([rows], 0)
    one, two = sorted(buffer.draw(2, 0), key=lambda drawn: drawn.sample.index)
    assert one.stored is two.stored and one.stored.members == 2
    assert not np.shares_memory(one.sample.token_ids, whole) and one.sample.token_ids.tolist() == [2, 3]
    assert not np.shares_memory(one.stored.prompt_ids, whole)


def test_refuses_broken_samples_and_stays_as_it_was():
    buffer = SelectiveSampleBuffer(10, 8, 1.0, seed=0)
    with pytest.raises(ValueError, match="prompt bad, sample 1: advantage is nan"):
        buffer.add([numbered([1.0], name="good"), numbered([1.0, float("nan")], name="bad")], 0)
    with pytest.raises(ValueError, match="policy version 3; allowed: up to 2"):
        buffer.add([numbered([1.0], 3)], 2)
    assert len(buffer) == 0 and buffer.stats(0)["priority_mass"] == 0
    with pytest.raises(ValueError, match="n is -1"):
        buffer.draw(-1, 0)
    for arguments in ((0, 1, 1.0), (1, -1, 1.0), (1, 1, -0.5), (1, 1, float("nan"))):
        with pytest.raises(ValueError, match="allowed"):
            SelectiveSampleBuffer(*arguments, seed=0)
    with pytest.raises(ValueError, match="rng"):
        buffer.load_state_dict({"capacity": 1})


def filled(seed=5, capacity=20):
    buffer = SelectiveSampleBuffer(capacity, 3, 0.7, seed)
    rng = np.random.default_rng(1)
    for version in range(6):
        buffer.add([numbered(rng.normal(size=5), version, f"{version}/{k}") for k in range(2)], version)
        buffer.draw(4, version)
    return buffer


@pytest.mark.parametrize("capacity", [20, 70])  # full, and with slots that expired samples left
def test_a_resumed_buffer_makes_the_same_draws(capacity):
    buffer = filled(capacity=capacity)
    state = pickle.loads(pickle.dumps(buffer.state_dict()))
    assert len(state["prompts"]) == buffer.stats(5)["prompts"]
    resumed = SelectiveSampleBuffer(capacity, 3, 0.7, seed=99)
    resumed.add([numbered([9.0], name="forgotten")], 0)
    resumed.load_state_dict(state)
    for version in range(5, 9):
        more = [numbered([0.3, -2.0, 1.0], version, f"more/{version}")]
        assert buffer.stats(version) == resumed.stats(version)
        got, want = resumed.draw(7, version), buffer.draw(7, version)
        assert keys(got) == keys(want) and [x.probability for x in got] == [x.probability for x in want]
        assert buffer.add(more, version) == resumed.add(more, version)


def test_equal_seeds_draw_equally_and_others_do_not():
    assert keys(filled(5).draw(10, 5)) == keys(filled(5).draw(10, 5)) != keys(filled(6).draw(10, 5))


@pytest.mark.parametrize("capacity", [6, 50])
def test_another_capacity_keeps_the_newest(capacity):
    buffer = filled()
    old = [(stored.prompt.id, one.index) for stored, one in buffer._live.values()]
    other = SelectiveSampleBuffer(capacity, 3, 0.7, seed=0)
    other.load_state_dict(buffer.state_dict())
    assert sorted(keys(other.draw(99, 5))) == sorted(old[-capacity:])
    other.add([numbered([1.0] * 60, 5, "next")], 5)
    assert len(other) == capacity


class Machine(RuleBasedStateMachine):
    """Compares the buffer with a plain list of (prompt, index, advantage, version)."""

    @initialize(capacity=st.integers(1, 9), max_age=st.integers(0, 3))
    def start(self, capacity, max_age):
        self.buffer = SelectiveSampleBuffer(capacity, max_age, 1.0, seed=0)
        self.model, self.version, self.names = [], 0, 0

    @rule(
        rows=st.lists(st.lists(st.tuples(st.sampled_from([0.0, 0.5, -2.0]), st.integers(0, 4)), max_size=4), max_size=4)
    )
    def add(self, rows):
        groups = []
        for row in rows:
            self.names += 1
            samples = [sample(i, a, max(0, self.version - age)) for i, (a, age) in enumerate(row)]
            groups.append(group(str(self.names), *samples))
            for one in samples:
                if one.advantage and self.version - one.policy_version <= self.buffer.max_age:
                    self.model.append((str(self.names), one.index, one.advantage, one.policy_version))
        self.model = self.model[-self.buffer.capacity :]
        self.buffer.add(groups, self.version)

    @rule(n=st.integers(0, 12), later=st.integers(0, 2))
    def draw(self, n, later):
        self.version += later
        self.model = [row for row in self.model if self.version - row[3] <= self.buffer.max_age]
        drawn = self.buffer.draw(n, self.version)
        found = {(name, index) for name, index in keys(drawn)}
        assert len(found) == len(drawn) == min(n, len(self.model))
        mass = sum(abs(row[2]) for row in self.model)
        probability = {row[:2]: abs(row[2]) / mass for row in self.model}
        for one in drawn:
            assert one.probability == pytest.approx(probability[one.stored.prompt.id, one.sample.index])

    @rule()
    def resume(self):
        state = pickle.loads(pickle.dumps(self.buffer.state_dict()))
        self.buffer = SelectiveSampleBuffer(self.buffer.capacity, self.buffer.max_age, 1.0, seed=1)
        self.buffer.load_state_dict(state)

    @invariant()
    def agrees(self):
        if not hasattr(self, "buffer"):
            return
        stats = self.buffer.stats(self.version)
        live = list(self.buffer._live.values())
        assert [(stored.prompt.id, one.index) for stored, one in live] == [row[:2] for row in self.model]
        assert stats["size"] == len(self.buffer) == len(self.model) <= self.buffer.capacity
        assert stats["prompts"] == len({row[0] for row in self.model})
        assert stats["priority_mass"] == pytest.approx(sum(abs(row[2]) for row in self.model))
        members = Counter(row[0] for row in self.model)
        assert all(stored.members == members[stored.prompt.id] for stored, _ in live)
        if self.model:
            assert stats["age_max"] == max(self.version - row[3] for row in self.model)


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)
