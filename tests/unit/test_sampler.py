"""The sampler over a second engine (tests/plain_engine.py), and over a scripted one where an answer must be chosen."""

from __future__ import annotations

import copy
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from skyrl.policy.encode import TAGS
from skyrl.policy.module import PolicyModule, load_policy
from skyrl.records import (
    ConfigError,
    DataError,
    Prompt,
    RewardParts,
    RolloutRequest,
    Sample,
    SampleGroup,
    SkyrlError,
    SyncError,
)
from skyrl.rollout.engine import Completion, EngineRequest, Enough
from skyrl.rollout.sampler import Sampler, best_answer, sample_seed
from skyrl.settings import Config, Truncated
from skyrl.sync.snapshot import layout_of, take_snapshot
from tests.plain_engine import PlainEngine, log_distribution
from tests.tiny_models import answer_ids, encoder, noise, processor, prompt, random_model

EOS = int(processor().tokenizer.eos_token_id)
ENDED = "<think>I see 31/41. 3+1=4.</think><answer>9</answer>"
PROMPTS = [
    prompt("p/0", noise(0)),
    prompt("p/1", question="How many digits are there?"),
    prompt("p/2", noise(2), question="What is the largest digit?"),
    prompt("p/3", noise(3), question="How many digits are even?"),
]
Words = tuple[list[int], list[float], str, bool]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random policy, as ``model.policy`` names one."""
    made = tmp_path_factory.mktemp("policy")
    random_model(scale=3.0).save_pretrained(made)
    processor().save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def built(folder: Path) -> Sampler:
    cfg = Config()
    cfg.rollout.engine = "tests.plain_engine:PlainEngine"
    cfg.rollout.max_new_tokens, cfg.rollout.probe_new_tokens, cfg.rollout.probe_prompts = 12, 5, 3
    cfg.controller.seed = 3
    return Sampler(cfg, str(folder))


@pytest.fixture
def sampler(built: Sampler) -> Sampler:
    """One whose settings, prompts and engine a test may replace."""
    made = copy.copy(built)
    made.cfg, made.datasets, made.version = built.cfg.model_copy(deep=True), {"train": PROMPTS, "eval": PROMPTS}, 5
    return made


def request(*rows: int, n: int = 3, **fields: Any) -> RolloutRequest:
    return RolloutRequest(
        **{"split": "train", "step": 4, "greedy": False, "seed": 3} | fields, rows=rows, samples_per_prompt=n
    )


def words(groups: list[SampleGroup]) -> dict[tuple[str, str], list[Words]]:
    """What was sampled, by prompt."""
    return {
        group.prompt.key: [(s.token_ids.tolist(), s.logprobs.tolist(), s.text, s.truncated) for s in group.samples]
        for group in groups
    }


def own_logprobs(folder: Path, made: Sampler, groups: list[SampleGroup]) -> np.ndarray:
    """As the learner computes them: whole rows, no cache, and the forbidden tokens that exist."""
    policy = load_policy(str(folder), "float32").eval()
    forbidden = [i for i in made.encoder.forbidden_token_ids() if i < len(processor().tokenizer)]
    module = PolicyModule(policy, forbidden, made.cfg.rollout.temperature)
    rows = [(group.prompt, group.prompt_ids, s.token_ids) for group in groups for s in group.samples]
    with torch.no_grad():
        return module(made.encoder.collate(rows))[0].numpy()


class Scripted:
    """Answers every request with ``said``, and remembers what it was asked."""

    vocabulary = len(processor().tokenizer)

    def __init__(self, said: str | np.ndarray = "9", ends: bool = True) -> None:
        self.said = answer_ids(said, end=ends) if isinstance(said, str) else said
        self.ends, self.asked = ends, list[EngineRequest]()

    def generate(self, requests: list[EngineRequest]) -> list[list[Completion]]:
        assert requests  # an engine is not asked for nothing
        self.asked = requests
        logprobs = np.full(len(self.said), -0.5, np.float32)
        ids = [np.array(asked.prompt_ids, np.int32) for asked in requests]
        made = [Completion(prompt_ids, self.said, logprobs, "said", not self.ends) for prompt_ids in ids]
        return [[one] * asked.n for one, asked in zip(made, requests, strict=True)]


# ---------------------------------------------------------------- what is sampled


def test_the_role_imports_no_library_that_samples_or_trains() -> None:
    heavy = "[m for m in ('torch', 'vllm', 'transformers', 'ray', 'PIL') if m in sys.modules]"
    code = f"import sys, skyrl.rollout.sampler; found = {heavy}; sys.exit(str(found) if found else 0)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_groups_come_in_the_order_of_the_rows_and_say_which_policy_drew_them(sampler: Sampler) -> None:
    assert sampler.sizes() == {"train": 4, "eval": 4}
    groups = sampler.generate(request(2, 0, 1))
    assert [group.prompt for group in groups] == [PROMPTS[2], PROMPTS[0], PROMPTS[1]]
    for group in groups:
        assert group.prompt_ids.dtype == np.int32 and np.array_equal(
            group.prompt_ids, encoder().encode(group.prompt)[0]
        )
        assert [sample.index for sample in group.samples] == [0, 1, 2] and group.blind is None
        for sample in group.samples:
            assert sample.policy_version == 5 and sample.mask.all() and 0 < len(sample.token_ids) <= 12
            assert sample.token_ids.dtype == np.int32 and sample.logprobs.dtype == np.float32
            assert sample.logprobs.shape == sample.token_ids.shape == sample.mask.shape
            assert not set(sample.token_ids.tolist()) & set(sampler.encoder.forbidden_token_ids())
            assert sample.truncated == (EOS not in sample.token_ids.tolist()) == (sample.token_ids[-1] != EOS)
    assert len({tuple(sample.token_ids.tolist()) for group in groups for sample in group.samples}) == 9
    with pytest.raises(DataError, match="unknown split 'test'; this worker has: train, eval"):
        sampler.generate(request(0, split="test"))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_recorded_log_probabilities_are_the_learners(sampler: Sampler, folder: Path, temperature: float) -> None:
    sampler.cfg.rollout.temperature = temperature
    groups = sampler.generate(request(0, 1, 3))
    recorded = np.concatenate([sample.logprobs for group in groups for sample in group.samples])
    np.testing.assert_allclose(recorded, own_logprobs(folder, sampler, groups), atol=2e-5)


def test_neither_order_nor_company_nor_worker_changes_an_answer(sampler: Sampler, folder: Path) -> None:
    together = words(sampler.generate(request(0, 1, 2, 3)))
    apart = words(sampler.generate(request(3, 1)) + sampler.generate(request(2)) + sampler.generate(request(0)))
    other = copy.copy(sampler)
    other.engine = PlainEngine(sampler.cfg, str(folder))
    assert apart == together == words(other.generate(request(3, 2, 1, 0)))
    fewer = words(sampler.generate(request(0, 1, 2, 3, n=2)))
    assert fewer == {key: answers[:2] for key, answers in together.items()}
    for changed in (request(0, step=5), request(0, seed=4)):
        assert not {tuple(a[0]) for a in words(sampler.generate(changed))["p/0", ""]} & {
            tuple(a[0]) for a in together["p/0", ""]
        }


def test_greedy_answers_are_the_likeliest_whatever_the_seed(sampler: Sampler, folder: Path) -> None:
    asked = request(0, 1, n=1, greedy=True)
    sampler.cfg.rollout.temperature, sampler.cfg.rollout.top_p = 0.3, 0.5  # neither matters
    groups = sampler.generate(asked)
    assert words(groups) == words(sampler.generate(replace(asked, step=9, seed=8)))
    policy = load_policy(str(folder), "float32").eval()
    for group in groups:  # transformers' own search, as an independent witness
        _, pictures = sampler.encoder.encode(group.prompt)
        ids = torch.from_numpy(group.prompt_ids).long()[None]
        options = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": EOS, "pad_token_id": EOS}
        suppressed = sampler.encoder.forbidden_token_ids()
        found = policy.generate(input_ids=ids, **pictures, suppress_tokens=suppressed, **options)[0, ids.shape[1] :]
        assert group.samples[0].token_ids.tolist() == found.tolist()


def test_a_blind_request_shows_no_picture_and_leaves_out_rows_that_have_none(sampler: Sampler) -> None:
    sampler.engine = engine = Scripted()
    groups = sampler.generate(request(2, 1, 0, blind=True))
    assert [group.prompt.key for group in groups] == [("p/2", "blind"), ("p/0", "blind")]
    for group, asked, seen in zip(groups, engine.asked, (PROMPTS[2], PROMPTS[0]), strict=True):
        assert group.prompt.images == asked.pictures == () and group.prompt.question == seen.question
        assert asked.prompt_ids == encoder().text_ids(prompt("x", question=seen.question))
    assert sampler.generate(request(1, blind=True)) == []
    # The same rows with the picture: nothing is left out.
    assert [group.prompt.key for group in sampler.generate(request(2, 1))] == [("p/2", ""), ("p/1", "")]
    assert [len(asked.pictures) for asked in engine.asked] == [1, 0]


def test_the_seed_of_a_prompt_goes_by_run_step_id_and_variant() -> None:
    def hashed(text: str) -> int:
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") // 4

    assert sample_seed(3, 6, PROMPTS[0]) == hashed("3/6/p/0")
    assert sample_seed(3, 6, replace(PROMPTS[0], variant="blind")) == hashed("3/6/p/0#blind")
    assert all(0 <= sample_seed(1, step, PROMPTS[0]) < 2**62 for step in range(200))


def test_the_probe_asks_the_first_evaluation_prompts_and_cuts_no_tail(sampler: Sampler) -> None:
    sampler.cfg.rollout.top_p = 0.5
    groups = sampler.probe()
    assert [group.prompt for group in groups] == PROMPTS[:3]
    assert all(len(group.samples) == 1 and len(group.samples[0].token_ids) <= 5 for group in groups)
    assert words(groups) == words(sampler.probe())
    sampler.version = 6
    assert words(groups) != words(sampler.probe())
    sampler.engine = engine = Scripted()
    sampler.datasets["eval"] = PROMPTS[:2]
    assert len(sampler.probe()) == 2 and {asked.top_p for asked in engine.asked} == {1.0}
    assert [asked.seed for asked in engine.asked] == [sample_seed(3, 6, asked) for asked in PROMPTS[:2]]


def test_a_request_carries_the_settings(sampler: Sampler) -> None:
    sampler.engine = engine = Scripted()
    sampler.cfg.rollout.temperature, sampler.cfg.rollout.top_p = 0.7, 0.9
    sampler.generate(request(0, n=4))
    (asked,) = engine.asked
    assert (asked.n, asked.temperature, asked.top_p, asked.max_tokens) == (4, 0.7, 0.9, 12)
    assert asked.stop_ids == (EOS,) and asked.forbidden_ids == tuple(encoder().forbidden_token_ids())
    sampler.generate(request(0, n=1, greedy=True))
    assert (engine.asked[0].temperature, engine.asked[0].top_p, engine.asked[0].seed) == (0.0, 1.0, None)


# ---------------------------------------------------------------- tokens that a model may not have, or ends with


def variant(folder: Path, target: Path, change: Callable[[Any], None] = lambda _: None, **generation: Any) -> Sampler:
    """A sampler over the folder's policy with a changed tokenizer or generation_config.json."""
    load_policy(str(folder), "float32").save_pretrained(target)
    changed = copy.deepcopy(processor())
    change(changed.tokenizer)
    changed.save_pretrained(target)
    (target / "generation_config.json").write_text(json.dumps(generation))
    cfg = Config()
    cfg.rollout.engine, cfg.rollout.max_new_tokens = "tests.plain_engine:PlainEngine", 12
    made = Sampler(cfg, str(target))
    made.datasets = {"train": PROMPTS}
    return made


def test_every_stop_token_of_the_model_ends_an_answer_and_is_trained_on(folder: Path, tmp_path: Path) -> None:
    special = processor().tokenizer.convert_tokens_to_ids("<global-img>")
    ends = {EOS, special, *range(200, 260)}
    made = variant(folder, tmp_path, eos_token_id=sorted(ends))
    asked = made._asked(PROMPTS[0], request(0), 12, 1.0)
    assert set(asked.stop_ids) == ends and not ends & set(asked.forbidden_ids) and special in ends
    samples = [sample for group in made.generate(request(0, 1, 2, 3, n=8)) for sample in group.samples]
    stopped = [sample for sample in samples if not sample.truncated]
    assert len(stopped) > 8 and any(sample.token_ids[-1] != EOS for sample in stopped)
    for sample in samples:
        ids = sample.token_ids.tolist()
        assert not ends & set(ids[:-1]) and (ids[-1] in ends) == (not sample.truncated)
        assert sample.truncated <= (len(ids) == 12) and sample.mask.all()
        spoken = ids if sample.truncated else ids[:-1]
        assert sample.text == processor().tokenizer.decode(spoken)


def test_tokens_beyond_the_output_layer_are_neither_forbidden_nor_waited_for(folder: Path, tmp_path: Path) -> None:
    size = len(processor().tokenizer)
    made = variant(
        folder, tmp_path, lambda t: t.add_special_tokens({"sep_token": "<beyond>"}), eos_token_id=[EOS, size + 5]
    )
    assert size in made.encoder.forbidden_token_ids() and size + 5 in made.encoder.stop_token_ids
    asked = made._asked(PROMPTS[0], request(0), 12, 1.0)
    assert asked.forbidden_ids == tuple(encoder().forbidden_token_ids()) and asked.stop_ids == (EOS,)
    groups = made.generate(request(0, 1))
    recorded = np.concatenate([sample.logprobs for group in groups for sample in group.samples])
    np.testing.assert_allclose(recorded, own_logprobs(folder, made, groups), atol=2e-5)


def test_tags_that_are_special_tokens_stay_in_the_text_and_can_be_sampled(folder: Path, tmp_path: Path) -> None:
    made = variant(folder, tmp_path, lambda t: t.add_special_tokens({"additional_special_tokens": list(TAGS)}))
    assert set(made.encoder.special_tags) == set(TAGS)
    made.engine = engine = Scripted(ENDED)
    (group,) = made.generate(request(0, n=1))
    assert group.samples[0].text == ENDED
    assert not set(engine.asked[0].forbidden_ids) & set(made.encoder.special_tags.values())
    made.engine = Scripted(ENDED, ends=False)
    assert made.generate(request(0, n=1))[0].samples[0].text == ENDED
    group.samples[0].reward = RewardParts(1.0, 1.0, None, 1.0)
    (group,) = made.continue_blind([group], 4)
    kept = answer_ids(ENDED)[: len(answer_ids(ENDED)) // 2]
    assert group.blind is not None and group.blind[1].text == processor().tokenizer.decode(kept) + ENDED


# ---------------------------------------------------------------- prompts that can't be sampled


class Refusing(PlainEngine):
    """Refuses wide pictures, as the picture processors of several models do."""

    def generate(self, requests: list[EngineRequest]) -> list[list[Completion]]:
        for asked in requests:
            if any(picture.shape[1] > 200 * picture.shape[0] for picture in asked.pictures):
                raise ValueError("absolute aspect ratio must be smaller than 200, got 300.0")
        return super().generate(requests)


def test_a_prompt_that_the_engine_refuses_is_named(sampler: Sampler, folder: Path) -> None:
    sampler.engine = Refusing(sampler.cfg, str(folder))
    sampler.datasets["train"] = [PROMPTS[0], prompt("p/wide", np.zeros((3, 900, 3), np.uint8)), PROMPTS[2]]
    said = r"prompt 'p/wide' .* pictures of \['900x3'\] pixels can't be sampled: ValueError: absolute aspect ratio"
    with pytest.raises(DataError, match=said):
        sampler.generate(request(0, 2, 1))
    assert len(sampler.generate(request(0, 2))) == 2  # the others still can


def test_an_answer_that_comes_without_its_end_is_refused(sampler: Sampler, folder: Path) -> None:
    class Endless(PlainEngine):
        def generate(self, requests: list[EngineRequest], enough: Enough | None = None) -> list[list[Completion]]:
            found = super().generate(requests)
            for made in (one for some in found for one in some):
                if made.token_ids[-1] == EOS:
                    made.token_ids, made.logprobs = made.token_ids[:-1], made.logprobs[:-1]
            return found

    sampler.engine = Endless(sampler.cfg, str(folder))
    said = rf"prompt 'p/\S+': the engine says that an answer ended by itself.* tokens that end one: {EOS}\."
    with pytest.raises(SkyrlError, match=said):
        sampler.generate(request(0, 1, 2, n=16))


def test_an_engine_that_is_broken_is_not_blamed_on_a_prompt(sampler: Sampler) -> None:
    class Broken(Scripted):
        def generate(self, requests: list[EngineRequest]) -> list[list[Completion]]:
            raise RuntimeError("out of memory")

    sampler.engine = Broken()
    with pytest.raises(RuntimeError, match="out of memory"):
        sampler.generate(request(0))


def test_too_long_prompts_are_named(sampler: Sampler) -> None:
    text, whole = len(encoder().text_ids(PROMPTS[0])), len(encoder().encode(PROMPTS[0])[0])
    assert text < whole
    limit = r"has {} tokens; rollout\.max_prompt_tokens allows {}"
    sampler.cfg.rollout.max_prompt_tokens = whole - 1  # its pictures make it too long, which the engine finds out
    for engine in (sampler.engine, Picky(whole - 1)):
        sampler.engine = engine
        with pytest.raises(DataError, match="prompt 'p/0' " + limit.format(whole, whole - 1)):
            sampler.generate(request(1, 0) if len(encoder().encode(PROMPTS[1])[0]) < whole else request(0))
    sampler.cfg.rollout.max_prompt_tokens, sampler.engine = 2, Scripted()
    for blind in (False, True):
        with pytest.raises(DataError, match=r"prompt 'p/2' has \d+ tokens; rollout\.max_prompt_tokens allows 2"):
            sampler.generate(request(2, blind=blind))
    with pytest.raises(DataError, match="prompt 'p/2' has"):
        sampler.continue_blind([group(sample(0, 1.0), asked=PROMPTS[2])], 1)
    assert sampler.engine.asked == []  # nothing is sampled that is known to be too long


class Picky(Scripted):
    """Refuses what is longer than it can hold, as vLLM does, without a name."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit

    def generate(self, requests: list[EngineRequest]) -> list[list[Completion]]:
        if any(len(asked.prompt_ids) + 7 * len(asked.pictures) > self.limit for asked in requests):
            raise ValueError("The decoder prompt is longer than the maximum model length")
        return super().generate(requests)


# ---------------------------------------------------------------- the best answer, continued blind


def sample(index: int, model: float | None, rule: float = 0.0, text: str = ENDED, **fields: Any) -> Sample:
    ids = fields.pop("ids", answer_ids(text, end=not fields.get("truncated", False)))
    values = {"truncated": False, "reward": RewardParts(rule, 1.0, model, 1.0)} | fields
    return Sample(index, ids, np.zeros(len(ids), np.float32), text, policy_version=1, **values)


def group(*samples: Sample, asked: Prompt = PROMPTS[0]) -> SampleGroup:
    return SampleGroup(asked, encoder().encode(asked)[0], list(samples))


@pytest.mark.parametrize(
    ("samples", "best"),
    [
        ([sample(0, 1.0), sample(1, 3.0), sample(2, 3.0)], 1),
        ([sample(0, 1.0), sample(1, 3.0, truncated=True), sample(2, 2.0, error="crashed"), sample(3, -1.0)], 0),
        ([sample(0, 1.0, ids=np.array([EOS], np.int32)), sample(1, -2.0, ids=np.array([7, EOS], np.int32))], 1),
        ([sample(0, None), sample(1, None, 1.0), sample(2, None, 1.0)], 1),
        ([sample(0, None, 0.5), sample(1, -9.0, 1.0), sample(2, 9.0)], 1),  # never a score against a rule
        ([sample(0, 9.0, mask=np.zeros(len(answer_ids(ENDED)), bool)), sample(1, -9.0)], 1),
        (
            [sample(0, 9.0, truncated=True), sample(1, 9.0, reward=None, error="crashed"), sample(2, 1.0, reward=None)],
            None,
        ),
        ([], None),
    ],
)
def test_the_best_answer_that_can_be_cut(samples: list[Sample], best: int | None) -> None:
    assert best_answer(samples) == best


def test_the_best_answers_first_half_is_continued_without_the_picture(sampler: Sampler) -> None:
    sampler.engine = engine = Scripted("4+1=5.</think><answer>5</answer>")
    sampler.cfg.rollout.max_new_tokens, sampler.cfg.rollout.temperature, sampler.cfg.rollout.top_p = 40, 0.7, 0.9
    chosen = answer_ids(f"{ENDED}1")
    mask = np.arange(len(chosen)) != 1  # one token was not the policy's
    groups = [
        group(sample(0, 1.0), sample(1, 2.0, text=f"{ENDED}1", mask=mask)),
        group(sample(0, 1.0), asked=PROMPTS[1]),  # no picture
        group(sample(0, 1.0, truncated=True), asked=PROMPTS[2]),
        group(sample(0, 1.0), asked=PROMPTS[3]),
    ]
    groups[1].blind = (0, sample(1, 1.0))  # a stale one goes
    before = [one.token_ids.copy() for one in groups[0].samples]
    assert sampler.continue_blind(groups, 6) is groups
    assert [one.blind is None for one in groups] == [False, True, True, False]
    assert [one.prompt.variant for one in groups] == [""] * 4

    kept = chosen[: len(chosen) // 2]
    asked = engine.asked[0]
    question = encoder().text_ids(prompt("x", question=PROMPTS[0].question))
    assert asked.prompt_ids == [*question, *kept.tolist()] and asked.pictures == () and len(engine.asked) == 2
    assert (asked.n, asked.temperature, asked.top_p, asked.max_tokens) == (1, 0.7, 0.9, 40 - len(kept))
    assert asked.forbidden_ids == tuple(encoder().forbidden_token_ids())
    assert asked.seed == sample_seed(3, 6, replace(PROMPTS[0], variant="blind")) != engine.asked[1].seed

    assert groups[0].blind is not None
    place, made_up = groups[0].blind
    assert place == 1 and made_up.index == 2 and made_up.policy_version == 5 and not made_up.truncated
    assert np.array_equal(made_up.token_ids, [*kept, *engine.said]) and made_up.token_ids.dtype == np.int32
    assert made_up.logprobs is None and made_up.reward is None
    assert np.array_equal(made_up.mask, [*mask[: len(kept)], *[True] * len(engine.said)])
    assert made_up.text == processor().tokenizer.decode(kept) + "4+1=5.</think><answer>5</answer>"
    assert all(map(np.array_equal, before, [one.token_ids for one in groups[0].samples]))


def test_a_continuation_that_reaches_the_limit_is_truncated(sampler: Sampler) -> None:
    sampler.engine, groups = Scripted("4+1=5", ends=False), [group(sample(0, 1.0))]
    sampler.continue_blind(groups, 6)
    assert groups[0].blind is not None and groups[0].blind[1].truncated
    assert groups[0].blind[1].text.endswith("4+1=5")
    nothing = [group(sample(0, 1.0), asked=PROMPTS[1])]
    assert sampler.continue_blind(nothing, 6)[0].blind is None


@pytest.mark.parametrize("truncated", list(Truncated))
@pytest.mark.parametrize("ends", [True, False])
def test_a_truncated_continuation_trains_as_truncated_answers_do(
    sampler: Sampler, truncated: Truncated, ends: bool
) -> None:
    sampler.engine, groups = Scripted("4+1=5", ends=ends), [group(sample(0, 1.0))]
    sampler.cfg.reward.truncated = truncated
    sampler.continue_blind(groups, 6)
    assert groups[0].blind is not None
    made = groups[0].blind[1]
    assert made.mask.shape == made.token_ids.shape and made.mask.dtype == bool
    left_out = truncated is Truncated.leave_out and not ends
    assert made.mask.tolist() == [not left_out] * len(made.token_ids)
    assert groups[0].samples[0].mask.all()  # the answer that it was cut from is none of it


# ---------------------------------------------------------------- weights


def test_new_weights_answer_as_a_sampler_that_started_with_them(folder: Path, tmp_path: Path) -> None:
    changed = random_model(seed=1, scale=3.0)
    changed.save_pretrained(tmp_path)
    processor().save_pretrained(tmp_path)
    cfg = Config()
    cfg.rollout.engine, cfg.rollout.max_new_tokens = "tests.plain_engine:PlainEngine", 8
    old, new = Sampler(cfg, str(folder)), Sampler(cfg, str(tmp_path))
    old.datasets = new.datasets = {"train": PROMPTS, "eval": PROMPTS}
    before = words(old.generate(request(0, 1)))
    parameters = list(changed.named_parameters())
    snapshot = take_snapshot(parameters, layout_of(parameters), version=7)
    assert snapshot.megabytes > 1 and old.load_weights(snapshot) == snapshot.megabytes
    groups = old.generate(request(0, 1))
    assert words(groups) == words(new.generate(request(0, 1))) != before
    assert {s.policy_version for one in groups for s in one.samples} == {7} and old.version == 7
    with pytest.raises(SyncError, match="9"):
        old.load_weights(take_snapshot(parameters[:-1], layout_of(parameters[:-1]), version=9))
    assert old.version == 7


def test_a_transfer_that_fails_says_why_until_the_next(sampler: Sampler) -> None:
    class Transferring(Scripted):
        def transfer(self, method: str, kwargs: dict[str, Any]) -> None:
            if kwargs:
                raise KeyError("x")

    sampler.engine = Transferring()
    assert sampler.transfer_failure() is None
    with pytest.raises(KeyError):
        sampler.transfer("update_weights", {"update_info": {}})
    assert sampler.transfer_failure() == "update_weights: KeyError: 'x'"
    sampler.transfer("start_weight_update", {})
    assert sampler.transfer_failure() is None
    sampler.finish_transfer(8)
    assert sampler.version == 8


@pytest.mark.parametrize("path", ["no.such:Engine", "tests.plain_engine:NoEngine"])
def test_an_engine_that_can_not_be_imported_is_named(folder: Path, path: str) -> None:
    cfg = Config()
    cfg.rollout.engine = path
    with pytest.raises(ConfigError, match=f"rollout.engine={path}"):
        Sampler(cfg, str(folder))


# ---------------------------------------------------------------- the second engine's own arithmetic


def test_the_plain_engines_distribution_by_hand() -> None:
    asked = EngineRequest([1], (), 1, 0.5, 0.7, 1, 0, (), (3,))
    logits = torch.tensor([[0.0, 1.0, 0.5, 9.0, -1.0]])
    weights = np.exp([0.0, 2.0, 1.0, -np.inf, -2.0])
    assert weights[1] / weights.sum() < 0.7 < (weights[1] + weights[2]) / weights.sum()  # two tokens reach top_p
    expected = np.array([0, weights[1], weights[2], 0, 0]) / (weights[1] + weights[2])
    np.testing.assert_allclose(log_distribution(logits, asked)[0].exp().numpy(), expected, rtol=1e-6)
    whole = log_distribution(logits, replace(asked, top_p=1.0))[0].numpy()
    np.testing.assert_allclose(np.exp(whole), weights / weights.sum(), rtol=1e-6)
