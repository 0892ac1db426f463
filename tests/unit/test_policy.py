"""Log-probabilities of given answers, against the model's own full logits."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learner_cases import make_batch, tiny_model
from learner_oracle import answer_logprobs

from skyrl.policy.encode import EncodedBatch, PromptEncoder
from skyrl.policy.module import PolicyModule, load_policy
from skyrl.records import ConfigError, TrainItem


@pytest.fixture(scope="module")
def parts() -> tuple[Any, PromptEncoder, list[TrainItem]]:
    model, processor = tiny_model()
    encoder = PromptEncoder(processor)
    return model, encoder, make_batch(encoder, 1, num_prompts=3, per_prompt=2).items


def module_for(parts: tuple[Any, PromptEncoder, list[TrainItem]], temperature: float = 1.0) -> PolicyModule:
    return PolicyModule(parts[0], parts[1].forbidden_token_ids(), temperature)


def collate(encoder: PromptEncoder, rows: list[TrainItem], length: int | None = None) -> EncodedBatch:
    return encoder.collate([(r.prompt, r.prompt_ids, r.sample.token_ids) for r in rows], length)


@torch.no_grad()
def run(module: PolicyModule, batch: EncodedBatch, rows: list[TrainItem]) -> list[np.ndarray]:
    flat = module(batch)[0].numpy()
    return np.split(flat, np.cumsum([len(r.sample.token_ids) for r in rows])[:-1])


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_equals_log_softmax_of_the_full_logits(parts: Any, temperature: float) -> None:
    model, encoder, rows = parts
    assert {bool(r.prompt.images) for r in rows} == {True, False}
    got = run(module_for(parts, temperature), collate(encoder, rows), rows)
    double = deepcopy(model).double()
    for row, mine in zip(rows, got, strict=True):
        with torch.no_grad():
            want = answer_logprobs(double, encoder, row, temperature)
        np.testing.assert_allclose(mine, want.numpy(), rtol=1e-6, atol=1e-5)
    assert np.std(np.concatenate(got)) > 0.3  # far above the tolerance: the test would see a wrong position


def test_padding_changes_nothing(parts: Any) -> None:
    _, encoder, rows = parts
    module = module_for(parts)
    plain = run(module, collate(encoder, rows), rows)
    wide = run(module, collate(encoder, rows, length=150), rows)
    for a, b in zip(plain, wide, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_neighbours_and_order_change_nothing(parts: Any) -> None:
    _, encoder, rows = parts
    module = module_for(parts)
    together = run(module, collate(encoder, rows), rows)
    backwards = run(module, collate(encoder, rows[::-1]), rows[::-1])[::-1]
    for row, a, b in zip(rows, together, backwards, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
        np.testing.assert_allclose(a, run(module, collate(encoder, [row]), [row])[0], atol=1e-5)


def test_the_picture_matters(parts: Any) -> None:
    _, encoder, rows = parts
    module, batch = module_for(parts), collate(encoder, rows[:1])
    seen = run(module, batch, rows[:1])[0]
    batch.pictures["pixel_values"] = -batch.pictures["pixel_values"]
    assert np.abs(run(module, batch, rows[:1])[0] - seen).max() > 1e-3


def test_forbidden_tokens_have_no_probability(parts: Any) -> None:
    _, encoder, rows = parts
    forbidden = encoder.forbidden_token_ids()
    assert encoder.image_token_id in forbidden
    batch = collate(encoder, rows[:1])
    first = int(batch.answer_mask[0].nonzero()[0])
    batch.input_ids[0, first] = encoder.pad_id
    with torch.no_grad():
        logprobs = module_for(parts)(batch)[0]
    assert logprobs[0] == -torch.inf
    # The other tokens share the probability of one.
    total = 0.0
    allowed = np.setdiff1d(np.arange(len(encoder.tokenizer)), forbidden)
    one = batch.answer_mask.clone()
    one[0, first + 1 :] = False
    batch.answer_mask = one
    for token in allowed:
        batch.input_ids[0, first] = int(token)
        with torch.no_grad():
            total += float(module_for(parts)(batch)[0].exp())
    assert total == pytest.approx(1, abs=1e-4)


def test_entropy_by_hand_and_only_on_request(parts: Any) -> None:
    model, encoder, rows = parts
    batch = collate(encoder, rows[:1])
    module = module_for(parts, 0.9)
    with torch.no_grad():
        assert module(batch)[1] is None
        entropy = module(batch, with_entropy=True)[1]
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **batch.pictures).logits[0] / 0.9
    logits[:, encoder.forbidden_token_ids()] = -1e30
    p = torch.softmax(logits.double(), -1)
    first = len(rows[0].prompt_ids)
    want = -(p * torch.log(p.clamp(min=1e-300))).sum(-1)[first - 1 : -1]
    np.testing.assert_allclose(entropy.numpy(), want.numpy(), rtol=1e-4, atol=1e-6)
    assert not entropy.requires_grad


def test_gradient_reaches_every_parameter(parts: Any) -> None:
    model, encoder, rows = parts
    model.zero_grad()
    module_for(parts)(collate(encoder, rows))[0].sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.zero_grad()


def test_architectures_that_change_their_logits_are_refused(parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts[0].config.text_config, "final_logit_softcapping", 30.0, raising=False)
    with pytest.raises(ConfigError, match=r"final_logit_softcapping=30\.0"):
        module_for(parts)


def test_load_policy_keeps_weights_type_and_generation_cache(parts: Any, tmp_path: Path) -> None:
    parts[0].save_pretrained(tmp_path)
    again = load_policy(str(tmp_path), "float32")
    assert type(again) is type(parts[0])
    for (name, want), (got_name, got) in zip(parts[0].named_parameters(), again.named_parameters(), strict=True):
        assert name == got_name
        assert torch.equal(want, got)
    assert {p.dtype for p in load_policy(str(tmp_path), "bfloat16").parameters()} == {torch.bfloat16}


def test_a_text_model_loads_and_scores(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    model = load_policy(str(tmp_path), "float32")
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    answer = torch.tensor([[False, False, True, True, True]])
    with torch.no_grad():
        got = PolicyModule(model, [0])(EncodedBatch(ids, torch.ones_like(ids), answer, {}))[0]
        logits = model(input_ids=ids).logits[0]
    logits[:, 0] = -torch.inf
    want = torch.log_softmax(logits, -1)[[1, 2, 3], [3, 4, 5]]
    np.testing.assert_allclose(got.numpy(), want.numpy(), atol=1e-6)


@pytest.mark.parametrize("rows", [12, 20, 32])
def test_output_layers_narrower_and_wider_than_the_vocabulary(rows: int) -> None:
    """A tokenizer may have special tokens that the output layer lacks, and a padded layer has rows that no token is."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).eval()
    model.lm_head = torch.nn.Linear(16, rows, bias=False)
    forbidden = [0, 3, 15, 19, 40]  # the tokenizer has 20 tokens and names one that not even the embeddings have
    ids = torch.tensor([[1, 15, 4, 11, 6]])
    answer = torch.tensor([[False, False, True, True, True]])
    logprobs, entropy = PolicyModule(model, forbidden, 0.7)(EncodedBatch(ids, torch.ones_like(ids), answer, {}), True)
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, 1:4].double() / 0.7
    assert logits.shape == (3, rows)
    allowed = [i for i in range(rows) if i not in forbidden]
    table = torch.log_softmax(logits[:, allowed], -1)
    want = [float(table[row, allowed.index(token)]) for row, token in enumerate((4, 11, 6))]
    np.testing.assert_allclose(logprobs.detach().numpy(), want, atol=1e-5)
    np.testing.assert_allclose(entropy.numpy(), -(table.exp() * table).sum(-1).numpy(), atol=1e-5)
    logprobs.sum().backward()
    assert model.lm_head.weight.grad.isfinite().all() and (model.lm_head.weight.grad[allowed] != 0).any(1).all()


def test_nothing_to_load_is_an_error(parts: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        load_policy(str(tmp_path), "float32")
    parts[0].config.save_pretrained(tmp_path)
    with pytest.raises(OSError, match=str(tmp_path)):
        load_policy(str(tmp_path), "float32")
