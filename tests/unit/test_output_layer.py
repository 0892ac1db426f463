"""The output layer in blocks, against whole logits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from skyrl.objective.reductions import token_logprobs
from skyrl.policy import output_layer
from skyrl.policy.output_layer import answer_logprobs

ROWS, WIDTH, VOCABULARY = 12, 16, 900
FIRST_BLOCK = tuple(range(256))


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_layer, "BLOCK_BYTES", 1)  # 256 tokens: three whole blocks and a rest of 132


def case(bias: bool = False, dtype: torch.dtype = torch.float32) -> tuple[nn.Linear, Tensor, Tensor]:
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, VOCABULARY, bias=bias, dtype=dtype)
    ids = torch.tensor([0, 255, 256, 511, 512, 767, 768, 899, 7, 300, 600, 890])  # both ends of every block
    with torch.no_grad():
        head.weight *= 8  # sure of some tokens, unsure of others
    return head, torch.randn(ROWS, WIDTH, dtype=dtype, requires_grad=True), ids


def whole(head: Any, hidden: Tensor, ids: Tensor, temperature: float, forbidden: Any) -> tuple[Tensor, Tensor]:
    return token_logprobs(head(hidden), ids, temperature, forbidden)


def passes(run: Any, head: Any, hidden: Tensor, *rest: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Log-probabilities, entropy and all gradients of a weighted sum, also where it is not finite."""
    trained = [t for t in (hidden, *head.parameters()) if t.requires_grad]
    logprobs, entropy = run(head, hidden, *rest)
    assert not entropy.requires_grad
    return logprobs.detach(), entropy, list(torch.autograd.grad(logprobs, trained, torch.linspace(-1, 2, ROWS)))


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("temperature", "forbidden"), [(1.0, ()), (0.7, (3, 299, 899)), (2.0, FIRST_BLOCK)])
def test_equals_whole_logits(trained: bool, bias: bool, temperature: float, forbidden: tuple[int, ...]) -> None:
    head, hidden, ids = case(bias)
    head.requires_grad_(trained)
    got = passes(answer_logprobs, head, hidden, ids, temperature, forbidden)
    want = passes(whole, head, hidden, ids, temperature, forbidden)
    torch.testing.assert_close(got[0], want[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got[1], want[1], rtol=1e-5, atol=2e-6)
    assert len(got[2]) == len(want[2]) == 1 + trained * (1 + bias)
    for mine, other in zip(got[2], want[2], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
        assert other.abs().max() > 0.1
    banned = [int(i) in forbidden for i in ids]
    assert (got[0] == -math.inf).tolist() == banned


def test_float64_by_hand() -> None:
    head, hidden, ids = case()
    logprobs, entropy = answer_logprobs(head, hidden, ids, 0.5, (1, 898))
    logits = (hidden.double() @ head.weight.double().T / 0.5).detach()
    logits[:, [1, 898]] = -1e9
    table = torch.log_softmax(logits, -1)
    torch.testing.assert_close(logprobs.detach().double(), table[range(ROWS), ids], rtol=0, atol=1e-5)
    torch.testing.assert_close(entropy.double(), -(table.exp() * table).sum(-1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("trained", [True, False])
def test_sixteen_bits_have_logits_rounded_as_whole_ones_and_computed_with_in_float32(trained: bool) -> None:
    head, hidden, ids = case(True, torch.bfloat16)
    head.requires_grad_(trained)
    got = passes(answer_logprobs, head, hidden, ids, 0.9, (5,))
    want = passes(whole, head, hidden, ids, 0.9, (5,))
    assert got[0].dtype == got[1].dtype == torch.float32
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[1], want[1], rtol=1e-4, atol=1e-5)
    for mine, other in zip(got[2], want[2], strict=True):
        assert mine.dtype == torch.bfloat16
        assert (mine - other).float().norm() < 0.01 * other.float().norm()


def test_a_tied_layer_gets_the_gradients_of_both_its_uses() -> None:
    head, _, ids = case()
    embedding = nn.Embedding(VOCABULARY, WIDTH)
    embedding.weight = head.weight
    grads = []
    for run in (answer_logprobs, whole):
        head.weight.grad = None
        run(head, embedding(ids.flip(0)), ids, 1.0, ())[0].sum().backward()
        grads.append(head.weight.grad)
    assert (grads[0] - grads[1]).abs().max() < 1e-6 * grads[1].abs().max()


class Largest(TorchDispatchMode):
    """The most elements of any tensor that was computed."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        found = out if isinstance(out, tuple | list) else [out]
        self.elements = max([self.elements, *(t.numel() for t in found if isinstance(t, Tensor))])
        return out


@pytest.mark.parametrize("trained", [True, False])
def test_logits_are_never_whole(trained: bool) -> None:
    head = nn.Linear(2, 4096).requires_grad_(trained)
    hidden, ids = torch.randn(50, 2, requires_grad=True), torch.arange(50)
    with Largest() as seen:
        answer_logprobs(head, hidden, ids, 1.0, ())[0].sum().backward()
    assert seen.elements == 50 * 256
    with Largest() as seen:
        whole(head, hidden, ids, 1.0, ())[0].sum().backward()
    assert seen.elements == 50 * 4096


def test_a_weight_that_hooks_of_the_layer_gather(monkeypatch: pytest.MonkeyPatch) -> None:
    """ZeRO-3 in small: the weight is there within a call of the layer and within its backward pass only."""
    head, hidden, ids = case()
    want = passes(whole, head, hidden, ids, 1.0, (0,))
    full, gone = head.weight.detach().clone(), torch.empty(0)

    def gather(*_: Any) -> None:
        head.weight.data = full

    def release(*_: Any) -> None:
        head.weight.data = gone

    release()
    head.register_forward_pre_hook(gather)
    head.register_forward_hook(release)
    head.register_full_backward_pre_hook(gather)
    got = passes(answer_logprobs, head, hidden, ids, 1.0, (0,))
    for mine, other in zip((got[0], *got[2]), (want[0], *want[2]), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_a_layer_that_is_wrapped_is_called_as_it_is() -> None:
    class Doubled(nn.Linear):
        def forward(self, hidden: Tensor) -> Tensor:
            return 2 * super().forward(hidden)

    plain, hidden, ids = case()
    head = Doubled(WIDTH, VOCABULARY, bias=False)
    head.weight = plain.weight
    want = whole(plain, 2 * hidden, ids, 1.0, (3,))[0]
    torch.testing.assert_close(answer_logprobs(head, hidden, ids, 1.0, (3, 5000))[0], want)


def test_a_token_beyond_the_layer_is_an_error_and_leaves_the_layer_as_it_was() -> None:
    head, hidden, ids = case()
    with pytest.raises(ValueError, match="token 900 is beyond the output layer; allowed: 0 … 899"):
        answer_logprobs(head, hidden, torch.full_like(ids, 900), 1.0, ())
    assert head(hidden).shape == (ROWS, VOCABULARY)
    assert answer_logprobs(head, hidden[:0], ids[:0], 1.0, ())[0].shape == (0,)
