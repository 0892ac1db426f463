"""Over-sampling: a step ends when it has enough complete groups, and the next one goes on with the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_runs import PROMPTS, SAMPLES, Watched, config, numbers, policy_folder, run_loop

from skyrl.batch.assembly import check_fresh
from skyrl.batch.batcher import Batcher
from skyrl.data.stream import PromptStream
from skyrl.learner.step import LearnerStep
from skyrl.records import Begun, ConfigError, DataError, RolloutRequest, SampleGroup, SkyrlError, TrainBatch
from skyrl.rollout.sampler import Sampler
from skyrl.settings import Config, PairSource

STEPS = 4


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return policy_folder(tmp_path_factory.getbasetemp())


def long_tailed(run_dir: Path, lag: int = 0, steps: int = STEPS, oversample: float = 0.5) -> Config:
    cfg = config(run_dir, steps, lag)
    cfg.rollout.temperature, cfg.rollout.max_new_tokens, cfg.rollout.oversample = 1.2, 40, oversample
    cfg.data.eval_size, cfg.hallucination.probe_prompts = 2, 0
    return cfg


class Groups(Watched):
    """Also notes the groups that each step trains on."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.trained: list[list[SampleGroup]] = []

    def call(self, member: Any, function: Any, pieces: int, args: Any, kwargs: Any) -> Any:
        if function is Batcher.exchange:
            self.trained.append([group for part in args[2:] for group in part])
        return super().call(member, function, pieces, args, kwargs)

    @property
    def ids(self) -> list[list[str]]:
        return [[group.prompt.id for group in groups] for groups in self.trained]


# ---------------------------------------------------------------- one step


@pytest.fixture(scope="module")
def sampler(policy: str, tmp_path_factory: pytest.TempPathFactory) -> Sampler:
    return Sampler(long_tailed(tmp_path_factory.mktemp("run")), policy)


def request(*rows: int, step: int = 1) -> RolloutRequest:
    return RolloutRequest("train", rows, step, SAMPLES, greedy=False, seed=0)


def answers(groups: list[SampleGroup]) -> dict[str, list[list[int]]]:
    return {group.prompt.id: [sample.token_ids.tolist() for sample in group.samples] for group in groups}


def test_the_groups_with_the_shortest_longest_answer_come_first_and_the_others_are_cut(sampler: Sampler) -> None:
    whole = answers(sampler.generate(request(*range(9))))
    longest = {name: max(map(len, group)) for name, group in whole.items()}
    sampler.version = 7
    first, second, left = sampler.generate_enough(request(*range(9)), [], 5, 2)
    done, cut = [*first, *second], sorted(longest.values())[4]
    assert len(first) in (2, 3) and len(done) == 5 and len(left) == 4
    assert all(whole[name] == group for name, group in answers(done).items())
    # Of those that end in one and the same step of the engine the first that were asked.
    assert list(answers(done)) == [name for name, length in longest.items() if length <= cut][:5]
    for one in left:
        assert (one.carried, one.step) == (1, 1)
        for place, sample in enumerate(one.samples):
            ids = whole[one.prompt_id][place]
            assert sample.token_ids.tolist() == ids[:cut] and (place in one.open) == (len(ids) > cut)
            assert sample.policy_version == 7 and sample.versions is None and len(sample.mask) == len(sample.token_ids)
            assert (sample.text == "") == (place in one.open)
    again = sampler.generate_enough(request(*range(9)), [], 5, 2)
    assert answers([*again[0], *again[1]]) == answers(done)


def test_a_begun_group_goes_on_where_it_is_and_comes_before_new_ones(sampler: Sampler) -> None:
    sampler.version = 3
    (*_, left), length = sampler.generate_enough(request(*range(6)), [], 2, 1), {}
    assert len(left) == 4
    sampler.version = 4
    done, rest = sampler.generate_enough(request(6, 7, step=2), left, 6, 1)
    assert not rest and [group.prompt.id for group in done[:4]] == [one.prompt_id for one in left]
    assert [group.carried for group in done] == [1, 1, 1, 1, 0, 0]
    for group, one in zip(done, left, strict=False):
        for sample, before in zip(group.samples, one.samples, strict=True):
            had = len(before.token_ids)
            assert sample.token_ids[:had].tolist() == before.token_ids.tolist()
            assert np.array_equal(sample.logprobs[:had], before.logprobs)
            assert len(sample.mask) == len(sample.token_ids) == len(sample.logprobs) > 0
            if before.index in one.open:
                assert len(sample.token_ids) > had
                assert sample.versions.tolist() == [3] * had + [4] * (len(sample.token_ids) - had)
            else:
                assert len(sample.token_ids) == had and sample.versions is None
            assert sample.policy_version == 3
            ended = sample.token_ids[:-1] if not sample.truncated else sample.token_ids
            assert sample.text == sampler.encoder.decode_answer(ended.tolist())
            assert sample.truncated == (
                len(sample.token_ids) == 40 and int(sample.token_ids[-1]) not in sampler.encoder.stop_token_ids
            )
            length[len(sample.token_ids)] = 1
    assert all(sample.versions is None and sample.policy_version == 4 for g in done[4:] for sample in g.samples)
    # The other tokens are drawn with other numbers than a first attempt had.
    whole = answers(sampler.generate(request(*range(6))))
    assert any(answers([group])[group.prompt.id] != whole[group.prompt.id] for group in done[:4])


def test_a_step_waits_for_what_was_carried_too_often(sampler: Sampler) -> None:
    *_, left = sampler.generate_enough(request(*range(6)), [], 2, 1)
    late = [
        replace(one, carried=sampler.cfg.rollout.max_carried if place == 3 else 0) for place, one in enumerate(left)
    ]
    done, rest = sampler.generate_enough(request(6, 7, step=2), late, 2, 1)
    assert done[0].prompt.id == late[3].prompt_id and len(done) == 2 and len(rest) == 4


def test_complete_groups_beyond_what_is_asked_wait_without_being_sampled(sampler: Sampler) -> None:
    done, left = sampler.generate_enough(request(0, 1, 2), [], 3, 1)
    ready = [
        Begun(int(group.prompt.id.split("/")[1]), group.prompt.id, 1, group.prompt_ids, group.samples, (), 0)
        for group in done
    ]
    first, rest = sampler.generate_enough(request(5, step=2), ready, 2, 1)
    assert not left and answers(first) == answers(done[:2]) and rest[0].prompt_id == done[2].prompt.id
    assert len(rest[1].prompt_ids) == 0 and [one.carried for one in rest] == [1, 1]
    # What was not sampled yet is asked for as if for the first time.
    (group,), _ = sampler.generate_enough(request(step=3), rest[1:], 1, 1)
    assert answers([group]) == answers(sampler.generate(request(5, step=2)))


def test_what_cannot_go_on_is_refused(sampler: Sampler, policy: str, tmp_path: Path) -> None:
    *_, left = sampler.generate_enough(request(*range(6)), [], 2, 1)
    with pytest.raises(SkyrlError, match=r"unfinished answers to prompt 'other' of row .*, where the data now have"):
        sampler.generate_enough(request(), [replace(left[0], prompt_id="other")], 1, 1)
    limit, sampler.cfg.rollout.max_new_tokens = sampler.cfg.rollout.max_new_tokens, 3
    with pytest.raises(
        SkyrlError, match=r"an unfinished answer of \d+ tokens .* rollout.max_new_tokens above that, not 3"
    ):
        sampler.generate_enough(request(), left, 4, 1)
    sampler.cfg.rollout.max_new_tokens = limit
    cfg = long_tailed(tmp_path)
    cfg.rollout.engine = f"{__name__}:Endless"
    with pytest.raises(ConfigError, match=r"rollout.oversample=0.5 with rollout.engine=.*can't stop early"):
        Sampler(cfg, policy)


class Endless:
    vocabulary = 10

    def __init__(self, cfg: Config, folder: str) -> None: ...

    def generate(self, requests: list[Any]) -> list[Any]: ...


def test_a_carried_group_may_be_older_by_the_steps_that_it_was_carried(sampler: Sampler) -> None:
    sampler.version = 5
    (group,), _ = sampler.generate_enough(request(0), [], 1, 1)
    check_fresh([replace(group, carried=2)], version=8, lag=1)
    for carried, version in ((2, 9), (0, 7), (2, 4)):
        with pytest.raises(SkyrlError, match="drawn by policy version 5"):
            check_fresh([replace(group, carried=carried)], version, lag=1)


# ---------------------------------------------------------------- whole runs


def taken(size: int, steps: int, members: int = 1) -> Counter[str]:
    """Rows that a run of so many steps asks for: one larger step, and then as many as each trains."""
    stream, ahead = PromptStream(size, 0), members * -(-PROMPTS // members // 2)
    rows = stream.take(PROMPTS + ahead) + tuple(row for _ in range(steps - 1) for row in stream.take(PROMPTS))
    return Counter(f"train/{row}" for row in rows)


@pytest.mark.parametrize(("lag", "members"), [(0, 1), (1, 2)])
def test_no_prompt_is_trained_twice_or_lost_whatever_the_kill(
    policy: str, tmp_path: Path, lag: int, members: int
) -> None:
    def changed(name: str) -> Config:
        cfg = long_tailed(tmp_path / name, lag)
        cfg.rollout.num_workers = members
        return cfg

    seen = Groups()
    sink = run_loop(changed("whole"), policy, seen)
    expected, ids = numbers(sink), [name for step in seen.ids for name in step]
    assert [len(step) for step in seen.ids] == [PROMPTS] * STEPS
    assert len(set(ids)) == len(ids) and set(ids) < taken(400, STEPS, members).keys()
    assert all(expected[step]["rollout/carried"] > 0 for step in range(2, STEPS + 1))
    assert any(expected[step]["rollout/versions_max"] > 0 for step in expected)
    got, trained = dict[int, Any](), list[list[str]]()
    for kill_at in (2, 3, None):  # one run, killed twice
        part = Groups()
        got |= numbers(run_loop(changed("cut"), policy, part, kill_at=kill_at, resume=kill_at != 2))
        trained += part.ids[: None if kill_at is None else -1]  # that of the kill is trained again
    assert got == expected and trained == seen.ids


def test_every_token_has_the_log_probability_of_the_version_that_drew_it(policy: str, tmp_path: Path) -> None:
    """Scored with the weights of that version, which are kept here."""
    weights: dict[int, dict[str, Any]] = {}
    compared = Counter[int]()
    gaps: list[float] = []

    def before(learner: LearnerStep, batch: TrainBatch) -> None:
        weights[batch.version] = {name: whole.clone() for name, whole in learner.backend.parameters()}
        mixed = [
            replace(group, samples=[sample])
            for group in seen.trained[-1]
            for sample in group.samples
            if sample.versions is not None
        ]
        for version in {int(v) for group in mixed for v in group.samples[0].versions}:
            _copy(learner.backend, weights[version])
            for group, own in zip(mixed, learner.logprobs(mixed), strict=True):
                (sample,) = group.samples
                of = sample.versions == version
                gaps.extend(np.abs(own - sample.logprobs)[of])
                compared[batch.version - version] += int(of.sum())
        _copy(learner.backend, weights[batch.version])
        assert all(s.policy_version == s.versions.min() < batch.version for group in mixed for s in group.samples)
        assert all(batch.off_policy(item) for item in batch.items if item.sample.versions is not None)

    seen = Groups(before)
    cfg = long_tailed(tmp_path, steps=5)
    cfg.buffer.enabled, cfg.rollout.max_carried = False, 2
    sink = run_loop(cfg, policy, seen)
    assert compared[0] > 20 and compared[1] > 20 and max(gaps) < 1e-4
    assert max(step["rollout/carried_max"] for step in sink.steps.values()) <= 2
    assert max(step["grpo/ratio_max"] for step in sink.steps.values()) > 1.001


def _copy(backend: Any, parameters: dict[str, Any]) -> None:
    import torch

    with torch.no_grad():
        for name, parameter in backend.model.named_parameters():
            parameter.copy_(parameters[name])


def test_a_resumed_run_may_change_workers_lag_and_share(policy: str, tmp_path: Path) -> None:
    """Whatever was begun is trained once, in the first steps after the resume; without over-sampling nothing is carried
    any more then."""
    cfg, ids = long_tailed(tmp_path, lag=1, steps=6), list[str]()
    for kill_at, members, lag, share in ((2, 2, 1, 0.5), (4, 1, 0, 1.0), (5, 3, 0, 0.0), (None, 1, 1, 0.0)):
        cfg.rollout.num_workers, cfg.controller.lag, cfg.rollout.oversample = members, lag, share
        part = Groups()
        sink = run_loop(cfg, policy, part, kill_at=kill_at, resume=kill_at != 2)
        ids += [name for step in part.ids[: None if kill_at is None else -1] for name in step]
    assert len(ids) == len(set(ids)) == 6 * PROMPTS
    stream = PromptStream(400, 0)
    # Nothing was left behind: these are the first rows of the stream.
    assert set(ids) == {f"train/{row}" for row in stream.take(6 * PROMPTS)}
    assert "rollout/carried" not in sink.steps[6]


def test_without_over_sampling_nothing_is_carried_and_evaluation_never_is(policy: str, tmp_path: Path) -> None:
    for share in (0.0, 0.5):
        cfg, seen = long_tailed(tmp_path / str(share), steps=2, oversample=share), Groups()
        cfg.algorithm.mpo.pairs = PairSource.dropout_ntp
        cfg.hallucination.probe_prompts = 2
        sink = run_loop(cfg, policy, seen)
        assert seen.calls.count("generate_enough") == (2 if share else 0)
        assert any(name.startswith("rollout/") for name in sink.steps[2]) == bool(share)
        evaluated = [metrics for _, metrics in sink.all if "eval/accuracy" in metrics]
        assert len(evaluated) == 2 and not any(name.startswith("rollout/") for one in evaluated for name in one)


def test_there_must_be_as_many_prompts_as_are_sampled_together(tmp_path: Path) -> None:
    from skyrl.data.datasets import check_size

    cfg = long_tailed(tmp_path)
    check_size(9, cfg)
    with pytest.raises(DataError, match=r"8 training prompts, but rollout.prompts_per_step=6 and oversample=0.5 ask 9"):
        check_size(8, cfg)


@pytest.fixture(autouse=True)
def _reset(sampler: Sampler) -> Iterator[None]:
    yield
    sampler.version = 0
