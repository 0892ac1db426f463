"""What travels in a sync when only a part of the policy is trained, and what the receiver makes of it: the learner, the
sampler and the proof are the real ones, over the plain engine and backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learner_cases import build_policy, make_batch, tiny_model
from tiny_runs import config

from skyrl.crew.local_executor import LocalExecutor
from skyrl.learner.step import LearnerStep
from skyrl.policy.lora import FACTORS, add_lora, plain_name
from skyrl.policy.module import module_of
from skyrl.records import ConfigError, SyncError, WeightSnapshot
from skyrl.rollout.sampler import Sampler
from skyrl.settings import Config, Trainable, WeightSync
from skyrl.settings.system import LoraConfig, LoraSync, system_problems
from skyrl.sync.incoming import Incoming
from skyrl.sync.outgoing import Outgoing, _require_same_names
from skyrl.sync.snapshot import parameters_of, take_snapshot
from skyrl.system import System, start_system

FACTOR_MODES = [LoraSync.merged, LoraSync.adapter]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp("policy")
    build_policy(folder)
    return str(folder)


@pytest.fixture
def cfg(tmp_path: Path) -> Config:
    made = config(tmp_path, steps=1)
    made.learner.lr, made.rollout.max_prompt_tokens = 1e-2, 64
    return made


@pytest.fixture
def start(cfg: Config, policy: str) -> Iterator[Callable[[], System]]:
    open_ones: list[Any] = []

    def started() -> System:
        open_ones.append(start_system(cfg, policy, None, LocalExecutor()))
        return open_ones[-1].__enter__()

    yield started
    for one in open_ones:
        one.__exit__(None, None, None)


def member(system: System) -> Sampler:
    return system.rollouts.members[0].build()


def learner(system: System) -> LearnerStep:
    return system.learners.members[0].build()


def train(system: System, step: int = 1) -> None:
    learner(system).train_step(make_batch(learner(system).encoder, step))


def weights(sampler: Sampler) -> dict[str, np.ndarray]:
    return {name: p.detach().numpy().copy() for name, p in sampler.engine.model.named_parameters()}  # type: ignore[attr-defined]


def policy_of(system: System) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in learner(system).policy_parameters()}


def assert_equal(system: System) -> None:
    for name, own in policy_of(system).items():
        np.testing.assert_array_equal(own, weights(member(system))[name], err_msg=name)


# ---------------------------------------------------------------- frozen modules


@pytest.mark.parametrize("trainable", [Trainable.adapter, Trainable.language_and_adapter, Trainable.all])
def test_after_the_first_sync_only_what_is_trained_travels(
    cfg: Config, start: Callable[[], System], trainable: Trainable
) -> None:
    cfg.learner.trainable = trainable
    system = start()
    whole = sum(own.nbytes for own in policy_of(system).values()) / 1e6
    trained = sum(p.nbytes for p in learner(system).backend.model.parameters() if p.requires_grad) / 1e6
    assert system.syncer.sync(0)["sync/megabytes"] == whole
    for step in (1, 2):
        train(system, step)
        assert system.syncer.sync(step)["sync/megabytes"] == pytest.approx(trained)
        assert_equal(system)
    assert (trained < whole / 2) == (trainable is Trainable.adapter)


def test_a_snapshot_holds_the_trained_module_alone_and_says_on_what_it_builds(
    cfg: Config, start: Callable[[], System]
) -> None:
    cfg.learner.trainable = Trainable.adapter
    part = learner(start()).snapshot(5, base=4)
    assert part is not None and part.base == 4 and {module_of(name) for name in part.names} == {"adapter"}
    cfg.learner.trainable = Trainable.all
    whole = learner(start()).snapshot(5, base=4)
    assert whole is not None and whole.base is None  # everything can have changed


def test_a_member_that_holds_another_version_refuses_a_part(cfg: Config, start: Callable[[], System]) -> None:
    cfg.learner.trainable = Trainable.adapter
    system = start()
    for base, held in ((0, "none"), (2, "3")):
        part = learner(system).snapshot(4, base)
        with pytest.raises(SyncError, match=rf"changes version {base}, but this rollout worker holds {held};"):
            member(system).load_weights(part)  # type: ignore[arg-type]
        member(system).load_weights(learner(system).snapshot(3))  # type: ignore[arg-type]


def test_a_member_that_was_built_anew_gets_all_weights(cfg: Config, start: Callable[[], System]) -> None:
    cfg.learner.trainable = Trainable.adapter
    system = start()
    whole = system.syncer.sync(0)["sync/megabytes"]
    train(system)
    system.rollouts.rebuild(0)
    for version in (1, 2):  # and from then on
        metrics = system.syncer.sync(version)
        assert (metrics["sync/megabytes"], metrics["sync/retries"]) == (whole, 0.0)
    assert_equal(system)


def test_after_a_load_that_failed_midway_a_member_holds_nothing(cfg: Config, start: Callable[[], System]) -> None:
    cfg.learner.trainable = Trainable.adapter
    system = start()
    system.syncer.sync(0)
    part = learner(system).snapshot(1, base=0)
    assert part is not None
    cut = WeightSnapshot(1, part.names, part.shapes, part.dtypes, [p[:-4] for p in part.parts], 0)
    with pytest.raises(SyncError, match="the transfer is partial"):
        member(system).load_weights(cut)
    with pytest.raises(SyncError, match="holds none"):
        member(system).load_weights(part)


def test_a_frozen_weight_that_changed_all_the_same_is_seen_and_mended(cfg: Config, start: Callable[[], System]) -> None:
    cfg.learner.trainable = Trainable.adapter
    system = start()
    system.syncer.sync(0)
    with torch.no_grad():
        learner(system).backend.model.get_input_embeddings().weight.mul_(1.5)
    assert system.syncer.sync(1)["sync/retries"] == 1.0
    assert_equal(system)


# ---------------------------------------------------------------- LoRA


@pytest.mark.parametrize("sync", FACTOR_MODES)
@pytest.mark.parametrize("targets", [[], ["q_proj", "v_proj"]])
def test_with_lora_merged_weights_or_factors_travel_and_become_the_policy(
    cfg: Config, start: Callable[[], System], sync: LoraSync, targets: list[str]
) -> None:
    cfg.learner.lora = LoraConfig(rank=2, alpha=8, targets=targets, sync=sync)
    system = start()
    system.syncer.sync(0)
    named = dict(learner(system).backend.model.named_parameters())
    factors = sum(p.nbytes for p in named.values() if p.requires_grad)
    layers = {name.split(".lora_A.")[0].rpartition(".")[0] for name in named if ".lora_A." in name}
    joined = sum(
        p.nbytes
        for name, p in named.items()
        if plain_name(name) and name.replace(".base_layer.", ".").rpartition(".")[0].rpartition(".")[0] in layers
    )  # with q_proj and v_proj, k_proj and o_proj of the same layer
    for step in (1, 2):
        train(system, step)
        metrics = system.syncer.sync(step)
        expected = factors if sync is LoraSync.adapter else joined
        assert metrics["sync/megabytes"] == pytest.approx(expected / 1e6) and metrics["sync/retries"] == 0.0
        assert metrics["sync/logprob_gap"] < 1e-4
        assert_equal(system)


def broken(kind: str, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A factor as a faulty transfer might bring it."""
    if kind == "zero":
        return torch.zeros_like(tensor)
    if kind == "scale":
        return tensor * 1.5 if FACTORS[1] in name else tensor
    return tensor.roll(1, 0) if kind == "permuted" else tensor


@pytest.mark.parametrize("kind", ["zero", "scale", "permuted", "stale"])
def test_a_wrong_adapter_is_seen_and_all_weights_are_sent(
    cfg: Config, start: Callable[[], System], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    cfg.learner.lora = LoraConfig(rank=2, alpha=8, sync=LoraSync.adapter)
    system = start()
    system.syncer.sync(0)
    train(system)
    assert system.syncer.sync(1)["sync/retries"] == 0.0
    stale = learner(system).snapshot(2, base=1)
    assert stale is not None
    stale.parts = [part.copy() for part in stale.parts]
    train(system, 2)
    load = Sampler.load_weights

    def faulty(sampler: Sampler, snapshot: WeightSnapshot) -> float:
        if snapshot.base is None:
            return load(sampler, snapshot)
        if kind == "stale":
            return load(sampler, stale)
        tensors = [broken(kind, name, tensor) for name, tensor in parameters_of(snapshot)]
        parts = [tensor.contiguous().reshape(-1).view(torch.uint8).numpy() for tensor in tensors]
        return load(sampler, WeightSnapshot(2, snapshot.names, snapshot.shapes, snapshot.dtypes, parts, snapshot.base))

    monkeypatch.setattr(Sampler, "load_weights", faulty)
    metrics = system.syncer.sync(2)
    assert metrics["sync/retries"] == 1.0 and metrics["sync/logprob_gap"] < 1e-4
    assert_equal(system)


def test_vllms_own_transfer_takes_no_factors(cfg: Config) -> None:
    cfg.learner.lora = LoraConfig(rank=2, sync=LoraSync.adapter)
    cfg.rollout.device = cfg.learner.device = "cuda"
    for sync, refused in ((WeightSync.nccl, True), (WeightSync.shm, False)):
        cfg.rollout.weight_sync = sync
        assert any("learner.lora.sync" in keys for keys, _ in system_problems(cfg, with_learner=True)) == refused


def test_factors_of_another_policy_are_refused(cfg: Config, start: Callable[[], System]) -> None:
    cfg.learner.lora = LoraConfig(rank=2, sync=LoraSync.adapter)
    system = start()
    system.syncer.sync(0)
    part = learner(system).snapshot(1, base=0)
    assert part is not None
    fewer = WeightSnapshot(1, part.names[2:], part.shapes[2:], part.dtypes[2:], part.parts[2:], 0)
    with pytest.raises(SyncError, match="other factors"):
        member(system).load_weights(fewer)


def test_factors_travel_in_sixteen_bits_and_merge_as_the_learner_merges() -> None:
    """The receiver's merge against peft's own."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    model, lora = tiny_model()[0].bfloat16(), LoraConfig(rank=2, alpha=8, sync=LoraSync.adapter)
    add_lora(model, lora, {"language"})
    out, incoming = Outgoing(model, lora), Incoming(lora)

    def sent(version: int, base: int | None) -> WeightSnapshot:
        named = [(n, p) for n, p in model.named_parameters() if base is None or n in out.changing]
        return take_snapshot(out.sent(named), out.sent_layout(base is not None), version, base)

    first = dict(incoming.tensors(sent(1, None)))
    incoming.version = 1
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
    second = dict(incoming.tensors(sent(2, 1)))
    for part in model.modules():
        if isinstance(part, BaseTunerLayer):
            part.merge()
    peft = {plain_name(name): p for name, p in model.named_parameters()}
    assert len(second) < len(first) and {t.dtype for t in second.values()} == {torch.bfloat16}
    for name, tensor in second.items():
        torch.testing.assert_close(tensor, peft[name].detach(), rtol=2**-7, atol=2**-7)
    assert any(not torch.equal(tensor, first[name]) for name, tensor in second.items())


def test_an_architecture_whose_files_cut_layers_with_factors_is_told_so() -> None:
    joined = [("a.q.weight", torch.float32, (2, 2)), ("a.k.weight", torch.float32, (2, 2))]
    apart = [("a.qk.base_layer.weight", torch.float32, (4, 2)), ("a.qk.lora_A.default.weight", torch.float32, (1, 2))]
    with pytest.raises(ConfigError, match=r"learner\.lora\.sync=adapter: .*; use merged"):
        _require_same_names(apart, joined)
