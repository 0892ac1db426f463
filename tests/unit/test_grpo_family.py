"""The GRPO family against plain Python: values, gradients by finite differences, statistics, oracles, invariances.

The reference keeps what has no gradient (``frozen``, the log-probabilities at the start of the step) apart from what is
differentiated, so finite differences of it are the gradients that the loss must have.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from learner_views import grpo_loss, merged

from skyrl.objective.grpo import Grpo
from skyrl.settings import Aggregation, GrpoConfig, KlEstimator, KlPlace, Mismatch, Ratio, Surrogate

LENGTHS = (1, 4, 3, 6, 2)
WEIGHTS = (1.0, 0.5, 0.0, 1.7, 1.0)
DENOMINATOR = 7
BOUNDS = {"clip_low": 0.05, "clip_high": 0.1, "mismatch_cap": 1.5}
DUAL_CLIP = 1.12
STATS = {
    "clipped": "grpo/clip_fraction",
    "dual_clipped": "grpo/dual_clip_fraction",
    "masked": "grpo/masked_fraction",
    "truncated": "grpo/truncated_fraction",
    "mismatch": "grpo/mismatch_mean",
    "ratio": "grpo/ratio_mean",
}
"""What :func:`plain` counts, and the statistics that are its sums."""


@dataclass
class Data:
    """[B, T] arrays, [B] advantages and weights; float64."""

    logprobs: np.ndarray
    behaviour: np.ndarray
    reference: np.ndarray
    advantages: np.ndarray
    mask: np.ndarray
    weights: np.ndarray


def make(seed: int = 7, drift: float = 0.45) -> Data:
    rng = np.random.default_rng(seed)
    shape = (len(LENGTHS), max(LENGTHS))
    logprobs = -2 * rng.random(shape)
    return Data(
        logprobs,
        logprobs + drift * rng.normal(size=shape),
        logprobs + 0.4 * rng.normal(size=shape),
        rng.normal(size=shape[0]),
        np.arange(shape[1])[None] < np.array(LENGTHS)[:, None],
        np.array(WEIGHTS),
    )


def plain(data: Data, cfg: GrpoConfig, logprobs: np.ndarray, frozen: np.ndarray) -> tuple[float, dict[str, float]]:
    """The loss and its statistics from loops over samples and tokens, in Python floats."""
    total = 0.0
    counts = dict.fromkeys(STATS, 0.0)
    for i, weight in enumerate(data.weights.tolist()):
        if weight == 0:
            continue
        tokens = [t for t in range(data.mask.shape[1]) if data.mask[i, t]]
        base = data.behaviour if cfg.mismatch is Mismatch.none else frozen
        # Both what is differentiated and, for CISPO's weight, the constant of it.
        moving = {t: math.exp(logprobs[i, t] - base[i, t]) for t in tokens}
        still = {t: math.exp(frozen[i, t] - base[i, t]) for t in tokens}
        if cfg.ratio is Ratio.sequence:
            moving = dict.fromkeys(tokens, math.prod(moving.values()) ** (1 / len(tokens)))
            still = dict.fromkeys(tokens, math.prod(still.values()) ** (1 / len(tokens)))
        w = {t: math.exp(frozen[i, t] - data.behaviour[i, t]) for t in tokens}
        inside = 1 / cfg.mismatch_cap <= math.prod(w.values()) <= cfg.mismatch_cap
        still_ks = {t: estimate(cfg.kl_estimator, frozen[i, t], data.reference[i, t]) for t in tokens}
        if cfg.ratio is Ratio.sequence and cfg.surrogate is Surrogate.clip:  # GSPO: one advantage a sample
            still_ks = dict.fromkeys(tokens, sum(still_ks.values()) / len(tokens))
        losses = []
        for t in tokens:
            advantage = data.advantages[i]
            k = estimate(cfg.kl_estimator, logprobs[i, t], data.reference[i, t])
            if cfg.kl_place is KlPlace.reward:
                advantage -= cfg.kl_weight * still_ks[t]
            low, high = -math.inf if cfg.clip_low is None else 1 - cfg.clip_low, 1 + cfg.clip_high
            if cfg.surrogate is Surrogate.cispo:
                objective = min(max(still[t], low), high) * advantage * logprobs[i, t]
                counts["clipped"] += not low <= still[t] <= high
            else:
                objective = min(moving[t] * advantage, min(max(moving[t], low), high) * advantage)
                counts["clipped"] += moving[t] > high if advantage > 0 else moving[t] < low
                if cfg.dual_clip is not None and advantage < 0 and objective < cfg.dual_clip * advantage:
                    objective = cfg.dual_clip * advantage
                    counts["dual_clipped"] += 1
            counts["ratio"] += still[t]
            counts["mismatch"] += w[t]
            counts["truncated"] += w[t] > cfg.mismatch_cap
            out = {
                Mismatch.token_mask: not 1 / cfg.mismatch_cap <= w[t] <= cfg.mismatch_cap,
                Mismatch.sequence_mask: not inside,
            }.get(cfg.mismatch, False)
            counts["masked"] += out
            factor = {Mismatch.token_truncate: min(w[t], cfg.mismatch_cap), Mismatch.token_mask: w[t]}.get(
                cfg.mismatch, 1.0
            )
            penalty = cfg.kl_weight * k if cfg.kl_place is KlPlace.loss else 0.0
            losses.append(0.0 if out else penalty - factor * objective)
        total += weight * sum(losses) / (len(tokens) if cfg.aggregation is Aggregation.sample else 1)
    return total / DENOMINATOR, counts


def estimate(kind: KlEstimator, logprob: float, reference: float) -> float:
    d = reference - logprob
    return {"k1": -d, "k2": d * d / 2, "k3": math.exp(d) - d - 1}[kind.value]


def run(data: Data, cfg: GrpoConfig, denominator: int = DENOMINATOR) -> tuple[float, np.ndarray, dict[str, float]]:
    leaf = torch.tensor(data.logprobs, requires_grad=True)
    others = [torch.tensor(x) for x in (data.behaviour, data.advantages, data.mask, data.weights)]
    loss, sums = grpo_loss(leaf, *others, cfg, denominator, torch.tensor(data.reference))
    loss.backward()
    assert leaf.grad is not None
    return loss.item(), leaf.grad.numpy(), {name: value.item() for name, value in sums.items()}


def finite_differences(data: Data, cfg: GrpoConfig) -> np.ndarray:
    grad = np.zeros_like(data.logprobs)
    for i, t in np.argwhere(data.mask):
        ends = []
        for step in (1e-6, -1e-6):
            moved = data.logprobs.copy()
            moved[i, t] += step
            ends.append(plain(data, cfg, moved, data.logprobs)[0])
        grad[i, t] = (ends[0] - ends[1]) / 2e-6
    return grad


@pytest.mark.parametrize("mismatch", list(Mismatch))
@pytest.mark.parametrize("kl_place", list(KlPlace))
@pytest.mark.parametrize("surrogate", list(Surrogate))
@pytest.mark.parametrize("ratio", list(Ratio))
@pytest.mark.parametrize("aggregation", list(Aggregation))
def test_value_gradient_and_statistics(aggregation, ratio, surrogate, kl_place, mismatch) -> None:
    dual_clip = DUAL_CLIP if surrogate is Surrogate.clip else None
    family = {"aggregation": aggregation, "ratio": ratio, "surrogate": surrogate, "dual_clip": dual_clip}
    data = make()
    for estimator in KlEstimator:
        penalty = {"kl_weight": 0.3, "kl_estimator": estimator, "kl_place": kl_place}
        cfg = GrpoConfig(**BOUNDS, **family, **penalty, mismatch=mismatch)
        loss, grad, sums = run(data, cfg)
        value, counts = plain(data, cfg, data.logprobs, data.logprobs)
        assert loss == pytest.approx(value, rel=1e-12)
        assert grad == pytest.approx(finite_differences(data, cfg), abs=2e-9)
        for name, count in counts.items():
            if STATS[name] in sums:
                assert sums[STATS[name]] == pytest.approx(count, rel=1e-12), name
    only_if_on = {
        "grpo/dual_clip_fraction",
        "grpo/masked_fraction",
        "grpo/truncated_fraction",
        "grpo/mismatch_mean",
    } & sums.keys()
    assert only_if_on == {
        *(["grpo/dual_clip_fraction"] if dual_clip else []),
        *(["grpo/mismatch_mean"] if mismatch is not Mismatch.none else []),
        *(["grpo/truncated_fraction"] if mismatch is Mismatch.token_truncate else []),
        *(["grpo/masked_fraction"] if mismatch in (Mismatch.token_mask, Mismatch.sequence_mask) else []),
    }


def test_the_data_reaches_every_branch() -> None:
    """Else the comparison above would prove less than it says."""
    data = make()
    most = sum(length for length, weight in zip(LENGTHS, WEIGHTS, strict=True) if weight)
    for count, setting in [
        *(("clipped", {"ratio": r, "surrogate": s}) for r, s in itertools.product(Ratio, Surrogate)),
        *(("dual_clipped", {"ratio": r, "dual_clip": DUAL_CLIP}) for r in Ratio),
        *(("masked", {"mismatch": kind}) for kind in (Mismatch.token_mask, Mismatch.sequence_mask)),
        ("truncated", {"mismatch": Mismatch.token_truncate}),
    ]:
        counts = plain(data, GrpoConfig(**BOUNDS, **setting), data.logprobs, data.logprobs)[1]
        assert 1 <= counts[count] < most, (count, setting)


@pytest.mark.parametrize(
    ("advantage", "ratio", "dual_clip", "objective", "decides"),
    [(-1, 5, 3, -3, 1), (-1, 2.9, 3, -2.9, 0), (-1, 0.7, 3, -0.8, 0), (1, 5, 3, 1.2, 0), (-2, 5, 3, -6, 1)],
)
def test_dual_clip_by_hand(advantage, ratio, dual_clip, objective, decides) -> None:
    leaf = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    one = torch.ones(1, 1, dtype=torch.float64)
    loss, sums = grpo_loss(leaf, 0 * one, advantage * one[0], one, one[0], GrpoConfig(dual_clip=dual_clip), 1)
    loss.backward()
    assert loss.item() == pytest.approx(-objective)
    assert sums["grpo/dual_clip_fraction"].item() == decides
    assert (leaf.grad.item() == 0) == (decides or objective in (-0.8, 1.2))


def test_sequence_ratio_by_hand() -> None:
    """log ρ = 0.01 on 100 tokens: the geometric mean is 1.01005, the product 2.71828, which cap 2.7 leaves out."""
    ones = torch.ones(1, 100, dtype=torch.float64)
    arguments = (0.01 * ones - 1, -ones, ones[0, :1], ones, ones[0, :1])
    sums = grpo_loss(*arguments, GrpoConfig(ratio=Ratio.sequence), 1)[1]
    assert sums["grpo/ratio_max"].item() == pytest.approx(1.01005, abs=1e-5)
    assert sums["grpo/ratio_mean"].item() == pytest.approx(101.005, abs=1e-3)
    for cap, masked in ((2.7, 100), (2.72, 0)):
        for sign in (1, -1):
            turned = (sign * 0.01 * ones - 1, *arguments[1:])
            loss, sums = grpo_loss(*turned, GrpoConfig(mismatch=Mismatch.sequence_mask, mismatch_cap=cap), 1)
            assert sums["grpo/masked_fraction"].item() == masked
            assert loss.item() == pytest.approx(0.0 if masked else -1.0)


@pytest.mark.parametrize("aggregation", list(Aggregation))
def test_on_policy_every_correction_is_the_identity(aggregation) -> None:
    """θ = behaviour: whatever the setting, the gradient is that of plain GRPO and nothing is cut."""
    data = make(drift=0.0)
    want = run(data, GrpoConfig(aggregation=aggregation))[1]
    assert np.abs(want).max() > 0.01
    for ratio, surrogate, mismatch in itertools.product(Ratio, Surrogate, Mismatch):
        wide = GrpoConfig(aggregation=aggregation, ratio=ratio, surrogate=surrogate, mismatch=mismatch)
        for cfg in (wide, wide.model_copy(update={"clip_low": 1e-6, "clip_high": 1e-6, "mismatch_cap": 1 + 1e-6})):
            _, grad, sums = run(data, cfg)
            assert grad == pytest.approx(want, abs=1e-15)
            tokens = sum(length for length, weight in zip(LENGTHS, WEIGHTS, strict=True) if weight)
            ones = {"grpo_tokens", "grpo/ratio_mean", "grpo/mismatch_mean"} & sums.keys()
            assert [sums[name] for name in ones] == pytest.approx([tokens] * len(ones))
            zeros = {
                "grpo/clip_fraction",
                "grpo/masked_fraction",
                "grpo/truncated_fraction",
                "grpo/kl_behaviour",
            } & sums.keys()
            assert [sums[name] for name in zeros] == [0.0] * len(zeros)
    dual = run(data, GrpoConfig(aggregation=aggregation, dual_clip=1.001))
    assert dual[1] == pytest.approx(want, abs=1e-15) and dual[2]["grpo/dual_clip_fraction"] == 0


def cut(data: Data, rows: list[int], extra: int) -> Data:
    """Some rows, with ``extra`` padding that must not be read."""
    padding = ((0, 0), (0, extra))
    grown = {
        name: np.pad(getattr(data, name)[rows], padding, constant_values=math.nan)
        for name in ("logprobs", "behaviour", "reference")
    }
    mask = np.pad(data.mask[rows], padding)
    return replace(data, **grown, mask=mask, advantages=data.advantages[rows], weights=data.weights[rows])


@pytest.mark.parametrize("aggregation", list(Aggregation))
@pytest.mark.parametrize(
    "family",
    [
        {"ratio": Ratio.sequence, "dual_clip": DUAL_CLIP, "kl_estimator": KlEstimator.k1, "kl_place": KlPlace.reward},
        {"surrogate": Surrogate.cispo, "mismatch": Mismatch.token_truncate, "kl_estimator": KlEstimator.k2},
        {"mismatch": Mismatch.token_mask, "kl_place": KlPlace.reward},
        {"ratio": Ratio.sequence, "mismatch": Mismatch.sequence_mask},
    ],
)
def test_micro_batches_and_padding_change_nothing(aggregation, family) -> None:
    cfg = GrpoConfig(**BOUNDS, aggregation=aggregation, kl_weight=0.2, **family)
    data = make()
    denominator = {"sample": 4, "token": 13, "fixed": 4 * 6}[aggregation.value]
    loss, grad, sums = run(data, cfg, denominator)
    for parts, extra in (([[0], [1, 2], [3, 4]], 0), ([[4, 2], [0, 1, 3]], 3), ([[i] for i in range(5)], 9)):
        results = [run(cut(data, rows, extra), cfg, denominator) for rows in parts]
        assert sum(result[0] for result in results) == pytest.approx(loss, rel=1e-12)
        for rows, result in zip(parts, results, strict=True):
            assert result[1][:, : grad.shape[1]] == pytest.approx(grad[rows], rel=1e-12, abs=1e-15)
            assert not result[1][:, grad.shape[1] :].any()
        parts_stats = [{k: torch.tensor(v, dtype=torch.float64) for k, v in result[2].items()} for result in results]
        assert merged(parts_stats, [(Grpo(cfg), 1.0)]) == pytest.approx(sums, rel=1e-6)


def test_left_out_tokens_stay_in_the_denominator() -> None:
    """w = 4 and 1, cap 2: the first token of two is left out, the second counts a half, not a whole."""
    behaviour = torch.tensor([[-math.log(4), 0.0]], dtype=torch.float64) - 1
    one = torch.ones(1, dtype=torch.float64)
    cfg = GrpoConfig(mismatch=Mismatch.token_mask)
    loss, sums = grpo_loss(-torch.ones_like(behaviour), behaviour, one, torch.ones(1, 2), one, cfg, 1)
    assert loss.item() == pytest.approx(-0.5)
    assert (sums["grpo/masked_fraction"].item(), sums["grpo/mismatch_mean"].item()) == (1, pytest.approx(5))


@pytest.mark.parametrize("mismatch", list(Mismatch))
@pytest.mark.parametrize("surrogate", list(Surrogate))
@pytest.mark.parametrize("ratio", list(Ratio))
def test_extremes_stay_finite_and_nan_is_not_hidden(mismatch, surrogate, ratio) -> None:
    cfg = GrpoConfig(mismatch=mismatch, surrogate=surrogate, ratio=ratio)
    for gap in (500.0, -500.0):
        leaf = torch.full((1, 3), -600.0 + gap, requires_grad=True)
        loss, sums = grpo_loss(
            leaf, torch.full((1, 3), -600.0), -torch.ones(1), torch.ones(1, 3), torch.ones(1), cfg, 1
        )
        loss.backward()
        assert math.isfinite(loss.item()) and torch.isfinite(leaf.grad).all()
        assert all(math.isfinite(value.item()) for value in sums.values())
    behaviour = torch.tensor([[-1.0, math.nan, -1.0]])
    loss, _ = grpo_loss(-torch.ones(1, 3), behaviour, torch.ones(1), torch.ones(1, 3), torch.ones(1), cfg, 1)
    assert math.isnan(loss.item())


@pytest.mark.parametrize("ratio", list(Ratio))
def test_cispo_without_a_lower_clip(ratio) -> None:
    """As MiniMax-M1 has it. By hand: the weight of a ratio of 0.5 is 0.5, where ε_low = 0.2 makes it 0.8."""
    data = make()
    cfg = GrpoConfig(surrogate=Surrogate.cispo, clip_low=None, clip_high=0.1, ratio=ratio)
    loss, grad, sums = run(data, cfg)
    value, counts = plain(data, cfg, data.logprobs, data.logprobs)
    assert loss == pytest.approx(value, rel=1e-12)
    assert grad == pytest.approx(finite_differences(data, cfg), abs=2e-9)
    assert sums["grpo/clip_fraction"] == counts["clipped"] > 0
    one = torch.ones(1, 1, dtype=torch.float64)
    for low, weight in ((None, 0.5), (0.2, 0.8)):
        leaf = torch.tensor([[-1.0]], dtype=torch.float64, requires_grad=True)
        cfg = GrpoConfig(surrogate=Surrogate.cispo, clip_low=low, ratio=ratio)
        grpo_loss(leaf, leaf.detach() + math.log(2), -one[0], one, one[0], cfg, 1)[0].backward()
        assert leaf.grad.item() == pytest.approx(weight)


def test_a_clip_of_sequence_ratios_takes_one_advantage_a_sample() -> None:
    """GSPO, Eq. 5, with the penalty in the reward. s = 1.3 and k1 = (−0.4, 1.2) on two tokens, kl_weight 1, A = 0.3:
    the advantages of the tokens would be 0.7 and −0.9, of which the clip at 1.2 would hold the first and not the
    second. Their mean −0.1 is what counts: the clip holds neither, and o = 1.3 · −0.1."""
    log_s = math.log(1.3)
    leaf = torch.tensor([[-1.0, -1.0]], dtype=torch.float64, requires_grad=True)
    behaviour = torch.tensor([[-1.0 - 2 * log_s, -1.0]], dtype=torch.float64)
    reference = torch.tensor([[-0.6, -2.2]], dtype=torch.float64)
    ones = torch.ones(1, 2, dtype=torch.float64)
    advantage = torch.tensor([0.3], dtype=torch.float64)
    cfg = GrpoConfig(ratio=Ratio.sequence, kl_weight=1.0, kl_estimator=KlEstimator.k1, kl_place=KlPlace.reward)
    loss, sums = grpo_loss(leaf, behaviour, advantage, ones, ones[0, :1], cfg, 1, reference)
    loss.backward()
    assert loss.item() == pytest.approx(0.13)
    assert sums["grpo/clip_fraction"].item() == 0
    assert leaf.grad.tolist() == [pytest.approx([0.065, 0.065])]
    # With A = 1.3 the mean is 0.9 and the whole sample is clipped: no token has a gradient.
    leaf.grad = None
    loss, sums = grpo_loss(leaf, behaviour, advantage + 1, ones, ones[0, :1], cfg, 1, reference)
    loss.backward()
    assert (loss.item(), sums["grpo/clip_fraction"].item()) == (pytest.approx(-1.2 * 0.9), 2)
    assert leaf.grad.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("aggregation", list(Aggregation))
@pytest.mark.parametrize(
    "family",
    [
        {"kl_weight": 0.2},
        {"ratio": Ratio.sequence, "kl_weight": 0.2, "kl_place": KlPlace.reward},
        {"surrogate": Surrogate.cispo, "mismatch": Mismatch.token_truncate},
        {"mismatch": Mismatch.sequence_mask},
    ],
)
def test_masked_tokens_are_as_if_they_were_not_there(aggregation, family) -> None:
    """Tokens of a tool's result in the middle of an answer, which may hold anything; and an answer without any."""
    cfg = GrpoConfig(**BOUNDS, aggregation=aggregation, **family)
    data = make()
    want, grad, sums = run(data, cfg)
    own = np.repeat(np.arange(data.mask.shape[1]), 2)  # every token twice, of which the second is masked
    doubled = replace(
        data,
        logprobs=data.logprobs[:, own],
        behaviour=data.behaviour[:, own],
        reference=data.reference[:, own],
        mask=data.mask[:, own] & (np.arange(len(own)) % 2 == 0),
    )
    for name, junk in (("logprobs", -math.inf), ("behaviour", math.nan), ("reference", math.inf)):
        getattr(doubled, name)[:, 1::2] = junk
    loss, masked_grad, masked_sums = run(doubled, cfg)
    assert masked_sums.pop("places") == 2 * sums.pop("places")  # the only one that says where the tokens stand
    assert loss == pytest.approx(want, rel=1e-13) and masked_sums == pytest.approx(sums, rel=1e-13)
    assert masked_grad[:, ::2] == pytest.approx(grad, rel=1e-12, abs=1e-15) and not masked_grad[:, 1::2].any()
    data.mask[3] = False
    loss, grad, sums = run(data, cfg)
    data.weights[3] = 0.0
    without = run(data, cfg)
    assert math.isfinite(loss) and (loss, sums) == (without[0], without[2]) and not grad[3].any()
