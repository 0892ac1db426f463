"""Whole steps of the learner in one process, over the plain backend, against the float64 oracle: masks, lag, files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import learner_oracle
import numpy as np
import pytest
import torch
from learner_cases import WEIGHTS, build_policy, counted, groups_of, make_batch
from learner_plain import PLAIN, joined, plain_settings, recorded_gradients, weights_of
from learner_runs import distance, gradient_error

from skyrl.learner.files import FILE
from skyrl.learner.step import LearnerStep
from skyrl.monitoring.metrics import check_names
from skyrl.policy.attention import NAME, attention_of
from skyrl.policy.module import module_of
from skyrl.records import ConfigError, SkyrlError, TrainBatch
from skyrl.settings import Trainable


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("policy")
    build_policy(folder)
    return str(folder)


def oracle_logprobs(policy: str, learner: LearnerStep, batch: TrainBatch, weights: Any = None) -> list[torch.Tensor]:
    model = learner_oracle.load(policy, weights)
    with torch.no_grad():
        return [learner_oracle.answer_logprobs(model, learner.encoder, item, 0.8) for item in batch.items]


def with_masks(batch: TrainBatch) -> TrainBatch:
    """Every third token masked, and with a record that may not be read; one answer is masked altogether."""
    for i, item in enumerate(batch.items):
        item.sample.mask[i % 3 :: 3] = False
        if not item.sample.mask.any():
            item.sample.mask[0] = True
    batch.items[5].sample.mask[:] = False
    for item in batch.items:
        assert item.sample.logprobs is not None
        item.sample.logprobs[~item.sample.mask] = np.nan
    return counted(batch)


@pytest.mark.parametrize("masked", [False, True])
def test_two_steps_equal_the_float64_oracle(policy: str, masked: bool) -> None:
    cfg = plain_settings()
    learner = joined(cfg, policy)
    gradients, weights, delta = recorded_gradients(learner), [weights_of(learner)], 0.0
    for step in (1, 2):
        batch = make_batch(learner.encoder, step)
        if masked:
            batch = with_masks(batch)
        metrics = learner.train_step(batch)
        check_names(metrics)
        reference = oracle_logprobs(policy, learner, batch)
        delta += (learner_oracle.batch_mean_reward(batch, reference, cfg.algorithm.mpo.beta) - delta) / step
        loss, want, kl = learner_oracle.gradients(policy, learner.encoder, batch, weights[-1], delta, cfg)
        assert metrics["mpo/delta"] == pytest.approx(delta, abs=1e-5)
        assert metrics["loss/total"] == pytest.approx(loss, rel=1e-5)
        assert metrics["mpo/kl_reference"] == pytest.approx(kl, rel=1e-3, abs=1e-9)
        assert metrics["learner/tokens"] == sum(item.sample.mask.sum() for item in batch.items)
        assert gradient_error(gradients[-1], want) < 1e-5
        norm = np.sqrt(sum(np.square(g).sum() for g in want.values()))
        assert metrics["learner/grad_norm"] == pytest.approx(norm, rel=1e-5)
        weights.append(weights_of(learner))
    want_weights = learner_oracle.adamw(weights[0], gradients, [2.5e-5, 5e-5], cfg)
    assert distance(weights[2], want_weights) < 1e-6
    assert distance(weights[2], weights[0]) > 1e-5


def test_rows_of_their_own_give_the_same(policy: str) -> None:
    """The setting turns shared rows off, down to the attention function."""
    seen = []
    for shared in (True, False):
        learner = joined(plain_settings(shared_rows=shared), policy)
        assert attention_of(learner.backend.model) == ({NAME} if shared else {"sdpa"})
        batch = make_batch(learner.encoder, 1)
        scores = np.concatenate(learner.logprobs(groups_of(batch)))
        metrics = learner.train_step(batch)
        assert metrics.pop("learner/shared_rows") == shared
        del metrics["learner/micro_batches"]
        seen.append((metrics, weights_of(learner), scores))
    assert seen[0][0] == pytest.approx(seen[1][0], rel=1e-5, abs=1e-6)
    assert distance(seen[0][1], seen[1][1]) < 1e-6
    np.testing.assert_allclose(seen[0][2], seen[1][2], atol=1e-5)


def test_masked_tokens_count_for_nothing(policy: str) -> None:
    """What stands in a mask's gaps changes no number but through the context of what follows: so the answers' last
    tokens are masked, and then other ones stand there."""
    seen = []
    for other in (False, True):
        learner = joined(plain_settings(), policy)
        batch = make_batch(learner.encoder, 1)
        for item in batch.items:
            item.sample.mask[-2:] = False
            item.sample.mask[0] = True
            if other:
                item.sample.token_ids[~item.sample.mask] = batch.items[0].sample.token_ids[0]
        metrics = learner.train_step(counted(batch))
        assert metrics["learner/entropy"] > 0
        metrics.pop("learner/distinct_share")
        seen.append((metrics, weights_of(learner)))
    assert seen[0][0] == pytest.approx(seen[1][0], rel=1e-5, abs=1e-6)
    assert distance(seen[0][1], seen[1][1]) < 1e-6


@pytest.mark.parametrize("what", ["no items", "all masked"])
def test_a_batch_without_a_token_trains_nothing(policy: str, what: str) -> None:
    learner = joined(plain_settings(weight_decay=0.5), policy)
    before = weights_of(learner)
    batch = make_batch(learner.encoder, 1)
    if what == "no items":
        batch = TrainBatch(1, 0, dict(WEIGHTS), [], [], 0, 0)
    for item in batch.items:
        item.sample.mask[:] = False
    metrics = learner.train_step(counted(batch))
    assert metrics == {"learner/tokens": 0, "learner/micro_batches": 0, "mpo/pairs": len(batch.pairs)}
    assert distance(before, weights_of(learner)) == 0 and learner.delta.updates == 0


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_delta_is_of_the_policy_at_the_start_of_the_step(policy: str, lag: int) -> None:
    """At lag 1 and above the records are an older policy's: here of made-up numbers, so that using one shows."""
    cfg = plain_settings(lr=1e-3)
    learner = joined(cfg, policy)
    learner.train_step(make_batch(learner.encoder, 1))
    batch = make_batch(learner.encoder, 2)
    for item in batch.items:
        item.sample.policy_version = batch.version - lag
    start, reference = (
        oracle_logprobs(policy, learner, batch, weights_of(learner)),
        oracle_logprobs(policy, learner, batch),
    )
    first, beta = learner.delta.value, cfg.algorithm.mpo.beta
    by_record = learner_oracle.batch_mean_reward(batch, reference, beta)
    by_policy = learner_oracle.mean_reward(batch, start, reference, beta)
    assert abs(by_record - by_policy) > 1e-2
    metrics = learner.train_step(batch)
    assert metrics["mpo/delta"] == pytest.approx((first + (by_policy if lag else by_record)) / 2, abs=1e-5)
    assert ("learner/logprob_gap_fresh" in metrics) == (lag == 0)


def test_a_pair_of_which_one_is_older(policy: str) -> None:
    """The record of one member is read, the other is scored."""
    cfg = plain_settings()
    learner = joined(cfg, policy)
    batch = make_batch(learner.encoder, 2)
    start = oracle_logprobs(policy, learner, batch)
    for pair in batch.pairs:
        batch.items[pair.rejected].sample.policy_version -= 1
        recorded = batch.items[pair.chosen].sample.logprobs
        start[pair.chosen] = torch.from_numpy(recorded).double()
    want = learner_oracle.mean_reward(batch, start, oracle_logprobs(policy, learner, batch), cfg.algorithm.mpo.beta)
    assert learner.train_step(batch)["mpo/delta"] == pytest.approx(want, abs=1e-5)


def test_a_grpo_sample_without_a_record_is_refused(policy: str) -> None:
    learner = joined(plain_settings(), policy)
    batch = make_batch(learner.encoder, 3)
    batch.items[1].sample.logprobs = None  # a member of a pair only
    learner.train_step(batch)
    batch.items[0].sample.logprobs = None
    with pytest.raises(SkyrlError, match=r"step 3: sample 0 of prompt 'p0' has grpo_weight 1, but its log-prob"):
        learner.train_step(batch)


@pytest.mark.parametrize("where", ["loss", "gradient", "delta"])
def test_what_is_not_finite_stops_the_step_and_spares_the_policy(policy: str, where: str) -> None:
    learner = joined(plain_settings(), policy)
    before, batch = weights_of(learner), make_batch(learner.encoder, 7)
    if where == "gradient":
        norm = learner.backend.model.base_model.text_model.norm
        norm.register_full_backward_hook(lambda _module, inner, _outer: (torch.full_like(inner[0], torch.nan),))
    else:
        recorded = batch.items[2 if where == "loss" else 0].sample.logprobs
        assert recorded is not None
        recorded[0] = np.nan
    what = {"loss": "loss/grpo", "gradient": "the gradient norm", "delta": "the mean implicit reward"}[where]
    with pytest.raises(SkyrlError, match=f"step 7: {what} is nan, so the policy was not updated"):
        learner.train_step(batch)
    assert distance(before, weights_of(learner)) == 0


# ---------------------------------------------------------------- what is trained, and what it is compared with


@pytest.mark.parametrize(
    ("trainable", "still"),
    [
        (Trainable.all, set()),
        (Trainable.adapter, {"language", "vision"}),
        (Trainable.language_and_adapter, {"vision"}),
        (Trainable.adapter_and_vision, {"language"}),
    ],
)
def test_settings_train_their_modules(policy: str, trainable: Trainable, still: set[str]) -> None:
    learner = joined(plain_settings(trainable=trainable), policy)
    before = weights_of(learner)
    learner.train_step(make_batch(learner.encoder, 1))
    for name, now in weights_of(learner).items():
        assert np.array_equal(before[name], now) == (module_of(name) in still), name


def test_adapter_only_step_without_any_picture_trains_nothing(policy: str) -> None:
    learner = joined(plain_settings(trainable=Trainable.adapter, weight_decay=0.5), policy)
    before = weights_of(learner)
    metrics = learner.train_step(make_batch(learner.encoder, 1, text_only=True))
    assert distance(before, weights_of(learner)) == 0
    assert metrics["learner/grad_norm"] == 0 and metrics["learner/tokens"] > 0


def test_kl_above_its_limit_refreshes_the_reference(policy: str) -> None:
    cfg = plain_settings()
    cfg.algorithm.mpo.reference_kl = 1e-9
    learner = joined(cfg, policy)
    metrics = [learner.train_step(make_batch(learner.encoder, step)) for step in (1, 2, 3, 4)]
    assert [m["mpo/reference_age"] for m in metrics] == [0, 1, 0, 1]
    kls = [m["mpo/kl_reference"] for m in metrics]
    assert kls[0] == pytest.approx(0, abs=1e-10) and kls[2] == pytest.approx(0, abs=1e-10)
    assert min(kls[1], kls[3]) > 1e-6


@pytest.mark.parametrize("case", ["reference_free", "chosen_only"])
def test_terms_that_need_no_reference_load_none(policy: str, case: str) -> None:
    cfg = plain_settings()
    cfg.algorithm.grpo.kl_weight = 0.0
    cfg.algorithm.mpo.reference_free = case == "reference_free"
    if case == "chosen_only":
        cfg.algorithm.mpo.preference_weight = cfg.algorithm.mpo.quality_weight = 0.0
    learner = joined(cfg, policy)
    assert learner.reference is None
    gradients, means = recorded_gradients(learner), []
    for step in (1, 2):
        batch, weights = make_batch(learner.encoder, step), weights_of(learner)
        metrics = learner.train_step(batch)
        nothing = [torch.zeros(1, dtype=torch.float64)] * len(batch.items)
        means.append(learner_oracle.batch_mean_reward(batch, nothing, cfg.algorithm.mpo.beta))
        delta = float(np.mean(means)) if case == "reference_free" else 0.0
        loss, want, _ = learner_oracle.gradients(policy, learner.encoder, batch, weights, delta, cfg)
        assert metrics["loss/total"] == pytest.approx(loss, rel=1e-5)
        assert gradient_error(gradients[-1], want) < 1e-5
        assert "mpo/kl_reference" not in metrics and "mpo/reference_age" not in metrics
        assert ("mpo/delta" in metrics) == (case == "reference_free")


# ---------------------------------------------------------------- files


def test_a_resumed_step_equals_the_uninterrupted_one(policy: str, tmp_path: Path) -> None:
    cfg = plain_settings()
    cfg.algorithm.mpo.reference_every = 2
    learner, again = joined(cfg, policy), joined(cfg, policy)
    for step in (1, 2):
        learner.train_step(make_batch(learner.encoder, step))
    learner.save(tmp_path)
    want = learner.train_step(make_batch(learner.encoder, 3))
    again.load(tmp_path)
    assert again.train_step(make_batch(again.encoder, 3)) == want
    assert want["mpo/reference_age"] == 0
    assert distance(weights_of(again), weights_of(learner)) == 0


def test_checkpoints_that_do_not_fit_are_refused(policy: str, tmp_path: Path) -> None:
    learner = joined(plain_settings(), policy)
    with pytest.raises(SkyrlError, match=f"no learner state in {tmp_path}: it has no learner.json"):
        learner.load(tmp_path)
    learner.save(tmp_path)
    other = joined(plain_settings(trainable=Trainable.adapter), policy)
    with pytest.raises(SkyrlError, match=r"was saved with learner\.trainable=all \(here adapter\); use the same"):
        other.load(tmp_path)
    saved = json.loads((tmp_path / FILE).read_text())
    saved["layout"]["learner.backend"] = "somewhere:Else"
    (tmp_path / FILE).write_text(json.dumps(saved))
    with pytest.raises(SkyrlError, match=rf"learner\.backend=somewhere:Else \(here {PLAIN}\)"):
        learner.load(tmp_path)


def test_a_checkpoint_of_an_older_version_says_so(policy: str, tmp_path: Path) -> None:
    """Before formats had numbers, the file was the bare layout."""
    old = {"learner.num_workers": 1, "learner.zero_stage": 0, "learner.trainable": "all", "model.dtype": "float32"}
    (tmp_path / FILE).write_text(json.dumps(old))
    with pytest.raises(SkyrlError, match=r"has format 1, this version of skyrl reads 3: go on with the version that"):
        joined(plain_settings(), policy).load(tmp_path)


def test_export_is_the_policy(policy: str, tmp_path: Path) -> None:
    learner = joined(plain_settings(), policy)
    batch = make_batch(learner.encoder, 1)
    learner.train_step(batch)
    learner.export(tmp_path)
    again = joined(plain_settings(), str(tmp_path))
    assert distance(weights_of(again), weights_of(learner)) == 0
    for one, other in zip(learner.logprobs(groups_of(batch)), again.logprobs(groups_of(batch)), strict=True):
        assert np.array_equal(one, other)


# ---------------------------------------------------------------- the module


def test_the_driver_can_name_the_methods_without_heavy_libraries() -> None:
    code = (
        "import sys; from skyrl.learner.step import LearnerStep; from skyrl.monitoring.metrics import metric_table; "
        "from skyrl.settings import Config; metric_table(Config()); LearnerStep(Config(), '', 0, 1).free_port(); "
        "print([m for m in ('torch', 'deepspeed', 'transformers', 'ray', 'vllm') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


@pytest.mark.parametrize("backend", ["nowhere:Backend", "plain_backend:Nothing"])
def test_a_backend_that_is_not_there(policy: str, backend: str) -> None:
    with pytest.raises(ConfigError, match=f"learner.backend={backend}: can't be imported"):
        joined(plain_settings(backend=backend), policy)
