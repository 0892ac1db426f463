"""Tests of forests on small models of many architectures; ``tests/unit/test_forest.py`` runs them in a process of their
own. ``python -m pytest tests/models/forests.py``
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).parent))
from making import TEXT, ids_of, template, tokenizer  # noqa: I001  (before whatever imports transformers)
from zoo import ARCHITECTURES

import numpy as np
import pytest
import torch

from skyrl.policy import attention, trial
from skyrl.policy.encode import EncodedBatch, PromptEncoder
from skyrl.policy.forest import Rows, collate_forest
from skyrl.policy.module import PolicyModule
from skyrl.records import Sample, SampleGroup, SkyrlError
from skyrl.rewards.group_scorer import GroupScorer
from skyrl.rewards.reward_model import RewardModel

CPU = torch.device("cpu")
ALIKE = ("Idefics3", "Qwen2.5-VL", "GLM-4V", "LLaVA", "Llama", "Qwen3-MoE", "Mistral 3")
"""Joined pictures; rotary positions in three dimensions, of two kinds; projectors; text; experts; a sliding window."""


class Policy:
    """A backend over one model: what the trial asks of it."""

    device = CPU
    collective = False

    def __init__(self, module: PolicyModule) -> None:
        self.module, self.model = module, module.model

    @torch.no_grad()
    def score(self, rows: EncodedBatch, reference: bool = False) -> torch.Tensor:
        return self.module(rows)[0]

    def reduce(self, values: torch.Tensor, operation: Literal["sum", "max"]) -> torch.Tensor:
        return values


def convolved() -> tuple[Any, Any, Any]:
    """A layer whose state runs over the row, whatever the mask says."""
    import transformers

    tok = tokenizer()
    tok.chat_template = template("")
    cfg = transformers.Lfm2Config(**TEXT, **ids_of(tok), layer_types=["conv", "full_attention"])
    return transformers.Lfm2ForCausalLM, cfg, tok


def made(name: str, dtype: torch.dtype = torch.float32) -> tuple[Policy, PromptEncoder]:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    kind, cfg, processor = convolved() if name == "LFM 2" else ARCHITECTURES[name].make()
    text = cfg.get_text_config()
    if name == "Mistral 3":
        text.sliding_window = 24
    model = kind(cfg).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:  # far from uniform, so that a fault shows
                parameter.mul_(4) if parameter.any() else parameter.normal_(std=0.1)
    attention.share_prompts(model)
    encoder = PromptEncoder(processor)
    return Policy(PolicyModule(model.to(dtype), encoder.forbidden_token_ids())), encoder


@lru_cache(maxsize=1)
def policy_of(name: str) -> tuple[Policy, PromptEncoder]:
    return made(name)


@pytest.fixture(params=ALIKE)
def alike(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Policy, PromptEncoder]]:
    monkeypatch.setattr(attention, "CHUNK", 16)
    yield policy_of(request.param)


def logprobs(policy: Policy, rows: Rows) -> torch.Tensor:
    return policy.module(rows.encoded)[0][rows.places]


def test_log_probabilities_and_gradients_are_those_of_plain_rows(alike: tuple[Policy, PromptEncoder]) -> None:
    policy, encoder = alike
    rows = trial._trial_rows(encoder)
    found = []
    for forest in (False, True):
        policy.module.zero_grad()
        values = logprobs(policy, Rows.of(rows, encoder, CPU, forest))
        weights = torch.randn(len(values), generator=torch.Generator().manual_seed(1))
        (weights * values).sum().backward()
        found.append((values, {n: p.grad for n, p in policy.module.named_parameters() if p.grad is not None}))
    (want, gradients), (got, own) = found
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    for name, gradient in gradients.items():
        assert float((own[name] - gradient).abs().max()) < 1e-5 * largest, name
    assert trial.forests_agree(policy, encoder, "the policy")


@pytest.mark.parametrize("fault", ["position", "mask of one", "mask of all", "parent"])
def test_a_shift_by_one_is_seen(
    alike: tuple[Policy, PromptEncoder], fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, encoder = alike
    rows = trial._trial_rows(encoder)

    def shifted(some: Any, encoder: PromptEncoder) -> tuple[EncodedBatch, np.ndarray]:
        batch, places = collate_forest(some, encoder)
        assert batch.depths is not None and batch.parents is not None
        ends = batch.attention_mask.clone()
        if fault == "mask of one":  # the first branch is seen by the token behind it
            end = int(ends[0, 0, 0, (batch.answer_mask[0] & (ends[0, 0, 0] < ends[0, 0, 0, 0])).nonzero()[0, 0]])
            ends[ends == end] += 1
        elif fault == "mask of all":
            ends = (ends + 1).clamp(max=ends.max())
        parents = batch.parents - (batch.answer_mask[0].long() if fault == "parent" else 0)
        depths = batch.depths + (batch.answer_mask.long() if fault == "position" else 0)
        return replace(batch, attention_mask=ends, depths=depths, parents=parents), places

    with torch.no_grad():
        want = logprobs(policy, Rows.of(rows, encoder, CPU, False))
        monkeypatch.setattr("skyrl.policy.forest.collate_forest", shifted)
        gap = (logprobs(policy, Rows.of(rows, encoder, CPU, True)) - want).abs().max()
    assert gap > 1e-3
    if fault == "mask of one":
        assert not trial.forests_agree(policy, encoder, "the policy")


# ---------------------------------------------------------------- the trial


def refused(policy: Policy, encoder: PromptEncoder, caplog: pytest.LogCaptureFixture) -> str:
    with caplog.at_level(logging.WARNING):
        assert not trial.forests_agree(policy, encoder, "the policy")
    (said,) = [record.getMessage() for record in caplog.records if record.name == trial.logger.name]
    return said


@pytest.mark.parametrize("name", ["Gemma 3", "LFM 2"])
def test_pictures_seen_in_both_directions_and_layers_with_a_state_fall_back(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert "tokens differ by" in refused(*made(name), caplog)


def test_another_attention_falls_back(caplog: pytest.LogCaptureFixture) -> None:
    policy, encoder = made("Qwen2")
    policy.model.set_attn_implementation("eager")
    attention.share_prompts(policy.model)
    assert "computes attention with eager" in refused(policy, encoder, caplog)


def test_a_window_that_only_the_mask_has_falls_back(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A policy whose layers do not say how wide theirs is: its short rows agree, its long ones would not."""
    policy, encoder = made("Mistral 3")
    original = attention.forest_attention

    def mute(*args: Any, sliding_window: int | None = None, **rest: Any) -> Any:
        return original(*args, **rest)

    from transformers import AttentionInterface

    for config in attention._text_configs(policy.model):
        config.sliding_window = 10_000
    monkeypatch.setitem(AttentionInterface._global_mapping, attention.NAME, mute)
    monkeypatch.setattr(attention, "forest_attention", mute)
    assert "tokens differ" in refused(policy, encoder, caplog)
    assert {config.sliding_window for config in attention._text_configs(policy.model)} == {10_000}  # put back


@pytest.mark.parametrize("collective", [False, True])
def test_code_that_cannot_take_a_forest(collective: bool, caplog: pytest.LogCaptureFixture) -> None:
    policy, encoder = made("Qwen2")
    policy.collective = collective
    policy.model.base_model.forward = lambda input_ids, attention_mask, use_cache: SimpleNamespace(
        last_hidden_state=torch.zeros(*input_ids.shape, 64)
    )
    if collective:
        with pytest.raises(SkyrlError, match=r"set learner\.shared_rows=false \(TypeError"):
            trial.forests_agree(policy, encoder, "the policy")
    else:
        assert "TypeError" in refused(policy, encoder, caplog)


def test_in_16_bits_rounding_is_measured(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    policy, encoder = made("Llama", torch.bfloat16)
    assert trial.forests_agree(policy, encoder, "the policy")
    monkeypatch.setattr(trial, "ROUNDING", 1e6)  # so that it would explain anything
    assert "would hide a wrong position" in refused(policy, encoder, caplog)


def test_layers_may_be_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "CHUNK", 16)
    policy, encoder = made("Qwen2.5-VL")
    rows = Rows.of(trial._trial_rows(encoder), encoder, CPU, True)
    found = []
    for again in (False, True):
        if again:
            policy.model.gradient_checkpointing_enable({"use_reentrant": False})
            policy.model.train()
        policy.module.zero_grad()
        logprobs(policy, rows).sum().backward()
        found.append({n: p.grad.clone() for n, p in policy.module.named_parameters() if p.grad is not None})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, msg=name)


# ---------------------------------------------------------------- the reward model


@pytest.mark.parametrize(("name", "shares"), [*((name, True) for name in ALIKE), ("Gemma 3", False), ("LFM 2", False)])
def test_scores_of_a_reward_model_are_those_of_whole_rows(name: str, shares: bool) -> None:
    policy, encoder = made(name)
    model = RewardModel(policy.model, encoder, likelihood=True).eval()
    with torch.no_grad():
        model.head.weight.normal_()
        groups: dict[str, SampleGroup] = {}
        want: dict[str, list[float]] = {}
        for prompt, ids, answer in trial._trial_rows(encoder):
            group = groups.setdefault(prompt.id, SampleGroup(prompt, ids, []))
            group.samples.append(Sample(len(group.samples), answer, None, "", True, 0))
            want.setdefault(prompt.id, []).append(float(model(encoder.collate([(prompt, ids, answer)]))))
    scorer = GroupScorer(model, 64, encoder)
    assert scorer.forests is shares
    got, expected = (np.concatenate(list(some)) for some in (scorer.score([*groups.values()]), want.values()))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    assert np.ptp(expected) > 0.1
