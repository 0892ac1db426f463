"""LoRA: what is trained, what travels, and what is exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learner_cases import build_policy, groups_of, make_batch, tiny_model
from learner_plain import joined, plain_settings, weights_of
from tiny_runs import config, numbers, policy_folder, run_loop
from torch import nn

from skyrl.learner.step import LearnerStep
from skyrl.policy.lora import add_lora, computing_merged, merged, plain_name
from skyrl.policy.module import load_policy, module_of
from skyrl.records import ConfigError, SkyrlError
from skyrl.settings import Trainable
from skyrl.settings.system import LoraConfig


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp("policy")
    build_policy(folder)
    return str(folder)


def lora_learner(policy: str, trainable: Trainable = Trainable.all, **lora: Any) -> LearnerStep:
    return joined(plain_settings(trainable=trainable, lora=LoraConfig(**{"rank": 4, "alpha": 8} | lora)), policy)


def test_factors_are_merged_in_order_and_in_the_weights_type() -> None:
    """W + 8/2 · B·A by hand; the bias keeps its place behind the weight."""
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.bfloat16)
    a, b = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.5, 0.0], [0.0, 0.25]])
    given = [
        ("norm.weight", torch.ones(2)),
        ("q.base_layer.weight", weight),
        ("q.base_layer.bias", torch.zeros(2)),
        ("q.lora_A.default.weight", a),
        ("q.lora_B.default.weight", b),
        ("end.weight", torch.ones(1)),
    ]
    found = list(merged(given, LoraConfig(rank=2, alpha=8)))
    assert [name for name, _ in found] == ["norm.weight", "q.weight", "q.bias", "end.weight"]
    assert [name for name, _ in given if plain_name(name)] == [given[i][0] for i in (0, 1, 2, 5)]
    assert found[1][1].dtype == torch.bfloat16 and found[1][1].tolist() == [[3.0, 2.0], [3.0, 5.0]]


def test_in_16_bits_the_receivers_weights_can_be_computed_with() -> None:
    """To the bit what a plain model of the merged weights gives; factors beside weights give something else."""
    cfg, ids = LoraConfig(rank=2, alpha=8), torch.arange(1, 9)[None]
    model, plain = (tiny_model()[0].to(torch.bfloat16).eval() for _ in range(2))
    add_lora(model, cfg, {"language"})
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05, generator=generator)
    plain.load_state_dict(dict(merged(model.named_parameters(), cfg)), strict=False)
    with torch.no_grad():
        want, beside = (part(input_ids=ids).logits for part in (plain, model))
        with computing_merged(model, cfg):
            assert torch.equal(model(input_ids=ids).logits, want)
        assert torch.equal(model(input_ids=ids).logits, beside) and not torch.equal(beside, want)


@pytest.mark.parametrize("trainable", [Trainable.all, Trainable.language_and_adapter, Trainable.adapter])
def test_only_the_named_modules_get_factors_and_nothing_else_is_trained(trainable: Trainable) -> None:
    from skyrl.policy.module import TRAINED

    model = tiny_model()[0]
    plain = [name for name, _ in model.named_parameters()]
    count = add_lora(model, LoraConfig(rank=2), TRAINED[trainable])
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * count > 0 and all(".lora_" in name for name in trained)
    assert {module_of(name) for name in trained} == TRAINED[trainable]
    assert not any("lm_head" in name for name in trained)
    assert [n for name, _ in model.named_parameters() if (n := plain_name(name)) is not None] == plain


def test_targets_choose_layers_by_their_last_name() -> None:
    model = tiny_model()[0]
    add_lora(model, LoraConfig(rank=2, targets=["q_proj"]), {"language"})
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".q_proj.lora_" in name and "vision" not in name for name in trained)


@pytest.mark.parametrize(
    ("targets", "trained", "message"),
    [
        (["q_proj", "query"], {"language"}, r"learner\.lora\.targets: query: no such trained layer; allowed: .*q_proj"),
        ([], set[str](), r"learner\.lora\.rank=2: learner\.trainable names no module with linear layers"),
    ],
)
def test_no_layer_to_train(targets: list[str], trained: set[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        add_lora(tiny_model()[0], LoraConfig(rank=2, targets=targets), trained)


def test_a_step_changes_the_factors_and_the_merged_weights_are_the_policy(policy: str, tmp_path: Path) -> None:
    learner = lora_learner(policy, Trainable.language_and_adapter)
    before, batch = weights_of(learner), make_batch(learner.encoder, 1)
    assert all(
        np.array_equal(before[n], p.detach().numpy()) for n, p in load_policy(policy, "float32").named_parameters()
    )
    learner.train_step(batch)
    after, told = weights_of(learner), learner.logprobs(groups_of(batch))
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    linear = {
        f"{n}.weight" for n, part in load_policy(policy, "float32").named_modules() if isinstance(part, nn.Linear)
    }
    wanted = {name for name in linear if module_of(name) != "vision" and "lm_head" not in name}
    assert before.keys() == after.keys() and changed == wanted
    learner.export(tmp_path / "out")
    again = joined(plain_settings(), str(tmp_path / "out"))  # the merged folder is an ordinary model
    for own, theirs in zip(told, again.logprobs(groups_of(batch)), strict=True):
        np.testing.assert_allclose(own, theirs, atol=1e-5)
    assert not np.allclose(
        np.concatenate(told), np.concatenate(joined(plain_settings(), policy).logprobs(groups_of(batch)))
    )


def test_the_exported_adapter_is_what_peft_loads(policy: str, tmp_path: Path) -> None:
    from peft import PeftModel
    from safetensors.torch import load_file

    learner = joined(plain_settings(lora=LoraConfig(rank=4, alpha=8), lr=0.1, warmup_steps=0), policy)
    start = weights_of(learner)
    learner.train_step(make_batch(learner.encoder, 1))
    moved = max(float(np.abs(own - start[name]).max()) for name, own in weights_of(learner).items())
    assert moved > 1e-3  # or an adapter that is not loaded would look right
    learner.export(tmp_path / "out")
    keys = list(load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors"))
    assert keys and all(key.startswith("base_model.model.model.") for key in keys)
    assert all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in keys)
    theirs = PeftModel.from_pretrained(
        load_policy(policy, "float32"), str(tmp_path / "out" / "adapter")
    ).merge_and_unload()
    for name, own in weights_of(learner).items():
        np.testing.assert_allclose(own, dict(theirs.named_parameters())[name].detach().numpy(), atol=1e-6)


def test_a_checkpoint_of_other_factors_is_refused(policy: str, tmp_path: Path) -> None:
    learner = lora_learner(policy)
    learner.save(tmp_path)
    with pytest.raises(SkyrlError, match=r"was saved with learner\.lora="):
        lora_learner(policy, rank=2).load(tmp_path)


def test_a_whole_run_is_proved_at_each_sync_and_resumes_to_the_same_numbers(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    folder, runs = policy_folder(tmp_path_factory.mktemp("policy")), []
    for name in ("whole", "cut"):
        cfg = config(tmp_path / name, 3, lag=1)
        cfg.learner.lora, cfg.learner.lr = LoraConfig(rank=4), 3e-3
        runs.append(cfg)
    whole = run_loop(runs[0], folder)
    metrics = numbers(whole)
    assert all(0 < m["sync/logprob_gap"] < 1e-4 for m in metrics.values()) and metrics[3]["learner/grad_norm"] > 0
    cut = numbers(run_loop(runs[1], folder, kill_at=3)) | numbers(run_loop(runs[1], folder, resume=True))
    assert cut == metrics
