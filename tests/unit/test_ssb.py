import itertools
import math
import pickle
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from skyrl.records import Prompt, Sample, SampleGroup
from skyrl.replay.ssb import SelectiveSampleBuffer
from skyrl.settings import BufferConfig, Eviction, Unit

OPTIONS = [
    {},
    {"recency": 0.6},
    {"uniform_share": 0.3},
    {"eviction": Eviction.smallest, "recency": 0.8},
    {"unit": Unit.group, "recency": 0.7, "uniform_share": 0.2},
    {"unit": Unit.group, "eviction": Eviction.smallest},
]


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


def make(capacity=10, max_age=8, seed=0, **options):
    return SelectiveSampleBuffer(BufferConfig(capacity=capacity, max_age=max_age, **options), seed)


def keys(drawn):
    return [(one.stored.prompt.id, one.sample.index) for one in drawn]


def held(buffer):
    """Everything in the buffer, in the order in which it came."""
    state = buffer.state_dict()
    names = [
        state["prompts"][p][0].id for p, n in zip(state["unit_prompts"], state["counts"], strict=True) for _ in range(n)
    ]
    return list(zip(names, [one.index for one in state["samples"]], strict=True))


# ---------------------------------------------------------------- the law of the draws


def test_one_right_of_eight_is_drawn_half_the_time():
    buffer = make(100, seed=3)
    buffer.add([numbered([2.645751] + [-0.377964] * 7)], 0)
    runs = 3000
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
        buffer = make(alpha=alpha)
        buffer.add([numbered([4.0, -1.0])], 0)
        assert {one.sample.index: one.probability for one in buffer.draw(2, 0)}[0] == pytest.approx(want)


def first_chances(units, now, alpha, recency, share):
    """P by its definition, in plain Python; ``units`` are lists of (advantage, version)."""
    priorities = [sum(abs(a) ** alpha * recency ** (now - v) for a, v in unit) / len(unit) for unit in units]
    return [(1 - share) * p / sum(priorities) + share / len(units) for p in priorities]


@pytest.mark.parametrize("unit", Unit)
@pytest.mark.parametrize(("alpha", "recency", "share"), [(1.0, 0.5, 0.0), (0.5, 0.5, 0.3), (2.0, 1.0, 0.1)])
def test_ordered_pairs_have_exactly_the_enumerated_law_of_the_mixture(unit, alpha, recency, share):
    groups = [numbered([3.0, -1.0], 4, "a"), numbered([2.0], 6, "b"), numbered([-0.5, 0.5], 7, "c")]
    buffer = make(alpha=alpha, recency=recency, uniform_share=share, unit=unit, seed=1)
    for one in groups:
        buffer.add([one], one.samples[0].policy_version)
    members = [[(one.advantage, one.policy_version) for one in whole.samples] for whole in groups]
    names = ["a", "b", "c"]
    if unit is Unit.sample:
        names = [(name, i) for name, whole in zip("abc", members, strict=True) for i in range(len(whole))]
        members = [[one] for whole in members for one in whole]
    chance = dict(zip(names, first_chances(members, 7, alpha, recency, share), strict=True))
    expected = {(i, j): chance[i] * chance[j] / (1 - chance[i]) for i, j in itertools.permutations(names, 2)}
    assert sum(expected.values()) == pytest.approx(1)
    counts, runs = Counter(), 2000
    for _ in range(runs):
        drawn = buffer.draw(4 if unit is Unit.group else 2, 7)
        order = keys(drawn) if unit is Unit.sample else list(dict.fromkeys(name for name, _ in keys(drawn)))
        counts[tuple(order[:2])] += 1
    for name, one in zip(keys(drawn), drawn, strict=True):
        assert one.probability == pytest.approx(chance[name if unit is Unit.sample else name[0]], rel=1e-12)
    assert set(counts) <= set(expected)
    # The 0.1 % points of 19 and of 5 degrees of freedom.
    limit = 43.8 if unit is Unit.sample else 20.5
    assert sum((counts[pair] - runs * p) ** 2 / (runs * p) for pair, p in expected.items()) < limit


@pytest.mark.parametrize(("recency", "last"), [(0.5, 2600), (0.97, 12_000), (1.0, 500)])
def test_recency_is_exact_over_thousands_of_versions(recency, last):
    buffer = make(capacity=50, max_age=12, recency=recency)
    rng = np.random.default_rng(0)
    rows = []
    for version in range(0, last, 4):
        advantages = rng.normal(size=3).tolist()
        rows = [row for row in rows if version - row[1] <= 12] + [(a, version) for a in advantages]
        buffer.add([numbered(advantages, version, str(version))], version)
        if version % 12 == 0:  # often enough to see the weights right after they were shifted
            want = first_chances([[row] for row in rows], version, 1.0, recency, 0.0)
            got = {one.sample.advantage: one.probability for one in buffer.draw(50, version)}
            chances = [got.pop(advantage) for advantage, _ in rows]
            assert not got and np.allclose(chances, want, rtol=1e-10, atol=0)
    mass = sum(abs(a) * recency ** (last - v) for a, v in rows if last - v <= 12)
    buffer.draw(0, last)
    assert buffer.stats(last)["priority_mass"] == pytest.approx(mass, rel=1e-9)


def test_a_group_is_drawn_whole_and_the_first_that_does_not_fit_ends_the_draw():
    buffer = make(20, unit=Unit.group)
    buffer.add([numbered([4.0] * 3, name="a"), numbered([1.0] * 3, name="b"), numbered([1e-9], name="c")], 0)
    for n, sizes in ((2, {0}), (3, {3}), (5, {3}), (6, {6}), (7, {7}), (9, {7})):
        drawn = [buffer.draw(n, 0) for _ in range(20)]
        assert {len(one) for one in drawn} == sizes, n
        for one in drawn:
            assert all(count == (1 if name == "c" else 3) for name, count in Counter(n for n, _ in keys(one)).items())
    # Σ of the groups' mean priorities, not of the samples'.
    assert {one.stored.prompt.id: one.probability for one in buffer.draw(6, 0)} == pytest.approx({"a": 0.8, "b": 0.2})


# ---------------------------------------------------------------- what is kept


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_only_effective_samples_that_can_be_drawn_are_kept(alpha):
    buffer = make(max_age=2, alpha=alpha)
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
    buffer = make(3)
    assert buffer.add([numbered([1, 1], name="a"), numbered([1, 1], name="b")], 0) == 3
    assert sorted(keys(buffer.draw(9, 0))) == [("a", 1), ("b", 0), ("b", 1)]
    assert buffer.stats(0)["prompts"] == 2
    assert buffer.add([numbered([1], name="c")], 0) == 1
    assert buffer.stats(0)["prompts"] == 2 and len(buffer) == 3
    assert buffer.add([numbered([1] * 7, name="d")], 0) == 3
    assert held(buffer) == [("d", 4), ("d", 5), ("d", 6)]
    assert buffer.stats(0)["prompts"] == 1


def test_the_smallest_priority_goes_and_among_equals_the_oldest():
    buffer = make(3, eviction=Eviction.smallest)
    assert buffer.add([numbered([-2.0, 0.5, 1.0, 0.5], name="a")], 0) == 3
    assert held(buffer) == [("a", 0), ("a", 2), ("a", 3)]  # the first of the two 0.5
    assert buffer.add([numbered([0.1], name="b")], 0) == 0  # itself the smallest
    assert buffer.add([numbered([1.0, 1.0], name="c")], 0) == 2
    assert held(buffer) == [("a", 0), ("c", 0), ("c", 1)]


def test_the_smallest_priority_takes_recency_into_account():
    buffer = make(2, eviction=Eviction.smallest, recency=0.5)
    buffer.add([numbered([3.0, 1.0], 0, "old")], 0)
    buffer.add([numbered([1.1], 1, "new")], 1)  # 1.5, 0.5 and 1.1 at version 1
    assert held(buffer) == [("old", 0), ("new", 0)]
    buffer.add([numbered([1.1], 2, "newer")], 2)  # 0.75, 0.55 and 1.1 at version 2
    assert held(buffer) == [("old", 0), ("newer", 0)]
    buffer.add([numbered([0.8], 3, "newest")], 3)  # 0.375, 0.55 and 0.8 at version 3
    assert held(buffer) == [("newer", 0), ("newest", 0)]


@pytest.mark.parametrize("eviction", Eviction)
def test_groups_make_room_as_a_whole(eviction):
    buffer = make(5, unit=Unit.group, eviction=eviction)
    buffer.add([numbered([1.0, 1.0], name="a"), numbered([0.1, 2.0], name="b")], 0)
    buffer.add([numbered([1.0, 1.0], name="c")], 0)
    # "a" came first and has the smaller mean: 1.0 against 1.05.
    assert held(buffer) == [("b", 0), ("b", 1), ("c", 0), ("c", 1)]
    assert buffer.add([numbered([0.5] * 4, name="d")], 0) == (4 if eviction is Eviction.oldest else 0)


def test_what_is_too_old_makes_room_before_anything_else_does():
    buffer = make(2, max_age=1, eviction=Eviction.smallest)
    buffer.add([numbered([9.0, 9.0], 0, "old")], 0)
    assert buffer.add([numbered([0.1, 0.2], 2, "new")], 2) == 2
    assert held(buffer) == [("new", 0), ("new", 1)]


def test_age_limit_with_versions_out_of_order():
    buffer = make(max_age=2)
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
    buffer = make()
    buffer.add([rows], 0)
    one, two = sorted(buffer.draw(2, 0), key=lambda drawn: drawn.sample.index)
    assert one.stored is two.stored and one.stored.members == 2
    assert not np.shares_memory(one.sample.token_ids, whole) and one.sample.token_ids.tolist() == [2, 3]
    assert not np.shares_memory(one.stored.prompt_ids, whole)


def test_refuses_broken_samples_and_stays_as_it_was():
    buffer = make(alpha=30.0, capacity=2, unit=Unit.group)
    with pytest.raises(ValueError, match="prompt bad, sample 1: advantage is nan"):
        buffer.add([numbered([1.0], name="good"), numbered([1.0, float("nan")], name="bad")], 0)
    for huge in (1e3, 1e300):
        with pytest.raises(ValueError, match="above 1e50; lower alpha"):
            buffer.add([numbered([1.0, huge])], 0)
    with pytest.raises(ValueError, match="policy version 3; allowed: up to 2"):
        buffer.add([numbered([1.0], 3)], 2)
    with pytest.raises(ValueError, match="prompt g: 3 samples to keep together; capacity is 2"):
        buffer.add([numbered([1.0] * 3)], 0)
    assert buffer.add([numbered([0.01])], 0) == 0  # 1e-60 counts as 0
    assert len(buffer) == 0 and buffer.stats(0)["priority_mass"] == 0
    with pytest.raises(ValueError, match="n is -1"):
        buffer.draw(-1, 0)


@pytest.mark.parametrize(
    "setting",
    [
        *({"capacity": 0}, {"max_age": -1}, {"alpha": -0.5}, {"alpha": math.nan}, {"recency": 0.0}),
        *({"recency": 1.01}, {"recency": math.nan}, {"uniform_share": -0.1}, {"uniform_share": 1.1}),
    ],
)
def test_refuses_settings_out_of_range(setting):
    with pytest.raises(ValueError, match="allowed"):
        make(**setting)


def test_refuses_an_age_at_which_recency_leaves_nothing():
    make(recency=0.5, max_age=500)
    with pytest.raises(ValueError, match=r"recency is 0\.5 with max_age 501; allowed: a max_age of up to 500"):
        make(recency=0.5, max_age=501)


# ---------------------------------------------------------------- state


def filled(seed=5, capacity=20, **options):
    buffer = make(capacity, 3, seed, alpha=0.7, **options)
    rng = np.random.default_rng(1)
    for version in range(1000, 1006):
        buffer.add([numbered(rng.normal(size=5), version, f"{version}/{k}") for k in range(2)], version)
        buffer.draw(4, version)
    return buffer


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("capacity", [20, 70])  # full, and with leaves that expired samples left
def test_a_resumed_buffer_makes_the_same_draws(capacity, options):
    buffer = filled(capacity=capacity, **options)
    state = pickle.loads(pickle.dumps(buffer.state_dict()))
    assert len(state["prompts"]) == buffer.stats(1005)["prompts"]
    resumed = make(capacity, 3, seed=99, alpha=0.7, **options)
    resumed.add([numbered([9.0], name="forgotten")], 0)
    resumed.load_state_dict(state)
    # A thousand versions on: all weights are shifted in between, at another time in the two buffers.
    for version in (*range(1005, 1010), *range(3000, 3004)):
        more = [
            numbered([0.3, -2.0, 1.0], version, f"more/{version}"),
            numbered([-0.4, 1.0], version, f"too/{version}"),
        ]
        got, want = resumed.draw(7, version), buffer.draw(7, version)
        assert keys(got) == keys(want) and [x.probability for x in got] == [x.probability for x in want]
        assert buffer.stats(version) == resumed.stats(version)
        assert buffer.add(more, version) == resumed.add(more, version)
        assert held(buffer) == held(resumed)


def test_equal_seeds_draw_equally_and_others_do_not():
    assert keys(filled(5).draw(10, 1005)) == keys(filled(5).draw(10, 1005)) != keys(filled(6).draw(10, 1005))


@pytest.mark.parametrize("capacity", [6, 50])
def test_another_capacity_keeps_the_newest(capacity):
    buffer = filled()
    old = held(buffer)
    other = make(capacity, 3)
    other.load_state_dict(buffer.state_dict())
    assert held(other) == old[-capacity:]
    assert sorted(keys(other.draw(99, 1005))) == sorted(old[-capacity:])
    other.add([numbered([1.0] * 60, 1005, "next")], 1005)
    assert len(other) == capacity


def test_another_unit_parts_and_joins_the_groups():
    buffer = filled()
    old = held(buffer)
    joined = make(20, 3, unit=Unit.group)
    joined.load_state_dict(buffer.state_dict())
    assert held(joined) == old and len(joined.state_dict()["counts"]) == 4
    parted = make(20, 3)
    parted.load_state_dict(joined.state_dict())
    assert held(parted) == old and parted.state_dict()["counts"] == [1] * 20


def test_a_state_of_the_first_format_is_refused():
    buffer = filled()
    state = buffer.state_dict()
    old = {key: state[key] for key in ("capacity", "free", "samples", "prompts", "rng")}
    with pytest.raises(ValueError, match=r"lacks \['counts', 'leaves', 'unit', 'unit_prompts'\]: another version"):
        buffer.load_state_dict(old | {"slots": state["leaves"], "sample_prompts": state["unit_prompts"]})
    assert held(buffer) == held(filled())


# ---------------------------------------------------------------- everything together


class Machine(RuleBasedStateMachine):
    """Compares the buffer with a plain list of units: (prompt, indices, mean |A|, version)."""

    @initialize(
        capacity=st.integers(4, 9),
        max_age=st.integers(0, 3),
        recency=st.sampled_from([1.0, 0.5]),
        share=st.sampled_from([0.0, 0.25, 1.0]),
        eviction=st.sampled_from(Eviction),
        unit=st.sampled_from(Unit),
    )
    def start(self, capacity, max_age, recency, share, eviction, unit):
        self.cfg = BufferConfig(
            capacity=capacity, max_age=max_age, recency=recency, uniform_share=share, eviction=eviction, unit=unit
        )
        self.buffer = SelectiveSampleBuffer(self.cfg, seed=0)
        self.model, self.version, self.names = [], 0, 0

    def size(self):
        return sum(len(unit[1]) for unit in self.model)

    def expire(self):
        self.model = [unit for unit in self.model if self.version - unit[3] <= self.cfg.max_age]

    def key(self, unit):
        # Powers of two times halves: exact, so ties are ties.
        return unit[2] / self.cfg.recency ** unit[3] if self.cfg.eviction is Eviction.smallest else 0.0

    def put(self, unit):
        while self.size() + len(unit[1]) > self.cfg.capacity:
            first = min(self.model, key=self.key)  # min() takes the first among equals
            if self.key(unit) < self.key(first):
                return
            self.model.remove(first)
        self.model.append(unit)

    @rule(
        rows=st.lists(st.tuples(st.lists(st.sampled_from([0.0, 0.5, -2.0]), max_size=4), st.integers(0, 4)), max_size=4)
    )
    def add(self, rows):
        groups = []
        self.expire()
        for advantages, age in rows:
            self.names += 1
            version = max(0, self.version - age)
            groups.append(numbered(advantages, version, str(self.names)))
            kept = [(i, abs(a)) for i, a in enumerate(advantages) if a and self.version - version <= self.cfg.max_age]
            if self.cfg.unit is Unit.sample:
                for i, a in kept:
                    self.put((str(self.names), (i,), a, version))
            elif kept:
                mean = sum(a for _, a in kept) / len(kept)
                self.put((str(self.names), tuple(i for i, _ in kept), mean, version))
        new = {one.prompt.id for one in groups}
        assert self.buffer.add(groups, self.version) == sum(len(unit[1]) for unit in self.model if unit[0] in new)

    @rule(n=st.integers(0, 12), later=st.integers(0, 2))
    def draw(self, n, later):
        self.version += later
        self.expire()
        drawn = self.buffer.draw(n, self.version)
        assert len(set(keys(drawn))) == len(drawn) <= n
        if self.cfg.unit is Unit.sample:
            assert len(drawn) == min(n, self.size())
        assert all(self.version - one.sample.policy_version <= self.cfg.max_age for one in drawn)
        units = [[(unit[2], unit[3])] for unit in self.model]
        chances = first_chances(units, self.version, 1.0, self.cfg.recency, self.cfg.uniform_share) if units else []
        chance = {(unit[0], i): p for unit, p in zip(self.model, chances, strict=True) for i in unit[1]}
        for one in drawn:
            assert one.probability == pytest.approx(chance[one.stored.prompt.id, one.sample.index])

    @rule()
    def resume(self):
        state = pickle.loads(pickle.dumps(self.buffer.state_dict()))
        self.buffer = SelectiveSampleBuffer(replace(self.cfg), seed=1)
        self.buffer.load_state_dict(state)

    @invariant()
    def agrees(self):
        if not hasattr(self, "buffer"):
            return
        stats = self.buffer.stats(self.version)
        assert held(self.buffer) == [(unit[0], i) for unit in self.model for i in unit[1]]
        assert stats["size"] == len(self.buffer) == self.size() <= self.cfg.capacity
        names = [unit[0] for unit in self.model]
        assert stats["prompts"] == len(set(names)) == len(self.buffer.state_dict()["prompts"])
        mass = sum(unit[2] * self.cfg.recency ** (self.version - unit[3]) for unit in self.model)
        assert stats["priority_mass"] == pytest.approx(mass)
        if self.model:
            assert stats["age_max"] == max(self.version - unit[3] for unit in self.model)
        # The trees agree with the entries, leaf by leaf, and empty leaves weigh nothing.
        buffer = self.buffer
        leaves = np.arange(self.cfg.capacity)
        filled = np.array([buffer._queue.number(leaf) >= 0 for leaf in leaves])
        assert ((buffer._tree.get(leaves) > 0) == filled).all() and filled.sum() == len(self.model)
        assert buffer._ones is None or (buffer._ones.get(leaves) == filled).all()
        members = Counter()
        for leaf in leaves[filled].tolist():
            members[id(buffer._store[leaf].stored)] += len(buffer._store[leaf].samples)
        assert all(buffer._store[i].stored.members == members[id(buffer._store[i].stored)] for i in leaves[filled])


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)
