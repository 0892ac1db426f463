import math
import pickle
import subprocess
import sys

import numpy as np
import pytest

from skyrl.batch.batcher import BufferService
from skyrl.records import DataError, PreferencePair, Prompt, RewardParts, Sample, SampleGroup
from skyrl.settings import (
    AlgorithmConfig,
    BufferConfig,
    GrpoConfig,
    GrpoFilter,
    MpoConfig,
    PairSource,
    Stage,
    ThresholdConfig,
    ThresholdKind,
)

RIGHT_3_OF_8 = [1.0, 1.0, 1.0, -0.6, -0.6, -0.6, -0.6, -0.6]


OFF = ThresholdConfig(kind=ThresholdKind.off)
PICTURE = np.zeros((1, 1, 3), dtype=np.uint8)


def make_group(
    name, advantages, effective=True, version=0, scores=None, tokens=None, errors=(), rules=None, false=None, facts=None
):
    """``facts`` also gives the prompt a picture; ``false`` are the samples' numbers of false claims."""
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
    prompt = Prompt(name, "?", () if facts is None else (PICTURE,), "", "exact", facts=facts or {})
    return SampleGroup(prompt, np.array([1], dtype=np.int32), samples, checkable=facts is not None)


def service(seed=0, grpo=None, mpo_weight=0.0, threshold=1.0, pairs=1, **buffer):
    mpo = MpoConfig(weight=mpo_weight, threshold=ThresholdConfig(value=threshold), pairs_per_prompt=pairs)
    return BufferService(BufferConfig(**buffer), AlgorithmConfig(grpo=grpo or GrpoConfig(), mpo=mpo), seed)


def algorithm_service(mix=1.0, **algorithm):
    return BufferService(BufferConfig(mix=mix), AlgorithmConfig(**algorithm), 0)


def listed(batch):
    return [(item.prompt.id, item.sample.index, item.grpo_weight, item.replayed) for item in batch.items]


def test_fill_rule_by_hand():
    buffer = service(mix=0.25)
    first = [make_group("a", RIGHT_3_OF_8), make_group("b", RIGHT_3_OF_8), make_group("c", [0.1] * 8, effective=False)]
    batch, metrics = buffer.exchange(first, step=0, version=0)
    # The first step finds an empty buffer: 16 fresh effective samples of 2 tokens each, of 24.
    assert listed(batch) == [(name, index, 1.0, False) for name in "ab" for index in range(8)]
    assert (batch.step, batch.grpo_samples, batch.grpo_tokens, batch.pairs) == (0, 16, 32, [])
    assert metrics == {
        "buffer/size": 16,
        "buffer/replayed": 0,
        "batch/items": 16,
        "buffer/effective_share_fresh": pytest.approx(2 / 3),
        "buffer/effective_share": pytest.approx(2 / 3),
        "buffer/pairs_share": 0,
        "buffer/prompts": 2,
        "buffer/mass": pytest.approx(2 * (3 * 1.0 + 5 * 0.6)),
    }
    # 24 fresh, 16 not effective: round(0.25 · 24) = 6 are replayed.
    second = [make_group("d", RIGHT_3_OF_8, version=2)]
    second += [make_group(name, [0.0] * 8, False, version=2) for name in "ef"]
    batch, metrics = buffer.exchange(second, step=2, version=2)
    assert len(batch.items) == 14 and batch.grpo_samples == 14 and batch.grpo_tokens == 28
    replayed = [item for item in batch.items if item.replayed]
    assert len(replayed) == 6 and {item.prompt.id for item in replayed} <= {"a", "b"}
    assert [item.replayed for item in batch.items] == [False] * 8 + [True] * 6
    assert metrics["buffer/effective_share_fresh"] == pytest.approx(8 / 24)
    assert metrics["buffer/effective_share"] == pytest.approx(14 / 24)
    assert metrics["buffer/age_mean"] == 2 and metrics["buffer/size"] == 24 and metrics["buffer/replayed"] == 6
    # 16 fresh of which 2 failed and the rest are effective: the 2 free places are the limit, not 4.
    third = [make_group("g", RIGHT_3_OF_8, version=3, errors=(1, 2)), make_group("h", RIGHT_3_OF_8, version=3)]
    batch, metrics = buffer.exchange(third, step=3, version=3)
    assert metrics["buffer/replayed"] == 2 and metrics["buffer/effective_share"] == 1.0
    assert ("g", 1, 1.0, False) not in listed(batch) and batch.grpo_samples == 16


def test_importance_weights_have_mean_one_and_level_the_advantages():
    buffer = service(mix=1.0, importance_correction=True)
    buffer.exchange([make_group("a", [3.0, -1.0, -1.0, -1.0])], 0, 0)
    batch, _ = buffer.exchange([make_group("b", [0.0] * 4, False, version=1)], 1, 1)
    weights = {item.sample.index: item.grpo_weight for item in batch.items}
    assert all(item.replayed for item in batch.items) and len(weights) == 4
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
    batch, metrics = buffer.exchange(groups, 4, 0)
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
        buffer.exchange([make_group("old", [1.0, -1.0] * 4)], 1, 0)
        fresh = make_group("new", advantages, effective=False, version=1)
        batch, metrics = buffer.exchange([fresh], 2, 1)
        assert metrics["buffer/replayed"] == free and len(batch.items) == 8


def test_filter_all_lets_the_reward_model_speak_alone():
    groups = [make_group("a", [0.5, -0.5, 0.0], False), make_group("b", [1.0, -1.0], errors=(1,))]
    batch, metrics = service(grpo=GrpoConfig(filter=GrpoFilter.all)).exchange(groups, 0, 0)
    assert [row[:2] for row in listed(batch)] == [("a", 0), ("a", 1), ("b", 0)]
    assert metrics["buffer/effective_share_fresh"] == pytest.approx(1 / 5) and metrics["buffer/size"] == 1


@pytest.mark.parametrize("off", [{"enabled": False}, {"grpo": GrpoConfig(weight=0.0)}])
def test_nothing_is_replayed_when_off(off):
    buffer = service(mix=1.0, mpo_weight=1.0, **off)
    for step in range(2):
        groups = [
            make_group("a", [1.0, -1.0, 0.5], version=step, scores=[3.0, 0.0, 1.0]),
            make_group("b", [0.0], False),
        ]
        batch, metrics = buffer.exchange(groups, step, step)
        assert metrics["buffer/size"] == 0 and metrics["buffer/replayed"] == 0
        weights = [row[2] for row in listed(batch)]
        assert weights == ([0.0, 0.0] if "grpo" in off else [1.0] * 3) and len(batch.pairs) == 1


def test_an_empty_batch_is_allowed():
    batch, metrics = service().exchange([make_group("a", [0.0, 0.0], False)], 0, 0)
    assert batch.items == [] and batch.grpo_samples == batch.grpo_tokens == 0
    assert metrics["batch/items"] == 0 and "buffer/age_mean" not in metrics
    _, metrics = service().exchange([], 0, 0)
    assert "buffer/effective_share" not in metrics


def test_broken_input_is_named():
    with pytest.raises(DataError, match=r"prompt p: .*samples \[1\] are \[nan\]"):
        service(mpo_weight=1.0).exchange([make_group("p", [1.0, -1.0], scores=[1.0, np.nan])], 0, 0)
    with pytest.raises(DataError, match="prompt p, sample 1: 0 answer tokens"):
        service().exchange([make_group("p", [1.0, -1.0], tokens=[1, 0])], 0, 0)


def test_each_stage_trains_its_own_term():
    def step(buffer, number):
        groups = [
            make_group(f"a{number}", [1.0, -1.0, 0.5], version=number, scores=[3.0, 0.0, 1.0]),
            make_group(f"b{number}", [0.0, 0.0], False, version=number),
        ]
        batch, metrics = buffer.exchange(groups, number, number)
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
    group = make_group("a", [-1.0, 1.0, -1.0, 1.0], scores=[np.nan] * 4, rules=[0.0, 1.0, 0.0, 1.0], facts={"grid": []})
    batch, metrics = algorithm_service(mpo=mpo).exchange([group], 1, 0)
    assert [(pair.chosen, pair.rejected) for pair in batch.pairs] == [(1, 0), (3, 2)]
    assert all(math.isnan(pair.margin) for pair in batch.pairs)
    assert metrics["threshold/labelled"] == 0 and "threshold/tau" not in metrics


def blind(group, chosen, tokens):
    ids = np.array(tokens, dtype=np.int32)
    logprobs = np.full(len(ids), np.nan, dtype=np.float32)
    group.blind = (chosen, Sample(len(group.samples), ids, logprobs, "", False, 0))
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
    batch, metrics = algorithm_service(mpo=mpo).exchange(groups, 1, 0)
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
    assert all(math.isnan(pair.margin) for pair in batch.pairs)
    assert batch.items[2].sample.token_ids.tolist() == [0, 7] and batch.items[2].prompt.id == "a"
    assert batch.grpo_samples == 7 and not any(name.startswith("threshold/") for name in metrics)


def test_the_gate_withholds_reinforcement_and_nothing_else():
    gate = ThresholdConfig(kind=ThresholdKind.fixed, value=0.0)
    # Right and above, right and below, right and at the threshold, wrong and below.
    rules, scores = [1.0, 1.0, 1.0, 0.0], [3.0, -1.0, 0.0, -5.0]
    buffer = algorithm_service(gate=gate, mpo=MpoConfig(threshold=OFF, pairs_per_prompt=4))
    batch, metrics = buffer.exchange([make_group("a", [0.9, 0.6, 0.5, -2.0], rules=rules, scores=scores)], 1, 0)
    assert [row[1:3] for row in listed(batch)] == [(0, 1.0), (1, 0.0), (2, 1.0), (3, 1.0)]
    assert batch.pairs == [PreferencePair(0, 3, 8.0), PreferencePair(2, 1, 1.0)]  # 1 is rejected, which is allowed
    assert metrics["gate/withheld_share"] == pytest.approx(1 / 3) and metrics["gate/tau"] == 0.0
    assert metrics["buffer/size"] == 3 and metrics["buffer/effective_share_fresh"] == 1.0
    assert metrics["buffer/effective_share"] == 0.75  # its place is free for a replayed sample
    # The same with a negative advantage is made less likely as ever; and it can't be chosen even where it is the best.
    groups = [make_group("b", [-0.5, 0.5], rules=[1.0, 0.0], scores=[-1.0, -5.0], version=1)]
    batch, metrics = buffer.exchange(groups, 2, 1)
    assert [row[:3] for row in listed(batch) if not row[3]] == [("b", 0, 1.0), ("b", 1, 1.0)] and batch.pairs == []
    assert metrics["gate/withheld_share"] == 1.0
    _, metrics = buffer.exchange([make_group("c", [1.0, -1.0], rules=[0.0, 0.0])], 3, 1)
    assert "gate/withheld_share" not in metrics
    groups = [make_group("a", [0.9, 0.6, 0.5, -2.0], rules=rules, scores=scores)]
    batch, metrics = algorithm_service(mpo=MpoConfig(weight=0.0)).exchange(groups, 1, 0)
    assert [row[2] for row in listed(batch)] == [1.0] * 4 and not any(name.startswith("gate/") for name in metrics)


@pytest.mark.parametrize("source", list(PairSource))
def test_the_gate_keeps_an_answer_from_being_chosen(source):
    def pairs(gate):
        mpo = MpoConfig(pairs=source, threshold=OFF)
        group = blind(make_group("a", [1.0, -1.0], rules=[1.0, 0.0], scores=[1.0, -1.0]), 0, [0, 7])
        return algorithm_service(mpo=mpo, gate=gate).exchange([group], 1, 0)[0].pairs

    assert len(pairs(ThresholdConfig(value=1.0))) == 1 and pairs(ThresholdConfig(value=1.1)) == []


def test_thresholds_learn_from_all_candidates_but_only_for_later_steps():
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
    batch, metrics = buffer.exchange(groups, 1, 0)
    assert [pair.margin for pair in batch.pairs] == [6.0, 2.0, 10.0] and metrics["gate/withheld_share"] == 0
    # The window after step 1: margins 6, 2, 10 of which 6 and 2 are labelled; right answers' scores 4, 2, 0, 8.
    assert metrics["threshold/tau"] == metrics["gate/tau"] == 0.0
    assert metrics["threshold/labelled"] == 2 and metrics["threshold/risk"] == 0.5
    assert metrics["gate/labelled"] == 3 and metrics["gate/risk"] == pytest.approx(1 / 3)
    # Step 2 uses the medians of step 1, 6 and 3, whatever it brings itself.
    batch, metrics = buffer.exchange(groups, 2, 0)
    assert metrics["threshold/tau"] == 6.0 and metrics["gate/tau"] == 3.0
    assert [pair.margin for pair in batch.pairs] == [6.0, 10.0]
    assert metrics["gate/withheld_share"] == 0.5  # 2 and 0 of 4, 2, 0, 8
    # What did not pass is observed too: the medians stay.
    _, metrics = buffer.exchange(groups, 3, 0)
    assert metrics["threshold/tau"] == 6.0 and metrics["gate/tau"] == 3.0
    # Both are state.
    other = algorithm_service(mpo=MpoConfig(threshold=learning, pairs_per_prompt=2), gate=learning)
    other.load_state_dict(pickle.loads(pickle.dumps(buffer.state_dict())))
    extra = make_group("e", [1.0, -1.0], rules=[1.0, 0.0], scores=[40.0, -2.0], facts=grid)
    (_, want), (_, got) = (one.exchange([extra, *groups], 4, 0) for one in (buffer, other))
    assert got == want


def test_a_state_without_thresholds_is_refused():
    state = service().state_dict()
    del state["margin_threshold"], state["gate"]
    with pytest.raises(DataError, match="lacks gate, margin_threshold: the checkpoint is of an older version"):
        service().load_state_dict(state)


def test_a_resumed_service_makes_the_same_batches():
    def groups(version):
        return [make_group(f"{version}", RIGHT_3_OF_8, version=version), make_group("z", [0.0] * 8, False)]

    one, two = service(mix=0.5, capacity=20, max_age=3), service(seed=9, mix=0.5, capacity=20, max_age=3)
    for version in range(4):
        one.exchange(groups(version), version, version)
    two.load_state_dict(pickle.loads(pickle.dumps(one.state_dict())))
    for version in range(4, 8):
        got, got_metrics = two.exchange(groups(version), version, version)
        want, want_metrics = one.exchange(groups(version), version, version)
        assert listed(got) == listed(want) and got_metrics == want_metrics
        assert got_metrics["buffer/replayed"] == 8


def test_the_buffer_needs_no_torch():
    code = "import skyrl.batch.batcher, sys; assert not {'torch', 'ray', 'vllm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
