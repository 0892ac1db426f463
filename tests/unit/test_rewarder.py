"""Whole groups through the rewarder, with hand-worked rewards and advantages; the means over them."""

from __future__ import annotations

import copy
import math
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tiny_models import processor

from skyrl.data.parquet import write_parquet
from skyrl.monitoring.metrics import check_names
from skyrl.records import Check, DataError, Prompt, Sample, SampleGroup, SkyrlError
from skyrl.rewards import rewarder as module
from skyrl.rewards.metrics import failures, fingerprint, model_agreement, refuse_all_failed, reward_metrics
from skyrl.rewards.rewarder import Rewarder
from skyrl.settings import Config, GrpoFilter, Squash, Std, Truncated

PICTURE = np.zeros((4, 4, 3), dtype=np.uint8)
RIGHT = "<think>I see 31/41.</think><answer>9</answer>"
WRONG = "<think>I see 38/41.</think><answer>16</answer>"
BARE = "<answer>9</answer>"
CUT = "<think>I see 31/4"
OWN = "hostile_verifiers:right"


def group(*texts: str, picture: bool = True, **changes: Any) -> SampleGroup:
    fields: dict[str, Any] = {
        "id": "train/17",
        "question": "What is the sum of the digits?",
        "images": (PICTURE,) if picture else (),
        "answer": "9",
        "verifier": "numeric",
        "facts": {"grid": [[3, 1], [4, 1]]} if picture else {},
    }
    prompt = Prompt(**(fields | changes))
    samples = []
    for index, text in enumerate(texts):
        ids, logprobs = np.zeros(4 + index, dtype=np.int32), np.zeros(4 + index, dtype=np.float32)
        ids.flags.writeable = logprobs.flags.writeable = False  # as they come out of Ray's shared memory
        samples.append(Sample(index, ids, logprobs, text, truncated=text == CUT, policy_version=0))
    return SampleGroup(prompt, np.zeros(3, dtype=np.int32), samples)


class FixedModel:
    """A reward model that returns what it was given."""

    def __init__(self, *scores: list[float]) -> None:
        self.scores = [np.array(part, dtype=np.float32) for part in scores]
        for part in self.scores:
            part.flags.writeable = False

    def score(self, groups: list[SampleGroup]) -> list[np.ndarray]:
        return self.scores


def config(std: Std = Std.population, **reward: Any) -> Config:
    plain = {"model_weight": 1.0, "format_weight": 0.1, "squash": Squash.none, "verifier_timeout": 0.5}
    plain["verifiers"] = {"mine": OWN, "crash": "hostile_verifiers:crash"}
    cfg = Config(reward=plain | reward)
    cfg.algorithm.grpo.std = std
    return cfg


def make(cfg: Config, *scores: list[float], prefix: str = "") -> Rewarder:
    """A rewarder of a policy that needs no folder, whose reward model gives these scores; none without scores."""
    with pytest.MonkeyPatch.context() as patch:
        from skyrl.policy.encode import PromptEncoder

        patch.setattr(PromptEncoder, "from_pretrained", lambda *args, **kwargs: SimpleNamespace(answer_prefix=prefix))
        rewarder = Rewarder(cfg, "no folder", None, 1)
    if scores:
        rewarder.model = FixedModel(*scores)  # type: ignore[assignment]
    return rewarder


@pytest.fixture(scope="module")
def rules() -> Iterator[Rewarder]:
    rewarder = make(config())
    yield rewarder
    rewarder.checks.close()


def column(scored: SampleGroup, name: str) -> list[float]:
    return [getattr(sample, name) for sample in scored.samples]


def part(scored: SampleGroup, name: str) -> list[float]:
    return [getattr(sample.reward, name) for sample in scored.samples]


def test_rule_and_form(rules: Rewarder) -> None:
    groups = [group(RIGHT, WRONG, BARE, CUT)]
    assert rules.score(groups) is groups
    assert part(groups[0], "rule") == [1.0, 0.0, 1.0, 0.0]
    assert part(groups[0], "format") == [1.0, 1.0, 0.0, 0.0]
    assert part(groups[0], "total") == [1.1, 0.1, 1.0, 0.0]
    assert part(groups[0], "model") == [None] * 4
    assert column(groups[0], "error") == [None] * 4
    # rule: mean 1/2, std 1/2.  total: mean 0.55, deviations ±0.55, ±0.45, std sqrt((0.3025 + 0.2025) / 2) = 0.502494
    assert column(groups[0], "rule_advantage") == [1.0, -1.0, 1.0, -1.0]
    np.testing.assert_allclose(column(groups[0], "advantage"), [1.094540, -0.895533, 0.895533, -1.094540], atol=1e-6)
    assert [sample.effective for sample in groups[0].samples] == [True] * 4


def test_claims_are_checked(rules: Rewarder) -> None:
    (scored,) = rules.score([group(RIGHT, WRONG, BARE, CUT)])
    assert column(scored, "claims") == [4, 4, 0, 3]
    assert column(scored, "false_claims") == [0, 1, 0, 0]


@pytest.mark.parametrize("changes", [{"images": ()}, {"facts": {}}, {"facts": {"colour": "red"}}])
def test_without_picture_or_facts_with_a_checker_nothing_is_known(rules: Rewarder, changes: dict) -> None:
    (scored,) = rules.score([group(RIGHT, WRONG, **changes)])
    assert column(scored, "claims") == [0, 0] and not scored.checkable
    assert not [name for name in reward_metrics([scored], rules.cfg) if name.startswith("hallucination/")]
    (scored,) = rules.score([group(RIGHT, WRONG, facts={"grid": [[3, 1], [4, 1]], "colour": "red"})])
    assert scored.checkable and reward_metrics([scored], rules.cfg)["hallucination/coverage"] == 1.0


def test_answers_that_can_never_be_scored_end_the_run(rules: Rewarder) -> None:
    failed = rules.score([group(RIGHT, answer="nine"), group(BARE, answer="ten")])
    with pytest.raises(SkyrlError, match=r"^step 3: none of the 2 answers could be scored; the first: .*'nine'"):
        refuse_all_failed(failed, "step 3")
    refuse_all_failed([], "step 3")
    refuse_all_failed([*failed, *rules.score([group(RIGHT)])], "step 3")


def parquet_config(folder: Path, *names: str, **own: str) -> Config:
    """A run on a file whose rows name these verifiers."""
    prompts = [Prompt(f"{i}", "?", (), "9", name) for i, name in enumerate(names)]
    write_parquet(folder / "mine.parquet", prompts)
    cfg = config(verifiers=own)
    cfg.data.source, cfg.data.train_path, cfg.data.eval_path = "files", *2 * [str(folder / "mine.parquet")]
    return cfg


def test_verifiers_that_the_data_name_are_checked_where_they_run(tmp_path: Path) -> None:
    rewarder = make(parquet_config(tmp_path, "numeric", "math", "mine", mine=OWN))
    rewarder.ready()
    rewarder.checks.close()
    for path, message in (
        ("no_such_module:f", "verifier 'mine'.*No module named 'no_such_module'"),
        ("hostile_verifiers:absent", "verifier 'mine'.*'hostile_verifiers:absent' can't be imported"),
        ("hostile_verifiers:not_a_function", "verifier 'mine'.*is a int; allowed: a function"),
    ):
        rewarder = make(parquet_config(tmp_path, "numeric", "mine", mine=path))
        with pytest.raises(DataError, match=message):
            rewarder.ready()
        rewarder.checks.close()


def test_a_name_of_the_settings_is_known_in_a_process_of_its_own(tmp_path: Path) -> None:
    """What a reward actor does: nothing was registered there, all that it has is the pickled settings."""
    cfg = parquet_config(tmp_path, "mine", mine=OWN)
    code = (
        "import pickle, sys; from types import SimpleNamespace\n"
        "from skyrl.policy.encode import PromptEncoder\n"
        "from skyrl.rewards.rewarder import Rewarder\n"
        "PromptEncoder.from_pretrained = lambda *args, **kwargs: SimpleNamespace(answer_prefix='')\n"
        "cfg, group = pickle.loads(sys.stdin.buffer.read())\n"
        "rewarder = Rewarder(cfg, '', None, 1)\n"
        "rewarder.ready()\n"
        "print([sample.reward.rule for sample in rewarder.score([group])[0].samples])\n"
    )
    given = pickle.dumps((cfg, group(RIGHT, WRONG, verifier="mine")))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], input=given, capture_output=True, timeout=120, env=environment)
    assert done.stdout.decode() == "[1.0, 0.0]\n", done.stderr.decode()


def test_the_module_of_the_role_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'transformers', 'ray', 'vllm', 'deepspeed', 'sympy'}"
    code = f"import sys, skyrl.rewards.rewarder, skyrl.evaluation.summary; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "set()\n", done.stderr


def test_plugins_are_loaded_before_anything_is_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def installed(group: str) -> list[SimpleNamespace]:
        return [SimpleNamespace(load=lambda: asked.append(group))]

    monkeypatch.setattr(module, "entry_points", installed)
    make(config())
    assert asked == ["skyrl.plugins"]


# ---------------------------------------------------------------- templates that open <think>


def test_a_think_tag_that_the_template_has_written_counts_for_the_form() -> None:
    rewarder = make(config(), prefix="<think>")
    opened, twice = RIGHT.removeprefix("<think>"), RIGHT
    (scored,) = rewarder.score([group(opened, twice, "9</answer>")])
    assert part(scored, "format") == [1.0, 0.0, 0.0] and part(scored, "rule") == [1.0, 1.0, 0.0]


@pytest.mark.parametrize(("opening", "well_formed"), [("", RIGHT), ("<think>\n", RIGHT.removeprefix("<think>"))])
def test_the_policys_own_template_says_what_it_opens(tmp_path: Path, opening: str, well_formed: str) -> None:
    own = copy.deepcopy(processor())
    for piece in (own, own.tokenizer):
        if getattr(piece, "chat_template", None):
            piece.chat_template += f"{{% if add_generation_prompt %}}{opening}{{% endif %}}"
    own.save_pretrained(tmp_path)
    (scored,) = Rewarder(config(), str(tmp_path), None, 1).score([group(well_formed, "<think>" + well_formed)])
    assert part(scored, "format") == [1.0, 0.0]


# ---------------------------------------------------------------- truncated answers

TEXTS = (RIGHT, CUT, WRONG, CUT)


def test_truncated_answers_are_trained_as_what_the_verifier_says() -> None:
    cfg = config()
    assert cfg.reward.truncated is Truncated.train
    (scored,) = make(cfg).score([group(*TEXTS)])
    assert [sample.mask.all() for sample in scored.samples] == [True] * 4
    assert part(scored, "rule") == [1.0, 0.0, 0.0, 0.0]
    # One right of four: mean 1/4, standard deviation sqrt(3)/4.
    np.testing.assert_allclose(column(scored, "rule_advantage"), [3**0.5, *3 * [-(3**-0.5)]])
    assert [sample.effective for sample in scored.samples] == [True] * 4
    assert not {"response/left_out_share", "reward/length_penalty"} & reward_metrics([scored], cfg).keys()


def test_left_out_answers_count_in_their_group_and_train_nothing() -> None:
    cfg = config(truncated="leave_out")
    (scored,) = make(cfg).score([group(*TEXTS)])
    assert [sample.mask.tolist() for sample in scored.samples] == [
        [value] * len(sample.token_ids) for sample, value in zip(scored.samples, [True, False] * 2, strict=True)
    ]
    assert [sample.effective for sample in scored.samples] == [True, False, True, False]
    (trained,) = make(config()).score([group(*TEXTS)])
    for name in ("advantage", "rule_advantage", "reward"):  # of the others and of its own: nothing else changes
        assert column(scored, name) == column(trained, name)
    metrics = reward_metrics([scored], cfg)
    assert metrics == reward_metrics([trained], config()) | {"response/left_out_share": 0.5}
    assert reward_metrics(make(cfg).score([group(RIGHT, WRONG)]), cfg)["response/left_out_share"] == 0.0


def test_soft_penalty_goes_by_the_length_of_every_answer() -> None:
    cfg = config(truncated="soft_penalty", soft_penalty_tokens=4)
    cfg.rollout.max_new_tokens = 7
    (scored,) = make(cfg).score([group(RIGHT, WRONG, BARE, CUT)])  # 4, 5, 6 and 7 tokens; free up to 3
    assert part(scored, "rule") == [1.0, 0.0, 1.0, 0.0] and all(sample.mask.all() for sample in scored.samples)
    assert part(scored, "total") == pytest.approx([1.1 - 0.25, 0.1 - 0.5, 1.0 - 0.75, 0.0 - 1.0])
    assert column(scored, "rule_advantage") == [1.0, -1.0, 1.0, -1.0]  # what is effective is decided by the rule
    totals = np.array(part(scored, "total"))
    np.testing.assert_allclose(column(scored, "advantage"), (totals - totals.mean()) / totals.std())
    metrics = reward_metrics([scored], cfg)
    assert metrics["reward/length_penalty"] == pytest.approx(-2.5 / 4) and "response/left_out_share" not in metrics


def test_soft_penalty_decides_between_equal_answers() -> None:
    cfg = config(Std.none, truncated="soft_penalty", soft_penalty_tokens=7)
    cfg.rollout.max_new_tokens = 7
    (scored,) = make(cfg).score([group(RIGHT, RIGHT)])
    assert column(scored, "advantage") == pytest.approx([1 / 14, -1 / 14])
    assert column(scored, "rule_advantage") == [0.0, 0.0]


# ---------------------------------------------------------------- the reward model, and errors


def test_reward_model_decides_the_total_but_not_the_effective_samples() -> None:
    rewarder = make(config(Std.none), [3.0, 1.0], [0.5, -0.5])
    first, second = rewarder.score([group(RIGHT, RIGHT), group(WRONG, RIGHT)])
    assert part(first, "model") == [3.0, 1.0]
    assert part(first, "total") == pytest.approx([4.1, 2.1])
    assert column(first, "advantage") == pytest.approx([1.0, -1.0])
    assert column(first, "rule_advantage") == [0.0, 0.0]
    assert not any(sample.effective for sample in first.samples)
    assert part(second, "total") == pytest.approx([0.6, 0.6])
    assert column(second, "advantage") == [0.0, 0.0]
    assert column(second, "rule_advantage") == [-0.5, 0.5]


def test_rounding_of_large_scores_is_a_tie_and_hides_no_right_answer() -> None:
    scores = [10_000.0, 10_000.001, 10_000.002]  # two units in the last place of float32
    equal, mixed = make(config(), scores, scores).score([group(*3 * [RIGHT]), group(RIGHT, WRONG, WRONG)])
    assert column(equal, "advantage") == [0.0] * 3
    np.testing.assert_allclose(column(mixed, "advantage"), [2**0.5, -(0.5**0.5), -(0.5**0.5)], atol=0.01)


def test_sample_with_error_takes_no_part() -> None:
    rewarder = make(config(Std.none), [0.0, math.nan, 0.0])
    (scored,) = rewarder.score([group(RIGHT, RIGHT, WRONG)])
    assert scored.samples[1].reward is None
    assert "train/17" in str(scored.samples[1].error) and "sample 1" in str(scored.samples[1].error)
    # Mean of 1 and 0, not of 1, 1 and 0.
    assert column(scored, "rule_advantage") == [0.5, 0.0, -0.5]
    assert column(scored, "advantage") == pytest.approx([0.5, 0.0, -0.5])


def test_verifier_that_crashes_is_an_error_not_a_zero(rules: Rewarder) -> None:
    (scored,) = rules.score([group(RIGHT, CUT, CUT, verifier="crash")])
    assert scored.samples[0].reward is None and "exit status 3" in str(scored.samples[0].error)
    assert part(SampleGroup(scored.prompt, scored.prompt_ids, scored.samples[1:]), "rule") == [0.0, 0.0]
    assert reward_metrics([scored], rules.cfg)["reward/errors"] == 1.0


@pytest.mark.parametrize("scores", [[math.nan, 0.0], [math.nan, math.nan]])
def test_fewer_than_two_scored_samples_have_no_advantage(scores: list[float]) -> None:
    (scored,) = make(config(Std.sample), scores).score([group(RIGHT, WRONG)])
    assert column(scored, "advantage") == column(scored, "rule_advantage") == [0.0, 0.0]
    assert [sample.reward is None for sample in scored.samples] == [math.isnan(score) for score in scores]


def test_group_of_one(rules: Rewarder) -> None:
    (scored,) = rules.score([group(RIGHT)])
    assert part(scored, "rule") == [1.0]
    assert (scored.samples[0].advantage, scored.samples[0].error) == (0.0, None)


def test_scoring_again_forgets_the_first_time(rules: Rewarder) -> None:
    scored = make(config(), [math.nan, 1.0]).score([group(RIGHT, WRONG)])
    (again,) = rules.score(scored)
    assert column(again, "error") == [None, None]
    assert column(again, "rule_advantage") == [1.0, -1.0]


def test_mistakes_of_the_data_set_or_the_model_name_it(rules: Rewarder) -> None:
    with pytest.raises(DataError, match=r"train/17.*'nope'"):
        rules.score([group(RIGHT, verifier="nope")])
    with pytest.raises(DataError, match=r"train/17.*grid"):
        rules.score([group(RIGHT, facts={"grid": 7})])
    with pytest.raises(DataError, match="shapes"):
        make(config(), [1.0]).score([group(RIGHT, WRONG)])


def test_metrics() -> None:
    rewarder = make(config(), [1.0, 0.0, 0.0, math.nan], [2.0, 1.0])
    scored = rewarder.score([group(RIGHT, WRONG, CUT, BARE), group(BARE, WRONG, picture=False)])
    metrics = reward_metrics(scored, rewarder.cfg)
    check_names(metrics)
    # Valid: rule 1, 0, 0 and 1, 0; format 1, 1, 0 and 0, 1; model 1, 0, 0 and 2, 1; total adds them up.
    assert metrics == pytest.approx(
        {
            "reward/rule": 0.4,
            "reward/rule/numeric": 0.4,
            "reward/rule_std": 0.24**0.5,
            "reward/accuracy": 0.4,
            "reward/format": 0.6,
            "reward/format_of_right": 0.5,
            "reward/model": 0.8,
            "reward/model_std": 0.56**0.5,
            "reward/model_largest": 2.0,
            # 1 above 0 and 0; 2 above 1. By Mann-Whitney the variances are 2 · 4 / 12 and 1 · 3 / 12.
            "reward/model_agreement": 1.0,
            "reward/model_agreement_sd": (11 / 12) ** 0.5 / 3,
            "reward/tied_share": 0.0,
            "reward/advantage_order": 1.0,
            "reward/advantage_centre": 0.0,
            "reward/scored": 5.0,
            "reward/total": 0.4 + 0.06 + 0.8,
            "reward/errors": 1.0,
            "response/length_mean": (4 + 5 + 6 + 7 + 4 + 5) / 6,
            "response/truncated_share": 1 / 6,
            "response/repetition": (0 + 1 / 2 + 2 / 3 + 3 / 4 + 0 + 1 / 2) / 6,  # 4-grams of equal tokens: 1, 2, 3 …
            "response/same_share": 0.0,
            "response/answer_share": 5 / 6,
            "data/fingerprint": fingerprint(["train/17", "train/17"]),
            "hallucination/rate": 1 / 4,
            "hallucination/false_claim_share": 1 / 11,
            "hallucination/coverage": 3 / 4,
        }
    )


def test_answers_to_one_prompt_are_compared() -> None:
    rewarder = make(config(), [1.0, 1.0, 3.0], [2.0, 2.0, 2.0])
    first, second = rewarder.score([group(RIGHT, WRONG, WRONG), group(WRONG, WRONG, WRONG)])
    second.samples = [replace(sample, token_ids=second.samples[0].token_ids) for sample in second.samples]
    metrics = reward_metrics([first, second], rewarder.cfg)
    assert (metrics["reward/tied_share"], metrics["response/same_share"]) == (0.5, 0.5)
    # Right 1 against wrong 1 (a tie, one half) and 3 (lost); the second group has no right answer.
    assert metrics["reward/model_agreement"] == 0.25
    assert metrics["reward/model_agreement_sd"] == pytest.approx((2 * 4 / 12) ** 0.5 / 2)
    # As one set, right 1 against 1, 3, 2, 2, 2.
    assert model_agreement([first.samples + second.samples], "x")["x"] == 0.1
    trains_all = config()
    trains_all.algorithm.grpo.filter = GrpoFilter.all
    for sample, advantage in zip(second.samples, (1.0, -1.0, 0.0), strict=True):
        sample.advantage = advantage
    assert reward_metrics([second], trains_all)["reward/tied_share"] == 0.0
    assert reward_metrics([second], rewarder.cfg)["reward/tied_share"] == 1.0


def test_advantages_are_held_against_their_rewards() -> None:
    rewarder = make(config(), [3.0, 2.0, 1.0], [0.0, 0.0, 0.0])
    first, second = rewarder.score([group(WRONG, WRONG, WRONG), group(WRONG, WRONG, WRONG)])
    assert reward_metrics([first, second], rewarder.cfg)["reward/advantage_order"] == 1.0
    one, two, _ = first.samples
    one.advantage, two.advantage = two.advantage, one.advantage  # 3 > 2 > 1: one of three pairs is turned round
    turned = reward_metrics([first, second], rewarder.cfg)
    assert turned["reward/advantage_order"] == pytest.approx(2 / 3)
    assert turned["reward/advantage_centre"] == pytest.approx(0, abs=1e-12)
    for sample in second.samples:
        sample.advantage = 0.25
    assert reward_metrics([first, second], rewarder.cfg)["reward/advantage_centre"] == 0.25


def test_spread_of_the_agreement_is_that_of_chance() -> None:
    """Against a model that knows nothing, simulated."""
    rng = np.random.default_rng(0)
    shares, told = [], []
    for _ in range(2000):
        (scored,) = make(config(), rng.normal(size=5).tolist()).score([group(RIGHT, RIGHT, WRONG, WRONG, WRONG)])
        found = model_agreement([scored.samples], "x")
        shares.append(found["x"])
        told.append(found["x_sd"])
    assert np.mean(shares) == pytest.approx(0.5, abs=0.03)
    assert np.std(shares) == pytest.approx(told[0], rel=0.05) and len(set(told)) == 1


def test_fingerprint_does_not_depend_on_the_order() -> None:
    assert fingerprint(["a", "b"]) == fingerprint(["b", "a"]) != fingerprint(["ab"]) != fingerprint(["a", "b", "b"])


def test_what_was_not_measured_has_no_key(rules: Rewarder) -> None:
    assert reward_metrics([], rules.cfg) == {"reward/errors": 0.0, "reward/scored": 0.0}
    text_only = reward_metrics(rules.score([group(BARE, WRONG, picture=False)]), rules.cfg)
    assert set(text_only) == {
        *(f"reward/{name}" for name in ("errors", "scored", "total", "rule", "rule/numeric", "rule_std", "accuracy")),
        *(
            f"reward/{name}"
            for name in ("format", "format_of_right", "tied_share", "advantage_order", "advantage_centre")
        ),
        *(
            f"response/{name}"
            for name in ("length_mean", "truncated_share", "repetition", "answer_share", "same_share")
        ),
        "data/fingerprint",
    }
    silent = reward_metrics(rules.score([group(BARE, BARE)]), rules.cfg)
    assert silent["hallucination/rate"] == silent["hallucination/coverage"] == 0.0
    assert "hallucination/false_claim_share" not in silent  # of no claims
    failed = reward_metrics(rules.score([group(RIGHT, answer="nine")]), rules.cfg)
    assert failed["reward/errors"] == 1.0 and "reward/total" not in failed and "response/length_mean" in failed


# ---------------------------------------------------------------- other forms of an answer, several verifiers


@pytest.mark.parametrize("prefix", ["", "<think>"])
def test_answer_in_a_box(prefix: str) -> None:
    rewarder = make(config(answer={"at": "boxed"}), prefix=prefix)
    texts = [
        r"<think>It is \boxed{8}.</think>\boxed{9}",
        r"<think>It is \boxed{9}.",
        r"<think>It is \boxed{9}.</think>9",
    ]
    (scored,) = rewarder.score([group(*(text.removeprefix(prefix) for text in texts))])
    assert part(scored, "rule") == part(scored, "format") == [1.0, 0.0, 0.0]
    assert column(scored, "answer") == ["9", None, None]
    (bare,) = rewarder.score([group(r"\boxed{9}", "<answer>9</answer>")])
    assert part(bare, "rule") == part(bare, "format") == ([0.0, 0.0] if prefix else [1.0, 0.0])


def test_pattern_that_takes_for_ever_is_an_error_of_its_sample() -> None:
    rewarder = make(config(answer={"at": "regex", "pattern": r"(?:a|aa)+$"}))
    (scored,) = rewarder.score([group("a" * 9, "a" * 80 + "b", "9", answer="9", verifier="exact")])
    assert [sample.reward is None for sample in scored.samples] == [False, True, False]
    assert "sample 1: reward.answer.pattern took longer than 0.5 s" in str(scored.samples[1].error)


def test_parts_of_the_rule_are_stored_and_logged() -> None:
    rewarder = make(config())
    checks = (Check("numeric", "9", 3.0), Check("exact", "9.0"))
    both, alone = rewarder.score([group(RIGHT, WRONG, BARE.replace("9", "9.0"), checks=checks), group(BARE)])
    assert part(both, "rules") == [{"numeric": 1, "exact": 0}, {"numeric": 0, "exact": 0}, {"numeric": 1, "exact": 1}]
    assert part(both, "rule") == [0.75, 0.0, 1.0] and [sample.right for sample in both.samples] == [False, False, True]
    metrics = reward_metrics([both, alone], rewarder.cfg)
    check_names(metrics)
    assert metrics["reward/rule"] == pytest.approx(2.75 / 4)
    assert (metrics["reward/rule/numeric"], metrics["reward/rule/exact"]) == (3 / 4, pytest.approx(1 / 3))


def test_function_of_another_system_reads_the_whole_text_and_may_give_more_than_1() -> None:
    own = {"trl": "foreign_rewards:trl_tokens", "verl": "foreign_rewards:compute_score"}
    rewarder = make(config(verifiers=own, verifier_timeout=20.0))
    tokens, ends = rewarder.score([group("", CUT, verifier="trl"), group("9", "8", verifier="verl", kind="sums")])
    rewarder.checks.close()
    assert part(tokens, "rule") == [4.0, 5.0] and all(sample.right for sample in tokens.samples)
    assert part(ends, "rule") == [1.0, 0.0] and [sample.right for sample in ends.samples] == [True, False]
    assert column(tokens, "rule_advantage") == [-1.0, 1.0]


def test_failures_are_told_with_verifier_count_and_example() -> None:
    rewarder = make(config(verifiers={"strict": "foreign_rewards:fails_if_wrong"}, verifier_timeout=20.0))
    groups = rewarder.score([group(RIGHT, WRONG, WRONG, verifier="strict"), group(RIGHT, WRONG)])
    rewarder.checks.close()
    assert part(SampleGroup(groups[0].prompt, groups[0].prompt_ids, groups[0].samples[:1]), "rule") == [1.0]
    told = failures(groups, "step 1")
    assert told is not None and told.startswith(
        "step 1: answers that could not be scored: 2 of 3 by strict. They train"
    )
    assert "prompt 'train/17', sample 1: verifier 'strict': AssertionError: 16 is not 9" in told
    assert failures(groups[1:], "step 1") is None
    groups[1].samples[1].error = "of another kind"
    told = failures(groups, "step 1")
    assert told is not None and told.endswith(" | of another kind") and "16 is not 9" in told


def test_answers_that_hang_do_not_wait_for_each_other() -> None:
    rewarder = make(config(verifiers={"hang": "hostile_verifiers:hang"}, verifier_timeout=2.0, verifier_processes=8))
    start = time.monotonic()
    (scored,) = rewarder.score([group(*(f"<answer>{n}</answer>" for n in [*range(8), *range(8)]), verifier="hang")])
    assert time.monotonic() - start < 14  # 32 s one after the other, 16 s with equal ones judged once
    assert all("killed after 2 s" in str(sample.error) for sample in scored.samples)
