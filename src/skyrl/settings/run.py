"""Settings of a run: its length, evaluation, checkpoints, cluster, monitoring; and the whole configuration."""

from __future__ import annotations

import functools
from collections.abc import Collection
from enum import Enum
from itertools import chain
from typing import Annotated, Any

from pydantic import Field, NonNegativeInt, PositiveFloat, ValidationError

from skyrl.digits.settings import DigitsConfig, digits_problems
from skyrl.records import ConfigError
from skyrl.schema import Count, Pattern, Setting, Settings, Share, field_problems, settings_of, shown, value_at
from skyrl.settings.alarms import Alarm
from skyrl.settings.algorithm import AlgorithmConfig, algorithm_problems
from skyrl.settings.buffer import BufferConfig, buffer_problems
from skyrl.settings.evaluate import EvaluateConfig, evaluate_problems
from skyrl.settings.reward import RewardConfig, reward_problems
from skyrl.settings.system import DataConfig, LearnerConfig, ModelConfig, RolloutConfig, system_problems

NAME = r"^[^/\\\p{C}]*[^/\\\p{C}.][^/\\\p{C}]*$"
ALARMS = "a list, each the name of an alarm (docs/monitoring.md)"
NAME_WORDS = "a name of a folder: not empty, without slashes, backslashes and control characters, not . or .."


class WandbMode(Enum):
    auto = "auto"
    """Online when logged in, else offline."""
    online = "online"
    offline = "offline"
    off = "off"


class KeptSamples(Enum):
    off = "off"
    last = "last"
    """Those of the last ``samples_kept`` steps, of as many evaluations, and of the evaluation before training."""
    all = "all"


class EvaluationConfig(Settings):
    every: NonNegativeInt = 10
    """Steps between evaluations; there is always one before the first step and one after the last.
    0 leaves only those two."""
    gallery: NonNegativeInt = 12
    """Scenes shown in the report, before and after."""


class HallucinationConfig(Settings):
    """Monitors of visual hallucination; docs/hallucination.md describes each."""

    probe_prompts: NonNegativeInt = 64
    """Most evaluation prompts that the image-blind and the masked-picture probe look at, at each evaluation. The first
    takes so many prompts and passes over those without a picture, the second takes so many with one. Bounds their cost,
    which ``eval/probe_seconds`` shows; 0 turns them off."""
    mask_share: Share = 0.6
    """Share of a picture's patches that the masked-picture probe blackens."""
    mask_patch: Count = 14
    """Side of such a patch, pixels."""
    gate_score: float = 0.0
    """The reward-model gate reports answers that are right by the rule and scored below this (raw units), unless
    ``algorithm.gate.kind=fixed`` sets another."""
    phrases: list[Pattern] = [  # noqa: RUF012 -- pydantic copies it
        r"\b(?:can(?:no|')?t|unable to|not able to) (?:see|view|access) (?:the |any |an )?(?:image|picture|photo)",
        r"\bno (?:image|picture|photo) (?:is |was )?(?:provided|attached|given|visible)",
    ]
    """Regular expressions (case ignored) of answers that deny seeing a picture that was there."""


class FilterConfig(Settings):
    """``python -m skyrl.filter_prompts``: the offline pass of the Selective Sample Buffer."""

    output: str = "pool.parquet"
    """File written: one row a prompt, with its pass rate."""
    rows: Count | None = None
    """First rows of the training data that are rolled out; null means all."""


class CheckpointConfig(Settings):
    every: NonNegativeInt = 20
    """Steps between checkpoints; 0 writes none but the final one."""
    keep: Count = 2
    """Complete checkpoints kept, the newest ones."""
    export: bool = True
    """Write the final policy as a Hugging Face folder."""


class ControllerConfig(Settings):
    steps: Count = 40
    """Length of the run."""
    seed: NonNegativeInt = 0
    """Seed of sampling and replay. The order of prompts follows ``data.seed``, embedded models ``digits.model_seed``;
    with the same seeds and settings a run repeats."""
    lag: NonNegativeInt = 0
    """Rollouts for step k + lag are asked before step k is trained: sampling and training then overlap, and each sample
    is ``lag`` policy versions older. 0 does one after the other."""
    timeout: PositiveFloat = 1800.0
    """Seconds after which a call to a member that has not ended counts as hung: the member is ended and replaced."""
    restarts: NonNegativeInt = 3
    """How often a run may build its learner anew and go back to the newest checkpoint, because a learner rank died or
    hung; and how often one call to another member is asked again. Above that the run ends with an error."""


class ClusterConfig(Settings):
    address: str | None = None
    """Ray cluster to join; null means ``$RAY_ADDRESS``, and if that is unset a local Ray."""
    num_cpus: Count | None = None
    """CPUs of a local Ray; null means all cores."""
    dashboard: bool = True
    """Start the Ray dashboard with a local Ray, on port 8265 or the next free one."""
    spread: bool = True
    """Place the workers of one kind on different nodes where possible."""


class MonitoringConfig(Settings):
    console: bool = True
    """Live table in a terminal; plain lines otherwise."""
    wandb: WandbMode = WandbMode.auto
    """Weights & Biases."""
    wandb_project: str = "skyrl"
    """Its project, so that those of one team can be told apart."""
    ray_metrics: bool = True
    """Gauges for the Ray dashboard and Prometheus."""
    tensorboard: bool = False
    """Event files for TensorBoard in the run's folder, by the package ``tensorboardX``."""
    samples: KeptSamples = KeptSamples.last
    """Which samples are kept in the run's folder, each with its text, rewards and advantage, for
    ``python -m skyrl.show`` (docs/monitoring.md). About as many bytes as their texts have after compression."""
    samples_kept: Count = 20
    """Steps, and evaluations, whose samples are kept with ``samples=last``: so the disk does not fill up."""
    stop_on: Annotated[list[Alarm], Field(json_schema_extra={"allowed": ALARMS})] = []  # noqa: RUF012 -- pydantic copies it
    """Alarms that end the run with an error, after the numbers of their step were written; docs/monitoring.md says what
    each means. All others are only told: in the console, ``events.jsonl``, ``summary.json`` and the report."""


class Config(Settings):
    name: Annotated[str, Field(pattern=NAME, json_schema_extra={"allowed": NAME_WORDS})] = "digits"
    """Names the run: its folder, its Ray namespace, its wandb run."""
    run_dir: str = ""
    """Folder of everything that a run writes; set by ``conf/config.yaml``. Every host must see it."""
    resume: str = "no"
    """``no``, ``auto`` (the newest complete checkpoint in ``run_dir``, else of the runs of this ``name`` whose folders
    lie beside it; a fresh run if there is none) or the path of a checkpoint folder. A resumed run goes on in its old
    ``run_dir``, with the data and models that it began with; it says what else has changed."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    digits: DigitsConfig = DigitsConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    buffer: BufferConfig = BufferConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    learner: LearnerConfig = LearnerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    hallucination: HallucinationConfig = HallucinationConfig()
    filter: FilterConfig = FilterConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    controller: ControllerConfig = ControllerConfig()
    cluster: ClusterConfig = ClusterConfig()
    monitoring: MonitoringConfig = MonitoringConfig()


@functools.cache
def all_settings() -> dict[str, Setting]:
    """Every setting by its key."""
    return {setting.key: setting for setting in settings_of(Config())}


def checked(data: dict[str, Any], with_learner: bool = True, with_files: bool = True) -> Config:
    """The configuration of these values; what they leave out has its default.

    Args:
        data: nested dictionaries, as YAML has them.
        with_learner: False if no learner will start, whose device and type do not matter then.
        with_files: False if models and data need not be there yet.

    Raises:
        ConfigError: naming every unknown key, every value out of range and every impossible combination, one a line.
    """
    wrong: dict[str, str] = {}
    defaults = Config().model_dump()
    try:
        cfg = Config.model_validate(_merged(defaults, data, wrong))
    except ValidationError as error:
        wrong = field_problems(error, data, all_settings())
        cfg = Config.model_validate(_merged(defaults, data, wrong))  # to see what else is wrong
    values, found = cfg.model_dump(), list(wrong.values())
    groups = (
        *(
            system_problems(cfg, with_learner, with_files),
            reward_problems(cfg),
            buffer_problems(cfg),
            algorithm_problems(cfg),
        ),
        *(digits_problems(cfg), evaluate_problems(cfg)),
    )
    for keys, sentence in chain(*groups):
        if not wrong.keys() & set(keys.split()):
            given = " with ".join(f"{key}={shown(value_at(values, key))}" for key in keys.split())
            found.append(f"{given}: {sentence}")
    if found:
        raise ConfigError("\n".join(found))
    return cfg


def validate(cfg: Config, with_learner: bool = True) -> None:
    """As :func:`checked`, for a configuration that was changed in the program."""
    checked(cfg.model_dump(), with_learner)


def _merged(
    defaults: dict[str, Any], data: dict[str, Any], left_out: Collection[str], prefix: str = ""
) -> dict[str, Any]:
    """``defaults`` with the values of ``data`` in their place, but for some dotted keys. A group is not replaced as a
    whole: two thresholds of one class have defaults of their own."""
    merged = dict(defaults)
    for name, value in data.items():
        key, default = f"{prefix}{name}", defaults.get(name)
        both = isinstance(value, dict) and isinstance(default, dict)
        if key not in left_out:
            merged[name] = _merged(default or {}, value, left_out, f"{key}.") if both else value
    return merged
