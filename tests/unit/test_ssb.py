import doctest
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
from skyrl.replay import ssb
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


def sample(index, advantage, version=0, rule_advantage=1.0, **fields):
    ids = np.array([index, 1], dtype=np.int32)
    logprobs = np.zeros(2, dtype=np.float32)
    return Sample(index, ids, logprobs, "", False, version, None, advantage, rule_advantage, **fields)


def group(name, *samples):
    picture = np.zeros((2, 2, 3), dtype=np.uint8)
    return SampleGroup(Prompt(name, "?", (picture,), "", "exact"), np.array([5], dtype=np.int32), list(samples))


def numbered(advantages, version=0, name="g"):
    return group(name, *(sample(index, a, version) for index, a in enumerate(advantages)))


def make(capacity=10, max_age=8, seed=0, **options):
    return SelectiveSampleBuffer(BufferConfig(capacity=capacity, max_age=max_age, **options), seed)


def keys(drawn):
    return [(one.prompt.id, one.sample.index) for one in drawn]


def held(buffer):
    """Everything in the buffer, in the order in which it came."""
    state = buffer.state_dict()
    names = [state["prompts"][place][0].id for place in state["sample_prompts"]]
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
    assert {one.prompt.id: one.probability for one in buffer.draw(6, 0)} == pytest.approx({"a": 0.8, "b": 0.2})


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
        sample(6, 1.0, 5, mask=np.zeros(2, dtype=bool)),
        sample(7, 1.0, 4, mask=np.array([False, True])),
    )
    assert buffer.add([rows], 5) == len(buffer) == 3
    assert sorted(keys(buffer.draw(10, 5))) == [("g", 0), ("g", 4), ("g", 7)]


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


def test_a_group_is_as_old_as_its_oldest_sample():
    buffer = make(max_age=3, unit=Unit.group, recency=0.5)
    buffer.add([group("mixed", sample(0, 1.0, 4), sample(1, 1.0, 2)), numbered([1.0], 4, "even")], 4)
    assert {one.prompt.id: one.probability for one in buffer.draw(3, 4)} == pytest.approx({"mixed": 0.2, "even": 0.8})
    assert buffer.stats(5)["age_max"] == 3 and buffer.stats(5)["age_mean"] == pytest.approx(7 / 3)
    assert keys(buffer.draw(3, 6)) == [("even", 0)]


def test_prompts_are_shared_and_views_are_copied():
    whole, flags = np.arange(12, dtype=np.int32), np.ones(12, dtype=bool)
    pictures, logs = np.arange(48, dtype=np.uint8).reshape(4, 2, 2, 3), np.zeros(12, dtype=np.float32)
    rows = numbered([1.0, 1.0])
    rows.samples[0].token_ids, rows.samples[0].logprobs, rows.samples[0].mask = whole[2:4], logs[2:4], flags[2:4]
    rows.samples[1].logprobs = None
    rows.prompt_ids = whole[:3]
    rows.prompt = replace(rows.prompt, images=(pictures[1], pictures[2].copy()))
    buffer = make()
    buffer.add([rows], 0)
    one, two = sorted(buffer.draw(2, 0), key=lambda drawn: drawn.sample.index)
    assert one.prompt is two.prompt and one.prompt_ids is two.prompt_ids and buffer.stats(0)["prompts"] == 1
    assert two.sample.logprobs is None and two.sample.token_ids is rows.samples[1].token_ids
    own = [one.sample.token_ids, one.sample.logprobs, one.sample.mask, one.prompt_ids, *one.prompt.images]
    assert all(array.flags.owndata for array in own)
    wanted = [whole[2:4], logs[2:4], flags[2:4], whole[:3], pictures[1], pictures[2]]
    assert all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(own, wanted, strict=True))
    # What owns its memory is not copied.
    assert one.prompt.images[1] is rows.prompt.images[1]


def test_the_example_in_the_docstring():
    assert doctest.testmod(ssb) == (0, 7)


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
    with pytest.raises(ValueError, match=next(iter(setting))):
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


@pytest.mark.parametrize("place", [-1, 10**6])
def test_a_state_that_names_a_prompt_that_it_lacks_is_refused(place):
    buffer, other = filled(), make(4)
    state = buffer.state_dict()
    state["sample_prompts"][0] = place
    with pytest.raises(ValueError, match="names a prompt that it lacks"):
        other.load_state_dict(state)
    assert len(other) == 0


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
    assert held(joined) == old and len({one.probability for one in joined.draw(20, 1005)}) == 4
    parted = make(20, 3)
    parted.load_state_dict(joined.state_dict())
    assert held(parted) == old and len({one.probability for one in parted.draw(20, 1005)}) == 20


def test_groups_that_do_not_fit_into_a_smaller_buffer_are_refused_and_it_stays_as_it_was():
    saved = make(20)
    saved.add([numbered([1.0] * 2, name="small"), numbered([1.0] * 5, name="large")], 0)
    buffer = make(4, unit=Unit.group)
    buffer.add([numbered([2.0, 1.0], name="kept"), numbered([1.0], name="too")], 0)
    untouched = make(4, unit=Unit.group)
    untouched.load_state_dict(buffer.state_dict())
    with pytest.raises(ValueError, match="prompt large: 5 samples to keep together; capacity is 4"):
        buffer.load_state_dict(saved.state_dict())
    assert held(buffer) == [("kept", 0), ("kept", 1), ("too", 0)]
    for _ in range(20):  # the generator's state stayed, too
        assert keys(buffer.draw(3, 0)) == keys(untouched.draw(3, 0))
    # Those that fit go as a whole, the first first.
    buffer = make(5, unit=Unit.group)
    buffer.load_state_dict(saved.state_dict())
    assert held(buffer) == [("large", i) for i in range(5)]


def test_another_exponent_ranks_anew():
    saved = make()
    saved.add([numbered([1e-3, 2.0, 10.0])], 0)
    buffer = make(alpha=20.0)
    buffer.load_state_dict(saved.state_dict())
    assert held(buffer) == [("g", 1), ("g", 2)]  # 1e-60 counts as 0
    assert {one.sample.index: one.probability for one in buffer.draw(2, 0)}[1] == pytest.approx(1 / (1 + 5.0**20))
    with pytest.raises(ValueError, match=r"prompt g, sample 2: \|10\.0\|\^51 is above 1e50; lower alpha"):
        make(alpha=51.0).load_state_dict(saved.state_dict())


def test_another_eviction_and_age_limit_act_at_once():
    saved = make()
    saved.add([numbered([9.0], 0, "old"), numbered([0.5, 3.0, 1.0], 3, "new")], 3)
    buffer = make(2, eviction=Eviction.smallest)
    buffer.load_state_dict(saved.state_dict())
    assert held(buffer) == [("old", 0), ("new", 1)]
    buffer = make(3, max_age=2, eviction=Eviction.smallest)
    buffer.load_state_dict(saved.state_dict())
    assert held(buffer) == [("new", 0), ("new", 1), ("new", 2)]  # the outdated made room


def test_a_state_of_another_layout_is_refused():
    buffer = filled()
    state = buffer.state_dict()
    records = {key: state[key] for key in ("samples", "prompts", "rng")} | {"capacity": 20, "free": []}
    first = records | {"slots": [], "sample_prompts": []}
    second = records | {"unit": "sample", "leaves": [], "counts": [], "unit_prompts": []}
    for other, number, age in ((first, 1, "older"), (second, 2, "older"), (state | {"layout": 4}, 4, "newer")):
        with pytest.raises(
            ValueError, match=f"state has layout {number}, that of {age} checkpoints; .* reads layout 3"
        ):
            buffer.load_state_dict(other)
    assert held(buffer) == held(filled())


# ---------------------------------------------------------------- everything together


class Machine(RuleBasedStateMachine):
    """Compares the buffer with a plain list of units: (prompt, members as (index, advantage), version)."""

    @initialize(
        capacity=st.integers(4, 9),
        max_age=st.integers(1, 3),
        alpha=st.sampled_from([1.0, 2.0, 0.0]),
        recency=st.sampled_from([1.0, 0.5]),
        share=st.sampled_from([0.0, 0.25, 1.0]),
        eviction=st.sampled_from(Eviction),
        unit=st.sampled_from(Unit),
    )
    def start(self, capacity, max_age, alpha, recency, share, eviction, unit):
        self.cfg = BufferConfig(
            capacity=capacity,
            max_age=max_age,
            alpha=alpha,
            recency=recency,
            uniform_share=share,
            eviction=eviction,
            unit=unit,
        )
        self.buffer = SelectiveSampleBuffer(self.cfg, seed=0)
        self.model, self.version, self.names = [], 0, 0

    def size(self):
        return sum(len(unit[1]) for unit in self.model)

    def expire(self):
        self.model = [unit for unit in self.model if self.version - unit[2] <= self.cfg.max_age]

    def key(self, unit):
        # Powers of two times halves: exact, so ties are ties.
        mean = sum(abs(a) ** self.cfg.alpha for _, a in unit[1]) / len(unit[1])
        return mean / self.cfg.recency ** unit[2] if self.cfg.eviction is Eviction.smallest else 0.0

    def put(self, name, members, version):
        """The samples of one group, as units."""
        for unit in [[one] for one in members] if self.cfg.unit is Unit.sample else [members] if members else []:
            self.put_unit((name, unit, version))

    def put_unit(self, unit):
        while self.size() + len(unit[1]) > self.cfg.capacity:
            first = min(self.model, key=self.key)  # min() takes the first among equals
            if self.key(unit) < self.key(first):
                return
            self.model.remove(first)
        self.model.append(unit)

    def fits(self, groups):
        return self.cfg.unit is Unit.sample or all(len(members) <= self.cfg.capacity for _, members, _ in groups)

    @rule(
        rows=st.lists(st.tuples(st.lists(st.sampled_from([0.0, 0.5, -2.0]), max_size=4), st.integers(0, 4)), max_size=4)
    )
    def add(self, rows):
        groups, kept = [], []
        for advantages, age in rows:
            self.names += 1
            version = max(0, self.version - age)
            groups.append(numbered(advantages, version, str(self.names)))
            young = self.version - version <= self.cfg.max_age
            kept.append((str(self.names), [(i, a) for i, a in enumerate(advantages) if a and young], version))
        if not self.fits(kept):
            with pytest.raises(ValueError, match="samples to keep together"):
                self.buffer.add(groups, self.version)
            return
        self.expire()
        for group in kept:
            self.put(*group)
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
        units = [[(a, unit[2]) for _, a in unit[1]] for unit in self.model]
        cfg = self.cfg
        chances = first_chances(units, self.version, cfg.alpha, cfg.recency, cfg.uniform_share) if units else []
        chance = {(unit[0], i): p for unit, p in zip(self.model, chances, strict=True) for i, _ in unit[1]}
        for one in drawn:
            assert one.probability == pytest.approx(chance[one.prompt.id, one.sample.index])

    @rule()
    def resume(self):
        state = pickle.loads(pickle.dumps(self.buffer.state_dict()))
        self.buffer = SelectiveSampleBuffer(self.cfg, seed=1)
        self.buffer.load_state_dict(state)

    @rule(
        capacity=st.integers(1, 9),
        max_age=st.integers(1, 3),
        alpha=st.sampled_from([1.0, 2.0]),
        eviction=st.sampled_from(Eviction),
        unit=st.sampled_from(Unit),
    )
    def go_on_with_other_settings(self, **changes):
        state, before = self.buffer.state_dict(), self.cfg
        self.cfg = before.model_copy(update=changes)
        groups = {}
        for name, members, version in self.model:
            groups.setdefault(name, (name, [], version))[1].extend(members)
        buffer = SelectiveSampleBuffer(self.cfg, seed=1)
        if not self.fits(groups.values()):
            with pytest.raises(ValueError, match="samples to keep together"):
                buffer.load_state_dict(state)
            assert len(buffer) == 0
            self.cfg = before
            return
        newest = max((unit[2] for unit in self.model), default=0)
        self.model, self.buffer = [], buffer
        for group in groups.values():
            if newest - group[2] <= self.cfg.max_age:
                self.put(*group)
        buffer.load_state_dict(state)

    @invariant()
    def agrees(self):
        if not hasattr(self, "buffer"):
            return
        stats = self.buffer.stats(self.version)
        assert held(self.buffer) == [(unit[0], i) for unit in self.model for i, _ in unit[1]]
        assert stats["size"] == len(self.buffer) == self.size() <= self.cfg.capacity
        names = [unit[0] for unit in self.model]
        assert stats["prompts"] == len(set(names)) == len(self.buffer.state_dict()["prompts"])
        alpha, recency = self.cfg.alpha, self.cfg.recency
        masses = [
            sum(abs(a) ** alpha for _, a in members) / len(members) * recency ** (self.version - version)
            for _, members, version in self.model
        ]
        assert stats["priority_mass"] == pytest.approx(sum(masses))
        ages = [self.version - version for _, members, version in self.model for _ in members]
        if ages:
            assert stats["age_max"] == max(ages) and stats["age_mean"] == pytest.approx(sum(ages) / len(ages))


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=200, stateful_step_count=20, deadline=None)
