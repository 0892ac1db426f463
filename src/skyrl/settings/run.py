"""Settings of a run: its length, evaluation, checkpoints, cluster, monitoring; and the whole configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from skyrl.settings.algorithm import AlgorithmConfig, BufferConfig
from skyrl.settings.system import DataConfig, LearnerConfig, ModelConfig, RewardConfig, RolloutConfig


class WandbMode(Enum):
    auto = "auto"
    """Online when logged in, else offline."""
    online = "online"
    offline = "offline"
    off = "off"


@dataclass
class EvaluationConfig:
    every: int = 10
    """Steps between evaluations; there is always one before the first step and one after the last.
    0 leaves only those two."""
    gallery: int = 12
    """Scenes shown in the report, before and after."""


@dataclass
class HallucinationConfig:
    """Monitors of visual hallucination; docs/hallucination.md describes each."""

    probe_prompts: int = 64
    """Most evaluation prompts that the image-blind and the masked-picture probe look at, at each evaluation. The first
    takes so many prompts and passes over those without a picture, the second takes so many with one. Bounds their cost,
    which ``eval/probe_seconds`` shows; 0 turns them off."""
    mask_share: float = 0.6
    """Share of a picture's patches that the masked-picture probe blackens."""
    mask_patch: int = 14
    """Side of such a patch, pixels."""
    gate_score: float = 0.0
    """The reward-model gate reports answers that are right by the rule and scored below this (raw units), unless
    ``algorithm.gate.kind=fixed`` sets another."""
    phrases: list[str] = field(
        default_factory=lambda: [
            r"\b(?:can(?:no|')?t|unable to|not able to) (?:see|view|access) (?:the |any |an )?(?:image|picture|photo)",
            r"\bno (?:image|picture|photo) (?:is |was )?(?:provided|attached|given|visible)",
        ]
    )
    """Regular expressions (case ignored) of answers that deny seeing a picture that was there."""


@dataclass
class FilterConfig:
    """``python -m skyrl.filter_prompts``: the offline pass of the Selective Sample Buffer."""

    output: str = "pool.parquet"
    """File written: one row a prompt, with its pass rate."""
    rows: int | None = None
    """First rows of the training data that are rolled out; null means all."""


@dataclass
class CheckpointConfig:
    every: int = 20
    """Steps between checkpoints; 0 writes none but the final one."""
    keep: int = 2
    """Complete checkpoints kept, the newest ones."""
    export: bool = True
    """Write the final policy as a Hugging Face folder."""


@dataclass
class ControllerConfig:
    steps: int = 40
    """Length of the run."""
    seed: int = 0
    """Seed of sampling and replay. The order of prompts follows ``data.seed``, embedded models ``model.seed``; with the
    same seeds and settings a run repeats."""
    timeout: float = 1800.0
    """Seconds after which a phase that does not end is an error."""


@dataclass
class ClusterConfig:
    address: str | None = None
    """Ray cluster to join; null means ``$RAY_ADDRESS``, and if that is unset a local Ray."""
    num_cpus: int | None = None
    """CPUs of a local Ray; null means all cores."""
    dashboard: bool = True
    """Start the Ray dashboard with a local Ray."""
    dashboard_port: int = 8265
    """Its port; the next free one is taken."""
    spread: bool = True
    """Place the workers of one kind on different nodes where possible."""


@dataclass
class MonitoringConfig:
    console: bool = True
    """Live table in a terminal; plain lines otherwise."""
    wandb: WandbMode = WandbMode.auto
    """Weights & Biases."""
    wandb_project: str = "skyrl"
    """Its project."""
    ray_metrics: bool = True
    """Gauges for the Ray dashboard and Prometheus."""


@dataclass
class Config:
    name: str = "digits"
    """Names the run: its folder, its Ray namespace, its wandb run."""
    run_dir: str = ""
    """Folder of everything that a run writes; set by ``conf/config.yaml``. Every host must see it."""
    resume: str = "no"
    """``no``, ``auto`` (the newest complete checkpoint in ``run_dir``, else of the runs of this ``name`` whose folders
    lie beside it; a fresh run if there is none) or the path of a checkpoint folder. A resumed run goes on in its old
    ``run_dir``, with the data and models that it began with; it says what else has changed."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    buffer: BufferConfig = field(default_factory=BufferConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    hallucination: HallucinationConfig = field(default_factory=HallucinationConfig)
    filter: FilterConfig = field(default_factory=FilterConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    controller: ControllerConfig = field(default_factory=ControllerConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    monitoring: MonitoringConfig = field(default_factory=MonitoringConfig)
