"""The plan of a run: each formula against numbers worked out by hand, sizes against models that are there, activations
against what autograd really keeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skyrl.plan import memory, places, speed
from skyrl.plan.foretell import Models, foretell
from skyrl.plan.machines import CARDS, GIB, Machines, read_machines
from skyrl.plan.memory import Figure, gathered, layer_bytes, learner_states, total
from skyrl.plan.report import _ranges, as_json
from skyrl.plan.sizes import Shape, shape
from skyrl.records import ConfigError
from skyrl.settings import Config, LearnerConfig, Offload, Trainable, WeightSync
from skyrl.settings.run import checked
from skyrl.simulate.lengths import Lengths

SEVEN = 7_000_000_000


def seven(**changes: Any) -> Shape:
    """A language model of 7 billion parameters, all trained."""
    values: dict[str, Any] = {
        "name": "seven", "source": "by hand", "parameters": SEVEN, "trained": SEVEN,
        "by_part": {"vision": 0, "adapter": 0, "language": SEVEN}, "active": SEVEN, "hidden": 4096, "layers": 32,
        "queries": 4096, "keys": 1024, "inner": 14336, "vocabulary": 128_000, "lora": 0, "frozen": False,
    }  # fmt: skip
    return Shape(**values | changes)


def sharded(ranks: int, stage: int, **changes: Any) -> LearnerConfig:
    return LearnerConfig(num_workers=ranks, zero_stage=stage, device="cuda", **changes)


def parts(figures: list[Figure]) -> dict[str, float]:
    return {one.part: one.bytes for one in figures}


# ---------------------------------------------------------------- the learner's states


def test_zero_3_of_7b_on_8_gpus_in_bfloat16() -> None:
    """An eighth of everything: weights 2 x 7e9 = 14 GB, gradients and master weights in float32 28 GB each, AdamW's two
    moments 56 GB, the reference 14 GB."""
    kept, moved = learner_states(sharded(8, 3), seven(), "bfloat16", compares=True)
    assert moved == []
    assert parts(kept) == {
        "weights": 1.75e9, "gradients": 3.5e9, "master weights": 3.5e9, "AdamW": 7e9, "reference policy": 1.75e9,
        # a bucket of 5e8 and 1.05e9 parameters that are gathered at once, 2 bytes each
        "DeepSpeed's buffers": 3.1e9,
    }  # fmt: skip


def test_zero_3_in_float32_updates_the_weights_themselves() -> None:
    kept, _ = learner_states(sharded(8, 3), seven(), "float32", compares=False)
    found = parts(kept)
    assert "master weights" not in found and "reference policy" not in found
    assert (found["weights"], found["gradients"], found["AdamW"]) == (3.5e9, 3.5e9, 7e9)


@pytest.mark.parametrize(
    ("stage", "dtype", "expected"),
    [
        # one rank's bytes of weights, gradients (with the flat copy of stages 1 and 2), master weights, AdamW; 7e9 x …
        (0, "float32", (4, 4, 0, 8)),
        (1, "float32", (4, 4 + 1, 1, 2)),
        (1, "bfloat16", (2, 4 + 1, 1, 2)),
        (2, "bfloat16", (2, 1 + 1, 1, 2)),
        (3, "bfloat16", (0.5, 1, 1, 2)),
    ],
)
def test_what_each_stage_cuts_on_4_ranks(stage: int, dtype: str, expected: tuple[float, ...]) -> None:
    found = parts(learner_states(sharded(4, stage), seven(), dtype, compares=False)[0])
    names = ("weights", "gradients", "master weights", "AdamW")
    assert tuple(found.get(name, 0.0) / SEVEN for name in names) == pytest.approx(expected)


def test_offload_moves_to_the_host() -> None:
    kept, moved = learner_states(sharded(8, 3, offload=Offload.optimizer), seven(), "bfloat16", compares=True)
    assert {*parts(moved)} == {"gradients", "master weights", "AdamW"} and total(moved) == pytest.approx(14e9)
    assert parts(kept)["weights"] == 1.75e9
    kept, moved = learner_states(sharded(8, 3, offload=Offload.all), seven(), "bfloat16", compares=True)
    assert "weights" not in parts(kept) and parts(moved)["weights"] == 1.75e9


def test_lora_trains_the_factors_alone() -> None:
    """7e9 frozen, 40 million in factors: no gradient of anything else."""
    lora = seven(trained=40_000_000, lora=16, frozen=True)
    found = parts(learner_states(sharded(1, 0), lora, "float32", compares=False)[0])
    assert found == {"weights": 4 * 7.04e9, "gradients": 0.16e9, "AdamW": 0.32e9}


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 64), st.integers(0, 3), st.sampled_from(["float32", "bfloat16"]), st.booleans())
def test_more_ranks_never_need_more_each(ranks: int, stage: int, dtype: str, compares: bool) -> None:
    one, two = (total(learner_states(sharded(n, stage), seven(), dtype, compares)[0]) for n in (ranks, 2 * ranks))
    assert two <= one


# ---------------------------------------------------------------- activations

HIDDEN, INNER, LAYERS, HEADS, KEYS, HEAD = 128, 352, 3, 4, 2, 32


def kept_bytes(dtype: str, trained: str, shared: bool, tokens: int) -> float:
    """Bytes that autograd keeps for a layer and token, parameters left out: the real model, one forward pass."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from skyrl.policy.attention import share_prompts
    from skyrl.policy.encode import EncodedBatch
    from skyrl.policy.lora import add_lora
    from skyrl.policy.module import PolicyModule
    from skyrl.settings import LoraConfig

    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=KEYS, vocab_size=300, max_position_embeddings=8192, tie_word_embeddings=False,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).to(getattr(torch, dtype))
    if trained == "frozen":  # but for the embeddings, as pictures' features are trained by an adapter
        model.requires_grad_(False)
        model.model.embed_tokens.requires_grad_(True)
    elif trained == "lora":
        add_lora(model, LoraConfig(rank=4), {"language"})
    every, answers = torch.arange(tokens), torch.arange(tokens)[None] >= tokens // 2
    if shared:
        share_prompts(model)
        rows = EncodedBatch(
            torch.randint(0, 300, (1, tokens)),
            torch.full((1, 1, 1, tokens), tokens),
            answers,
            {},
            every[None],
            every - 1,
        )
    else:
        rows = EncodedBatch(torch.randint(0, 300, (1, tokens)), torch.ones(1, tokens, dtype=torch.int64), answers, {})
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}
    alive: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        PolicyModule(model, ())(rows)
    return sum(kept.values()) / tokens / LAYERS


@pytest.mark.parametrize("trained", ["all", "frozen", "lora"])
@pytest.mark.parametrize(("dtype", "w"), [("float32", 4), ("bfloat16", 2)])
@pytest.mark.parametrize(("shared", "tokens"), [(False, 400), (True, 400), (True, 1200)])
def test_activations_are_those_that_autograd_keeps(trained: str, dtype: str, w: int, shared: bool, tokens: int) -> None:
    torch.set_num_threads(1)
    small = seven(
        hidden=HIDDEN, inner=INNER, layers=LAYERS, queries=HEADS * HEAD, keys=KEYS * HEAD, lora=4 * (trained == "lora"),
        frozen=trained != "all",
    )  # fmt: skip
    expected = layer_bytes(small, w, tokens, shared, gpu=False)
    assert kept_bytes(dtype, trained, shared, tokens) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("path", [1, 100, 128, 129, 500, 2048, 9000])
def test_gathered_keys_are_those_of_the_attention(path: int) -> None:
    from skyrl.policy.attention import _cut

    _, queries, keys, _ = _cut(torch.full((path,), path), None)
    entries = sum(q * k for q, k in zip(queries, keys, strict=True))
    assert gathered(path) == (sum(keys) / path, entries / path)


def test_a_pair_may_be_larger_than_a_micro_batch() -> None:
    cfg = Config()
    cfg.rollout.max_prompt_tokens, cfg.rollout.max_new_tokens, cfg.learner.micro_batch_tokens = 100, 1000, 500
    assert memory.micro_batch(cfg) == 2100  # one prompt, two answers
    cfg.learner.shared_rows = False
    assert memory.micro_batch(cfg) == 2200
    cfg.algorithm.mpo.weight = 0.0
    assert memory.micro_batch(cfg) == 1100
    cfg.learner.micro_batch_tokens = 8192
    assert memory.micro_batch(cfg) == 8192


# ---------------------------------------------------------------- engines


def test_the_cache_is_what_the_weights_leave() -> None:
    """14 GB of weights on 2 GPUs of 80 GiB; a token is 2 x 32 layers x 1024 x 2 bytes = 131,072, halved by 2 GPUs."""
    cfg = on_gpus(Config())
    cfg.rollout.tensor_parallel_size, cfg.rollout.gpu_memory_utilization = 2, 0.9
    bill, cache = memory.rollout(cfg, seven(), CARDS["H100-SXM"])
    found = parts(bill.device)
    assert found["weights"] == 7e9 and memory.kv_bytes(seven(), 2, 2) == 65_536
    taken = total([one for one in bill.device if one.part != "CUDA"])
    assert taken == pytest.approx(0.9 * 80 * GIB)  # what vLLM takes, whatever it needs
    assert cache.tokens == pytest.approx(found["key-value cache"] / 65_536)
    cfg.rollout.gpu_memory_utilization = 0.05
    assert memory.rollout(cfg, seven(), CARDS["H100-SXM"])[1].bytes < 0


def on_gpus(cfg: Config) -> Config:
    """Everything on GPUs, in bfloat16."""
    cfg.rollout.device = cfg.learner.device = "cuda"
    cfg.model.policy = ""  # its shape is given
    cfg.rollout.weight_sync, cfg.model.dtype = WeightSync.nccl, "bfloat16"
    cfg.rollout.max_prompt_tokens, cfg.rollout.max_new_tokens = 1024, 1024
    cfg.rollout.prompts_per_step, cfg.rollout.num_workers = 8, 2
    cfg.learner.num_workers, cfg.learner.zero_stage = 4, 3
    cfg.model.reward, cfg.reward.model_weight = "http://judge", 0.5
    checked(cfg.model_dump(), with_files=False)
    return cfg


# ---------------------------------------------------------------- sizes


def test_stated_models_have_the_published_sizes() -> None:
    """38.4 billion, of which the adapter's 92 million: 12,800 x 5,120 + 5,120 x 5,120, with biases and a norm; and 8.29
    billion of Skywork-VL-Reward-7B."""
    policy = shape("", "model.policy", "r1v2_38b", LearnerConfig(trainable=Trainable.adapter))
    assert policy.parameters == pytest.approx(38.4e9, rel=0.002) and policy.frozen
    adapter = 12_800 * 5_120 + 5_120 * 5_120 + 2 * 5_120 + 2 * 12_800
    assert policy.trained == policy.by_part["adapter"] == adapter
    assert (policy.layers, policy.queries, policy.keys) == (64, 5120, 1024)
    assert shape("", "model.reward", "r1v2_38b_reward", None).parameters == pytest.approx(8.29e9, rel=0.001)


def test_a_folder_needs_no_weights_and_is_counted_as_its_model(tmp_path: Path) -> None:
    from tiny_models import random_model

    model = random_model()
    model.config.save_pretrained(tmp_path)
    found = shape(str(tmp_path), "model.policy", "", LearnerConfig())
    assert found.parameters == found.trained == sum(p.numel() for p in model.parameters())
    assert sum(found.by_part.values()) == found.parameters and all(found.by_part.values())
    factors = shape(str(tmp_path), "model.policy", "", LearnerConfig(lora={"rank": 4}))  # type: ignore[arg-type]
    from skyrl.policy.lora import add_lora
    from skyrl.policy.module import TRAINED
    from skyrl.settings import LoraConfig

    add_lora(model, LoraConfig(rank=4), TRAINED[Trainable.all])
    assert factors.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert factors.parameters == found.parameters


def test_a_path_that_leads_nowhere_is_no_name_of_the_hub() -> None:
    with pytest.raises(ConfigError, match=r"model\.policy=/nowhere: no such folder exists; allowed: a folder"):
        shape("/nowhere", "model.policy", "", None)


def test_experts_that_are_not_chosen_do_not_work(tmp_path: Path) -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=8,
        num_experts_per_tok=2, moe_intermediate_size=16, intermediate_size=64, vocab_size=100,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    found = shape(str(tmp_path), "model.policy", "", LearnerConfig())
    whole = sum(p.numel() for p in Qwen3MoeForCausalLM(config).parameters())
    experts = 2 * 8 * 3 * 32 * 16
    assert found.parameters == whole and found.active == whole - experts * 3 // 4 and found.inner == 2 * 16


@pytest.mark.parametrize(
    ("files", "message"),
    [({}, "has no config.json"), ({"config.json": "{"}, "can't be read"), ({"config.json": "{}"}, "can't be read")],
)
def test_a_folder_that_is_no_model_is_named(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        shape(str(tmp_path), "model.policy", "", None)


def test_an_unknown_model_lists_those_that_are_known() -> None:
    with pytest.raises(ConfigError, match=r"model\.policy is empty.*name=r1v2_38b, r1v2_38b_reward"):
        shape("", "model.policy", "mine", None)


# ---------------------------------------------------------------- clusters


def test_a_short_form_and_a_file_say_the_same(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("nodes: 5\ngpus: 8\ngpu: H200\n")
    assert read_machines(str(file)) == read_machines("5x8xH200") == Machines(nodes=5, gpus=8, gpu="H200")
    assert read_machines("5x8xH200").card == CARDS["H200"]
    own = "gpus: 2\ngpu: mine\ngpu_memory_gib: 10\ngpu_tflops: 1\ngpu_bandwidth: 2\ngpu_link: 3\n"
    file.write_text(own)
    assert read_machines(str(file)).card == (10, 1, 2, 3, "the cluster's description")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("8xH100", r"must be nodes x GPUs x card.*cards: A100-40GB, "),
        ("1x8xH101", r"gpu=H101 is not known; allowed: A100-40GB, .*gpu_tflops"),
        ("nodes: 0", r"nodes: Input should be greater than or equal to 1"),
        ("gpu_count: 3", r"gpu_count: Extra inputs are not permitted.*allowed: nodes, gpus, gpu, "),
        ("[1, 2]", r"must hold fields"),
        ("a: [", r"no YAML"),
        ("nodes: 2", r"without GPUs, cpus and memory_gib"),
        ("gpus: 8", r"gpu= is not known"),
    ],
)
def test_a_wrong_cluster_is_named(tmp_path: Path, text: str, message: str) -> None:
    given = text
    if "x" not in text or " " in text:
        file = tmp_path / "cluster.yaml"
        file.write_text(text)
        given = str(file)
    with pytest.raises(ConfigError, match=message):
        read_machines(given)


# ---------------------------------------------------------------- places


def test_members_are_spread_and_engines_are_not_cut() -> None:
    """2 engines of 4 GPUs, 8 ranks, nodes of 8: one engine and 4 ranks each."""
    cfg = on_gpus(Config())
    cfg.rollout.tensor_parallel_size, cfg.learner.num_workers = 4, 8
    nodes, left = places.place(cfg, Machines(nodes=2, gpus=8, gpu="H100-SXM"))
    assert left == [] and [node.gpus for node in nodes] == [0, 0]
    kinds = [sorted(member.rpartition("-")[0] for member in node.members if "reward" not in member) for node in nodes]
    assert kinds == [["buffer", *["learner"] * 4, "rollout"], [*["learner"] * 4, "rollout"]]


def test_an_engine_that_no_node_holds_finds_no_place() -> None:
    cfg = on_gpus(Config())
    cfg.rollout.tensor_parallel_size = 4
    _, left = places.place(cfg, Machines(nodes=8, gpus=2, gpu="H100-SXM"))
    assert [need.member for need in left] == ["rollout-0", "rollout-1"]


def test_with_ipc_a_rank_shares_its_engines_gpu() -> None:
    cfg = on_gpus(Config())
    cfg.rollout.weight_sync, cfg.rollout.gpu_memory_utilization = WeightSync.ipc, 0.5
    cfg.learner.num_workers = cfg.rollout.num_workers = 2
    nodes, left = places.place(cfg, Machines(nodes=1, gpus=2, gpu="H100-SXM"))
    assert (
        left == [] and nodes[0].gpus == 0 and nodes[0].members[:2] == ["rollout-0 + learner-0", "rollout-1 + learner-1"]
    )


# ---------------------------------------------------------------- speed


def always(tokens: int, prompt: int) -> Lengths:
    return Lengths(about="always the same", quantiles=[tokens, tokens], prompt_tokens=prompt)


def test_operations_of_a_token() -> None:
    """All trained: 6 a weight; with checkpointing a forward pass more; an answer of each 8 chosen, one rejected: 2 of 8
    are compared with the reference. Frozen but for an adapter: no gradient of the weights."""
    cfg = on_gpus(Config())
    cfg.algorithm.mpo.weight = 0.0
    assert speed.token_passes(cfg, seven()) == (6 * SEVEN, 2)
    cfg.learner.gradient_checkpointing = True
    assert speed.token_passes(cfg, seven()) == (8 * SEVEN, 3)
    cfg.algorithm.mpo.weight = 1.0
    assert speed.token_passes(cfg, seven()) == (8.5 * SEVEN, 4)
    cfg.controller.lag = 1
    assert speed.token_passes(cfg, seven()) == (9 * SEVEN, 5)
    frozen = seven(trained=0, frozen=True)
    assert speed.token_passes(cfg, frozen) == (7 * SEVEN, 5)


def test_a_step_by_hand() -> None:
    """2 engines, each 4 prompts x 8 answers of 1,000 tokens on one card of 1 TB/s and 100 TFLOPS; a learner of 4."""
    cfg = on_gpus(Config())
    cfg.algorithm.mpo.weight, cfg.learner.shared_rows, cfg.learner.zero_stage = 0.0, False, 2
    machines = Machines(
        nodes=1, gpus=8, gpu="mine", gpu_memory_gib=1000, gpu_tflops=100, gpu_bandwidth=1000, gpu_link=100
    )
    found = foretell(cfg, machines, always(1000, 24), models=Models(seven(), None, False))
    assert found.problems == [] and found.step is not None
    weights, token = 14e9 / 0.8e12, 131_072 / 0.8e12
    one = 2 * SEVEN / 60e12  # arithmetic of a sequence
    decoding = 1000 * (2e-3 + weights + 32 * one) + token * 32 * (1000 * 24 + 1000 * 1000 / 2)
    reading = 4 * 24 / (40e12 / (2 * SEVEN))
    assert found.step.laps["time/rollout"] == pytest.approx(decoding + reading, rel=1e-3)
    attention = SEVEN / (4096 * 32)
    training = 64 * 1024 * (1 + 1024 / attention) * 6 * SEVEN / 40e12 / 4 + 1
    assert found.step.laps["time/learner"] == pytest.approx(training, rel=1e-3)
    assert found.step.laps["time/sync"] == pytest.approx(14e9 / 100e9 + 2, rel=1e-3)
    assert found.step.mean_step == pytest.approx(sum(found.step.laps.values()), rel=1e-3)


def test_moving_the_weights_may_take_longer_than_computing() -> None:
    """ZeRO-3 over two nodes at 8 Gbit/s: 1 GB a second; each micro-batch reads 14 GB twice."""
    cfg = on_gpus(Config())
    cfg.algorithm.mpo.weight, cfg.learner.shared_rows = 0.0, False
    slow = Machines(nodes=2, gpus=3, gpu="H100-SXM", network_gbit=8)
    _, cache = memory.rollout(cfg, seven(), slow.card)
    costs, _ = speed.costs_on(cfg, seven(), None, slow, cache, always(1000, 24))
    assert costs.learner.tokens_per_second == pytest.approx(cfg.learner.micro_batch_tokens / 28)


# ---------------------------------------------------------------- the whole


def test_what_does_not_fit_is_named_with_what_helps() -> None:
    """7 billion parameters at stage 0 need 14 + 28 + … GB on each GPU of 24 GiB; cut by stage 3 over 8 they fit."""
    cfg = on_gpus(Config())
    cfg.learner.num_workers, cfg.learner.zero_stage, cfg.learner.micro_batch_tokens = 8, 2, 2048
    cfg.learner.gradient_checkpointing, cfg.algorithm.mpo.weight = True, 0.0
    models = Models(seven(), None, False)
    machines = Machines(nodes=2, gpus=8, gpu="A100-40GB")
    cfg.rollout.num_workers = 4
    assert foretell(cfg, machines, always(100, 24), models=models).problems == []
    small = Machines(nodes=2, gpus=8, gpu="L4")
    found = foretell(cfg, small, always(100, 24), models=models)
    assert any(problem.startswith("learner: ") for problem in found.problems) and found.step is None
    assert any(one == "learner.zero_stage=3: then it fits" for one in found.advice)
    few = foretell(cfg, Machines(nodes=1, gpus=8, gpu="A100-40GB"), always(100, 24), models=models)
    assert "4 members find no place, the first is learner-4" in few.problems[0]
    # 4 ranks more are too many, and with half of them each holds too much: no single change will do.
    (together,) = few.advice
    assert together.endswith(": together, then it fits") and "num_workers=" in together
    for word in together.partition(":")[0].split():
        key, value = word.split("=")
        setattr(getattr(cfg, key.split(".")[0]), key.split(".")[1], type(_value(cfg, key))(value))
    assert foretell(cfg, Machines(nodes=1, gpus=8, gpu="A100-40GB"), always(100, 24), models=models).problems == []


def _value(cfg: Config, key: str) -> Any:
    return getattr(getattr(cfg, key.split(".")[0]), key.split(".")[1])


def test_a_machine_that_is_far_too_small_has_no_advice_but_the_nearest() -> None:
    cfg = on_gpus(Config())
    found = foretell(cfg, Machines(nodes=1, gpus=1, gpu="L4"), always(100, 24), models=Models(seven(), None, False))
    assert found.advice[0].startswith("no change that was tried makes it fit; nearest: ")


def test_host_memory_of_a_node_is_looked_at() -> None:
    cfg = on_gpus(Config())
    cfg.learner.zero_stage = 2  # each rank loads the whole model first
    models = Models(seven(), None, False)
    found = foretell(cfg, Machines(nodes=1, gpus=8, gpu="H100-SXM", memory_gib=40), always(100, 24), models=models)
    assert any("GiB of host memory, it has 40" in problem for problem in found.problems)


def test_without_gpus_memory_is_told_and_time_is_not() -> None:
    cfg = Config()
    cfg.model.reward, cfg.reward.model_weight = "http://judge", 0.5
    small = seven(parameters=10**6, trained=10**6, hidden=64, layers=2, queries=64, keys=64, inner=128, vocabulary=300)
    machines = Machines(nodes=1, cpus=8, memory_gib=16)
    found = foretell(cfg, machines, always(50, 24), models=Models(small, None, True))
    assert found.problems == [] and found.step is None and found.bills["learner"].device == []


def test_a_run_on_cpus_gets_no_time_of_the_gpus_beside_it() -> None:
    cfg = Config()
    cfg.model.reward, cfg.reward.model_weight = "http://judge", 0.5
    small = seven(parameters=10**6, trained=10**6, hidden=64, layers=2, queries=64, keys=64, inner=128, vocabulary=300)
    found = foretell(cfg, Machines(nodes=1, gpus=1, gpu="L4"), always(50, 24), models=Models(small, None, True))
    assert found.problems == [] and found.step is None


def test_nodes_that_are_alike_are_one_line() -> None:
    assert [_ranges(numbers) for numbers in ([0], [0, 1], [0, 2, 3, 4, 7])] == ["0", "0-1", "0, 2-4, 7"]


def test_the_command_writes_what_it_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from skyrl.plan import __main__ as command

    monkeypatch.setenv("COLUMNS", "200")
    words = ["plan", "experiment=r1v2_38b", "cluster=5x8xH100-SXM", "--json", str(tmp_path / "plan.json")]
    monkeypatch.setattr("sys.argv", words)
    command._work()
    shown, written = capsys.readouterr().out, json.loads((tmp_path / "plan.json").read_text())
    assert "everything fits" in shown and "38,392,158,592" in shown
    assert {one["source"] for member in written["members"].values() for one in member["device"]} >= {
        "computed",
        "assumed",
    }
    assert sum(len(node) for node in written["nodes"]) == 4 + 8 + 16 + 1
    assert f"{written['step']['seconds']:.1f}" in shown
    for words, message in (
        (["experiment=r1v2_38b"], "it is there 0 times"),
        (["cluster=1x8xH100-SXM", "--what"], "--what"),
        (["cluster=1x8xH100-SXM", "learner.zero=3"], "there is no such setting"),
    ):
        monkeypatch.setattr("sys.argv", ["plan", *words])
        with pytest.raises(ConfigError, match=message):
            command._work()


def test_a_run_that_does_not_fit_ends_with_1(monkeypatch: pytest.MonkeyPatch) -> None:
    from skyrl.plan import __main__ as command

    monkeypatch.setattr("sys.argv", ["plan", "experiment=r1v2_38b", "cluster=1x8xH100-SXM"])
    with pytest.raises(SystemExit, match="1"):
        command._work()


def test_numbers_in_the_json_are_plain() -> None:
    cfg = on_gpus(Config())
    cfg.learner.gradient_checkpointing = True
    machines = Machines(nodes=2, gpus=8, gpu="H100-SXM")
    found = foretell(cfg, machines, always(100, 24), models=Models(seven(), None, False))
    assert json.loads(json.dumps(as_json(cfg, machines, found)))["step"]["seconds"] > 0
