"""The learner with real DeepSpeed engines, one and two ranks, ZeRO 0 to 3, against a float64 oracle.

All engines run in three processes that the first test starts: one rank alone, then two ranks together.
"""

from __future__ import annotations

from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

import learner_oracle
import numpy as np
import pytest
import torch
from learner_cases import SHORT, SMALL, WHOLE, make_batch, settings
from learner_plain import recorded_gradients, weights_of
from learner_runs import distance, gradient_error, run_all
from plain_backend import PlainBackend

from skyrl.data.pictures import mask_picture
from skyrl.learner.backend import Backend
from skyrl.learner.passes import row_of
from skyrl.learner.step import LearnerStep
from skyrl.monitoring.metrics import check_names
from skyrl.policy.encode import PromptEncoder
from skyrl.policy.module import load_policy, module_of
from skyrl.policy.packing import plan_forests
from skyrl.settings import Config

pytestmark = pytest.mark.integration
RUNS = [(world_size, stage) for world_size in (1, 2) for stage in WHOLE]
ALL_RUNS = RUNS + [(world_size, stage) for world_size in (1, 2) for stage in SHORT]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_all(tmp_path_factory)[0]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(world size, rank) → results of all cases there."""
    return run_all(tmp_path_factory)[1]


@pytest.fixture(scope="module")
def encoder(policy: Path) -> PromptEncoder:
    return PromptEncoder.from_pretrained(str(policy))


# ---------------------------------------------------------------- gradients, optimizer, ranks


def test_the_plan_covers_what_the_tests_claim(encoder: PromptEncoder) -> None:
    batch = make_batch(encoder, 1)
    rows = [row_of(item) for item in batch.items]
    alone = plan_forests(rows, batch.pairs, 1, SMALL)[0]
    both = plan_forests(rows, batch.pairs, 2, SMALL)
    assert len(alone) > 2 and len(alone) > len({item.prompt.key for item in batch.items})  # groups are cut, too
    assert any(part and not any(batch.items[i].prompt.images for i in part) for part in [*alone, *both[0], *both[1]])
    assert sorted(i for part in [*both[0], *both[1]] for i in part) == list(range(len(batch.items)))


@pytest.mark.parametrize(("step", "case"), [(1, "train"), (2, "train"), (3, "train"), (1, "large")])
def test_loss_and_gradient_equal_the_float64_oracle(
    results: Any, policy: Path, encoder: PromptEncoder, step: int, case: str
) -> None:
    run = results[1, 0][case, 0]
    cfg = settings(0)
    reference_model = learner_oracle.load(str(policy))
    means = []
    for past in range(1, step + 1):
        batch = make_batch(encoder, past)
        with torch.no_grad():
            reference = [learner_oracle.answer_logprobs(reference_model, encoder, i, 0.8) for i in batch.items]
        means.append(learner_oracle.batch_mean_reward(batch, reference, cfg.algorithm.mpo.beta))
    delta = float(np.mean(means))
    weights = run["start"] if step == 1 else run["weights"][step - 2]
    loss, want, kl = learner_oracle.gradients(str(policy), encoder, batch, weights, delta, cfg)
    metrics = run["metrics"][step - 1]
    assert metrics["mpo/delta"] == pytest.approx(delta, abs=1e-5)
    assert metrics["mpo/kl_reference"] == pytest.approx(kl, rel=1e-3, abs=1e-9)
    assert metrics["mpo/reference_age"] == step - 1
    assert metrics["loss/total"] == pytest.approx(loss, rel=1e-5)
    assert gradient_error(run["gradients"][step - 1], want) < 1e-5
    norm = np.sqrt(sum(np.square(g).sum() for g in want.values()))
    assert metrics["learner/grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert norm > cfg.learner.max_grad_norm  # so the clip acts in these tests


@pytest.mark.parametrize(("world_size", "stage"), ALL_RUNS)
def test_update_is_clipped_adamw(results: Any, world_size: int, stage: int) -> None:
    run = results[world_size, 0]["train", stage]
    rates = [2.5e-5, 5e-5, 5e-5][: 3 if stage in WHOLE else 1]
    want = learner_oracle.adamw(run["start"], run["gradients"], rates, settings(stage))
    assert distance(run["weights"][-1], want) < 1e-6
    assert [m["learner/lr"] for m in run["metrics"]] == rates


@pytest.mark.parametrize(("world_size", "stage"), ALL_RUNS)
def test_ranks_stages_and_micro_batches_change_nothing(results: Any, world_size: int, stage: int) -> None:
    base, run = results[1, 0]["train", 0], results[world_size, 0]["train", stage]
    assert len(run["metrics"]) == (3 if stage in WHOLE else 1)
    for step in range(len(run["metrics"])):
        assert gradient_error(run["gradients"][step], base["gradients"][step]) < 1e-5
        assert distance(run["weights"][step], base["weights"][step]) < 1e-5
        got, want = dict(run["metrics"][step]), dict(base["metrics"][step])
        for name in ("learner/micro_batches", "learner/whole_steps"):  # ZeRO-3's pieces have other weights to look at
            del got[name], want[name]
        assert got == pytest.approx(want, rel=1e-5, abs=1e-5)
    if world_size == 1 and stage in WHOLE:
        large = results[1, 0]["large", stage]
        assert large["metrics"][0]["learner/micro_batches"] == 1
        assert run["metrics"][0]["learner/micro_batches"] > 2
        assert run["metrics"][0]["learner/shared_rows"] == 1
        assert gradient_error(large["gradients"][0], base["gradients"][0]) < 1e-6
        assert distance(large["weights"][0], base["weights"][0]) < 1e-6


@pytest.mark.parametrize("stage", [*WHOLE, *SHORT])
def test_ranks_agree_with_each_other(results: Any, stage: int) -> None:
    first, second = results[2, 0]["train", stage], results[2, 1]["train", stage]
    assert first["metrics"] == second["metrics"]
    assert first["delta"] == second["delta"]
    assert first["delta"]["updates"] == (3 if stage in WHOLE else 1)
    assert second["weights"] == [None] * len(first["weights"])  # a snapshot is rank 0's alone


@pytest.mark.parametrize("stage", WHOLE)
def test_fewer_items_than_ranks(results: Any, stage: int) -> None:
    one, two = results[1, 0]["few", 0], results[2, 0]["few", stage]
    assert gradient_error(two["gradients"][0], one["gradients"][0]) < 1e-6
    assert distance(two["weights"][0], one["weights"][0]) < 1e-6
    assert one["metrics"][0]["learner/tokens"] == two["metrics"][0]["learner/tokens"]


def test_under_zero_3_a_rank_holds_its_share_from_the_start(results: Any) -> None:
    for rank in (0, 1):
        run = results[2, rank]["sharded_load", 3]
        assert run["whole"] > 1_000_000 and run["held"] == pytest.approx(run["whole"] / 2, rel=0.01)
        assert run["by_learner"] == [True, True]  # the policy and the reference
        assert run["types"] == {"torch.bfloat16"}
        # In 16 bits the frequencies of rotary positions would be wrong by turns far along.
        assert run["buffers"].keys() == run["plain_buffers"].keys()
        assert any(name.endswith("inv_freq") and kind == "torch.float32" for name, (kind, _) in run["buffers"].items())
        for name, (kind, values) in run["plain_buffers"].items():
            assert run["buffers"][name][0] == kind and np.array_equal(run["buffers"][name][1], values)


def test_sharded_frozen_and_checkpointed_changes_nothing(results: Any) -> None:
    run, base = results[2, 0]["adapter_checkpointing", 3], results[1, 0]["adapter", 0]
    assert run["checkpointed_layers"] > 0
    assert gradient_error(run["gradients"][0], base["gradients"][0]) < 1e-5
    assert distance(run["weights"][0], base["weights"][0]) < 1e-5


# ---------------------------------------------------------------- another backend


def test_the_plain_backend_takes_the_same_steps(results: Any, policy: Path) -> None:
    run = results[1, 0]["train", 0]
    cfg = settings(0)
    cfg.learner.backend = "plain_backend:PlainBackend"
    learner = LearnerStep(cfg, str(policy), 0, threads=1)
    learner.join("127.0.0.1", learner.free_port())
    gradients = recorded_gradients(learner)
    assert distance(weights_of(learner), run["start"]) == 0
    for step, want in enumerate(run["metrics"]):
        metrics = learner.train_step(make_batch(learner.encoder, step + 1))
        assert metrics == pytest.approx(want, rel=1e-6, abs=1e-6)
        assert gradient_error(gradients[step], run["gradients"][step]) < 1e-6
        assert distance(weights_of(learner), run["weights"][step]) < 1e-6
    assert distance(run["start"], run["weights"][-1]) > 1e-5


def test_backends_have_the_calls_of_the_protocol() -> None:
    from skyrl.learner.deepspeed_backend import DeepSpeedBackend

    calls = [name for name in vars(Backend) if not name.startswith("_") and callable(getattr(Backend, name))]
    assert len(calls) == 9
    for name in [*calls, "__init__"]:
        want = signature(getattr(Backend, name))
        assert signature(getattr(DeepSpeedBackend, name)) == signature(getattr(PlainBackend, name)) == want, name


# ---------------------------------------------------------------- checkpoints and export


@pytest.mark.parametrize("case", ["train", "adapter"])
@pytest.mark.parametrize(("world_size", "stage"), RUNS)
def test_a_resumed_step_equals_the_uninterrupted_one(results: Any, world_size: int, stage: int, case: str) -> None:
    run = results[world_size, 0][case, stage]
    assert distance(run["resumed_weights"], run["weights"][-1]) < 1e-6
    assert distance(run["weights"][-1], run["weights"][-2]) > 1e-5  # the step is not a trivial one
    assert run["resumed_delta"] == run["delta"]
    assert run["resumed_decay"] == {0.7}  # the resumed run's setting, not the checkpoint's
    got, want = dict(run["resumed_metrics"]), dict(run["metrics"][-1])
    hits = got.pop("learner/tower_hits", None), want.pop("learner/tower_hits", None)
    assert got == pytest.approx(want, rel=1e-6, abs=1e-6)
    if (case, stage) == ("adapter", 0):  # the same pictures in every step; a run that goes on has none of them yet
        assert 0 < hits[0] < hits[1] <= 1
    else:
        assert hits == (None, None)


@pytest.mark.parametrize(("world_size", "stage"), RUNS)
def test_export_is_the_learners_policy(
    results: Any, world_size: int, stage: int, policy: Path, encoder: PromptEncoder
) -> None:
    run = results[world_size, 0]["on_policy", stage]
    exported = load_policy(run["folder"], "float32")
    assert distance({n: p.detach().numpy() for n, p in exported.named_parameters()}, run["weights"]) == 0
    assert dict(load_policy(str(policy), "float32").named_parameters()).keys() == run["weights"].keys()
    assert exported.config.to_dict()["text_config"]["use_cache"] is True
    batch = make_batch(encoder, 1)
    again = PromptEncoder.from_pretrained(run["folder"])
    model = learner_oracle.load(run["folder"])
    with torch.no_grad():
        for item, got in zip(batch.items, run["after"], strict=True):
            want = learner_oracle.answer_logprobs(model, again, item, 0.8)
            np.testing.assert_allclose(got, want.numpy(), atol=2e-5)


# ---------------------------------------------------------------- behaviour of a step


@pytest.mark.parametrize(("world_size", "stage"), RUNS)
def test_first_on_policy_step(results: Any, world_size: int, stage: int) -> None:
    run = results[world_size, 0]["on_policy", stage]
    metrics = run["metrics"]
    check_names(metrics)
    check_names(run["empty"])
    assert metrics["grpo/ratio_mean"] == pytest.approx(1, abs=1e-4)
    assert metrics["grpo/clip_fraction"] == 0
    assert metrics["grpo/kl_behaviour"] == pytest.approx(0, abs=1e-6)
    assert metrics["learner/logprob_gap_fresh"] < 1e-4
    # θ = π_0: every h is 0, so is δ, and the terms have their textbook values.
    assert metrics["mpo/delta"] == pytest.approx(0, abs=1e-5)
    assert metrics["loss/preference"] == pytest.approx(0.693147, abs=1e-5)
    assert metrics["loss/quality"] == pytest.approx(1.386294, abs=1e-5)
    assert max(np.abs(a - b).max() for a, b in zip(run["after"], run["logprobs"], strict=True)) > 1e-3


def test_picture_drop_equals_the_float64_oracle(results: Any, policy: Path, encoder: PromptEncoder) -> None:
    """``probe_prompts`` is 4, so the first four answers, which are to two scenes."""
    cfg: Config = settings(0)
    model = learner_oracle.load(str(policy), results[1, 0]["on_policy", 0]["weights"])
    drops = []
    for item in make_batch(encoder, 1).items[:4]:
        prompt = item.prompt
        (picture,) = prompt.images
        hidden = mask_picture(picture, f"{prompt.id}/0", cfg.hallucination.mask_share, cfg.hallucination.mask_patch)
        masked = replace(item, prompt=replace(prompt, id=f"{prompt.id}-hidden", images=(hidden,)))
        with torch.no_grad():
            with_picture = learner_oracle.answer_logprobs(model, encoder, item, 0.8)
            drops.append((with_picture - learner_oracle.answer_logprobs(model, encoder, masked, 0.8)).numpy())
    want = float(np.concatenate(drops).mean())
    assert abs(want) > 1e-2
    for world_size, stage in RUNS:
        for rank in range(world_size):
            run = results[world_size, rank]["on_policy", stage]
            assert run["picture_drop"] == {"eval/picture_drop": pytest.approx(want, abs=1e-5)}
            assert run["text_drop"] == {}


@pytest.mark.parametrize(("world_size", "stage"), RUNS)
def test_an_empty_batch_trains_nothing(results: Any, world_size: int, stage: int) -> None:
    run = results[world_size, 0]["on_policy", stage]
    assert run["empty"] == {"learner/tokens": 0, "learner/micro_batches": 0, "mpo/pairs": 0}
    assert distance(run["before"], run["after_empty"]) == 0


@pytest.mark.parametrize(("world_size", "stage"), RUNS)
def test_not_finite_stops_every_rank_and_spares_the_policy(results: Any, world_size: int, stage: int) -> None:
    for rank in range(world_size):
        loss, gradient, delta = results[world_size, rank]["not_finite", stage]
        assert loss.startswith("step 7: loss/grpo is nan")
        assert gradient.startswith("step 7: the gradient norm is")
        assert delta.startswith("step 7: the mean implicit reward is nan")


@pytest.mark.parametrize("stage", WHOLE)
def test_bfloat16_follows_float32(results: Any, stage: int) -> None:
    of_type = {dtype: results[1, 0]["half_precision", dtype, stage] for dtype in ("bfloat16", "float32")}
    assert len(of_type["float32"]) == 2
    # Made-up records and the learner's own log π_θ give different δ, so the loss shows which was used.
    recorded = results[1, 0]["train", stage]["metrics"][0]
    assert abs(of_type["float32"][0]["mpo/delta"] - recorded["mpo/delta"]) > 1e-3
    for half, full in zip(of_type["bfloat16"], of_type["float32"], strict=True):
        assert half["loss/total"] == pytest.approx(full["loss/total"], rel=0.02)
        assert half["learner/grad_norm"] == pytest.approx(full["learner/grad_norm"], rel=0.05)


# ---------------------------------------------------------------- what is trained


@pytest.mark.parametrize(("world_size", "stage"), RUNS)
def test_adapter_only_leaves_the_rest_alone(results: Any, world_size: int, stage: int) -> None:
    run = results[world_size, 0]["adapter", stage]
    for name, before in run["start"].items():
        same = np.array_equal(before, run["weights"][-1][name])
        assert same == (module_of(name) != "adapter"), name
    (gradient,) = run["gradients"][0].values()
    assert np.abs(gradient).max() > 1e-4
    base = results[1, 0]["adapter", 0]
    assert gradient_error(run["gradients"][1], base["gradients"][1]) < 1e-5


def test_gradient_checkpointing_changes_nothing(results: Any) -> None:
    plain, run = results[1, 0]["train", 1], results[1, 0]["checkpointing", 1]
    assert (plain["checkpointed_layers"], run["checkpointed_layers"] > 0) == (0, True)
    assert gradient_error(run["gradients"][0], plain["gradients"][0]) < 1e-6


@pytest.mark.parametrize("stage", [2, 3])
def test_what_is_kept_in_host_memory_changes_nothing(results: Any, stage: int) -> None:
    base, run = results[1, 0]["train", 0], results[1, 0]["offload", stage]
    assert gradient_error(run["gradients"][0], base["gradients"][0]) < 1e-5
    assert distance(run["weights"][0], base["weights"][0]) < 1e-5
