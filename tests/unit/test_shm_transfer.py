"""Which parameters a shared-memory update must bring: the rule about tied embeddings, on small stand-ins."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from skyrl.records import SyncError

CONFIGS = [
    SimpleNamespace(tie_word_embeddings=True),
    SimpleNamespace(tie_word_embeddings=False),
    SimpleNamespace(),  # the text part of Qwen2-VL and GLM-4V says nothing in transformers 5
]


class Model(nn.Module):
    """Embedding, body and head; ``load_weights`` says that it loaded ``loads``."""

    def __init__(self, tied: bool, loads: set[str] | None, head: str = "lm_head") -> None:
        super().__init__()
        self.embed_tokens, self.body = nn.Embedding(5, 3), nn.Linear(3, 3)
        setattr(self, head, nn.Linear(3, 5, bias=False))
        if tied:
            getattr(self, head).weight = self.embed_tokens.weight
        self.loads = loads

    def load_weights(self, weights: Iterator[tuple[str, torch.Tensor]]) -> set[str] | None:
        return self.loads


def receive(monkeypatch: pytest.MonkeyPatch, model: Model, config: Any, *again: set[str]) -> None:
    """One update, and further ones if they bring ``again``. As vLLM's reloading does, the first takes shared parameters
    apart."""
    from vllm.model_executor.model_loader import reload

    from skyrl.sync.shm_transfer import ShmUpdateInfo, ShmWeightTransferEngine

    def take_apart(model: nn.Module) -> None:
        for module in model.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(parameter.detach().clone())

    monkeypatch.setattr(reload, "initialize_layerwise_reload", take_apart)
    engine = object.__new__(ShmWeightTransferEngine)
    engine.model, engine.model_config = model, SimpleNamespace(hf_text_config=config, hf_config=config)
    for loads in (model.loads, *again):
        model.loads = loads
        engine.start_weight_update()
        engine.receive_weights(ShmUpdateInfo([], 3, whole=True))


BODY = {"body.weight", "body.bias"}


@pytest.mark.parametrize("config", CONFIGS, ids=["says tied", "says not tied", "says nothing"])
@pytest.mark.parametrize("head", ["lm_head", "output"])
def test_a_head_that_shares_the_embedding_comes_with_it_whatever_the_configuration_says(
    monkeypatch: pytest.MonkeyPatch, config: Any, head: str
) -> None:
    receive(monkeypatch, Model(True, BODY | {"embed_tokens.weight"}, head), config)
    receive(monkeypatch, Model(True, BODY | {f"{head}.weight"}, head), config)  # sent under its other name
    receive(monkeypatch, Model(False, BODY | {"embed_tokens.weight", f"{head}.weight"}, head), config)
    receive(monkeypatch, Model(False, None, head), config)  # some models do not say what they loaded
    with pytest.raises(SyncError, match=rf"snapshot 3 left 1 parameter\(s\) .* first '{head}.weight'"):
        receive(monkeypatch, Model(False, BODY | {"embed_tokens.weight"}, head), config)
    with pytest.raises(SyncError, match=r"left 1 parameter\(s\) .* first 'body.bias'"):
        receive(monkeypatch, Model(True, {"body.weight", "embed_tokens.weight"}, head), config)


def test_a_tie_is_known_also_after_an_update_that_did_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    receive(monkeypatch, Model(True, None), CONFIGS[0], BODY | {"embed_tokens.weight"}, BODY | {"lm_head.weight"})


def test_a_tied_pair_that_nobody_sent_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SyncError, match=r"left 2 parameter\(s\) .* first 'embed_tokens.weight'"):
        receive(monkeypatch, Model(True, BODY), CONFIGS[0])


def test_every_name_of_a_shared_parameter_is_known() -> None:
    from skyrl.sync.shm_transfer import shared_names

    pair = {"embed_tokens.weight", "lm_head.weight"}
    assert shared_names(Model(True, None)) == {"embed_tokens.weight": pair, "lm_head.weight": pair}
    assert shared_names(Model(False, None)) == {}
    whole = Model(False, None)
    whole.lm_head = whole.embed_tokens  # the module itself is shared, as vLLM's Qwen 2 does
    assert shared_names(whole) == {"embed_tokens.weight": pair, "lm_head.weight": pair}
