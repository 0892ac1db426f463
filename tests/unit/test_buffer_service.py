import pickle
import subprocess
import sys

import numpy as np
import pytest

from skyrl.buffer.service import BufferService
from skyrl.config import AlgorithmConfig, BufferConfig, GrpoConfig, GrpoFilter, MpoConfig
from skyrl.types import DataError, PreferencePair, Prompt, RewardParts, Sample, SampleGroup

RIGHT_3_OF_8 = [1.0, 1.0, 1.0, -0.6, -0.6, -0.6, -0.6, -0.6]


def make_group(name, advantages, effective=True, version=0, scores=None, tokens=None, errors=()):
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
                reward=None if failed else RewardParts(1.0, 1.0, score, 1.0),
                advantage=advantage,
                rule_advantage=advantage if effective else 0.0,
                error="verifier crashed" if failed else None,
            )
        )
    return SampleGroup(Prompt(name, "?", (), "", "exact"), np.array([1], dtype=np.int32), samples)


def service(seed=0, grpo=None, mpo_weight=0.0, threshold=1.0, pairs=1, **buffer):
    mpo = MpoConfig(weight=mpo_weight, margin_threshold=threshold, pairs_per_prompt=pairs)
    return BufferService(BufferConfig(**buffer), AlgorithmConfig(grpo or GrpoConfig(), mpo), seed)


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
    code = "import skyrl.buffer.service, sys; assert not {'torch', 'ray', 'vllm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
