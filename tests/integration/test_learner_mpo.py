"""MPO in the learner with real DeepSpeed engines, ZeRO 0 and 3 on one and two ranks, against a float64 oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import learner_oracle
import pytest
import torch
from learner_cases import make_batch
from learner_mpo_cases import refreshing
from learner_runs import distance, gradient_error, run_all

from skyrl.policy.encode import PromptEncoder

pytestmark = pytest.mark.integration


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


ITERATED = [(1, 0), (1, 3), (2, 0), (2, 3)]


def test_refreshed_reference_equals_the_float64_oracle(results: Any, policy: Path, encoder: PromptEncoder) -> None:
    """References: π_0 for steps 1 and 2, the policy after step 2 for steps 3 and 4; δ goes on over the refresh."""
    run = results[1, 0]["refresh", 0]
    cfg = refreshing(0, 1)
    before = [run["start"], *run["weights"]]
    delta = None
    for step, metrics in enumerate(run["metrics"], start=1):
        own_reference = run["weights"][1] if step > 2 else run["start"]
        batch = make_batch(encoder, step)
        model = learner_oracle.load(str(policy), own_reference)
        with torch.no_grad():
            reference = [learner_oracle.answer_logprobs(model, encoder, i, 0.8) for i in batch.items]
        mean = learner_oracle.batch_mean_reward(batch, reference, cfg.algorithm.mpo.beta)
        delta = mean if delta is None else 0.5 * delta + 0.5 * mean
        assert metrics["mpo/delta"] == pytest.approx(delta, abs=1e-5)
        assert metrics["mpo/reference_age"] == (0, 1, 0, 1)[step - 1]
        if step > 2:
            weights = before[step - 1]
            loss, want, kl = learner_oracle.gradients(str(policy), encoder, batch, weights, delta, cfg, own_reference)
            assert metrics["loss/total"] == pytest.approx(loss, rel=1e-5)
            assert metrics["mpo/kl_reference"] == pytest.approx(kl, rel=1e-3, abs=1e-9)
            assert gradient_error(run["gradients"][step - 1], want) < 1e-5


@pytest.mark.parametrize(("world_size", "stage"), ITERATED)
def test_a_refresh_is_the_same_on_all_ranks_and_stages_and_survives_a_checkpoint(
    results: Any, world_size: int, stage: int
) -> None:
    """The checkpoint is written after step 3, so the resumed step needs the reference that step 2 left."""
    base, run = results[1, 0]["refresh", 0], results[world_size, 0]["refresh", stage]
    for step in range(4):
        assert gradient_error(run["gradients"][step], base["gradients"][step]) < 1e-5
        assert run["metrics"][step]["mpo/reference_age"] == step % 2
        kl = base["metrics"][step]["mpo/kl_reference"]
        assert run["metrics"][step]["mpo/kl_reference"] == pytest.approx(kl, rel=1e-3, abs=1e-9)
    assert run["resumed_delta"] == run["delta"]
    assert run["resumed_metrics"] == pytest.approx(run["metrics"][-1], rel=1e-6, abs=1e-6)
    assert distance(run["resumed_weights"], run["weights"][-1]) < 1e-6


@pytest.mark.parametrize("case", ["offline", "blind"])
@pytest.mark.parametrize(("world_size", "stage"), ITERATED)
def test_unrecorded_pair_members_cost_a_pass_and_change_nothing(
    results: Any, world_size: int, stage: int, case: str
) -> None:
    known, unknown = results[1, 0][f"{case}_known", 0], results[world_size, 0][f"{case}_unknown", stage]
    for got, want in zip(unknown["metrics"], known["metrics"], strict=True):
        assert ("learner/logprob_gap_fresh" in got) == (case == "blind")
        # Where some are recorded, the gap is that of those; which pieces of weights a rank looks at is its own matter.
        others = {"learner/micro_batches", "learner/logprob_gap_fresh_mean", "learner/whole_steps"}
        others |= {"learner/logprob_gap_fresh"} if case == "offline" else set()
        same = {name: value for name, value in want.items() if name not in others}
        assert {name: got[name] for name in got if name not in others} == pytest.approx(same, rel=1e-5, abs=1e-5)
    assert distance(unknown["weights"], known["weights"]) < 1e-5
    assert abs(known["metrics"][1]["mpo/delta"]) > 1e-3  # at the first step θ = π_0 and δ would be 0 anyway
