"""The sampler over vLLM on CPU, in a process of its own, against the second engine and the learner's forward pass."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from skyrl.policy.lora import add_lora
from skyrl.policy.module import PolicyModule
from skyrl.records import DataError, RolloutRequest, Sample, SampleGroup, SyncError, WeightSnapshot
from skyrl.rollout.engine import EngineRequest, rollout_environment
from skyrl.rollout.sampler import Sampler
from skyrl.settings import Config
from skyrl.settings.system import LoraConfig, LoraSync
from skyrl.sync.incoming import Incoming
from skyrl.sync.outgoing import Outgoing
from skyrl.sync.snapshot import layout_of, take_snapshot
from tests.plain_engine import log_distribution
from tests.tiny_models import noise, processor, prompt, random_model

pytestmark = pytest.mark.integration

TOKENS = processor().tokenizer
ENDS = {int(TOKENS.eos_token_id), TOKENS.convert_tokens_to_ids("<global-img>"), *range(200, 240)}
"""Stop tokens of the policy: its end of sequence, another special token, and ordinary ones that it really samples."""
PROMPTS = [
    prompt("p/0", noise(0)),
    prompt("p/1", question="How many digits are there?"),
    prompt("p/2", noise(2), noise(3), question="What is the largest digit?"),
    prompt("p/long", *[noise(i) for i in range(12)]),
]
_BUILT: list[Sampler] = []
"""In the sampler's process: the one there is."""


def build(cfg: Config, folder: str) -> None:
    _BUILT.append(Sampler(cfg, folder))
    _BUILT[0].datasets = {"train": PROMPTS, "eval": PROMPTS[:3]}


def on_sampler(function: Callable[..., Any], *args: Any) -> Any:
    return function(_BUILT[0], *args)


@pytest.fixture(scope="module")
def cfg() -> Config:
    made = Config()
    made.rollout.max_prompt_tokens, made.rollout.max_new_tokens, made.rollout.temperature = 64, 24, 0.8
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    made = tmp_path_factory.mktemp("policy")
    random_model(scale=3.0).save_pretrained(made)
    processor().save_pretrained(made)
    (made / "generation_config.json").write_text(json.dumps({"eos_token_id": sorted(ENDS)}))
    return str(made)


@pytest.fixture(scope="module")
def ask(cfg: Config, folder: str) -> Iterator[Callable[..., Any]]:
    """Calls a function of :class:`Sampler` in the other process. vLLM wants its environment before it is imported."""
    old = dict(os.environ)
    os.environ.update(rollout_environment(cfg.rollout, 1))
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), build, (cfg, folder)) as pool:
            yield lambda function, *args: pool.submit(on_sampler, function, *args).result(timeout=300)
    finally:
        os.environ.clear()
        os.environ.update(old)


@pytest.fixture(scope="module")
def plain(cfg: Config, folder: str) -> Sampler:
    """The same policy over the second engine, here."""
    other = cfg.model_copy(deep=True)
    other.rollout.engine = "tests.plain_engine:PlainEngine"
    made = Sampler(other, folder)
    made.datasets = {"train": PROMPTS, "eval": PROMPTS[:3]}
    return made


def request(*rows: int, n: int = 8, greedy: bool = False, blind: bool = False, step: int = 1) -> RolloutRequest:
    return RolloutRequest("train", rows, step, n, greedy, 3, blind)


def samples(groups: list[SampleGroup]) -> list[Sample]:
    return [sample for group in groups for sample in group.samples]


def gap(plain: Sampler, groups: list[SampleGroup]) -> float:
    """Largest difference between recorded log-probabilities and the learner's forward pass."""
    model = plain.engine.model  # type: ignore[attr-defined]
    module = PolicyModule(model, plain.encoder.forbidden_token_ids(), plain.cfg.rollout.temperature)
    rows = [(group.prompt, group.prompt_ids, sample.token_ids) for group in groups for sample in group.samples]
    with torch.no_grad():
        own = module(plain.encoder.collate(rows))[0].numpy()
    return float(np.abs(own - np.concatenate([sample.logprobs for sample in samples(groups)])).max())


def test_vllm_draws_from_the_learners_distribution(ask: Callable[..., Any], plain: Sampler) -> None:
    groups = ask(Sampler.generate, request(2, 0, 1))
    assert [group.prompt.id for group in groups] == ["p/2", "p/0", "p/1"]
    assert all(np.array_equal(group.prompt_ids, plain.encoder.encode(group.prompt)[0]) for group in groups)
    assert gap(plain, groups) < 1e-4
    assert len({tuple(sample.token_ids.tolist()) for sample in samples(groups)}) > 20
    again = ask(Sampler.generate, request(1, 2))
    assert [s.token_ids.tolist() for s in samples(again)] == [
        s.token_ids.tolist() for name in ("p/1", "p/2") for g in groups if g.prompt.id == name for s in g.samples
    ]


def test_vllm_stops_when_there_is_enough_and_goes_on_where_it_was(ask: Callable[..., Any], plain: Sampler) -> None:
    for step in range(5, 25):
        asked = request(2, 0, 1, n=2, step=step)
        groups = ask(Sampler.generate, asked)
        longest = sorted(max(len(sample.token_ids) for sample in group.samples) for group in groups)
        if longest[0] < longest[1]:  # they advance together, and one group is complete before the others
            break
    whole = {group.prompt.id: [s.token_ids.tolist() for s in group.samples] for group in groups}
    first, left = ask(Sampler.generate_enough, asked, [], 1, 1)
    assert [s.token_ids.tolist() for s in samples(first)] == whole[first[0].prompt.id]
    assert len(left) == 2 and any(one.open for one in left)
    for one in left:
        for sample, ids in zip(one.samples, whole[one.prompt_id], strict=True):
            assert sample.token_ids.tolist() == ids[: len(sample.token_ids)]
            assert (sample.index in one.open) == (len(sample.token_ids) < len(ids))
    _, same = ask(Sampler.generate_enough, asked, [], 1, 1)
    assert [[s.token_ids.tolist() for s in one.samples] for one in same] == [
        [s.token_ids.tolist() for s in one.samples] for one in left
    ]
    ask(forget)  # nothing is running any more
    second, rest = ask(Sampler.generate_enough, request(step=step + 1), left, 2, 1)
    assert not rest and [group.prompt.id for group in second] == [one.prompt_id for one in left]
    for one, group in zip(left, second, strict=True):
        for before, sample in zip(one.samples, group.samples, strict=True):
            assert sample.token_ids[: len(before.token_ids)].tolist() == before.token_ids.tolist()
            assert sample.truncated == (len(sample.token_ids) == 24 and sample.token_ids[-1] not in ENDS)
    assert gap(plain, [*first, *second]) < 1e-4
    assert all(np.array_equal(group.prompt_ids, plain.encoder.encode(group.prompt)[0]) for group in second)


def forget(sampler: Sampler) -> None:
    sampler.engine.forget_caches()  # type: ignore[attr-defined]


def against_vllms_own_loop(made: Sampler) -> int:
    """The engine takes its answers from vLLM's core; they must be those of ``LLM.generate``, to the bit and letter."""
    from skyrl.rollout.vllm_engine import _input, _params

    engine: Any = made.engine
    asked = [made._asked(prompt, request(n=8), 24, 1.0) for prompt in PROMPTS[:3]]
    asked[1].begun = tuple([30 + place] * (place + 1) for place in range(8))
    engine.forget_caches()
    ours = engine.generate(asked)
    singly = [one for whole in asked for one in (whole.singly if whole.begun else [whole])]
    engine.forget_caches()
    params = list(map(_params, singly))
    for one in params:
        one.detokenize = True
    outputs = engine.llm.generate(list(map(_input, singly)), params, use_tqdm=False)
    theirs = [one for output in outputs for one in sorted(output.outputs, key=lambda one: one.index)]
    prompts = [output.prompt_token_ids for output in outputs for _ in output.outputs]
    begun = [() for _ in range(8)] + list(asked[1].begun) + [() for _ in range(8)]
    for a, b, ids, own in zip([one for group in ours for one in group], theirs, prompts, begun, strict=True):
        assert [*a.prompt_ids, *own] == list(ids) and a.token_ids.tolist() == list(b.token_ids)
        assert a.logprobs.tolist() == np.asarray(b.logprobs.logprobs, np.float32).tolist()
        assert a.text.endswith(b.text) and (own or a.text == b.text) and a.truncated == (b.finish_reason == "length")
    engine.forget_caches()  # nothing is running any more
    assert not engine.llm.llm_engine.has_unfinished_requests()
    left = engine.llm.llm_engine.output_processor
    assert not left.parent_requests and not left.external_req_ids
    return len(theirs)


def test_what_the_core_says_is_what_vllm_would_have_returned(ask: Callable[..., Any]) -> None:
    assert ask(against_vllms_own_loop) == 24


def test_both_engines_find_the_same_likeliest_answers(ask: Callable[..., Any], plain: Sampler) -> None:
    for asked in (request(0, 1, 2, n=1, greedy=True), request(0, 1, 2, n=1, greedy=True, blind=True)):
        ours, theirs = ask(Sampler.generate, asked), plain.generate(asked)
        assert [group.prompt.key for group in ours] == [group.prompt.key for group in theirs]
        for a, b in zip(samples(ours), samples(theirs), strict=True):
            assert (a.token_ids.tolist(), a.truncated) == (b.token_ids.tolist(), b.truncated)
            assert a.text == b.text or "�" in b.text  # vLLM leaves out a character that the end cuts in two
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)


def test_every_stop_token_ends_an_answer_belongs_to_it_and_is_not_its_text(
    ask: Callable[..., Any], plain: Sampler
) -> None:
    made = samples(ask(Sampler.generate, request(0, 1, 2, n=16, step=2)))
    stopped = [sample for sample in made if not sample.truncated]
    assert len(stopped) > 16 and {int(sample.token_ids[-1]) for sample in stopped} - {int(TOKENS.eos_token_id)}
    for sample in made:
        ids = sample.token_ids.tolist()
        assert not ENDS & set(ids[:-1]) and (ids[-1] in ENDS) == (not sample.truncated)
        assert (len(ids) == 24) >= sample.truncated and len(sample.logprobs) == len(ids)
        spoken = TOKENS.decode(ids if sample.truncated else ids[:-1])
        assert sample.text == spoken or "�" in spoken
        assert not set(ids) & set(plain.encoder.forbidden_token_ids())


def narrow(made: Sampler, top_p: float) -> list[SampleGroup]:
    made.cfg.rollout.top_p, old = top_p, made.cfg.rollout.top_p
    groups = made.generate(request(0, 1, n=4))
    made.cfg.rollout.top_p = old
    return groups


def test_with_top_p_the_cut_distribution_is_recorded(ask: Callable[..., Any], plain: Sampler) -> None:
    groups, model = ask(narrow, 0.6), plain.engine.model  # type: ignore[attr-defined]
    asked = EngineRequest([], (), 1, 0.8, 0.6, 1, None, (), tuple(plain.encoder.forbidden_token_ids()))
    for group in groups:
        for sample in group.samples:
            batch = plain.encoder.collate([(group.prompt, group.prompt_ids, sample.token_ids)])
            with torch.no_grad():
                logits = model(input_ids=batch.input_ids, **batch.pictures).logits[0]
            expected = log_distribution(logits[len(group.prompt_ids) - 1 : -1], asked).numpy()
            drawn = expected[np.arange(len(sample.token_ids)), sample.token_ids]
            np.testing.assert_allclose(sample.logprobs, drawn, atol=1e-4)
    assert gap(plain, groups) > 1e-2  # the learner's has the whole tail


def refused(made: Sampler) -> str:
    with pytest.raises(DataError) as error:
        made.generate(request(0, 3, 1))
    return str(error.value)


def test_a_prompt_that_pictures_make_too_long_is_named_and_the_others_go_on(
    ask: Callable[..., Any], cfg: Config
) -> None:
    length = len(PROMPTS[3].images) * 7  # placeholders alone
    assert length > cfg.rollout.max_prompt_tokens
    assert ask(refused).startswith("prompt 'p/long' has ")
    assert len(ask(Sampler.generate, request(0, 1))) == 2


def test_new_weights_reach_embedding_head_and_caches(ask: Callable[..., Any], plain: Sampler) -> None:
    before = ask(Sampler.generate, request(0, 1, 2))
    parameters = list(random_model(seed=1, scale=3.0).named_parameters())
    assert "lm_head.weight" not in dict(parameters)  # the head is the embedding
    snapshot = take_snapshot(parameters, layout_of(parameters), version=7)
    for made in (plain.load_weights(snapshot), ask(Sampler.load_weights, snapshot)):
        assert made == snapshot.megabytes > 0
    after = ask(Sampler.generate, request(0, 1, 2))
    assert gap(plain, after) < 1e-4 < 0.1 < gap(plain, before)
    assert {sample.policy_version for sample in samples(after)} == {7}
    assert gap(plain, ask(Sampler.probe)) < 1e-4


def part(base: int | None, version: int, *wanted: str, seed: int = 2) -> WeightSnapshot:
    """Some of another random policy's parameters."""
    parameters = [(n, p) for n, p in random_model(seed, scale=3.0).named_parameters() if any(w in n for w in wanted)]
    return take_snapshot(parameters, layout_of(parameters), version, base)


def why_not(made: Sampler, snapshot: WeightSnapshot) -> str:
    with pytest.raises(SyncError) as error:
        made.load_weights(snapshot)
    return str(error.value)


@pytest.mark.parametrize("wanted", [("text_model.layers.1.self_attn",), ("connector", "norm"), ("embed_tokens",)])
def test_a_part_of_the_weights_takes_its_place_among_the_others(
    ask: Callable[..., Any], plain: Sampler, wanted: tuple[str, ...]
) -> None:
    for made in (part(None, 7, "", seed=1), part(7, 8, *wanted)):
        plain.load_weights(made)
        ask(Sampler.load_weights, made)
    after = ask(Sampler.generate, request(0, 1, 2))
    assert gap(plain, after) < 1e-4 and {sample.policy_version for sample in samples(after)} == {8}
    plain.load_weights(part(None, 7, "", seed=1))
    assert gap(plain, after) > 1e-2  # the part made a difference


def test_a_layer_that_gets_only_a_part_is_refused_and_the_engine_goes_on(
    ask: Callable[..., Any], plain: Sampler
) -> None:
    for made in (plain.load_weights, lambda snapshot: ask(Sampler.load_weights, snapshot)):
        made(part(None, 7, "", seed=1))
    said = ask(why_not, part(7, 8, "text_model.layers.1.self_attn.q_proj", "text_model.layers.0.mlp.up_proj"))
    assert "snapshot 8 has " in said and ("qkv_proj" in said or "gate_up_proj" in said) and "come together" in said
    assert gap(plain, ask(Sampler.generate, request(0, 1, 2))) < 1e-4  # with what it had
    assert ask(why_not, part(7, 8, "connector")).endswith("this rollout worker holds none; it needs all weights")
    for made in (plain.load_weights, lambda snapshot: ask(Sampler.load_weights, snapshot)):
        made(part(None, 8, "", seed=3))
    assert ask(why_not, part(7, 9, "connector")).endswith(
        "changes version 7, but this rollout worker holds 8; it needs all weights"
    )
    assert gap(plain, ask(Sampler.generate, request(0, 1, 2))) < 1e-4


LORA = LoraConfig(rank=2, alpha=8, targets=["q_proj", "down_proj"], sync=LoraSync.adapter)


def expect_factors(made: Sampler) -> None:
    made._incoming = Incoming(LORA)


def test_factors_are_merged_into_the_layers_that_vllm_joins(ask: Callable[..., Any], plain: Sampler) -> None:
    model = random_model(seed=1, scale=3.0)
    add_lora(model, LORA, {"language"})
    out, held = Outgoing(model, LORA), list(model.named_parameters())
    for step, base in ((7, None), (8, 7), (9, 8)):
        sent = take_snapshot(
            out.sent([(n, p) for n, p in held if base is None or n in out.changing]), out.sent_layout(base is not None),
            step, base,
        )  # fmt: skip
        if base is None:
            ask(expect_factors)
        ask(Sampler.load_weights, sent)
        plain.load_weights(take_snapshot(out.own(held), out.own_layout, step))
        assert sent.megabytes < 0.1 or base is None
        after = ask(Sampler.generate, request(0, 1, 2))
        assert gap(plain, after) < 1e-4
        with torch.no_grad():
            for name, p in held:
                if name in out.changing:
                    p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(step)))
    plain.load_weights(take_snapshot(out.own(held), out.own_layout, 10))
    assert gap(plain, after) > 1e-2  # what one step did shows
