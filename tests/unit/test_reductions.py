import math

import pytest
import torch

from skyrl.objective import reductions
from skyrl.objective.reductions import token_logprobs


def reference(logits, ids, temperature, forbidden):
    """float64, token by token."""
    logprobs, entropies = [], []
    for row, token in zip(
        logits.double().reshape(-1, logits.shape[-1]).tolist(), ids.reshape(-1).tolist(), strict=True
    ):
        weights = [0.0 if k in forbidden else math.exp(x / temperature) for k, x in enumerate(row)]
        total = sum(weights)
        logprobs.append(math.log(weights[token] / total))
        entropies.append(-sum(w / total * math.log(w / total) for w in weights if w))
    return logprobs, entropies


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("forbidden", [(), (0, 6)])
@pytest.mark.parametrize("chunk", [2**26, 7 * 4])
def test_token_logprobs_agree_with_float64(monkeypatch, temperature, forbidden, chunk):
    monkeypatch.setattr(reductions, "CHUNK_ELEMENTS", chunk)
    torch.manual_seed(0)
    logits, ids = torch.randn(3, 5, 7) * 3, torch.randint(1, 6, (3, 5))
    logprobs, entropy = token_logprobs(logits, ids, temperature, forbidden)
    want, want_entropy = reference(logits, ids, temperature, forbidden)
    assert logprobs.dtype == torch.float32 and logprobs.shape == entropy.shape == (3, 5)
    assert logprobs.flatten().tolist() == pytest.approx(want, abs=1e-5)
    assert entropy.flatten().tolist() == pytest.approx(want_entropy, abs=1e-5)


def test_token_logprobs_gradient_is_the_same_in_chunks_and_leaves_the_logits_alone(monkeypatch):
    torch.manual_seed(0)
    logits, ids = torch.randn(6, 9, dtype=torch.float64), torch.randint(1, 9, (6,))
    before = logits.clone()
    grads = []
    for chunk in (2**26, 9 * 2):
        monkeypatch.setattr(reductions, "CHUNK_ELEMENTS", chunk)
        leaf = logits.clone().requires_grad_()
        logprobs, entropy = token_logprobs(leaf, ids, 0.8, (0,))
        assert not entropy.requires_grad
        (logprobs * torch.arange(6)).sum().backward()
        grads.append(leaf.grad)
    allowed = before / 0.8
    allowed[:, 0] = -math.inf
    analytic = (torch.nn.functional.one_hot(ids, 9) - allowed.softmax(-1)) / 0.8 * torch.arange(6).unsqueeze(-1)
    assert torch.allclose(grads[0], analytic, atol=1e-6)
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(logits, before)


def test_forbidden_token_has_minus_infinity_and_no_nan_gradient_once_masked():
    logits = torch.randn(2, 4, requires_grad=True)
    logprobs, _ = token_logprobs(logits, torch.tensor([0, 1]), forbidden_ids=(0,))
    assert logprobs[0].item() == -math.inf
    logprobs.masked_fill(torch.tensor([True, False]), 0.0).sum().backward()
    assert torch.isfinite(logits.grad).all() and logits.grad[0].abs().sum() == 0


def test_uniform_entropy():
    _, entropy = token_logprobs(torch.zeros(1, 8), torch.tensor([1]), forbidden_ids=(0, 2, 3, 4))
    assert entropy.item() == pytest.approx(math.log(4))


def test_half_precision_is_computed_in_float32():
    logits = torch.randn(4, 50).bfloat16()
    got, _ = token_logprobs(logits, torch.arange(4))
    assert torch.equal(got, token_logprobs(logits.float(), torch.arange(4))[0])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"forbidden_ids": (1, 9)}, r"\[9\].*0 … 3"),
        ({"ids": torch.tensor([0])}, "shape"),
    ],
)
def test_token_logprobs_refuses(kwargs, message):
    arguments = {"logits": torch.zeros(2, 4), "ids": torch.tensor([0, 1]), **kwargs}
    with pytest.raises(ValueError, match=message):
        token_logprobs(**arguments)
