import pickle
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skyrl.batch.batcher import Batcher
from skyrl.records import (
    DataError,
    PreferencePair,
    Prompt,
    RewardParts,
    Sample,
    SampleGroup,
    SkyrlError,
    StepReport,
    TrainBatch,
)
from skyrl.settings import (
    AlgorithmConfig,
    BufferConfig,
    Config,
    ControllerConfig,
    GrpoConfig,
    GrpoFilter,
    MpoConfig,
    OwnTerm,
    PairSource,
    Stage,
    ThresholdConfig,
    ThresholdKind,
)

RIGHT_3_OF_8 = [1.0, 1.0, 1.0, -0.6, -0.6, -0.6, -0.6, -0.6]


OFF = ThresholdConfig(kind=ThresholdKind.off)
PICTURE = np.zeros((1, 1, 3), dtype=np.uint8)


def make_group(
    name,
    advantages,
    effective=True,
    version=0,
    scores=None,
    tokens=None,
    errors=(),
    rules=None,
    false=None,
    facts=None,
    masks=None,
):
    """``facts`` also gives the prompt a picture; ``false`` are the samples' numbers of false claims; ``masks`` say by
    sample which tokens train."""
    samples = []
    for index, advantage in enumerate(advantages):
        length = 2 if tokens is None else tokens[index]
        score = 0.0 if scores is None else scores[index]
        failed = index in errors
        samples.append(
            Sample(
                index,
                np.full(length, index, dtype=np.int32),
                np.zeros(length, dtype=np.float32),
                "",
                False,
                version,
                reward=None if failed else RewardParts(1.0 if rules is None else rules[index], 1.0, score, 1.0),
                advantage=advantage,
                rule_advantage=advantage if effective else 0.0,
                false_claims=0 if false is None else false[index],
                error="verifier crashed" if failed else None,
            )
        )
        if masks is not None and index in masks:
            samples[-1].mask = np.array(masks[index], dtype=bool)
    prompt = Prompt(name, "?", () if facts is None else (PICTURE,), "", "exact", facts=facts or {})
    return SampleGroup(prompt, np.array([1], dtype=np.int32), samples, checkable=facts is not None)


def service(seed=0, grpo=None, mpo_weight=0.0, threshold=1.0, pairs=1, lag=0, **buffer):
    mpo = MpoConfig(weight=mpo_weight, threshold=ThresholdConfig(value=threshold), pairs_per_prompt=pairs)
    return batcher(AlgorithmConfig(grpo=grpo or GrpoConfig(), mpo=mpo), BufferConfig(**buffer), lag, seed)


def algorithm_service(mix=1.0, lag=0, **algorithm):
    return batcher(AlgorithmConfig(**algorithm), BufferConfig(mix=mix), lag)


def batcher(algorithm, buffer, lag=0, seed=0):
    return Batcher(Config(algorithm=algorithm, buffer=buffer, controller=ControllerConfig(seed=seed, lag=lag)), "")


def exchange(one, groups, step, version):
    """The batch, and the metrics without those of the rewards."""
    batch, report = one.exchange(step, version, groups)
    assert (batch.step, batch.version, batch.weights) == (step, version, one.cfg.algorithm.weights(step))
    groups_own = ("buffer/", "batch/", "threshold/", "gate/")
    return batch, {name: value for name, value in report.metrics.items() if name.startswith(groups_own)}


def listed(batch):
    """At lag 0 a sample is off-policy if it is replayed."""
    return [(item.prompt.id, item.sample.index, item.grpo_weight, batch.off_policy(item)) for item in batch.items]


def test_fill_rule_by_hand():
    buffer = service(mix=0.25)
    first = [make_group("a", RIGHT_3_OF_8), make_group("b", RIGHT_3_OF_8), make_group("c", [0.1] * 8, effective=False)]
    batch, metrics = exchange(buffer, first, 0, 0)
    # The first step finds an empty buffer: 16 fresh effective samples of 2 tokens each, of 24.
    assert listed(batch) == [(name, index, 1.0, False) for name in "ab" for index in range(8)]
    assert (batch.step, batch.grpo_samples, batch.grpo_tokens, batch.pairs) == (0, 16, 32, [])
    assert metrics == {
        "buffer/size": 16,
        "buffer/replayed": 0,
        "batch/items": 16,
        "batch/lag_mean": 0,
        "batch/lag_max": 0,
        "buffer/effective_share_fresh": pytest.approx(2 / 3),
        "buffer/effective_share": pytest.approx(2 / 3),
        "buffer/pairs_share": 0,
        "buffer/prompts": 2,
        "buffer/mass": pytest.approx(2 * (3 * 1.0 + 5 * 0.6)),
    }
    # 24 fresh, 16 not effective: round(0.25 · 24) = 6 are replayed.
    second = [make_group("d", RIGHT_3_OF_8, version=2)]
    second += [make_group(name, [0.0] * 8, False, version=2) for name in "ef"]
    batch, metrics = exchange(buffer, second, 2, 2)
    assert len(batch.items) == 14 and batch.grpo_samples == 14 and batch.grpo_tokens == 28
    replayed = [item for item in batch.items if batch.off_policy(item)]
    assert len(replayed) == 6 and {item.prompt.id for item in replayed} <= {"a", "b"}
    assert [batch.off_policy(item) for item in batch.items] == [False] * 8 + [True] * 6
    assert metrics["buffer/effective_share_fresh"] == pytest.approx(8 / 24)
    assert metrics["buffer/effective_share"] == pytest.approx(14 / 24)
    assert metrics["buffer/age_mean"] == 2 and metrics["buffer/size"] == 24 and metrics["buffer/replayed"] == 6
    # 16 fresh of which 2 failed and the rest are effective: the 2 free places are the limit, not 4.
    third = [make_group("g", RIGHT_3_OF_8, version=3, errors=(1, 2)), make_group("h", RIGHT_3_OF_8, version=3)]
    batch, metrics = exchange(buffer, third, 3, 3)
    assert metrics["buffer/replayed"] == 2 and metrics["buffer/effective_share"] == 1.0
    assert ("g", 1, 1.0, False) not in listed(batch) and batch.grpo_samples == 16


def test_importance_weights_have_mean_one_and_level_the_advantages():
    buffer = service(mix=1.0, importance_correction=True)
    exchange(buffer, [make_group("a", [3.0, -1.0, -1.0, -1.0])], 0, 0)
    batch, _ = exchange(buffer, [make_group("b", [0.0] * 4, False, version=1)], 1, 1)
    weights = {item.sample.index: item.grpo_weight for item in batch.items}
    assert all(batch.off_policy(item) for item in batch.items) and len(weights) == 4
    # 1/P = 2, 6, 6, 6; mean 5.
    assert weights == pytest.approx({0: 0.4, 1: 1.2, 2: 1.2, 3: 1.2})


def test_pairs_bring_their_members_with_weight_zero():
    buffer = service(mpo_weight=0.25, threshold=2.0, pairs=2)
    groups = [
        make_group("same", [0.2, -0.1, -0.1], False, scores=[5.0, 1.0, 3.0]),
        make_group("mixed", [1.0, -1.0, 0.0], scores=[-1.0, 4.0, 1.5], tokens=[3, 4, 5]),
        make_group("close", [0.2, -0.2], False, scores=[1.0, 1.5]),
        make_group("failed", [1.0, -1.0, 0.0], scores=[9.0, np.nan, 2.0], errors=(1,)),
    ]
    batch, metrics = exchange(buffer, groups, 4, 0)
    assert listed(batch) == [
        ("same", 0, 0.0, False),
        ("same", 1, 0.0, False),
        ("mixed", 0, 1.0, False),
        ("mixed", 1, 1.0, False),
        ("failed", 0, 1.0, False),
        ("failed", 2, 0.0, False),
    ]
    assert batch.pairs == [PreferencePair(0, 1, 4.0), PreferencePair(3, 2, 5.0), PreferencePair(4, 5, 7.0)]
    assert (batch.grpo_samples, batch.grpo_tokens) == (3, 9)
    assert metrics["buffer/pairs_share"] == 0.75


def test_replay_takes_only_places_that_no_fresh_sample_trains_in():
    """Of eight fresh samples three are effective by the rule, but with filter=all seven train."""
    advantages = [1.0, -1.0, 0.5, -0.5, 0.2, -0.2, 0.1, 0.0]
    for only, free in ((GrpoFilter.effective, 8), (GrpoFilter.all, 1)):
        buffer = service(mix=1.0, grpo=GrpoConfig(filter=only))
        exchange(buffer, [make_group("old", [1.0, -1.0] * 4)], 1, 0)
        fresh = make_group("new", advantages, effective=False, version=1)
        batch, metrics = exchange(buffer, [fresh], 2, 1)
        assert metrics["buffer/replayed"] == free and len(batch.items) == 8


def test_filter_all_lets_the_reward_model_speak_alone():
    groups = [make_group("a", [0.5, -0.5, 0.0], False), make_group("b", [1.0, -1.0], errors=(1,))]
    batch, metrics = exchange(service(grpo=GrpoConfig(filter=GrpoFilter.all)), groups, 0, 0)
    assert [row[:2] for row in listed(batch)] == [("a", 0), ("a", 1), ("b", 0)]
    assert metrics["buffer/effective_share_fresh"] == pytest.approx(1 / 5) and metrics["buffer/size"] == 1


@pytest.mark.parametrize("off", [{"enabled": False}, {"grpo": GrpoConfig(weight=0.0)}])
def test_nothing_is_replayed_when_off(off):
    buffer = service(mix=1.0, mpo_weight=1.0, **off)
    for step in range(2):
        groups = [
            make_group("a", [1.0, -1.0, 0.5], version=step, scores=[3.0, 0.0, 1.0]),
            make_group("b", [0.0], False, version=step),
        ]
        batch, metrics = exchange(buffer, groups, step, step)
        assert metrics["buffer/size"] == 0 and metrics["buffer/replayed"] == 0
        weights = [row[2] for row in listed(batch)]
        assert weights == ([0.0, 0.0] if "grpo" in off else [1.0] * 3) and len(batch.pairs) == 1


def test_an_empty_batch_is_allowed():
    batch, metrics = exchange(service(), [make_group("a", [0.0, 0.0], False)], 0, 0)
    assert batch.items == [] and batch.grpo_samples == batch.grpo_tokens == 0
    assert metrics["batch/items"] == 0 and "buffer/age_mean" not in metrics
    _, metrics = exchange(service(), [], 0, 0)
    assert "buffer/effective_share" not in metrics


@pytest.mark.parametrize("source", [PairSource.reward_margin, PairSource.rule])
@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_broken_scores_are_named(source, broken):
    one = algorithm_service(mpo=MpoConfig(pairs=source, threshold=OFF))
    group = make_group("p", [1.0, -1.0, 0.5], scores=[1.0, 0.0, broken], rules=[1.0, 0.0, 0.0])
    with pytest.raises(
        DataError, match=rf"prompt p: no preference pairs: .*samples \[2\] are \[{broken}\]; allowed: finite"
    ):
        exchange(one, [group], 0, 0)
    failed = make_group("p", [1.0, -1.0, 0.5], scores=[1.0, 0.0, broken], rules=[1.0, 0.0, 0.0], errors=(2,))
    failed.samples[2].reward = RewardParts(0.0, 1.0, broken, 1.0)  # what takes no part may be anything
    assert exchange(one, [failed], 0, 0)[0].pairs == [PreferencePair(0, 1, 1.0)]


def test_answers_that_could_not_be_scored_are_told_once():
    one = service()
    well, failed = make_group("p", [1.0, -1.0]), make_group("q", [1.0, -1.0, 0.0], errors=(0, 2))
    assert one.exchange(1, 0, [well])[1].notes == ()
    (note,) = one.exchange(2, 0, [well], [failed])[1].notes
    assert note.startswith("step 2: answers that could not be scored: 2 of 5 by exact. They train nothing")
    assert note.endswith("The first of each: verifier crashed")
    _, report = one.exchange(3, 0, [failed])
    assert report.notes == () and report.metrics["reward/errors"] == 2


def test_an_answer_without_tokens_is_named():
    with pytest.raises(DataError, match="prompt p, sample 1: 0 answer tokens"):
        exchange(service(), [make_group("p", [1.0, -1.0], tokens=[1, 0])], 0, 0)


def test_each_stage_trains_its_own_term():
    def step(buffer, number):
        groups = [
            make_group(f"a{number}", [1.0, -1.0, 0.5], version=number, scores=[3.0, 0.0, 1.0]),
            make_group(f"b{number}", [0.0, 0.0], False, version=number),
        ]
        batch, metrics = exchange(buffer, groups, number, number)
        return [row[2] for row in listed(batch)], len(batch.pairs), metrics

    buffer = algorithm_service(stage=Stage.mpo_then_grpo, mpo_steps=2)
    for number in (1, 2):
        weights, pairs, metrics = step(buffer, number)
        assert weights == [0.0, 0.0] and pairs == 1 and metrics["buffer/size"] == metrics["buffer/replayed"] == 0
        assert "buffer/mass" not in metrics and metrics["threshold/tau"] == 2.0
    weights, pairs, metrics = step(buffer, 3)
    assert weights == [1.0, 1.0, 1.0] and pairs == 0 and metrics["buffer/size"] == 3
    assert "threshold/tau" not in metrics and metrics["buffer/replayed"] == 0
    weights, pairs, metrics = step(buffer, 4)
    assert weights == [1.0] * 5 and metrics["buffer/replayed"] == 2  # the two places that b4 leaves free

    for stage, want in ((Stage.mpo, ([0.0, 0.0], 1)), (Stage.grpo, ([1.0] * 3, 0)), (Stage.joint, ([1.0] * 3, 1))):
        assert step(algorithm_service(stage=stage), 1)[:2] == want


def test_rule_pairs_need_no_reward_model():
    mpo = MpoConfig(pairs=PairSource.rule, threshold=OFF, pairs_per_prompt=2)
    group = make_group("a", [-1.0, 1.0, -1.0, 1.0], scores=[None] * 4, rules=[0.0, 1.0, 0.0, 1.0], facts={"grid": []})
    batch, metrics = exchange(algorithm_service(mpo=mpo), [group], 1, 0)
    assert [(pair.chosen, pair.rejected) for pair in batch.pairs] == [(1, 0), (3, 2)]
    assert all(pair.margin is None for pair in batch.pairs)
    assert metrics["threshold/labelled"] == 0 and "threshold/tau" not in metrics


def blind(group, chosen, tokens):
    ids = np.array(tokens, dtype=np.int32)
    group.blind = (chosen, Sample(len(group.samples), ids, None, "", False, group.samples[0].policy_version))
    return group


def test_dropout_ntp_rejects_what_was_said_without_the_picture():
    mpo = MpoConfig(pairs=PairSource.dropout_ntp, threshold=ThresholdConfig(value=1e9))
    same = make_group("same", [1.0, -1.0], facts={"grid": []})
    groups = [
        blind(make_group("a", [1.0, -1.0], facts={"grid": []}), 0, [0, 7]),
        make_group("text", [1.0, -1.0]),
        blind(same, 1, same.samples[1].token_ids),  # it said the same without looking
        blind(make_group("tied", [0.0, 0.0], False), 1, [1, 8, 9]),
        blind(make_group("failed", [1.0, -1.0], errors=(0,)), 0, [0, 7]),
    ]
    batch, metrics = exchange(algorithm_service(mpo=mpo), groups, 1, 0)
    assert [row[:3] for row in listed(batch)] == [
        ("a", 0, 1.0),
        ("a", 1, 1.0),
        ("a", 2, 0.0),
        ("text", 0, 1.0),
        ("text", 1, 1.0),
        ("same", 0, 1.0),
        ("same", 1, 1.0),
        ("tied", 1, 0.0),
        ("tied", 2, 0.0),
        ("failed", 1, 1.0),
    ]
    assert [(pair.chosen, pair.rejected) for pair in batch.pairs] == [(0, 2), (7, 8)]
    assert all(pair.margin is None for pair in batch.pairs)
    assert batch.items[2].sample.token_ids.tolist() == [0, 7] and batch.items[2].prompt.id == "a"
    assert batch.grpo_samples == 7 and not any(name.startswith("threshold/") for name in metrics)


def test_the_gate_withholds_reinforcement_and_nothing_else():
    gate = ThresholdConfig(kind=ThresholdKind.fixed, value=0.0)
    # Right and above, right and below, right and at the threshold, wrong and below.
    rules, scores = [1.0, 1.0, 1.0, 0.0], [3.0, -1.0, 0.0, -5.0]
    buffer = algorithm_service(gate=gate, mpo=MpoConfig(threshold=OFF, pairs_per_prompt=4))
    batch, metrics = exchange(buffer, [make_group("a", [0.9, 0.6, 0.5, -2.0], rules=rules, scores=scores)], 1, 0)
    assert [row[1:3] for row in listed(batch)] == [(0, 1.0), (1, 0.0), (2, 1.0), (3, 1.0)]
    assert batch.pairs == [PreferencePair(0, 3, 8.0), PreferencePair(2, 1, 1.0)]  # 1 is rejected, which is allowed
    assert metrics["gate/withheld_share"] == pytest.approx(1 / 3) and metrics["gate/tau"] == 0.0
    assert metrics["buffer/size"] == 3 and metrics["buffer/effective_share_fresh"] == 1.0
    assert metrics["buffer/effective_share"] == 0.75  # its place is free for a replayed sample
    # The same with a negative advantage is made less likely as ever; and it can't be chosen even where it is the best.
    groups = [make_group("b", [-0.5, 0.5], rules=[1.0, 0.0], scores=[-1.0, -5.0], version=1)]
    batch, metrics = exchange(buffer, groups, 2, 1)
    assert [row[:3] for row in listed(batch) if not row[3]] == [("b", 0, 1.0), ("b", 1, 1.0)] and batch.pairs == []
    assert metrics["gate/withheld_share"] == 1.0 and metrics["buffer/size"] == 5  # both are kept
    _, metrics = exchange(buffer, [make_group("c", [1.0, -1.0], rules=[0.0, 0.0], version=1)], 3, 1)
    assert "gate/withheld_share" not in metrics
    groups = [make_group("a", [0.9, 0.6, 0.5, -2.0], rules=rules, scores=scores)]
    batch, metrics = exchange(algorithm_service(mpo=MpoConfig(weight=0.0)), groups, 1, 0)
    assert [row[2] for row in listed(batch)] == [1.0] * 4 and not any(name.startswith("gate/") for name in metrics)


@pytest.mark.parametrize("source", list(PairSource))
def test_the_gate_keeps_an_answer_from_being_chosen(source):
    def pairs(gate):
        mpo = MpoConfig(pairs=source, threshold=OFF)
        group = blind(make_group("a", [1.0, -1.0], rules=[1.0, 0.0], scores=[1.0, -1.0]), 0, [0, 7])
        return exchange(algorithm_service(mpo=mpo, gate=gate), [group], 1, 0)[0].pairs

    assert len(pairs(ThresholdConfig(value=1.0))) == 1 and pairs(ThresholdConfig(value=1.1)) == []


def test_thresholds_learn_from_all_candidates_but_only_for_later_steps(tmp_path):
    learning = ThresholdConfig(kind=ThresholdKind.quantile, value=0.0, quantile=0.5, every=1, min_labelled=1)
    buffer = algorithm_service(mpo=MpoConfig(threshold=learning, pairs_per_prompt=2), gate=learning)
    grid = {"grid": []}
    groups = [
        # First pair 0 with 2, margin 6; right 0 and 1, of which 1 makes a false claim.
        make_group("a", [1.0, 1.0, -2.0], rules=[1.0, 1.0, 0.0], scores=[4.0, 2.0, -2.0], false=[0, 1, 0], facts=grid),
        # First pair 1 with 0, margin 2; its chosen answer makes a false claim.
        make_group("b", [1.0, -1.0], rules=[1.0, 0.0], scores=[0.0, 2.0], false=[0, 2], facts=grid),
        # Unlabelled: margin 10, right 0 with 8.
        make_group("c", [1.0, -1.0], rules=[1.0, 0.0], scores=[8.0, -2.0], false=[1, 0]),
        # No candidate: a single answer, wrong.
        make_group("d", [1.0], rules=[0.0], scores=[5.0], facts=grid),
    ]
    batch, metrics = exchange(buffer, groups, 1, 0)
    assert [pair.margin for pair in batch.pairs] == [6.0, 2.0, 10.0] and metrics["gate/withheld_share"] == 0
    # The window after step 1: margins 6, 2, 10 of which 6 and 2 are labelled; right answers' scores 4, 2, 0, 8.
    assert metrics["threshold/tau"] == metrics["gate/tau"] == 0.0
    assert metrics["threshold/labelled"] == 2 and metrics["threshold/risk"] == 0.5
    assert metrics["gate/labelled"] == 3 and metrics["gate/risk"] == pytest.approx(1 / 3)
    # Step 2 uses the medians of step 1, 6 and 3, whatever it brings itself.
    batch, metrics = exchange(buffer, groups, 2, 0)
    assert metrics["threshold/tau"] == 6.0 and metrics["gate/tau"] == 3.0
    assert [pair.margin for pair in batch.pairs] == [6.0, 10.0]
    assert metrics["gate/withheld_share"] == 0.5  # 2 and 0 of 4, 2, 0, 8
    # What did not pass is observed too: the medians stay.
    _, metrics = exchange(buffer, groups, 3, 0)
    assert metrics["threshold/tau"] == 6.0 and metrics["gate/tau"] == 3.0
    # Both are state.
    other = algorithm_service(mpo=MpoConfig(threshold=learning, pairs_per_prompt=2), gate=learning)
    buffer.save(tmp_path / "state", {}, {})
    assert other.load(tmp_path / "state") == {}
    extra = make_group("e", [1.0, -1.0], rules=[1.0, 0.0], scores=[40.0, -2.0], facts=grid)
    (_, want), (_, got) = (exchange(one, [extra, *groups], 4, 0) for one in (buffer, other))
    assert got == want


def test_a_prompt_gives_the_margin_threshold_one_candidate_however_many_pairs_it_forms():
    mpo = MpoConfig(threshold=OFF, pairs_per_prompt=2)
    group = make_group("a", [1.0, 1.0, -1.0, -1.0], scores=[4.0, 2.0, 0.0, -2.0], facts={"grid": []})
    batch, metrics = exchange(algorithm_service(mpo=mpo), [group], 1, 0)
    assert [pair.margin for pair in batch.pairs] == [6.0, 2.0] and metrics["threshold/labelled"] == 1


def test_a_state_of_an_older_version_is_refused_without_unpickling_it(tmp_path):
    asks_for_a_module_that_is_gone = b"cskyrl.types\nSample\n."
    for old in (asks_for_a_module_that_is_gone, pickle.dumps({"buffer": {}, "margin_threshold": {}, "gate": {}}), b""):
        (tmp_path / "buffer.pkl").write_bytes(old)
        with pytest.raises(DataError, match=r"buffer\.pkl .*checkpoints of older versions can't be loaded; start"):
            service().load(tmp_path / "buffer.pkl")


def test_offline_pairs_are_part_of_the_state(tmp_path):
    class Position:
        def __init__(self, at):
            self.at = at

        def state_dict(self):
            return self.at

        def load_state_dict(self, state):
            self.at = state

    class Pairs:
        def __init__(self, at):
            self.stream = Position(at)

    one, two = service(), service()
    one.save(tmp_path / "without", {}, {})
    one.pairs = Pairs({"at": 7})
    one.save(tmp_path / "with", {}, {})
    with pytest.raises(DataError, match=r"run with data\.pairs_path, this run is one without it"):
        two.load(tmp_path / "with")
    two.pairs = Pairs(None)
    two.load(tmp_path / "with")
    assert two.pairs.stream.at == {"at": 7}
    with pytest.raises(DataError, match=r"run without data\.pairs_path, this run is one with it"):
        two.load(tmp_path / "without")
    with pytest.raises(SkyrlError, match=r"data\.pairs_path.*got null"):
        service().offline(1, 0)


def test_a_resumed_batcher_makes_the_same_batches(tmp_path):
    def groups(version):
        return [make_group(f"{version}", RIGHT_3_OF_8, version=version), make_group("z", [0.0] * 8, False, version)]

    one, two = service(mix=0.5, capacity=20, max_age=3), service(seed=9, mix=0.5, capacity=20, max_age=3)
    for version in range(4):
        exchange(one, groups(version), version, version)
    one.save(tmp_path / "state", {}, {})
    two.load(tmp_path / "state")
    for version in range(4, 8):
        got, got_metrics = exchange(two, groups(version), version, version)
        want, want_metrics = exchange(one, groups(version), version, version)
        assert listed(got) == listed(want) and got_metrics == want_metrics
        assert got_metrics["buffer/replayed"] == 8


def test_what_was_asked_ahead_is_saved_and_handed_out_once(tmp_path):
    parts = [[make_group(name, [1.0, -1.0], version=3)] for name in "abc"]
    service(lag=2).save(tmp_path / "state", {5: 2, 6: 1}, {}, *parts)
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    one = service(lag=2)
    assert one.load(tmp_path / "state") == {5: 2, 6: 1}
    got = [one.pending(step, place) for step, place in ((5, 0), (6, 0), (5, 1))]
    assert [part[0].prompt.id for part in got] == ["a", "c", "b"]
    assert got[0][0].samples[1].token_ids.tolist() == [1, 1] and got[0][0].samples[0].policy_version == 3
    for step, place in ((5, 0), (7, 0), (5, 2)):
        with pytest.raises(SkyrlError, match=f"no saved part {place} of step {step}"):
            one.pending(step, place)
    # A failed write leaves the state of before.
    one.buffer.state_dict = lambda: lambda: None  # nothing that a state may hold
    with pytest.raises(TypeError, match="holds no function"):
        one.save(tmp_path / "state", {}, {})
    assert service().load(tmp_path / "state") == {5: 2, 6: 1}


def test_the_report_counts_all_answers_and_parts_keep_their_order():
    parts = [[make_group("a", [1.0, -1.0], tokens=[3, 4])], [], [make_group("b", [0.0, 0.0], False, errors=(1,))]]
    parts[2].append(make_group("c", [1.0, -1.0], masks={1: [False, False]}))
    batch, report = service().exchange(1, 0, *parts)
    assert (report.samples, report.tokens) == (6, 3 + 4 + 4 * 2)
    assert [row[:2] for row in listed(batch)] == [("a", 0), ("a", 1), ("c", 0)]
    assert report.metrics["reward/errors"] == 1 and report.metrics["reward/accuracy"] == 1
    failed = [make_group("f", [1.0, -1.0], errors=(0, 1))]
    with pytest.raises(SkyrlError, match="step 7: none of the 2 answers could be scored; the first: verifier crashed"):
        service().exchange(7, 0, [], failed)


def test_an_offline_step_has_the_weights_and_version_of_the_step():
    class Pairs:
        def batch(self, step, version, weights):
            return TrainBatch(step, version, weights, [None] * 4, [], grpo_samples=0, grpo_tokens=0)

    one = algorithm_service(stage=Stage.mpo_then_grpo, mpo_steps=3)
    one.pairs = Pairs()
    batch, report = one.offline(3, 2)
    assert (batch.step, batch.version, batch.weights) == (3, 2, {"grpo": 0.0, "mpo": 0.25})
    assert report == StepReport({"batch/items": 4.0}, samples=0, tokens=0)


def test_a_term_of_ones_own_gets_samples_and_replay_in_every_stage():
    terms = [OwnTerm(path="mine:Length", weight=0.5)]
    for stage, own, want in ((Stage.mpo, terms, 3), (Stage.mpo, [], 2), (Stage.mpo_then_grpo, terms, 3)):
        one = algorithm_service(stage=stage, mpo_steps=5, terms=own)
        for step in (1, 2):
            groups = [make_group("a", [1.0, -1.0, 0.5], version=step - 1, scores=[3.0, 0.0, 1.0])]
            groups.append(make_group("b", [0.0, 0.0], False, version=step - 1))
            batch, metrics = exchange(one, groups, step, step - 1)
        assert len(batch.pairs) == 1 and sum(not row[3] for row in listed(batch)) == want
        assert metrics["buffer/replayed"] == (2 if own else 0) and metrics["buffer/size"] == (6 if own else 0)
    off = algorithm_service(stage=Stage.mpo, terms=[OwnTerm(path="mine:Length", weight=0.0)])
    assert exchange(off, groups, 1, 1)[1]["buffer/size"] == 0


# ---------------------------------------------------------------- lag


def test_fresh_samples_may_be_as_old_as_the_lag_and_no_older_or_newer():
    one = service(lag=2, mpo_weight=1.0)
    groups = [make_group("a", [1.0, -1.0], version=3, scores=[2.0, 0.0]), make_group("b", [1.0, -1.0], version=5)]
    groups.append(make_group("none", [0.0, 0.0], False, version=4))
    batch, metrics = exchange(one, groups, 6, 5)
    assert [batch.off_policy(item) for item in batch.items] == [True, True, False, False]
    assert (metrics["batch/lag_mean"], metrics["batch/lag_max"]) == (1.0, 2.0)  # "none" has no item
    assert "buffer/age_max" not in metrics and batch.pairs == [PreferencePair(0, 1, 2.0)]
    for version, old in ((6, 3), (2, 3)):
        bad = [make_group("fine", [1.0, -1.0], version=version), make_group("p", [1.0, -1.0], version=old)]
        words = f"prompt p, sample 0: drawn by policy version 3, to be trained at version {version}; allowed: .*lag=2 "
        with pytest.raises(SkyrlError, match=words):
            exchange(one, bad, 7, version)
    late = blind(make_group("p", [1.0, -1.0], version=4), 0, [0, 7])
    late.blind[1].policy_version = 6
    with pytest.raises(SkyrlError, match="prompt p, sample 2: drawn by policy version 6"):
        exchange(one, [late], 6, 5)
    with pytest.raises(SkyrlError, match=r"version 4, .*controller.lag=0 "):
        exchange(service(), [make_group("p", [1.0, -1.0], version=4)], 6, 5)


def test_the_lag_of_a_batch_is_that_of_its_fresh_items_and_ages_are_the_replayed_ones():
    one = service(lag=1, mix=1.0, max_age=5)
    exchange(one, [make_group("a", [1.0, -1.0], version=0)], 1, 0)
    groups = [make_group("b", [1.0, -1.0], version=2), make_group("c", [0.0, 0.0], False, version=2)]
    batch, metrics = exchange(one, groups, 4, 3)
    assert [row[0] for row in listed(batch)] == ["b", "b", "a", "a"]
    assert (metrics["batch/lag_mean"], metrics["batch/lag_max"], metrics["buffer/age_mean"]) == (1.0, 1.0, 3.0)
    # A batch of nothing but replayed samples has no lag.
    batch, metrics = exchange(one, [make_group("d", [0.0, 0.0], False, version=3)], 5, 4)
    assert metrics["buffer/replayed"] == 2 and "batch/lag_mean" not in metrics and "batch/lag_max" not in metrics


# ---------------------------------------------------------------- masks


@pytest.mark.parametrize("only", list(GrpoFilter))
@pytest.mark.parametrize("source", [PairSource.reward_margin, PairSource.rule])
def test_an_answer_without_a_trained_token_takes_no_part(only, source):
    mpo = MpoConfig(pairs=source, threshold=OFF, pairs_per_prompt=4)
    one = algorithm_service(grpo=GrpoConfig(filter=only), mpo=mpo, gate=ThresholdConfig(value=-9.0))
    # Best right and worst wrong answer are masked; one token of answer 2 trains.
    group = make_group(
        "a",
        [2.0, -2.0, 1.0, -1.0],
        rules=[1.0, 0.0, 1.0, 0.0],
        scores=[9.0, -9.0, 1.0, 0.0],
        facts={"grid": []},
        tokens=[3, 3, 3, 3],
        masks={0: [False] * 3, 1: [False] * 3, 2: [False, True, False]},
    )
    batch, metrics = exchange(one, [group], 1, 0)
    assert [row[1:3] for row in listed(batch)] == [(2, 1.0), (3, 1.0)] and batch.pairs == [PreferencePair(0, 1, 1.0)]
    assert (batch.grpo_samples, batch.grpo_tokens) == (2, 4) and metrics["buffer/size"] == 2
    assert metrics["buffer/effective_share_fresh"] == 0.5
    assert metrics["gate/labelled"] == metrics["threshold/labelled"] == 1  # the right answer 2, and the pair


def test_a_masked_continuation_or_chosen_answer_makes_no_blind_pair():
    mpo = MpoConfig(pairs=PairSource.dropout_ntp, threshold=OFF)
    groups = [blind(make_group(name, [1.0, -1.0]), 0, [0, 7]) for name in "abc"]
    groups[0].samples[0].mask[:] = False
    groups[1].blind[1].mask[:] = False
    batch, _ = exchange(algorithm_service(mpo=mpo), groups, 1, 0)
    assert [batch.items[pair.chosen].prompt.id for pair in batch.pairs] == ["c"]


# ---------------------------------------------------------------- properties of whole runs

ANSWER = st.tuples(
    st.sampled_from([-1.0, 0.0, 0.5, 2.0]),  # advantage
    st.booleans(),  # effective
    st.sampled_from([1.0, 0.0]),  # rule
    st.floats(-3, 3),  # r_θ
    st.sampled_from(["ok", "ok", "ok", "masked", "half", "failed"]),
)
STEP = st.tuples(st.lists(st.lists(ANSWER, min_size=2, max_size=4), min_size=1, max_size=3), st.integers(0, 2))


def drawn_group(name, answers, version):
    masks = {"masked": [False, False], "half": [True, False]}
    group = make_group(
        name,
        [answer[0] for answer in answers],
        version=version,
        scores=[answer[3] for answer in answers],
        rules=[answer[2] for answer in answers],
        errors=[place for place, answer in enumerate(answers) if answer[4] == "failed"],
        masks={place: masks[answer[4]] for place, answer in enumerate(answers) if answer[4] in masks},
    )
    for sample, answer in zip(group.samples, answers, strict=True):
        sample.rule_advantage = answer[0] if answer[1] and sample.error is None else 0.0
    return group


@settings(deadline=None, max_examples=150)
@given(st.lists(STEP, min_size=1, max_size=6), st.sampled_from(list(GrpoFilter)), st.floats(0, 1), st.data())
def test_whatever_comes_a_batch_keeps_its_promises(steps, only, mix, data):
    tau = data.draw(st.sampled_from([-9.0, 0.0]))
    mpo = MpoConfig(threshold=ThresholdConfig(value=0.5), pairs_per_prompt=2)
    one = algorithm_service(mix=mix, lag=2, mpo=mpo, grpo=GrpoConfig(filter=only), gate=ThresholdConfig(value=tau))
    asked_at = {}
    for version, (rows, lag) in enumerate(steps):
        step = version + 1
        groups = [drawn_group(f"{step}/{row}", group, max(0, version - lag)) for row, group in enumerate(rows)]
        samples = [sample for group in groups for sample in group.samples]
        if all(sample.error for sample in samples):
            continue
        asked_at |= {group.prompt.id: step for group in groups}
        batch, metrics = exchange(one, groups, step, version)
        names = [(item.prompt.id, item.sample.index) for item in batch.items]
        assert len(set(names)) == len(names)  # none is trained twice in a step
        fresh = [name for name in names if asked_at[name[0]] == step]
        assert names[: len(fresh)] == fresh and fresh == sorted(fresh)  # the fresh first, in order
        replayed = len(names) - len(fresh)
        assert replayed == metrics["buffer/replayed"] <= min(round(mix * len(samples)), len(samples))
        members = [place for pair in batch.pairs for place in (pair.chosen, pair.rejected)]
        assert len(set(members)) == len(members) and all(place < len(fresh) for place in members)
        trained = [item for item in batch.items if item.grpo_weight]
        assert all(item.grpo_weight or place in members for place, item in enumerate(batch.items))
        assert (batch.grpo_samples, batch.grpo_tokens) == (len(trained), sum(i.sample.trained_tokens for i in trained))
        for item in batch.items:
            assert item.sample.error is None and item.sample.mask.any() and version - item.sample.policy_version >= 0
        for item in trained:
            assert item.sample.advantage and (only is GrpoFilter.all or item.sample.rule_advantage)
            assert not (item.sample.advantage > 0 and item.sample.right and item.sample.reward.model < tau)
        for pair in batch.pairs:
            chosen, rejected = batch.items[pair.chosen], batch.items[pair.rejected]
            assert chosen.prompt.id == rejected.prompt.id and pair.margin >= 0.5
            assert pair.margin == chosen.sample.reward.model - rejected.sample.reward.model
            assert not (chosen.sample.right and chosen.sample.reward.model < tau)
        # Every fresh sample that may train does.
        for group in groups:
            for sample in group.samples:
                held = sample.advantage > 0 and sample.right and sample.reward.model < tau
                signal = sample.effective if only is GrpoFilter.effective else sample.error is None
                if signal and sample.advantage and sample.mask.any() and not held:
                    assert batch.items[names.index((group.prompt.id, sample.index))].grpo_weight == 1.0


def test_the_buffer_needs_no_torch():
    code = "import skyrl.batch.batcher, sys; assert not {'torch', 'ray', 'vllm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
