"""Every rule of the settings: what is allowed passes, what is not is named with its key and what is allowed."""

from __future__ import annotations

import math
import pickle
import subprocess
import sys
from collections.abc import Callable
from enum import Enum
from functools import reduce
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from skyrl.records import ConfigError
from skyrl.schema import Settings, value_at
from skyrl.settings import (
    AnswerPlace,
    Config,
    GrpoFilter,
    Mismatch,
    Offload,
    OwnTerm,
    PairSource,
    Ratio,
    Stage,
    Surrogate,
    ThresholdKind,
    Truncated,
    Unit,
    WeightSync,
    all_settings,
    checked,
    validate,
)


def nested(key: str, value: object) -> dict[str, Any]:
    return reduce(lambda inner, name: {name: inner}, reversed(key.split(".")), value)  # type: ignore[return-value]


def put(cfg: Config, key: str, value: object) -> Config:
    *sections, name = key.split(".")
    setattr(attrgetter(".".join(sections))(cfg) if sections else cfg, name, value)
    return cfg


def refusals(data: dict[str, Any], with_learner: bool = True) -> list[str]:
    try:
        checked(data, with_learner)
    except ConfigError as error:
        return str(error).splitlines()
    return []


def problems(cfg: Config) -> list[str]:
    return refusals(cfg.model_dump())


def test_defaults_are_valid() -> None:
    assert problems(Config()) == []


GATES = ("algorithm.mpo.threshold", "algorithm.gate")
LIMITS: dict[str, tuple[str, list[object], list[object]]] = {
    "a whole number, 1 or more": (
        "reward.judge.tries reward.judge.parallel reward.judge.max_tokens "
        "rollout.num_workers reward.num_workers learner.num_workers rollout.prompts_per_step rollout.max_prompt_tokens "
        "rollout.max_new_tokens rollout.tensor_parallel_size rollout.max_num_seqs rollout.kv_cache_gib "
        "rollout.probe_prompts rollout.probe_new_tokens reward.model_batch reward.soft_penalty_tokens buffer.capacity "
        "buffer.max_age digits.train_size data.eval_size data.max_pixels learner.micro_batch_tokens "
        "learner.lora.alpha rollout.max_carried "
        "controller.steps checkpoint.keep monitoring.samples_kept "
        "digits.warm_start_steps digits.reward_body_steps digits.reward_steps algorithm.mpo.pairs_per_prompt "
        "data.pairs_per_step evaluate.samples hallucination.mask_patch reward.verifier_processes "
        + " ".join(f"{gate}.{name}" for gate in GATES for name in ("every", "window", "min_labelled")),
        [1, 2.0],
        [0, -1, 1.5, "one", None, True],
    ),
    "a whole number, 0 or more": (
        "evaluation.every evaluation.gallery checkpoint.every learner.warmup_steps algorithm.mpo.reference_every "
        "algorithm.mpo_steps reward.judge.max_calls hallucination.probe_prompts data.seed "
        "digits.model_seed controller.seed controller.lag controller.restarts "
        "rollout.threads reward.threads learner.threads learner.lora.rank evaluate.report_answers",
        [0],
        [-1, 0.5, None, False],
    ),
    "null, or a whole number, 1 or more": ("filter.rows cluster.num_cpus evaluate.limit", [None, 1], [0, 1.5]),
    "a whole number, 2 or more": ("rollout.samples_per_prompt", [2], [1, 0, 2.5]),
    "a whole number, 0 or more and at most 3": ("learner.zero_stage", [0, 1, 2, 3], [-1, 4, 0.5]),
    "a number, 0 or more": (
        "learner.weight_decay buffer.alpha algorithm.grpo.weight algorithm.grpo.kl_weight algorithm.grpo.clip_high "
        "algorithm.mpo.weight algorithm.mpo.preference_weight algorithm.mpo.quality_weight "
        "algorithm.mpo.generation_weight reward.model_weight reward.format_weight reward.numeric_tolerance "
        "rollout.num_cpus reward.num_cpus learner.num_cpus learner.tower_cache_gib",
        [0, 1e-9, 5.0],
        [-1e-9, math.nan, math.inf, "much", None, True],
    ),
    "null, or a number, 0 or more": (
        "algorithm.mpo.preference_weight_end algorithm.mpo.quality_weight_end algorithm.mpo.generation_weight_end",
        [None, 0],
        [-1e-9, math.nan, math.inf],
    ),
    "a number, above 0": (
        "reward.verifier_timeout reward.judge.timeout learner.lr algorithm.mpo.beta controller.timeout",
        [1e-9],
        [0, -1.0, math.nan, math.inf],
    ),
    "a number, above 0 (limit)": ("learner.max_grad_norm", [1e-9, math.inf], [0, -1.0, math.nan, -math.inf]),
    "null, or a number, above 0": (
        "algorithm.mpo.reference_kl reward.squash_scale",
        [None, 1e-9],
        [0, math.nan, math.inf],
    ),
    "null, or a number, above 0 (limit)": ("rollout.logprob_gap_limit", [None, 1e-9, math.inf], [0, math.nan]),
    "a number, above 1": ("algorithm.grpo.mismatch_cap", [1.0000001, math.inf], [1, math.nan]),
    "null, or a number, above 1": ("algorithm.grpo.dual_clip", [None, 1.0000001], [1, math.nan, math.inf]),
    "a number, 0 or more and at most 1": (
        "digits.text_share buffer.mix buffer.uniform_share learner.min_lr_ratio hallucination.mask_share data.pool_min "
        "data.pool_max rollout.oversample",
        [0, 1],
        [-1e-9, 1.0000001, math.nan],
    ),
    "null, or a number, 0 or more and at most 1": (
        "buffer.fill_target",
        [None, 0, 1],
        [-1e-9, 1.0000001, math.nan, True],
    ),
    "a number, above 0 and at most 1": (
        "rollout.top_p buffer.recency rollout.gpu_memory_utilization",
        [1e-9, 1],
        [0, 1.0000001, math.nan],
    ),
    "a number, above 0 and below 1": (
        " ".join(f"{gate}.{name}" for gate in GATES for name in ("quantile", "target_risk", "confidence")),
        [1e-9, 0.9999999],
        [0, 1, math.nan],
    ),
    "a number, 0 or more and below 1": ("algorithm.mpo.delta_decay", [0, 0.9999999], [-1e-9, 1, math.nan]),
    "null, or a number, 0 or more and below 1": ("algorithm.grpo.clip_low", [0, 0.9999999], [-1e-9, 1, math.nan]),
    "a number, 0 or more and below 0.5": ("algorithm.mpo.label_smoothing", [0, 0.4999999], [-1e-9, 0.5, math.nan]),
    # vLLM 0.32 refuses more than 2 and samples at 0.01 whatever is between that and 0.
    "a number, 0.01 or more and at most 2": ("rollout.temperature", [0.01, 2], [0, 0.0099, 2.0001, math.nan]),
    "a number, 0 or more and at most 2": ("evaluate.temperature", [0, 0.01, 2], [-1e-9, 2.0001, math.nan]),
    "a number": (
        "algorithm.mpo.threshold.value algorithm.gate.value hallucination.gate_score",
        [-1e9, 0, 1e9],
        [math.nan, math.inf, -math.inf, None],
    ),
    "a list of 2, each a number, 0 or more and below 1": (
        "learner.betas",
        [[0, 0.9999999]],
        [[1.0, 0.9], [0.9, 1.0], [-0.1, 0.9], [0.9], [0.9, 0.9, 0.9], 0.9, [0.9, math.nan]],
    ),
    "one of float32, bfloat16, float16": ("model.dtype", ["float32", "bfloat16"], ["int8", "", None]),
    "one of cpu, cuda": ("rollout.device learner.device reward.device", ["cpu"], ["tpu", "", None]),
    "one of digits, files or package.module:Name": (
        "data.source",
        ["digits", "mine:prompts"],
        ["csv", "", "mine:", None],
    ),
    "a list of one or more, each one of sum, max, min, count, row_difference": (
        "digits.kinds",
        [["sum"], ["max", "row_difference"]],
        [[], ["product"], ["sum", "product"], "sum"],
    ),
    "null, or a regular expression": ("reward.answer.pattern", [None], ["(never closed", False]),
    "null, or one of required, optional, none": ("reward.answer.think", [None, "none"], ["no", False, ""]),
    "a name without spaces, slashes, < and >": (
        "reward.answer.think_tag reward.answer.answer_tag",
        ["reason", "seed:think", "考え"],
        ["", "<a>", "a b", "/a", None],
    ),
    "null, or one of tags, boxed, hashes, last_number, regex, whole": (
        "evaluate.place",
        [None, "boxed", "whole"],
        ["box", False, ""],
    ),
    "a list, each a regular expression": ("hallucination.phrases", [[], ["a|b"]], [["(never closed"], "a", [None]]),
    "a list, each text": (
        "evaluate.tasks reward.verifier_environment learner.lora.targets",
        [[], ["gsm8k", "mmmu:/data"]],
        ["gsm8k", None, [None]],
    ),
    "a list, each a mapping": (
        "algorithm.terms",
        [[], [{"path": "a.b:C"}], [{"path": "a:C", "weight": 0, "settings": {"x": [1]}}]],
        [{}, "a:C", None],
    ),
    "a mapping": ("model.chat_template_kwargs", [{}, {"enable_thinking": False}], [[], "no", None]),
    "a mapping, each value package.module:Name": (
        "reward.verifiers",
        [{}, {"close": "my_verifiers:close_enough"}],
        [[], {"close": "my_verifiers"}, {"close": None}],
    ),
    "package.module:Name": (
        "rollout.engine learner.backend",
        ["a:B", "a.b_1.c:Name"],
        ["a.b", "a:b.c", "a/b:C", ":C", "a:", "a b:C", "", None, "os.system('x'):a"],
    ),
    "a name of a folder: not empty, without slashes, backslashes and control characters, not . or ..": (
        "name",
        ["digits", "a..b", ".hidden", "übung 3", 2026],
        ["", ".", "..", "../../x", "/x", "a/b", "a\\b", "a\nb", "a\x1b[31m", "a\u202eb", None, False],
    ),
    "text": (
        "run_dir resume model.policy filter.output monitoring.wandb_project reward.judge.model reward.judge.template",
        [],
        [None, False, []],
    ),
    "null, or text": (
        "model.reward digits.cache_dir data.system_prompt data.suffix data.picture_root data.pool_path "
        "data.pairs_path cluster.address "
        "reward.verifier reward.judge.url reward.judge.api_key_env evaluate.data_dir evaluate.output",
        [None],
        [False, []],
    ),
    "null, or text or a list of one or more, each text": (
        "data.train_path data.eval_path",
        [None, "a", ["a", "b"]],
        [False, [], [None]],
    ),
    "a list, each the name of an alarm (docs/monitoring.md)": (
        "monitoring.stop_on",
        [[], ["cut_off", "stale"]],
        [["cut_of"], "cut_off", None, [1]],
    ),
    "null, or a list, each a number, above 0": ("data.weights", [None, [1, 0.5]], [[0], [-1], 1, [math.inf]]),
    "true or false": (
        "buffer.enabled buffer.importance_correction algorithm.mpo.reference_free learner.gradient_checkpointing "
        "checkpoint.export cluster.dashboard cluster.spread monitoring.console monitoring.ray_metrics "
        "monitoring.tensorboard model.trust_remote_code learner.shared_rows",
        [True, False],
        ["maybe", 2, None],
    ),
}
"""What a setting allows in words → the settings, values at the border, values just beyond."""
GOOD = [(key, value) for keys, good, _ in LIMITS.values() for key in keys.split() for value in good]
BAD = [(key, words, value) for words, (keys, _, bad) in LIMITS.items() for key in keys.split() for value in bad]


def test_each_setting_stands_in_the_table_above_or_is_a_choice() -> None:
    """So that no limit can be lost and no new setting comes without one."""
    words = {key: text.removesuffix(" (limit)") for text, (keys, _, _) in LIMITS.items() for key in keys.split()}
    choices = {key for key, setting in all_settings().items() if isinstance(setting.default, Enum)}
    assert {key: setting.allowed for key, setting in all_settings().items() if key not in choices} == words
    assert len(words) == sum(len(keys.split()) for keys, _, _ in LIMITS.values())


@pytest.mark.parametrize(("key", "words", "value"), BAD)
def test_the_message_names_key_value_and_what_is_allowed(key: str, words: str, value: object) -> None:
    yaml = {"None": "null", "True": "true", "False": "false"}
    shown = yaml.get(str(value), str(value) if str(value).isprintable() else repr(value))
    endless = isinstance(value, float) and not math.isfinite(value)
    allowed = (f"must be {words.removesuffix(' (limit)')}", *(["must be a finite number"] if endless else []))
    (message,) = (line for line in refusals(nested(key, value)) if line.startswith(f"{key}="))
    assert message.startswith(tuple(f"{key}={shown}: {must}" for must in allowed))


@pytest.mark.parametrize(("key", "value"), GOOD)
def test_the_ends_of_each_range_are_allowed(key: str, value: object) -> None:
    """The setting itself; what it needs of others has its own tests."""
    cfg = Config()
    cfg.algorithm.mpo.threshold.kind = ThresholdKind.fixed
    cfg.learner.zero_stage = 1
    assert [line for line in problems(put(cfg, key, value)) if " with " not in line] == []
    if key != "algorithm.terms":  # its items get the defaults that they lack
        assert value_at(cfg.model_dump(mode="json"), key) == (str(value) if key == "name" else value)


def test_what_is_left_out_keeps_its_default() -> None:
    """Both thresholds are of one class; a part of one must not bring the class's own defaults."""
    want = put(put(put(Config(), "algorithm.gate.value", 1.0), "algorithm.mpo.threshold.window", 99), "name", "2026")
    data = {"algorithm": {"gate": {"value": 1}, "mpo": {"threshold": {"window": 99}}}, "name": 2026}
    assert checked(data) == want
    with pytest.raises(ConfigError) as caught:
        checked({"algorithm": {"gate": {"window": 0}}, "model": {"reward": None}})
    assert "algorithm.gate.kind" not in str(caught.value)


@pytest.mark.parametrize("key", [key for key, setting in all_settings().items() if isinstance(setting.default, Enum)])
def test_a_choice_allows_its_members_alone(key: str) -> None:
    members = type(all_settings()[key].default)
    for member in members:
        assert attrgetter(key)(Config.model_validate(nested(key, member.value))) is member
    (message,) = refusals(nested(key, "other"))
    assert message == f"{key}=other: must be one of {', '.join(member.value for member in members)}"
    assert refusals(nested(key, False))[0].endswith("in YAML, words such as off, on, yes and no need quotes")


def test_every_setting_has_a_text() -> None:
    assert [key for key, setting in all_settings().items() if len(setting.text) < 4] == []
    assert len(all_settings()) > 150


def test_unknown_settings_are_named_with_the_nearest() -> None:
    wrong = {"algorithm": {"grpo": {"wieght": 1}}, "bufer": {"mix": 0.1}, "frobnicate": 3, "rollout": {"keep": 3}}
    near = "did you mean algorithm.grpo.weight or algorithm.grpo.kl_weight?"
    assert sorted(refusals(wrong)) == [
        f"algorithm.grpo.wieght: there is no such setting; {near}",
        "bufer: there is no such setting; did you mean buffer?",
        "frobnicate: there is no such setting; `python -m skyrl.launch --cfg job` lists all keys",
        "rollout.keep: there is no such setting; did you mean checkpoint.keep?",
    ]


def test_a_group_must_be_a_mapping() -> None:
    assert refusals({"controller": 3}) == ["controller=3: must be a group of settings"]


def test_a_wrong_term_is_named_with_its_place() -> None:
    terms = [{"path": "a:B", "wieght": 1}, {"path": "a.b", "weight": -1}, {"weight": math.inf}]
    found = refusals({"algorithm": {"terms": terms}})
    assert [line.split(":")[0] for line in found] == [
        "algorithm.terms[0].wieght=1",
        "algorithm.terms[1].path=a.b",
        "algorithm.terms[1].weight=-1",
        "algorithm.terms[2].path={'weight'",
        "algorithm.terms[2].weight=inf",
    ]
    assert found[0].endswith("not permitted") and "must match pattern" in found[1] and "must be greater" in found[2]


def no_reward_model(cfg: Config) -> None:
    cfg.model.reward, cfg.reward.model_weight, cfg.algorithm.mpo.weight = None, 0.0, 0.0


def uneven(cfg: Config) -> None:
    cfg.rollout.prompts_per_step, cfg.rollout.num_workers = 10, 3


def too_few_scenes(cfg: Config) -> None:
    cfg.digits.train_size = 10


def nothing_trained(cfg: Config) -> None:
    cfg.algorithm.grpo.weight = cfg.algorithm.mpo.weight = 0.0


def ipc(cfg: Config) -> None:
    cfg.rollout.weight_sync, cfg.rollout.device, cfg.learner.device = WeightSync.ipc, "cuda", "cuda"
    cfg.rollout.gpu_memory_utilization = 0.5


def ipc_with_uneven_workers(cfg: Config) -> None:
    ipc(cfg)
    cfg.rollout.num_workers = 2


def ipc_across_gpus(cfg: Config) -> None:
    ipc(cfg)
    cfg.rollout.tensor_parallel_size = 2


def ipc_without_room(cfg: Config) -> None:
    ipc(cfg)
    cfg.rollout.gpu_memory_utilization = 0.85


def own_data_not_read(cfg: Config) -> None:
    cfg.data.eval_path = "x.parquet"


def pairs_without_reward_model(cfg: Config) -> None:
    no_reward_model(cfg)
    cfg.algorithm.mpo.weight = 0.5


def weight_without_reward_model(cfg: Config) -> None:
    no_reward_model(cfg)
    cfg.reward.model_weight = 0.5


def ties_without_reward_model(cfg: Config) -> None:
    no_reward_model(cfg)
    cfg.algorithm.grpo.filter = GrpoFilter.all


def own_policy(cfg: Config) -> None:
    cfg.model.policy = "/"


def files(cfg: Config) -> None:
    cfg.data.source = "files"


def too_long(cfg: Config) -> None:
    cfg.rollout.max_prompt_tokens, cfg.rollout.max_new_tokens = 400, 113


def shared_memory_across_gpus(cfg: Config) -> None:
    cfg.rollout.tensor_parallel_size = 2


def nccl_on_cpu(cfg: Config) -> None:
    cfg.rollout.weight_sync = WeightSync.nccl


def nccl_with_a_cpu_learner(cfg: Config) -> None:
    cfg.rollout.weight_sync, cfg.rollout.device = WeightSync.nccl, "cuda"


def stage_without_its_term(cfg: Config) -> None:
    cfg.algorithm.stage, cfg.algorithm.mpo.weight = Stage.mpo, 0.0


def one_stage_only(cfg: Config) -> None:
    cfg.algorithm.stage, cfg.algorithm.mpo_steps, cfg.controller.steps = Stage.mpo_then_grpo, 60, 60


def cispo_with_dual_clip(cfg: Config) -> None:
    cfg.algorithm.grpo.surrogate, cfg.algorithm.grpo.dual_clip = Surrogate.cispo, 3.0


def sequence_ratio_with_token_mask(cfg: Config) -> None:
    cfg.algorithm.grpo.ratio, cfg.algorithm.grpo.mismatch = Ratio.sequence, Mismatch.token_mask


def refresh_of_no_reference(cfg: Config) -> None:
    cfg.algorithm.mpo.reference_free, cfg.algorithm.mpo.reference_every = True, 5


def threshold_without_reward_model(cfg: Config) -> None:
    no_reward_model(cfg)
    cfg.algorithm.mpo.weight, cfg.algorithm.mpo.pairs = 0.5, PairSource.rule


def gate_without_reward_model(cfg: Config) -> None:
    no_reward_model(cfg)
    cfg.algorithm.gate.kind = ThresholdKind.quantile


def offline_and_joint(cfg: Config) -> None:
    cfg.data.pairs_path = __file__


def no_pairs_file(cfg: Config) -> None:
    cfg.data.pairs_path, cfg.algorithm.stage = "/no/such/file", Stage.mpo


def no_pool_file(cfg: Config) -> None:
    cfg.data.pool_path = "/no/such/file"


def empty_pool_range(cfg: Config) -> None:
    cfg.data.pool_min = cfg.data.pool_max = 0.5


def never_drawn(cfg: Config) -> None:
    cfg.buffer.recency, cfg.buffer.max_age = 0.5, 501


def group_that_does_not_fit(cfg: Config) -> None:
    cfg.buffer.unit, cfg.buffer.capacity = Unit.group, 7


def unsure_risk(cfg: Config) -> None:
    cfg.algorithm.gate.kind, cfg.algorithm.gate.confidence = ThresholdKind.risk_controlled, 0.49


def bold_risk(cfg: Config) -> None:
    cfg.algorithm.gate.kind, cfg.algorithm.gate.target_risk = ThresholdKind.risk_controlled, 0.51


def default_verifier_that_is_unknown(cfg: Config) -> None:
    cfg.reward.verifier = "mine"


def pattern_without_its_place(cfg: Config) -> None:
    cfg.reward.answer.pattern = "a"


def place_without_its_pattern(cfg: Config) -> None:
    cfg.reward.answer.at = AnswerPlace.regex


def one_name_for_two_tags(cfg: Config) -> None:
    cfg.reward.answer.think_tag = "answer"


def own_verifier_of_a_taken_name(cfg: Config) -> None:
    cfg.reward.verifiers = {"math": "my:function", "mine": "my:function"}


def own_verifier_with_a_colon(cfg: Config) -> None:
    cfg.reward.verifiers = {"a:b": "my:function"}


def too_few_to_show_the_risk(cfg: Config) -> None:
    cfg.algorithm.gate.kind, cfg.algorithm.gate.min_labelled = ThresholdKind.risk_controlled, 28


def half_on_cpu(cfg: Config) -> None:
    cfg.model.dtype, cfg.learner.zero_stage = "float16", 1


def offload_on_cpu(cfg: Config) -> None:
    cfg.learner.offload, cfg.learner.zero_stage = Offload.all, 3


def offload_unsharded(cfg: Config) -> None:
    cfg.rollout.device = cfg.learner.device = "cuda"
    cfg.rollout.weight_sync, cfg.learner.offload = WeightSync.nccl, Offload.optimizer


def offload_of_whole_parameters(cfg: Config) -> None:
    offload_unsharded(cfg)
    cfg.learner.offload, cfg.learner.zero_stage = Offload.all, 2


def half_without_zero(cfg: Config) -> None:
    cfg.model.dtype = "bfloat16"


def stages_of_which_one_is_off(cfg: Config) -> None:
    cfg.algorithm.stage, cfg.algorithm.mpo_steps, cfg.algorithm.grpo.weight = Stage.mpo_then_grpo, 5, 0.0


def mismatch_with_dual_clip(cfg: Config) -> None:
    cfg.algorithm.grpo.mismatch, cfg.algorithm.grpo.dual_clip = Mismatch.sequence_mask, 3.0


def refresh_that_never_comes(cfg: Config) -> None:
    cfg.algorithm.stage, cfg.algorithm.grpo.kl_weight, cfg.algorithm.mpo.reference_every = Stage.grpo, 0.1, 5


def several_pairs_under_risk_control(cfg: Config) -> None:
    cfg.algorithm.mpo.pairs_per_prompt = 2


def several_blind_pairs(cfg: Config) -> None:
    cfg.algorithm.mpo.pairs, cfg.algorithm.mpo.pairs_per_prompt = PairSource.dropout_ntp, 2
    cfg.algorithm.mpo.threshold.kind = ThresholdKind.off


def window_that_is_never_full(cfg: Config) -> None:
    cfg.algorithm.gate.kind, cfg.algorithm.gate.window = ThresholdKind.quantile, 31


def shared_memory_on_gpus(cfg: Config) -> None:
    cfg.rollout.device = "cuda"


def same_term_twice(cfg: Config) -> None:
    cfg.algorithm.terms = [OwnTerm(path="a:B"), OwnTerm(path="a:B")]


def no_clip(cfg: Config) -> None:
    cfg.algorithm.grpo.clip_low = None


def nucleus_outside_the_clip(cfg: Config) -> None:
    cfg.rollout.top_p = 0.79


def penalty_longer_than_the_answer(cfg: Config) -> None:
    cfg.reward.truncated, cfg.reward.soft_penalty_tokens = Truncated.soft_penalty, 65


def too_old_to_replay(cfg: Config) -> None:
    cfg.controller.lag, cfg.buffer.max_age = 3, 3


def pairs_ahead_of_time(cfg: Config) -> None:
    cfg.data.pairs_path, cfg.algorithm.stage, cfg.controller.lag = __file__, Stage.mpo, 1


@pytest.mark.parametrize(
    ("change", "keys"),
    [
        (uneven, ["rollout.prompts_per_step=10 with rollout.num_workers=3: every worker must get the same number"]),
        (too_few_scenes, ["rollout.prompts_per_step=64", "digits.train_size=10", "must not ask for more"]),
        (nothing_trained, ["algorithm.stage=joint", "algorithm.grpo.weight=0", "algorithm.mpo.weight=0", "above 0"]),
        (ipc_with_uneven_workers, ["rollout.weight_sync=ipc", "rollout.num_workers=2", "learner.num_workers=1"]),
        (ipc_across_gpus, ["rollout.weight_sync=ipc", "rollout.tensor_parallel_size=2", "or use nccl"]),
        (ipc_without_room, ["rollout.gpu_memory_utilization=0.85", "rollout.weight_sync=ipc", "at most 0.6"]),
        (own_data_not_read, ["data.eval_path=x.parquet", "data.source=digits", "say data=files"]),
        (pairs_without_reward_model, ["model.reward=null", "algorithm.mpo.weight=0.5", "algorithm.mpo.pairs=rule"]),
        (weight_without_reward_model, ["model.reward=null", "reward.model_weight=0.5", "set model_weight=0"]),
        (ties_without_reward_model, ["model.reward=null", "algorithm.grpo.filter=all", "use filter=effective"]),
        (own_policy, ["model.reward=digits", "model.policy=/", "a folder or null"]),
        (too_long, ["rollout.max_prompt_tokens=400", "rollout.max_new_tokens=113", "at most 512"]),
        (shared_memory_across_gpus, ["rollout.tensor_parallel_size=2", "rollout.weight_sync=shm", "use nccl"]),
        (nccl_on_cpu, ["rollout.weight_sync=nccl", "rollout.device=cpu", "learner.device=cpu", "must be cuda"]),
        (nccl_with_a_cpu_learner, ["rollout.weight_sync=nccl", "rollout.device=cuda", "learner.device=cpu", "use shm"]),
        (half_on_cpu, ["model.dtype=float16", "on CPU use float32"]),
        (offload_on_cpu, ["learner.offload=all", "learner.device=cpu", "use none"]),
        (offload_unsharded, ["learner.offload=optimizer", "learner.zero_stage=0", "needs zero_stage=1 or more"]),
        (offload_of_whole_parameters, ["learner.offload=all", "learner.zero_stage=2", "needs zero_stage=3 or more"]),
        (half_without_zero, ["learner.zero_stage=0", "model.dtype=bfloat16", "zero_stage=1 or more"]),
        (stages_of_which_one_is_off, ["algorithm.stage=mpo_then_grpo", "algorithm.grpo.weight=0", "both"]),
        (mismatch_with_dual_clip, ["algorithm.grpo.dual_clip=3.0", "mismatch=sequence_mask", "set dual_clip=null"]),
        (refresh_that_never_comes, ["algorithm.mpo.reference_every=5", "reference_kl=null", "set them to 0 and null"]),
        (several_pairs_under_risk_control, ["algorithm.mpo.pairs_per_prompt=2", "kind=risk_controlled", "use 1"]),
        (several_blind_pairs, ["algorithm.mpo.pairs_per_prompt=2", "algorithm.mpo.pairs=dropout_ntp", "must be 1"]),
        (window_that_is_never_full, ["algorithm.gate.window=31", "algorithm.gate.min_labelled=32", "32 or more"]),
        (stage_without_its_term, ["algorithm.stage=mpo", "algorithm.mpo.weight=0", "above 0"]),
        (one_stage_only, ["algorithm.mpo_steps=60", "controller.steps=60", "1 or more and below"]),
        (cispo_with_dual_clip, ["algorithm.grpo.dual_clip=3.0", "surrogate=cispo", "set dual_clip=null"]),
        (sequence_ratio_with_token_mask, ["algorithm.grpo.mismatch=token_mask", "ratio=sequence", "sequence_mask"]),
        (
            refresh_of_no_reference,
            ["algorithm.mpo.reference_free=true", "algorithm.mpo.reference_every=5", "0 and null"],
        ),
        (threshold_without_reward_model, ["model.reward=null", "algorithm.mpo.threshold.kind=risk_controlled", "off"]),
        (gate_without_reward_model, ["model.reward=null", "algorithm.gate.kind=quantile", "off"]),
        (offline_and_joint, [f"data.pairs_path={__file__}", "algorithm.stage=joint", "set algorithm.stage=mpo"]),
        (no_pairs_file, ["data.pairs_path=/no/such/file", "no such file"]),
        (no_pool_file, ["data.pool_path=/no/such/file", "filter_prompts"]),
        (empty_pool_range, ["data.pool_min=0.5", "data.pool_max=0.5", "below"]),
        (never_drawn, ["buffer.recency=0.5", "buffer.max_age=501", "lower max_age"]),
        (group_that_does_not_fit, ["buffer.capacity=7", "buffer.unit=group", "rollout.samples_per_prompt=8"]),
        (unsure_risk, ["algorithm.gate.confidence=0.49", "algorithm.gate.kind=risk_controlled", "0.5 or more"]),
        (bold_risk, ["algorithm.gate.target_risk=0.51", "algorithm.gate.kind=risk_controlled", "0.5 or less"]),
        (own_verifier_of_a_taken_name, ["reward.verifiers", "math: the name of a built-in verifier"]),
        (own_verifier_with_a_colon, ["reward.verifiers", "'a:b': must be a name without a colon"]),
        (default_verifier_that_is_unknown, ["reward.verifier=mine", "the first must be null or one of exact, numeric"]),
        (pattern_without_its_place, ["reward.answer.pattern=a", "reward.answer.at=tags", "at=regex needs a pattern"]),
        (place_without_its_pattern, ["reward.answer.pattern=null", "reward.answer.at=regex", "needs a pattern"]),
        (one_name_for_two_tags, ["reward.answer.think_tag=answer", "reward.answer.answer_tag=answer", "two names"]),
        # Two walks with 0.05 each: 0.9^28 = 0.0523 > 0.05 >= 0.9^29
        (too_few_to_show_the_risk, ["algorithm.gate.min_labelled=28", "algorithm.gate.target_risk=0.1", "29 or more"]),
        (shared_memory_on_gpus, ["rollout.weight_sync=shm", "rollout.device=cuda", "nccl"]),
        (same_term_twice, ["algorithm.terms=", "there once", "a:B, a:B"]),
        (no_clip, ["algorithm.grpo.clip_low=null", "algorithm.grpo.surrogate=clip", "must be a number"]),
        (nucleus_outside_the_clip, ["rollout.top_p=0.79", "algorithm.grpo.clip_low=0.2", "at least 1 - clip_low"]),
        (penalty_longer_than_the_answer, ["reward.soft_penalty_tokens=65", "rollout.max_new_tokens=64"]),
        (too_old_to_replay, ["buffer.max_age=3", "controller.lag=3", "4 or more"]),
        (pairs_ahead_of_time, ["controller.lag=1", "data.pairs_path", "must be 0"]),
    ],
)
def test_impossible_combinations(change: Callable[[Config], None], keys: list[str]) -> None:
    cfg = Config()
    change(cfg)
    (message,) = problems(cfg)
    assert all(key in message for key in keys), message


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("resume", "/no/such/folder", "must be no, auto, or the folder of a checkpoint"),
        ("resume", "", "must be no, auto, or the folder of a checkpoint"),
        ("model.policy", "/no/such/folder", "must be digits, a Hugging Face folder or a name of the hub, owner/name"),
        ("model.policy", "no/such/folder", "must be digits, a Hugging Face folder or a name of the hub"),
        ("model.policy", "", "must be digits, a Hugging Face folder or a name of the hub"),
        (
            "model.reward",
            "/no/such/folder",
            "must be digits, null, an address http://…, a Hugging Face folder or a name",
        ),
        ("model.reward", "", "must be digits, null, an address http://…, a Hugging Face folder or a name of the hub"),
    ],
)
def test_folders_must_exist(key: str, value: str, words: str) -> None:
    """A name of the hub is looked up when the run starts."""
    found = problems(put(Config(), key, value))
    assert any(line.startswith(f"{key}={value}: ") and words in line for line in found), found
    assert problems(put(Config(), "resume", "/")) == problems(put(Config(), "resume", "auto")) == []


def test_data_of_files_need_both(tmp_path: Path) -> None:
    cfg = Config()
    files(cfg)
    assert problems(cfg) == [
        f"data.{split}_path=null with data.source=files: must be a file or folder, or a list of those; "
        "no such file exists"
        for split in ("train", "eval")
    ]
    file = tmp_path / "rows.parquet"
    file.touch()
    cfg.data.train_path = str(file)
    assert len(problems(cfg)) == 1
    cfg.data.eval_path = str(file)
    assert problems(cfg) == []
    cfg.data.eval_path = ""
    assert len(problems(cfg)) == 1


def test_combinations_that_are_possible() -> None:
    cfg = Config()
    no_reward_model(cfg)
    assert problems(cfg) == []
    own_policy(cfg)
    cfg.rollout.max_prompt_tokens = 4096  # the 512 positions are the embedded policy's
    assert problems(cfg) == []
    cfg.rollout.device = cfg.learner.device = "cuda"
    cfg.rollout.weight_sync, cfg.rollout.tensor_parallel_size, cfg.model.dtype = WeightSync.nccl, 8, "float16"
    cfg.learner.zero_stage = 1
    assert problems(cfg) == []
    ipc(shared := Config())
    assert problems(shared) == []


def test_neighbours_of_the_impossible_are_possible() -> None:
    cfg = Config()
    cfg.rollout.top_p = 0.8  # 1 - clip_low
    cfg.rollout.max_prompt_tokens, cfg.rollout.max_new_tokens = 448, 64
    cfg.reward.truncated, cfg.reward.soft_penalty_tokens = Truncated.soft_penalty, 64
    cfg.controller.lag, cfg.buffer.max_age = 3, 4
    cfg.algorithm.terms = [OwnTerm(path="a:B"), OwnTerm(path="a:C")]
    cfg.algorithm.gate.kind, cfg.algorithm.gate.min_labelled = ThresholdKind.risk_controlled, 29
    assert problems(cfg) == []
    cfg.rollout.top_p, cfg.algorithm.grpo.mismatch = 0.1, Mismatch.token_truncate
    assert problems(cfg) == []
    cfg.algorithm.grpo.mismatch, cfg.algorithm.grpo.clip_low = Mismatch.none, None
    cfg.algorithm.grpo.surrogate = Surrogate.cispo
    cfg.buffer.enabled, cfg.buffer.max_age = False, 1
    assert problems(cfg) == []
    cfg.algorithm.grpo.weight = cfg.algorithm.mpo.weight = 0.0
    assert problems(cfg) == []  # the terms of one's own are trained


def test_a_learner_that_will_not_start_needs_no_device() -> None:
    cfg = Config()
    nccl_with_a_cpu_learner(cfg)
    cfg.model.dtype = "float16"
    assert len(problems(cfg)) == 3  # the device, 16 bits on CPU, and without ZeRO
    validate(cfg, with_learner=False)


def test_all_problems_come_at_once() -> None:
    data = {"learner": {"lr": 0}, "buffer": {"mix": 2.0}, "model": {"dtype": "int4"}, "algorithm": {"stage": "mpo"}}
    data["algorithm"] |= {"mpo": {"weight": 0}}
    found = refusals(data)
    assert [line.split("=")[0] for line in found] == ["model.dtype", "buffer.mix", "learner.lr", "algorithm.stage"]


def test_a_wrong_setting_is_not_blamed_twice() -> None:
    """Its default stands in for it while the combinations are looked at, which the user never asked for."""
    data = {"rollout": {"prompts_per_step": 0, "num_workers": 3}}
    assert refusals(data) == ["rollout.prompts_per_step=0: must be a whole number, 1 or more"]
    assert refusals({"rollout": {"num_workers": 3}}) != []


def test_assignment_checks_the_value_and_not_the_combination() -> None:
    cfg = Config()
    with pytest.raises(ValidationError):
        cfg.rollout.num_workers = 0
    cfg.rollout.num_workers = 5  # 64 prompts do not divide evenly yet
    cfg.rollout.prompts_per_step = 10
    assert problems(cfg) == []
    with pytest.raises(ValidationError):
        cfg.rollout.prompts = 10  # type: ignore[attr-defined]


def test_a_copy_is_checked_by_validate() -> None:
    copy = Config().model_copy(update={"learner": Config().learner.model_copy(update={"lr": -1.0})}, deep=True)
    with pytest.raises(ConfigError, match=r"^learner.lr=-1.0: must be a number, above 0$"):
        validate(copy)


def test_configurations_share_no_state_and_travel() -> None:
    first, second = Config(), Config()
    first.rollout.top_p = 0.9
    first.digits.kinds.append("sum")
    first.model.chat_template_kwargs["x"] = 1
    first.algorithm.terms.append(OwnTerm(path="a:B"))
    assert second == Config() != first
    assert pickle.loads(pickle.dumps(first)) == first


def test_the_weights_of_a_step() -> None:
    cfg = Config()
    cfg.algorithm.terms = [OwnTerm(path="a.b:C", weight=0.5)]
    assert cfg.algorithm.weights(1) == {"grpo": 1.0, "mpo": 0.25, "a.b:C": 0.5}
    cfg.algorithm.stage, cfg.algorithm.mpo_steps = Stage.mpo_then_grpo, 2
    assert [cfg.algorithm.weights(step) for step in (1, 2, 3)] == [
        {"grpo": 0.0, "mpo": 0.25, "a.b:C": 0.5},
        {"grpo": 0.0, "mpo": 0.25, "a.b:C": 0.5},
        {"grpo": 1.0, "mpo": 0.0, "a.b:C": 0.5},
    ]
    cfg.algorithm.stage = Stage.mpo
    assert cfg.algorithm.weights(9)["grpo"] == 0.0 and not cfg.algorithm.uses_grpo and cfg.algorithm.uses_mpo


def test_settings_of_ones_own_are_checked_alike() -> None:
    class LengthSettings(Settings):
        limit: int = 32
        """Tokens."""

    with pytest.raises(ValidationError, match="lmiit"):
        LengthSettings(lmiit=3)  # type: ignore[call-arg]


def test_it_loads_no_heavy_library() -> None:
    code = (
        "import sys, skyrl.settings as s, skyrl.cli; s.validate(s.Config()); "
        "print([m for m in ('torch', 'ray', 'vllm', 'transformers', 'deepspeed') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "module", ["skyrl.digits.settings", "skyrl.schema", "skyrl.settings.algorithm", "skyrl.settings"]
)
def test_each_module_can_be_imported_first(module: str) -> None:
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
